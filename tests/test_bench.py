"""``python -m adamax_jax bench``: the command, and the facts that can be counted.

No test looks at a clock: that is for the command, on a quiet machine.
"""

import collections
import functools
import json
import math
import re
import weakref

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from sequences import STORAGES
from tables import squeezed
from versions import AS_USERS_DO, needs_new_xla

from adamax_jax import adam, adamax, master_weights
from adamax_jax.__main__ import main
from adamax_jax._lab import bench, shapes

LEAF = 1000
# The array of which the temporary memory is looked at, and the bytes that scalars take.
LARGE, SCALARS = 100_000, 1000
# What is copied of a leaf, which XLA then updates in place: u in one byte, since the
# kernel of m reads the old and the new one. The others need each number once.
COPIES = {"own": 0, "bfloat16": 0, "two bytes": 1}

every_storage = pytest.mark.parametrize("storage", STORAGES)
bounded_or_not = pytest.mark.parametrize("max_growth", [None, 1.1])


@pytest.fixture(autouse=True)
def lenient():
    """Optax mixes integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


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
@bounded_or_not
@every_storage
def test_a_step_is_three_kernels_a_leaf(storage, max_growth):
    """m, u and the parameters: none computes what another has stored."""
    leaves = 20
    optimizer = adamax(0.1, max_growth=max_growth, **STORAGES[storage])
    ours = compiled(optimizer, shapes.many(leaves, LEAF))
    _, entry = ours.as_text().split("ENTRY")
    kernels = re.findall(rf"^ .* = \w+\[{LEAF}\]\S* ([\w-]+)\(", entry, re.MULTILINE)
    found = collections.Counter(kernels)
    # The gradients, and what is donated: the parameters, m and u.
    assert found.pop("parameter") == 4 * leaves
    copies = {"copy": COPIES[storage] * leaves} if COPIES[storage] else {}
    assert found == {"fusion": 3 * leaves} | copies


@needs_new_xla
@every_storage
def test_a_step_of_adam_is_three_kernels_too(storage):
    """u in a byte is read by two of them, and not written out for it."""
    module = compiled(adam(0.1, **STORAGES[storage]), {"array": (LARGE,)})
    _, entry = module.as_text().split("ENTRY")
    kernels = re.findall(rf"^ .* = \w+\[{LARGE}\]\S* ([\w-]+)\(", entry, re.MULTILINE)
    assert kernels.count("fusion") == 3
    found = module.memory_analysis().temp_size_in_bytes
    assert found <= COPIES[storage] * LARGE + SCALARS


@needs_new_xla
@bounded_or_not
def test_a_shared_maximum_is_a_kernel_of_its_own(max_growth):
    """The eps that is added to it and the decay of u are not in that kernel."""
    optimizer = adamax(0.1, max_growth=max_growth, m_dtype="int8", shared_axes=-1)
    module = compiled(optimizer, {"array": (8192, 1024)}).as_text()
    (kernel,) = (k for k in module.split("\n\n") if re.search(r"= \S+ reduce\(", k))
    assert not re.search(r"= \S+ (add|multiply)\(", kernel)


def temporary_bytes(*args):
    return compiled(*args).memory_analysis().temp_size_in_bytes


@needs_new_xla
@bounded_or_not
@every_storage
def test_temporary_memory(storage, max_growth):
    """None, as in Optax, or one byte."""
    optimizer = adamax(0.1, max_growth=max_growth, **STORAGES[storage])
    found = temporary_bytes(optimizer, {"array": (LARGE,)})
    assert found <= COPIES[storage] * LARGE + SCALARS


@needs_new_xla
@bounded_or_not
def test_one_byte_needs_no_temporary_memory(max_growth):
    """But for the vectors of the rows."""
    optimizer = adamax(0.1, max_growth=max_growth, m_dtype="int8", shared_axes=-1)
    found = temporary_bytes(optimizer, {"array": (LARGE // 1000, 1000)})
    assert found <= 4 * 2 * LARGE // 1000 + SCALARS


@needs_new_xla
@pytest.mark.parametrize("residual_dtype", ["int16", "int8"])
def test_temporary_memory_of_master_weights(residual_dtype):
    """Copies of the old parameters and of u."""
    two_bytes = adamax(0.1, **STORAGES["two bytes"])
    found = temporary_bytes(
        master_weights(two_bytes, residual_dtype), {"array": (LARGE,)}, jnp.bfloat16
    )
    assert found <= (2 + 1) * LARGE + SCALARS


@every_storage
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


def test_shapes_are_those_of_the_models():
    def count(arrays):
        return len(arrays), sum(math.prod(shape) for shape in arrays.values())

    # GPT-2, whose smallest has 124,439,808.
    gpt2 = shapes.transformer(layers=12, width=768, vocabulary=50_257)
    assert count(gpt2) == (148, 124_439_808)
    # As in its weights.
    assert count(shapes.llama2()) == (291, 6_738_415_616)
    assert count(shapes.llama2_70b()) == (723, 68_976_648_192)
    assert count(shapes.transformer()) == (100, 34_132_992)
    assert count(shapes.many()) == (100, 100_000)
    assert shapes.matrix(16_000) == (16, 1000) and shapes.matrix(10) == (10,)


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


def test_compiling_begins_with_empty_caches(monkeypatch):
    cleared = []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(0))
    optimizer = bench.OPTIMIZERS[bench.REFERENCE]
    for end in (bench.TRACE, bench.COMPILE):
        assert bench._compile(optimizer, {"array": jnp.ones(3)}, end)() > 0
    assert len(cleared) == 2


def test_one_contender_is_held_at_a_time_and_none_stops_the_others(
    at_once, monkeypatch, capsys
):
    class Run(bench.CopyRun):
        pass

    made = []

    def make(gradients):
        # Beside the reference, which was made first.
        assert sum(run() is not None for run in made) <= 1
        run = Run(gradients)
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
    for name, parameter, state in [
        ("optax.adamax", 4, 8),
        ("optax.adam", 4, 8),
        ("adamax float32", 4, 8),
        ("adamax bfloat16/bfloat16", 4, 4),
        ("adamax int8/uint8", 4, 2),
        ("adamax int8 and shared u", 4, 1.004),
        ("adamax int8/uint8, bounded growth", 4, 2),
        ("adam int8/bfloat16", 4, 3),
        ("adam int8/uint8", 4, 2),
        ("adamax float32, flattened", 4, 8),
        ("bfloat16: optax.adamax", 2, 4),
        ("bfloat16: optax.adam and a float32 copy", 2, 12),
        ("bfloat16: adamax float32 and int16", 2, 10),
        ("bfloat16: adamax int8/uint8 and int16", 2, 4),
        ("bfloat16: adamax int8/uint8 and int8", 2, 3),
    ]:
        row = rows[name]
        assert row.state_bytes_per_parameter == almost(state)
        # The gradient once, the parameter and the state twice.
        assert row.moved_bytes_per_parameter == almost(3 * parameter + 2 * state)
        assert row.milliseconds.low <= row.milliseconds.median <= row.milliseconds.high
    assert rows["copy"].moved_bytes_per_parameter == 8


def test_every_contender_takes_the_steps_of_its_optimizer():
    """Two, with a second gradient that tells the optimizers apart."""
    first = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([3.0])}
    second = jax.tree.map(lambda g: g / 8, first)

    @functools.cache
    def moved(make_optimizer):
        optimizer = make_optimizer(bench.LEARNING_RATE)

        @jax.jit
        def two_steps(params):
            state = optimizer.init(params)
            for g in (first, second):
                updates, state = optimizer.update(g, state, params)
                params = optax.apply_updates(params, updates)
            return jax.tree.map(lambda p: p - 1, params)

        return two_steps(jax.tree.map(jnp.ones_like, first))

    bounded = functools.partial(adamax, b2=0.99, max_growth=2)
    adams = [
        name for name in bench.OPTIMIZERS if name.startswith(("adam ", "optax.adam"))
    ]
    adams.remove("optax.adamax")
    # What a contender should be, where it is not AdaMax.
    others = dict.fromkeys(
        ("optax.adam", "adam float32", "adam int8/uint8"), optax.adam
    )
    # 1 was added and subtracted; a uint8 u is known to a ninth of itself, an int8 m to
    # 4 to 6 %, or 12 % where it is small beside u, as in Adam.
    float32_error, errors = (
        1e-3,
        {"bfloat16": 0.01, "uint8": 0.2, "int8": 0.07, "adam int8": 0.12},
    )
    for name in bench.OPTIMIZERS:
        run = bench.contenders()[name](first)
        run()
        run._gradients = second
        run()
        error = max([e for n, e in errors.items() if n in name], default=float32_error)
        adamaxs = bounded if "bounded" in name else optax.adamax
        # A new contender that is neither belongs into `others`.
        chex.assert_trees_all_close(
            jax.tree.map(lambda p: p - 1, run._params),
            moved(others.get(name, adamaxs)),
            rtol=error,
        )


def test_command(at_once, monkeypatch, tmp_path, capsys):
    """With few contenders, on small arrays."""
    few = {name: bench.OPTIMIZERS[name] for name in (bench.REFERENCE, "adamax float32")}
    monkeypatch.setattr(bench, "OPTIMIZERS", few)
    monkeypatch.setattr(bench, "CALLED", tuple(few))
    monkeypatch.setattr(bench, "HALF", {})
    monkeypatch.setattr(bench, "SIZES", (10, 100))
    trees = {bench.MANY: shapes.many(3, 10), "large": shapes.many(2, 100)}
    monkeypatch.setattr(bench, "TREES", trees)
    path, figure = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["bench", "--max-size", "20", "--repetitions", "2"]
    assert main([*arguments, "--json", str(path), "--figure", str(figure)]) == 0
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
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_contenders_of_the_figure():
    """At most five, each with a colour of its own."""
    assert set(bench.COLORS) | set(bench.CALLED) <= set(bench.OPTIMIZERS)
    assert len(set(bench.COLORS.values())) == len(bench.COLORS) <= 5
