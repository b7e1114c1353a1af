"""``python -m adamax_jax bench``: the command, and the facts that can be counted.

No test looks at a clock: that is for the command, on a quiet machine.
"""

import collections
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from sequences import STORAGES

from adamax_jax import __main__, _bench, _shapes, adamax


@pytest.fixture(autouse=True)
def lenient():
    """Optax mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def compiled(optimizer, shapes):
    gradients = _bench.gradients_for(shapes)
    state = optimizer.init(gradients)
    step = jax.jit(_bench.optax_step(optimizer), donate_argnums=(0, 1))
    return step.lower(gradients, state, gradients).compile()


def operations(executable):
    """How many of each operation there are, in the fusions and between them."""
    names = re.findall(r"^ .* = \S+ ([\w-]+)\(", executable.as_text(), re.MULTILINE)
    return collections.Counter(names)


@pytest.mark.parametrize("leaves", [1, 20])
def test_a_float32_step_has_the_operations_of_optax(leaves):
    """But for the bias correction, computed once: a power there, expm1 here."""
    shapes = _shapes.many(leaves, 1000)
    ours = operations(compiled(adamax(0.1), shapes))
    theirs = operations(compiled(optax.adamax(0.1), shapes))
    assert theirs["fusion"] == 3 * leaves + 2
    extra = ours - theirs
    # And u_scale is one array more. None of this is done for every leaf.
    assert set(extra) <= {
        "exponential-minus-one",
        "negate",
        "multiply",
        "divide",
        "parameter",
        "copy",
    }
    assert all(count == 1 for count in extra.values())


def test_only_an_eps_that_may_be_zero_is_tested_for_0_by_0():
    def compares(eps):
        return operations(compiled(adamax(0.1, eps=eps), {"array": (1000,)}))["compare"]

    positive = compares(1e-8)
    assert compares(0.0) == compares(1e-45) == compares(jnp.float32(1e-8))
    assert compares(0.0) > positive


@pytest.mark.parametrize("storage", list(STORAGES.values()), ids=list(STORAGES))
def test_a_step_is_three_kernels_a_leaf(storage):
    """m, u and the parameters: nothing else is written in between."""
    ours = operations(compiled(adamax(0.1, **storage), _shapes.many(20, 1000)))
    # And two to four for the scalars.
    assert 60 < ours["fusion"] <= 64


@pytest.mark.parametrize("storage", list(STORAGES.values()), ids=list(STORAGES))
def test_temporary_memory(storage):
    """In float32 none, as in Optax; else at most the state itself, once more."""
    size = 100_000
    executable = compiled(adamax(0.1, **storage), {"array": (size,)})
    temporary = executable.memory_analysis().temp_size_in_bytes
    state = {"own": 0, "bfloat16": 4, "two bytes": 2}
    (name,) = (name for name, value in STORAGES.items() if value == storage)
    assert temporary <= state[name] * size + 1000


def test_region_analysis_saves_the_temporary_memory():
    """What the README advises for narrow states on a CPU."""
    program = (
        "import test_bench as t\n"
        "for storage in t.STORAGES.values():\n"
        "    step = t.compiled(t.adamax(0.1, **storage), {'array': (100_000,)})\n"
        "    assert step.memory_analysis().temp_size_in_bytes < 1000, storage\n"
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_copy_insertion_use_region_analysis=true",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize("storage", list(STORAGES.values()), ids=list(STORAGES))
def test_leaves_of_one_shape_are_traced_once(storage):
    optimizer = adamax(0.1, **storage)
    gradients = _bench.gradients_for(_shapes.many(50, 10))
    jaxpr = jax.make_jaxpr(optimizer.update)(gradients, optimizer.init(gradients))
    calls = collections.Counter(
        (equation.params["name"], id(equation.params["jaxpr"]))
        for equation in jaxpr.eqns
        if "jaxpr" in equation.params
    )
    for name in ("_update_leaf", "_multiply"):
        assert [n for (called, _), n in calls.items() if called == name] == [50]


def test_shapes_are_those_of_the_models():
    def count(shapes):
        return len(shapes), sum(math.prod(shape) for shape in shapes.values())

    # torchvision.models.resnet50 has as many.
    assert count(_shapes.resnet50()) == (161, 25_557_032)
    # GPT-2, whose smallest has 124,439,808.
    gpt2 = _shapes.transformer(layers=12, width=768, vocabulary=50_257)
    assert count(gpt2) == (148, 124_439_808)
    assert count(_shapes.transformer()) == (100, 34_132_992)
    assert count(_shapes.many()) == (1000, 1_000_000)


def test_contenders_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = _bench.take_turns(runs, rounds=4)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(
        "abc", 4
    )
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab", "abc"]


def test_bytes_are_counted():
    rows = {
        row.contender: row
        for row in _bench.step_rows("one", {"array": (100_000,)}, rounds=2)
    }
    for name, state in {
        "optax.adamax": 8,
        "optax.adam": 8,
        "adamax float32": 8,
        "adamax bfloat16/bfloat16": 4,
        "adamax int8/uint8": 2,
    }.items():
        row = rows[name]
        assert row.state_bytes_per_parameter == pytest.approx(state, abs=1e-3)
        # The gradient once, the parameter and the state twice.
        moved = 4 + 2 * (4 + state)
        assert row.moved_bytes_per_parameter == pytest.approx(moved, abs=1e-3)
        assert row.milliseconds.low <= row.milliseconds.median <= row.milliseconds.high
    assert rows["copy"].moved_bytes_per_parameter == 8
    assert rows["copy"].share_of_bandwidth == pytest.approx(1)
    assert rows["optax.adamax"].ratio == (1, 1, 1)


def test_every_contender_takes_the_step_of_its_optimizer():
    gradients = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    for name, make in _bench.contenders(flattened=True).items():
        run = make(gradients)
        run()
        if name.startswith(("adamax", "optax")):
            # The first step is the sign of the gradient, times the learning rate.
            moved = {key: 1 - value for key, value in run._params.items()}
            expected = jax.tree.map(lambda g: 1e-3 * jnp.sign(g), gradients)
            # A uint8 u is known to a ninth of itself.
            chex.assert_trees_all_close(moved, expected, rtol=0.13)


@pytest.fixture
def quick(monkeypatch):
    """Small arrays, and few of them."""
    monkeypatch.setattr(_bench, "SIZES", (10, 100))
    monkeypatch.setattr(_bench, "TREES", {_bench.MANY: _shapes.many(3, 10)})


def test_command(quick, tmp_path, capsys):
    path, figure = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["bench", "--max-size", "50", "--repetitions", "2"]
    arguments += ["--json", str(path), "--figure", str(figure)]
    assert __main__.main(arguments) == 0
    printed = capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["rounds"] == 2
    assert results["versions"]["optax"] == optax.__version__
    steps = [row for row in results["rows"] if "leaves" in row]
    assert {row["parameters"] for row in steps} == {10, 50, 30}
    assert any("flattened" in row["contender"] for row in steps)
    kinds = {row["what"] for row in results["rows"] if "what" in row}
    assert kinds == {"update, not compiled", "trace and lower", "compile"}
    for row in results["rows"]:
        assert f"| {row['contender']} |" in printed
        assert row["milliseconds"][0] > 0
    assert "Medians of 2 rounds" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_figure_and_json_need_a_folder(tmp_path, capsys):
    arguments = ["bench", "--json", str(tmp_path / "missing" / "bench.json")]
    assert __main__.main(arguments) == 1
    assert "no folder" in capsys.readouterr().err


def test_interrupt_keeps_what_was_measured(quick, tmp_path, monkeypatch, capsys):
    def interrupted(rounds):
        raise KeyboardInterrupt

    monkeypatch.setattr(_bench, "uncompiled_rows", interrupted)
    path = tmp_path / "bench.json"
    arguments = ["bench", "--max-size", "10", "--repetitions", "1", "--json", str(path)]
    assert __main__.main(arguments) == 130
    assert len(json.loads(path.read_text())["rows"]) >= 6
    assert "| optax.adamax |" in capsys.readouterr().out
