"""What a fault does: the tables of ``notebooks/faults.md``, each row of them a test.

``python tests/test_faults.py`` prints the tables of gradients anew.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sequences
from sequences import long_but
from versions import as_users_compile

from adamax_jax import (
    adamax,
    adamaxw,
    lp_adam,
    moments,
    scale_by_adamax,
    scale_by_lp_adam,
)

PAGE = Path(__file__).parents[1] / "notebooks" / "faults.md"

# By their names on the page.
STORAGES = {
    "float32": {},
    "bfloat16": sequences.STORAGES["bfloat16"],
    "int8, uint8": sequences.STORAGES["two bytes"],
    "int8, shared u": sequences.ONE_BYTE,
}
MEMORIES = {
    "As it comes": {},
    "With `b2=0.98, max_growth=2`": {"b2": 0.98, "max_growth": 2},
}
# By their names on the page; those of one name have the same steps.
GRADIENTS = {
    "0, 1e-42 or 1e-37": [0.0, 1e-42, 1e-37],  # the second is subnormal
    "1e+37 or 3.4e+38": [1e37, float(np.finfo(np.float32).max)],
    "infinity": [np.inf],
    "NaN": [np.nan],
}


def lengths(optimizer):
    """For each name of gradients three lengths of steps.

    All gradients of a coordinate are 1, but for the fourth: its steps there and ten
    steps later, and the last one of a coordinate beside it, in the same row.
    """
    fourth = jnp.concatenate([jnp.array(values) for values in GRADIENTS.values()])
    ones = jnp.ones([fourth.size, 2])
    faults = ones.at[:, 0].set(fourth)

    def step(state, t):
        updates, state = optimizer.update(jnp.where(t == 3, faults, ones), state)
        return state, updates

    _, steps = jax.lax.scan(step, optimizer.init(ones), jnp.arange(14))
    numbers = np.abs([steps[3, :, 0], steps[-1, :, 0], steps[-1, :, 1]]).T
    ends = np.cumsum([len(values) for values in GRADIENTS.values()])
    groups = np.split(numbers, ends[:-1])
    for group in groups:
        np.testing.assert_allclose(group, group[:1].repeat(len(group), 0), atol=0.011)
    return dict(zip(GRADIENTS, [group[0] for group in groups], strict=True))


def table(memory):
    found = {
        name: lengths(scale_by_adamax(**storage, **MEMORIES[memory]))
        for name, storage in STORAGES.items()
    }
    rows = [
        ["fourth gradient", "storage", "its step", "10 steps later", "its neighbour"],
        ["---", "---", "---:", "---:", "---:"],
    ]
    for gradient in GRADIENTS:
        for name, steps in found.items():
            rows.append([gradient, name, *(f"{x:.2f}" for x in steps[gradient])])
    return [f"| {' | '.join(row)} |" for row in rows]


@pytest.mark.parametrize("memory", MEMORIES)
def test_gradients(memory):
    """The page's table, but for the last digit, which may differ between compilers."""
    page = PAGE.read_text().splitlines()
    lines, start = table(memory), page.index(f"{memory}:") + 2
    number = r"nan|\d+\.\d\d"
    for line, other in zip(lines, page[start : start + len(lines)], strict=True):
        assert re.sub(number, "", line) == re.sub(number, "", other)
        numbers, others = (
            [float(x) for x in re.findall(number, text)] for text in (line, other)
        )
        np.testing.assert_allclose(numbers, others, atol=0.011)


def test_optax_does_the_same():
    with jax.numpy_dtype_promotion("standard"):
        theirs, ours = lengths(optax.scale_by_adamax()), lengths(scale_by_adamax())
    for gradient, steps in ours.items():
        np.testing.assert_allclose(steps, theirs[gradient], atol=1e-5)


def test_the_page_names_these_tests():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    here = {name for name in globals() if name.startswith("test_")}
    assert named == here - {"test_the_page_names_these_tests"}


FAMILY = [
    *(
        pytest.param(functools.partial(scale_by_adamax, **options), id=name)
        for name, options in STORAGES.items()
    ),
    *(
        pytest.param(functools.partial(scale_by_lp_adam, p), id=f"p={p}")
        for p in (2.0, jnp.inf)
    ),
]
every_optimizer = pytest.mark.parametrize("make", FAMILY)


@pytest.mark.parametrize("make", [FAMILY[0], FAMILY[3], FAMILY[-2]])
def test_the_count_stops_at_its_largest_number(make):
    """As in Optax, long after there is no bias to correct.

    It no longer says how to round a narrow m, which then stops short of its gradients.
    """
    optimizer = make()
    g = jnp.array([[1.0, -2.0, 2.0]])
    state, other = optimizer.init(g), optimizer.init(g)
    update, largest = jax.jit(optimizer.update), np.iinfo(np.int32).max
    for t in range(400):
        if t == 200:
            state = state._replace(count=jnp.int32(largest - 2))
        # The mean has to move after that.
        g_t = g if t < 300 else -g
        step, state = update(g_t, state)
        beside, other = update(g_t, other)
    assert int(state.count) == largest
    off = np.max(np.abs(step - beside))
    if jnp.int8 in [m.dtype for m in jax.tree.leaves(state.m)]:
        assert 0.1 < off < 0.4
    else:
        assert off < 0.005


