"""``python -m adamax_jax bench``: the command, and the facts that can be counted.

No test looks at a clock: that is for the command, on a quiet machine.
"""

import collections
import functools
import json
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import ONE_BYTE, STORAGES, TWO_BYTES
from tables import squeezed
from versions import AS_USERS_DO, needs_new_xla

from adamax_jax import adam, adamax, master_weights
from adamax_jax.__main__ import main
from adamax_jax._lab import bench, shapes

LEAF = 1000
# The array of which the temporary memory is looked at, and the bytes that scalars take.
LARGE, SCALARS = 100_000, 1000


@pytest.fixture(autouse=True)
def use_lenient(lenient):
    """Optax mixes integers and floats."""


def compiled(optimizer, arrays, dtype=jnp.float32):
    gradients = bench.gradients_for(arrays)
    gradients = jax.tree.map(lambda g: g.astype(dtype), gradients)
    state = optimizer.init(gradients)
    step = jax.jit(bench.optax_step(optimizer), donate_argnums=(0, 1))
    return step.lower(gradients, state, gradients).compile(AS_USERS_DO)


def operations(executable, result=r"(?:\(.*?\)|\S+)"):
    """How many of each operation there are, in the fusions and between them."""
    pattern = rf"^ .* = {result} ([\w-]+)\("
    return collections.Counter(re.findall(pattern, executable.as_text(), re.MULTILINE))


def array_operations(executable):
    """Of these, the ones that make arrays."""
    return operations(executable, rf"\w+\[{LEAF}\]\S*")


@pytest.mark.parametrize("leaves", [1, 20])
def test_a_float32_step_has_the_operations_of_optax(leaves):
    """On arrays, one for one; scalars of the bias correction are computed otherwise."""
    arrays = shapes.many(leaves, LEAF)
    ours = compiled(adamax(0.1), arrays)
    theirs = compiled(optax.adamax(0.1), arrays)
    expected = array_operations(theirs)
    assert expected["fusion"] == 3 * leaves
    assert expected["maximum"] == expected["divide"] == leaves
    assert array_operations(ours) == expected
    scalars = operations(ours) - operations(theirs)
    # And u_scale is one more. None of this is done for every leaf.
    assert all(count == 1 for count in scalars.values())


def test_only_an_eps_that_may_be_zero_is_tested_for_0_by_0():
    def compares(eps):
        return operations(compiled(adamax(0.1, eps=eps), {"array": (LEAF,)}))["compare"]

    positive = compares(1e-8)
    # Subnormal numbers may count as 0, and an array is not looked into.
    assert compares(0.0) == compares(1e-45) == compares(jnp.float32(1e-8))
    assert compares(0.0) > positive


@needs_new_xla
@pytest.mark.parametrize(
    "make",
    [adamax, functools.partial(adamax, max_growth=1.1), adam],
    ids=["adamax", "bounded", "adam"],
)
@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_is_three_kernels_a_leaf(storage, make):
    """m, u and the parameters: none computes what another has stored."""
    leaves = 3
    # u in one byte: the kernel of m reads the old and the new one.
    copies = leaves if storage == "two bytes" else 0
    optimizer = make(0.1, **STORAGES[storage])
    step = compiled(optimizer, shapes.many(leaves, LARGE))
    _, entry = step.as_text().split("ENTRY")
    found = collections.Counter(
        re.findall(rf"^ .* = \w+\[{LARGE}\]\S* ([\w-]+)\(", entry, re.MULTILINE)
    )
    assert found["fusion"] == 3 * leaves
    # The gradients, and what is donated: the parameters, m and u.
    assert found["parameter"] == 4 * leaves
    if make is not adam:
        assert found["copy"] == copies and found.total() == 7 * leaves + copies
    temporary = step.memory_analysis().temp_size_in_bytes
    assert temporary <= copies * LARGE + SCALARS


@needs_new_xla
@pytest.mark.parametrize("max_growth", [None, 1.1])
def test_a_shared_maximum_is_a_kernel_of_its_own(max_growth):
    """The eps that is added to it and the decay of u are not in that kernel."""
    optimizer = adamax(0.1, max_growth=max_growth, **ONE_BYTE)
    rows = 8192
    step = compiled(optimizer, {"array": (rows, 1024)})
    kernels = step.as_text().split("\n\n")
    (kernel,) = (k for k in kernels if re.search(r"= \S+ reduce\(", k))
    assert not re.search(r"= \S+ (add|multiply)\(", kernel)
    # No temporary memory but for the vectors of the rows.
    assert step.memory_analysis().temp_size_in_bytes <= 4 * 2 * rows + SCALARS


