"""``python -m adamax_jax bench``: the command, and the facts that can be counted.

No test looks at a clock: that is for the command, on a quiet machine.
"""

import collections
import functools
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

from adamax_jax import __main__, _bench, _shapes, adamax, lp_adam


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


def operations(executable, result=r"(?:\(.*?\)|\S+)"):
    """How many of each operation there are, in the fusions and between them."""
    pattern = rf"^ .* = {result} ([\w-]+)\("
    return collections.Counter(re.findall(pattern, executable.as_text(), re.MULTILINE))


def array_operations(executable, size=1000):
    """Of these, the ones that make arrays."""
    return operations(executable, rf"\w+\[{size}\]\S*")


@pytest.mark.parametrize("leaves", [1, 20])
def test_a_float32_step_has_the_operations_of_optax(leaves):
    """On arrays; the scalars of the bias correction are computed otherwise."""
    shapes = _shapes.many(leaves, 1000)
    ours = compiled(adamax(0.1), shapes)
    theirs = compiled(optax.adamax(0.1), shapes)
    expected = array_operations(theirs)
    assert expected["fusion"] == 3 * leaves
    assert expected["maximum"] == expected["divide"] == leaves
    assert array_operations(ours) == expected
    scalars = operations(ours) - operations(theirs)
    # And u_scale is one more. None of this is done for every leaf.
    assert all(count == 1 for count in scalars.values())


def test_only_an_eps_that_may_be_zero_is_tested_for_0_by_0():
    def compares(eps):
        return operations(compiled(adamax(0.1, eps=eps), {"array": (1000,)}))["compare"]

    positive = compares(1e-8)
    assert compares(0.0) == compares(1e-45) == compares(jnp.float32(1e-8))
    assert compares(0.0) > positive


@pytest.mark.parametrize("storage", list(STORAGES.values()), ids=list(STORAGES))
def test_a_step_is_three_kernels_a_leaf(storage):
    """m, u and the parameters; on a CPU, narrow m and u are copied before."""
    ours = compiled(adamax(0.1, **storage), _shapes.many(20, 1000))
    _, entry = ours.as_text().split("ENTRY")
    kernels = re.findall(r"^ .* = \w+\[1000\]\S* ([\w-]+)\(", entry, re.MULTILINE)
    found = collections.Counter(kernels)
    # The gradients, and what is donated.
    assert found.pop("parameter") == 20 * 4
    copies = {} if storage == {} else {"copy": 40}
    assert found == {"fusion": 60} | copies


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