# The largest deviations in a million steps: of u, of m relative to u, and of a step.
DRIFT = {
    "float32": (2e-5, 2e-7, 5e-6),
    "bfloat16": (2**-8, 0.01, 0.01),
    "int8, uint8": (1 / 9, 0.07, 0.1),
}


@pytest.mark.parametrize("name", long_but([], DRIFT))
def test_a_million_steps(name, x64):
    """Beside the paper's three lines in float64, in the same loop."""
    b1, b2, eps, size = 0.9, 0.999, 1e-8, 16
    optimizer = scale_by_adamax(b1, b2, eps, **STORAGES[name])
    units = 10.0 ** jnp.linspace(-3, 3, size)

    def step(carry, t):
        state, m, u, largest = carry
        key = jax.random.fold_in(jax.random.key(0), t)
        g = jnp.float32(jax.random.normal(key, [size]) * units)
        update, state = optimizer.update(g, state)
        m = b1 * m + (1 - b1) * g.astype(jnp.float64)
        u = jnp.maximum(b2 * u, jnp.abs(g.astype(jnp.float64)) + eps)
        exact = m / (1 - b1 ** t.astype(jnp.float64)) / u
        our_m, our_u = (x.astype(jnp.float64) for x in moments(state))
        off = our_u / u - 1, (our_m - m) / u, update.astype(jnp.float64) - exact
        off = jnp.stack([jnp.max(jnp.abs(x)) for x in off])
        return (state, m, u, jnp.maximum(largest, off)), None

    @as_users_compile
    def run():
        zeros = jnp.zeros(size, jnp.float64)
        state = optimizer.init(jnp.zeros(size, jnp.float32))
        first = state, zeros, zeros, jnp.zeros(3, jnp.float64)
        return jax.lax.scan(step, first, jnp.arange(1, 1_000_001))[0]

    state, *_, largest = run()
    assert int(state.count) == 1_000_000
    assert np.all(np.asarray(largest) <= np.array(DRIFT[name]) * 1.001), largest


@pytest.mark.parametrize("make", [adamax, functools.partial(lp_adam, p=3.0)])
def test_learning_rates(make):
    params = jnp.array([1.0, -2.0])

    def first(learning_rate):
        optimizer = make(learning_rate)
        step, state = optimizer.update(params, optimizer.init(params), params)
        return step, jax.tree.leaves(state)[:3]

    expected, state = first(0.1)
    np.testing.assert_array_equal(optax.apply_updates(params, first(0.0)[0]), params)
    np.testing.assert_array_equal(first(-0.1)[0], -expected)
    with pytest.raises(ValueError, match="learning_rate must be finite, got nan"):
        make(float("nan"))
    # Not known before the step: it is NaN, and the state as it would be.
    step, beside = first(jnp.float32(jnp.nan))
    assert np.isnan(step).all()
    for x, y in zip(state, beside, strict=True):
        np.testing.assert_array_equal(x, y)
    for schedule in (
        lambda count: jnp.float32(0.1),
        lambda count: np.float64(0.1),
        lambda count: np.array(0.1),
        lambda count: 0.1 + 0 * count,
    ):
        with jax.numpy_dtype_promotion("standard"):
            np.testing.assert_allclose(first(schedule)[0], expected, rtol=1e-6)
    for wrong in (lambda count: jnp.ones([1]), lambda count: None):
        with pytest.raises((TypeError, ValueError), match="learning_rate must be"):
            first(wrong)


def test_schedules_of_more_bits_than_the_parameters(x64):
    params = jnp.ones(2, jnp.float32)
    optimizer = adamaxw(lambda count: jnp.float64(0.1))
    step, _ = optimizer.update(params, optimizer.init(params), params)
    assert step.dtype == jnp.float32


@every_optimizer
def test_rates_of_zero(make):
    """b1 = b2 = eps = 0: the sign of each gradient, and 0 for a gradient of 0."""
    if "int8" in getattr(make, "keywords", {}).values():
        with pytest.raises(ValueError, match=r"int8 stores m/u.*b1 < b2"):
            make(b1=0.0, b2=0.0)
        return
    optimizer = make(b1=0.0, b2=0.0, eps=0.0)
    state = optimizer.init(jnp.zeros(3))
    for g in ([3.0, -1e-2, 0.0], [-2.0, 0.0, 1e3], [0.0, 0.0, 0.0], [1.0, 1.0, -1.0]):
        step, state = optimizer.update(jnp.array(g), state)
        np.testing.assert_allclose(step, np.sign(g), atol=0.01)