@needs_new_xla
@pytest.mark.parametrize("residual_dtype", ["int16", "int8"])
def test_temporary_memory_of_master_weights(residual_dtype):
    """Copies of the old parameters and of u."""
    optimizer = master_weights(adamax(0.1, **TWO_BYTES), residual_dtype)
    step = compiled(optimizer, {"array": (LARGE,)}, jnp.bfloat16)
    assert step.memory_analysis().temp_size_in_bytes <= (2 + 1) * LARGE + SCALARS


@pytest.mark.parametrize("storage", STORAGES)
def test_leaves_of_one_shape_are_traced_once(storage):
    leaves = 50
    optimizer = adamax(0.1, **STORAGES[storage])
    gradients = bench.gradients_for(shapes.many(leaves, 10))
    jaxpr = jax.make_jaxpr(optimizer.update)(gradients, optimizer.init(gradients))
    calls = collections.Counter(
        (equation.params["name"], id(equation.params["jaxpr"]))
        for equation in jaxpr.eqns
        if "jaxpr" in equation.params
    )
    for name in ("update_leaf", "_multiply"):
        assert [n for (called, _), n in calls.items() if called == name] == [leaves]


def test_the_transformer_is_gpt_2():
    gpt2 = shapes.transformer(layers=12, width=768, vocabulary=50_257)
    assert sum(np.prod(shape) for shape in gpt2.values()) == 124_439_808
    assert len(shapes.transformer()) == 100


def test_two_take_turns_in_random_order():
    calls = []

    def measure(name, seconds):
        calls.append(name)
        return seconds

    rounds = 30
    pairs = bench.take_turns(
        lambda: measure("own", 2.0), lambda: measure("reference", 1.0), rounds
    )
    assert pairs == [(2.0, 1.0)] * rounds
    turns = list(zip(calls[::2], calls[1::2], strict=True))
    assert len(turns) == bench.WARM_UP + rounds
    assert set(turns) == {("own", "reference"), ("reference", "own")}