def test_contenders_take_turns(monkeypatch):
    """In another order each round, each after a step of its own that is not timed."""
    monkeypatch.setattr(_bench, "SETTLE", 1e-9)
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = _bench.take_turns(runs, rounds=20)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(
        "abc", 20
    )
    assert calls[::2] == calls[1::2]
    timed = calls[1::2]
    rounds = ["".join(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert len(rounds) == _bench.WARM_UP + 20
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6


@pytest.mark.parametrize("name", _bench.OPTIMIZERS)
def test_a_step_is_donated_and_waited_for(name, monkeypatch):
    gradients = _bench.gradients_for({"array": (1000,)})
    run = _bench.contenders(flattened=False)[name](gradients)
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    for _ in range(2):
        before = jax.tree.leaves((run._params, run._state))
        run()
        assert all(x.is_deleted() for x in before)
    assert len(waited) == 2
    assert jax.tree.leaves(waited[-1]) == jax.tree.leaves((run._params, run._state))


def test_compiling_begins_with_empty_caches(monkeypatch, tmp_path):
    monkeypatch.setattr(_bench, "TREES", {_bench.MANY: _shapes.many(2, 10)})
    compiles = []
    cleared = []
    monkeypatch.setattr(_bench, "_compile", lambda *_: compiles.append(0) or (1.0, 2.0))
    rows = _bench.compile_rows(rounds=3)
    assert len(compiles) == 4 * len(_bench.OPTIMIZERS)
    assert {row.rounds for row in rows} == {3}
    assert {row.milliseconds.median for row in rows} == {1000, 2000}
    monkeypatch.undo()
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(0))
    optimizer = _bench.OPTIMIZERS["optax.adamax"]
    trace, compile = _bench._compile(optimizer, {"array": jnp.ones(3)})
    assert trace > 0 and compile > 0 and cleared == [0]


def test_a_contender_that_cannot_run_is_left_out(monkeypatch, capsys):
    def fail(gradients):
        raise MemoryError("no room")

    makers = {"copy": _bench.CopyRun, "broken": fail}
    monkeypatch.setattr(_bench, "contenders", lambda flattened: makers)
    gradients = _bench.gradients_for({"array": (10,)})
    assert list(_bench.make_runs(gradients, flattened=False)) == ["copy"]
    assert "left out: broken: no room" in capsys.readouterr().err


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
    assert rows["copy"].gigabytes_per_second > 0


def test_every_contender_takes_the_steps_of_its_optimizer():
    """Two, with a second gradient that tells Adam and AdaMax apart."""
    gradients = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    others = {
        "optax.adam": optax.adam,
        "lp_adam p=3": functools.partial(lp_adam, p=3),
    }
    for name, make in _bench.contenders(flattened=True).items():
        run = make(gradients)
        if not name.startswith(("adamax", "optax", "lp_adam")):
            run()
            continue
        run()
        run._gradients = jax.tree.map(lambda g: g / 8, gradients)
        run()
        make_optimizer = others.get(name, optax.adamax)
        optimizer = make_optimizer(_bench.LEARNING_RATE)
        params = jax.tree.map(jnp.ones_like, gradients)
        state = optimizer.init(params)
        for g in (gradients, run._gradients):
            updates, state = optimizer.update(g, state, params)
            params = optax.apply_updates(params, updates)
        moved, expected = (
            jax.tree.map(lambda p: p - 1, tree) for tree in (run._params, params)
        )
        # A uint8 u is known to a ninth of itself.
        chex.assert_trees_all_close(moved, expected, rtol=0.13)


@pytest.fixture
def quick(monkeypatch):
    """Small arrays, and few of them."""
    monkeypatch.setattr(_bench, "SIZES", (10, 100))
    monkeypatch.setattr(_bench, "SETTLE", 1e-9)
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
    again = [row for row in steps if row["contender"] == "optax.adamax, again"]
    assert len(again) == 3
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_figure_and_json_need_a_folder(tmp_path, capsys):
    arguments = ["bench", "--json", str(tmp_path / "missing" / "bench.json")]
    assert __main__.main(arguments) == 1
    assert "no folder" in capsys.readouterr().err


def test_figure_of_an_unknown_kind(tmp_path, capsys):
    assert __main__.main(["bench", "--figure", str(tmp_path / "bench.xyz")]) == 1
    assert ".pdf or .png or .svg" in capsys.readouterr().err


def test_an_error_keeps_what_was_measured(quick, monkeypatch, capsys):
    def fail(rounds):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(_bench, "uncompiled_rows", fail)
    with pytest.raises(RuntimeError):
        __main__.main(["bench", "--max-size", "10", "--repetitions", "1"])
    assert "| optax.adamax |" in capsys.readouterr().out


def test_small_arrays_alone(quick, capsys):
    assert __main__.main(["bench", "--max-size", "9", "--repetitions", "1"]) == 0
    printed = capsys.readouterr().out
    assert "| one of 9 |" in printed
    assert "compile |" not in printed


def test_interrupt_keeps_what_was_measured(quick, tmp_path, monkeypatch, capsys):
    def interrupted(rounds):
        raise KeyboardInterrupt

    monkeypatch.setattr(_bench, "uncompiled_rows", interrupted)
    path = tmp_path / "bench.json"
    arguments = ["bench", "--max-size", "10", "--repetitions", "1", "--json", str(path)]
    assert __main__.main(arguments) == 130
    assert len(json.loads(path.read_text())["rows"]) >= 6
    assert "| optax.adamax |" in capsys.readouterr().out