TRAINABLE = ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
COARSE = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e4m3b11fnuz"]


@pytest.mark.parametrize(
    "dtype", [*TRAINABLE, *(dtype for dtype in COARSE if hasattr(jnp, dtype))]
)
@pytest.mark.parametrize("make", [adamax, functools.partial(lp_adam, p=3.0)])
def test_parameters_of_every_dtype(make, dtype, x64):
    params = {"w": jnp.ones(3, dtype)}
    optimizer = make(0.125)
    state = optimizer.init(params)
    step, state = jax.jit(optimizer.update)(params, state, params)
    after = optax.apply_updates(params, step)["w"]
    assert after.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.asarray(after.astype("complex128")), 0.875, rtol=1e-2)


@pytest.mark.skipif(not hasattr(jnp, "float8_e8m0fnu"), reason="an older JAX")
@pytest.mark.parametrize("make", [adamax, functools.partial(lp_adam, p=3.0)])
def test_a_dtype_without_negative_numbers_is_refused(make):
    params = {"w": jax.ShapeDtypeStruct([3], "float8_e8m0fnu")}
    with pytest.raises(TypeError, match=r"\['w'\] .* which has no negative numbers"):
        jax.eval_shape(make(0.1).init, params)


@pytest.mark.parametrize("make", [adamax, functools.partial(lp_adam, p=3.0)])
@pytest.mark.parametrize("leaf", [3, np.arange(2), np.array([True]), "key"])
def test_parameters_without_gradients(make, leaf):
    leaf = jax.random.key(0) if isinstance(leaf, str) else leaf
    params = {"index": leaf, "w": jnp.ones(2)}
    optimizer = make(0.1)
    state = optimizer.init(params)
    assert state[0].m["index"] is state[0].u["index"] is None
    updates, state = optimizer.update({"index": None, "w": jnp.ones(2)}, state, params)
    assert updates["index"] is None
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)
    with pytest.raises(ValueError, match=r"\['index'\] .* must be None"):
        optimizer.update({"index": jnp.ones(2), "w": jnp.ones(2)}, state, params)


@pytest.mark.parametrize("dtypes", [{}, {"m_dtype": "float32", "u_dtype": "float32"}])
def test_parameters_of_four_bits(dtypes):
    """Their state is in bfloat16, or as asked for."""
    name = "float4_e2m1fn" if hasattr(jnp, "float4_e2m1fn") else "float8_e4m3b11fnuz"
    params = jnp.ones(3, name)
    optimizer = adamax(0.5, **dtypes)
    state = optimizer.init(params)
    assert state[0].m.dtype == dtypes.get("m_dtype", "bfloat16")
    step, _ = optimizer.update(params, state, params)
    assert step.dtype == params.dtype
    np.testing.assert_array_equal(step.astype(jnp.float32), -0.5)


@pytest.mark.parametrize("shared_axes", long_but([], [None, -1]))
def test_many_leaves(shared_axes):
    params = {f"w{i:04}": np.full([1, 2], i % 7 - 3, np.float32) for i in range(5000)}
    optimizer = scale_by_adamax(m_dtype="int8", shared_axes=shared_axes)
    steps, state = optimizer.update(params, optimizer.init(params))
    assert jax.tree.structure(steps) == jax.tree.structure(params)
    assert jax.tree.structure(state.m) == jax.tree.structure(params)
    steps, signs = (np.stack(jax.tree.leaves(x)) for x in (steps, params))
    np.testing.assert_allclose(steps, np.sign(signs), atol=0.15)


@every_optimizer
def test_deep_trees(make):
    params = jnp.array([[3.0, -3.0]])
    for i in range(200):
        params = {"inner": params} if i % 2 else [params]
    optimizer = make()
    update = jax.jit(optimizer.update)
    (step,) = jax.tree.leaves(update(params, optimizer.init(params))[0])
    np.testing.assert_allclose(step, [[1.0, -1.0]], atol=0.15)
    other = jax.tree.map(lambda x: x[:, :1], params)
    with pytest.raises(ValueError, match=r"gradient at .*\['inner'\].* shape"):
        optimizer.update(other, optimizer.init(params))


@pytest.mark.parametrize("name", list(STORAGES))
@pytest.mark.parametrize("other", list(STORAGES))
def test_states_of_another_configuration(name, other):
    """Refused, unless it is the same one."""
    params = {"kernel": jnp.ones([2, 3])}
    optimizer = scale_by_adamax(**STORAGES[name])
    state = scale_by_adamax(**STORAGES[other]).init(params)
    if name == other:
        optimizer.update(params, state, params)
        return
    with pytest.raises((TypeError, ValueError), match=r"convert_state|insert_state"):
        optimizer.update(params, state, params)


if __name__ == "__main__":
    for memory in MEMORIES:
        print(f"{memory}:\n", *table(memory), "", sep="\n")