def test_a_call_is_timed_after_others(monkeypatch):
    clock = iter([0.0, bench.SETTLE / 2, bench.SETTLE, 7.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    calls = []
    assert bench.settled(lambda: calls.append(0))() == 7.0 - bench.SETTLE
    assert len(calls) == 3


@pytest.fixture
def at_once(monkeypatch):
    """One call to settle."""
    monkeypatch.setattr(bench, "SETTLE", 1e-9)


@pytest.mark.parametrize("name", ["adamax int8/uint8", "bfloat16: optax.adamax"])
def test_a_step_is_donated_and_waited_for(name, monkeypatch):
    run = bench.contenders()[name](bench.gradients_for({"array": (LEAF,)}))
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    for _ in range(2):
        before = jax.tree.leaves((run._params, run._state))
        run()
        assert all(x.is_deleted() for x in before)
    assert jax.tree.leaves(waited[-1]) == jax.tree.leaves((run._params, run._state))


@pytest.mark.parametrize("time_of", [bench.TRACE, bench.COMPILE])
def test_compiling_begins_with_empty_caches(time_of, monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(0))
    optimizer = bench.OPTIMIZERS[bench.REFERENCE]
    measure = bench._call(time_of, optimizer, {"array": jnp.ones(3)})
    assert measure() > 0 and measure() > 0
    assert len(cleared) == 2


def test_one_contender_is_held_at_a_time_and_none_stops_the_others(
    at_once, monkeypatch, capsys
):
    class Run:
        state_bytes = temporary_bytes = 0

        def __call__(self):
            pass

    made = []

    def make(gradients):
        # Beside the reference, which was made first.
        assert sum(run() is not None for run in made) <= 1
        run = Run()
        made.append(weakref.ref(run))
        return run

    def fail(gradients):
        raise MemoryError("no room")

    makers = {bench.REFERENCE: make, "broken": fail, "a": make, "b": make}
    monkeypatch.setattr(bench, "contenders", lambda: makers)
    rows = list(bench.step_rows("one", {"array": (10,)}, rounds=1))
    assert [row.contender for row in rows] == [bench.REFERENCE, "a", "b"]
    assert "left out: broken: no room" in capsys.readouterr().err
    # Nothing can be said without the one that the others are compared to.
    makers[bench.REFERENCE] = fail
    with pytest.raises(MemoryError, match="no room"):
        list(bench.step_rows("one", {"array": (10,)}, rounds=1))


def test_bytes_are_counted(at_once):
    rows = {
        row.contender: row
        for row in bench.step_rows("one", {"array": (100, 1000)}, rounds=1)
    }
    # The scalars of the state are the rest.
    almost = functools.partial(pytest.approx, abs=1e-3)
    for name, state in [
        ("optax.adamax", 8),
        ("optax.adam", 8),
        ("adamax float32", 8),
        ("adamax bfloat16/bfloat16", 4),
        ("adamax int8/uint8", 2),
        ("adamax int8 and shared u", 1.004),
        ("adamax int8/uint8, bounded growth", 2),
        ("adam int8/bfloat16", 3),
        ("adam int8/uint8", 2),
        ("adamax float32, flattened", 8),
        ("bfloat16: optax.adamax", 4),
        ("bfloat16: optax.adam and a float32 copy", 12),
        ("bfloat16: adamax float32 and int16", 10),
        ("bfloat16: adamax int8/uint8 and int16", 4),
        ("bfloat16: adamax int8/uint8 and int8", 3),
    ]:
        row = rows[name]
        assert row.state_bytes / row.parameters == almost(state)
        median, low, high = row.milliseconds
        assert low <= median <= high


def test_every_contender_takes_the_steps_of_its_optimizer():
    """With gradients that grow and shrink, which tells the optimizers apart."""
    gradients = [{"a": n * jnp.array([1.0, -2.0, 3.0])} for n in (1, 64, 1, 1, 1)]

    def moved(run):
        for run._gradients in gradients:
            run()
        return run._params["a"] - 1

    references = {
        "adam": optax.adam(bench.LEARNING_RATE),
        "adamax": optax.adamax(bench.LEARNING_RATE),
        "bounded growth": adamax(bench.LEARNING_RATE, b2=0.99, max_growth=2),
    }
    expected = {
        name: moved(bench._optax_run(optimizer, gradients[0]))
        for name, optimizer in references.items()
    }
    # 1 was added and subtracted; a uint8 u is known to a ninth of itself, an int8 m to
    # 4 to 6 %, or 12 % where it is small beside u, as in Adam.
    errors = {"bfloat16": 0.01, "uint8": 0.2, "int8": 0.12}
    for name in bench.OPTIMIZERS:
        if not (kind := re.match(r"(?:optax\.)?(adamax|adam)\b", name)):
            continue
        error = max([e for n, e in errors.items() if n in name], default=1e-3)
        ours = moved(bench.contenders()[name](gradients[0]))
        kind = "bounded growth" if "bounded growth" in name else kind[1]
        np.testing.assert_allclose(ours, expected[kind], rtol=error, err_msg=name)


def test_command(at_once, monkeypatch, tmp_path, capsys):
    """With few contenders, on small arrays."""
    few = {name: bench.OPTIMIZERS[name] for name in (bench.REFERENCE, "adamax float32")}
    monkeypatch.setattr(bench, "OPTIMIZERS", few)
    monkeypatch.setattr(bench, "CALLED", tuple(few))
    monkeypatch.setattr(bench, "HALF", {})
    monkeypatch.setattr(bench, "SIZES", (10, 100))
    trees = {bench.MANY: shapes.many(3, 10), "large": shapes.many(2, 100)}
    monkeypatch.setattr(bench, "TREES", trees)
    path = tmp_path / "bench.json"
    arguments = ["bench", "--max-size", "20", "--repetitions", "2"]
    assert main([*arguments, "--json", str(path)]) == 0
    printed, progress = map(squeezed, capsys.readouterr())
    first, *lines = progress.splitlines()
    assert first.startswith(f"{3 * len(bench.contenders()) + 3 * len(few)} rows, ")
    results = json.loads(path.read_text())
    assert results["rounds"] == 2
    assert results["versions"]["optax"] == optax.__version__
    assert results["command"].endswith("bench --max-size 20 --repetitions 2")
    rows = results["rows"]
    # What is larger is left out.
    assert list(dict.fromkeys((row["time_of"], row["parameters"]) for row in rows)) == [
        (bench.STEP, 10),
        (bench.STEP, 20),
        (bench.STEP, 30),
        (bench.EAGER, 30),
        (bench.TRACE, 30),
        (bench.COMPILE, 30),
    ]
    assert len(rows) == 3 * len(bench.contenders()) + 3 * len(few)
    for row, line in zip(rows, lines, strict=True):
        assert f"| {row['contender']} |" in printed
        assert line.endswith(f"{row['arrays']}, {row['time_of']}, {row['contender']}")
        assert row["milliseconds"][0] > 0
    assert lines[-1].startswith(f"{len(rows)}/{len(rows)} ")
    assert "Medians of 2 rounds" in printed
