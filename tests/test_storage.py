"""m and u in few bytes: exact where that is promised, bounded where it is not."""

import functools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import sequences
from hypothesis import given
from sequences import trajectory

from adamax_jax import adamax, convert_state, moments, scale_by_adamax

NARROW = ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "uint8"]
STORAGES = list(sequences.STORAGES.values())
BYTES = [8, 4, 2]
# Decades on either side of 1 that a dtype holds with a full significand, spikes and the
# factor of 2 of the scale included.
DECADES = {
    "bfloat16": 6,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 2,
    "uint8": 6,
}
# The numbers of the uint8 scale: code 0 is 0, 4 codes per octave, code 1 is 2^-32.
UINT8 = np.array([0.0] + [2.0 ** (k // 4 - 32) * (1 + k % 4 / 4) for k in range(255)])


def bits(u):
    """u as it is stored, float8 as uint8: XLA on the CPU stacks float8 very slowly."""
    is_float8 = u.dtype.itemsize == 1 and u.dtype != jnp.uint8
    return jax.lax.bitcast_convert_type(u, jnp.uint8) if is_float8 else u


def numbers(stored, u_dtype):
    """What stored numbers or their bits stand for, before ``u_scale``, in float64."""
    stored = np.asarray(stored)
    if u_dtype == "uint8":
        return UINT8[stored]
    return stored.view(jnp.dtype(u_dtype)).astype(np.float64)


def rounded(x, dtype):
    """The number of a dtype nearest to x in float64: found without the library."""
    if dtype != "uint8":
        return x.astype(np.dtype(dtype)).astype(np.float64)
    above = np.clip(np.searchsorted(UINT8, x), 1, 255)
    low, high = UINT8[above - 1], UINT8[above]
    return np.where(x - low < high - x, low, high)


def exact(g, decays):
    """u_t in float64 for each step."""
    u, history = np.zeros(g.shape[1:]), []
    for g_t, decay in zip(np.abs(g, dtype=np.float64), decays, strict=True):
        u = np.maximum(decay * u, g_t)
        history.append(u)
    return np.array(history)


def decays_shown_by(u_scale, b2):
    """The decay of each step: u_scale_t / u_scale_(t-1), but for a power of two.

    It is b2, to the rounding of a float32 product.
    """
    u_scale = np.asarray(u_scale, np.float64)
    decays = u_scale / np.concatenate([[1.0], u_scale[:-1]])
    decays *= 2.0 ** np.round(np.log2(b2 / decays))
    np.testing.assert_allclose(decays, b2, rtol=2**-23)
    return decays


@functools.cache
def norms(u_dtype, b2=None):
    """A compiled run: the stored u and its scale after each step.

    A function of the gradients and, if b2 is None, of the b2 of each step, traced.
    """

    def step(state, inputs):
        g, traced = inputs
        optimizer = scale_by_adamax(
            b2=traced if b2 is None else b2, eps=0.0, u_dtype=u_dtype
        )
        _, state = optimizer.update(g, state)
        return state, (bits(state.u), state.u_scale)

    def run(g, b2s):
        init = scale_by_adamax(u_dtype=u_dtype).init(g[0])
        return jax.lax.scan(step, init, (g, b2s))[1]

    return jax.jit(run)


def assert_rounded_once(stored, g, b2, u_scale, u_dtype):
    """Every stored number is the exact one, rounded once.

    The quotient |g| / u_scale is a float32: where it is within 2^-22 of the middle
    between two neighbours, either of them is right.
    """
    x = exact(g, decays_shown_by(u_scale, b2)) / np.asarray(u_scale)[:, None]
    actual = numbers(stored, u_dtype)
    assert np.all(actual >= rounded(x * (1 - 2**-22), u_dtype))
    assert np.all(actual <= rounded(x * (1 + 2**-22), u_dtype))
    assert np.mean(actual == rounded(x, u_dtype)) > 1 - 1e-3


def heavy_tailed(u_dtype, steps=20_000, size=32):
    """Gradients with rare spikes and 30 % zeros, on a scale for each coordinate."""
    rng = np.random.default_rng(0)
    decades = DECADES[u_dtype]
    g = rng.standard_t(1.5, [steps, size])
    g *= 10 ** rng.uniform(-decades / 3, decades / 3, size)
    # Bounded, and set anew every few hundred steps: nothing leaves the dtype's range.
    g = np.clip(g, -(10.0**decades), 10.0**decades)
    g[rng.random(g.shape) < 0.3] = 0
    return g.astype(np.float32)


@pytest.mark.parametrize("u_dtype", NARROW)
def test_u_is_rounded_once_at_a_constant_b2(u_dtype):
    g = heavy_tailed(u_dtype)
    b2 = np.full(len(g), np.float32(0.999))
    stored, u_scale = norms(u_dtype, 0.999)(jnp.asarray(g), b2)
    assert_rounded_once(stored, g, b2.astype(np.float64), u_scale, u_dtype)


@pytest.mark.parametrize("u_dtype", NARROW)
def test_u_is_rounded_once_at_a_scheduled_b2(u_dtype):
    g = heavy_tailed(u_dtype)
    b2 = np.float32(0.999 - 0.1 * np.sin(np.arange(len(g)) / 300) ** 2)
    stored, u_scale = norms(u_dtype)(jnp.asarray(g), b2)
    assert_rounded_once(stored, g, b2.astype(np.float64), u_scale, u_dtype)


@given(
    st.lists(
        st.tuples(st.floats(-1, 1), st.sampled_from([-1.0, 0.0, 1.0])),
        min_size=120,
        max_size=120,
    ),
    st.lists(st.floats(0.05, 0.9999), min_size=30, max_size=30),
    st.sampled_from(NARROW),
)
def test_u_is_rounded_once(gradients, b2, u_dtype):
    exponents, signs = np.array(gradients).T
    g = np.float32(signs * 10 ** (exponents * DECADES[u_dtype])).reshape(30, 4)
    # Whatever decays below the dtype's range is not this test's subject.
    g[::2] = np.where(g[::2] == 0, np.float32(1), g[::2])
    b2 = np.float32(np.maximum(b2, 0.5))
    stored, u_scale = norms(u_dtype)(jnp.asarray(g), b2)
    assert np.all(u_scale >= 0.5) and np.all(u_scale <= 1)
    assert_rounded_once(stored, g, b2.astype(np.float64), u_scale, u_dtype)


@pytest.mark.parametrize("u_dtype", NARROW)
def test_decaying_the_stored_number_would_fail(u_dtype):
    """The same assertion refuses what others do: round b2 * u at every step."""
    g = heavy_tailed(u_dtype, steps=2000)
    u, stored = np.zeros(g.shape[1:]), []
    for g_t in np.abs(g, dtype=np.float64):
        u = rounded(np.maximum(0.999 * u, g_t), u_dtype)
        stored.append(np.searchsorted(UINT8, u) if u_dtype == "uint8" else u)
    actual = numbers(np.array(stored, jnp.dtype(u_dtype)), u_dtype)
    u = exact(g, np.full(len(g), 0.999))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(actual, rounded(u, u_dtype))
    # One rounding costs half an ulp; this is several, and grows.
    half_an_ulp = 1 / 8 if u_dtype == "uint8" else float(jnp.finfo(u_dtype).eps) / 2
    assert np.max(np.abs(actual[-1] / u[-1] - 1)) > 3 * half_an_ulp


@pytest.mark.parametrize("b2", [0.0, 0.1, 0.5, 0.9, 0.9999])
def test_scale_stays_in_range_at_every_b2(b2):
    g = jnp.asarray(heavy_tailed("bfloat16", steps=200))
    _, state = trajectory(scale_by_adamax(0.0, b2, 0.0, u_dtype="bfloat16"), g)
    assert np.all((state.u_scale >= 0.5) & (state.u_scale <= 1))
    norms = np.asarray(state.u, np.float64) * np.asarray(state.u_scale)[:, None]
    np.testing.assert_allclose(
        norms, exact(g, np.full(200, b2)), rtol=2**-8, atol=1e-30
    )


@pytest.mark.parametrize("u_dtype", NARROW)
def test_out_of_range(u_dtype):
    """What is positive stays positive, what is finite finite, and m keeps its share."""
    largest = 1.5 * 2.0**31 if u_dtype == "uint8" else float(jnp.finfo(u_dtype).max)
    smallest = (
        UINT8[1] if u_dtype == "uint8" else float(jnp.finfo(u_dtype).smallest_subnormal)
    )
    optimizer = scale_by_adamax(eps=0.0, m_dtype="int8", u_dtype=u_dtype)
    g = jnp.array([1e-36, -1e-36, 3e38, -3e38, 0.0])
    update, state = optimizer.update(g, optimizer.init(g))
    np.testing.assert_array_max_ulp(np.asarray(update), np.sign(g), maxulp=2)
    if u_dtype != "bfloat16":
        ends = [smallest, smallest, largest, largest, 0]
        np.testing.assert_array_equal(numbers(state.u, u_dtype), ends)
    step = jax.jit(lambda state: optimizer.update(0 * g, state))
    for _ in range(3000):
        update, state = step(state)
        # The bound, times what u may have been rounded down.
        assert np.all(np.abs(update) <= 1.0091 / 0.88)
    _, u = moments(state)
    assert np.all(np.isfinite(u)) and np.all(u[:4] > 0) and u[4] == 0


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
def test_large_gradients_leave_a_finite_state(dtype):
    g = jnp.array([1e6, -1e30, 1.0])
    optimizer = scale_by_adamax(m_dtype=dtype, u_dtype=dtype)
    update, state = trajectory(optimizer, jnp.stack([g] * 20))
    assert np.all(np.isfinite(state.m.astype(jnp.float32)))
    assert np.all(np.isfinite(state.u.astype(jnp.float32)))
    assert np.all(np.isfinite(update)) and np.all(np.sign(update) == np.sign(g)[None])


@pytest.mark.parametrize(
    "u_dtype", ["float16", "float8_e4m3fn", "float8_e5m2", "uint8"]
)
@pytest.mark.parametrize("m_dtype", ["int8", "float8_e5m2", "bfloat16", "float32"])
def test_no_step_gets_past_the_bound_out_of_range(m_dtype, u_dtype):
    """Gradients beyond both ends, and none after them."""
    rng = np.random.default_rng(0)
    g = np.float32(10 ** rng.uniform(-36, 37, [500, 32]) * rng.choice([-1, 1], 32))
    g[:, ::2] = np.float32(10 ** rng.uniform(4, 37, [500, 16]))
    g[rng.random(g.shape) < 0.5] = 0
    optimizer = scale_by_adamax(eps=0.0, m_dtype=m_dtype, u_dtype=u_dtype)
    update, _ = trajectory(optimizer, jnp.asarray(g))
    # Half an ulp of a float8 mean comes on top.
    slack = 1.07 if m_dtype == "float8_e5m2" else 1.01
    assert np.all(np.abs(update) <= slack * 1.0091 / 0.88)


def test_complex_m_shrinks_with_u():
    g = jnp.array([3e20 + 4e20j, 1j])
    optimizer = scale_by_adamax(m_dtype="float32", u_dtype="uint8")
    _, state = optimizer.update(g, optimizer.init(g))
    for _ in range(20):
        update, state = optimizer.update(0 * g, state)
        assert np.all(np.abs(update) <= 1.0091 / 0.88)


class TestMean:
    """m in int8: not exact, since it is an average, but bounded and unbiased."""

    def test_error_stays_bounded(self):
        """Over 20,000 steps, against float64.

        A code moves m/u by at most one step of the scale, 1.25 * 255 / 127^2 < 0.02 at
        its end and 0.0177 at 1. A stored error decays by b1 a step, while u may decay
        by b2: the errors add up to 0.02 / (1 - b1 / b2) = 0.2 at worst. As they are of
        either sign, they stay far below that. To compare m alone, both ratios are to
        the u that is stored.
        """
        g = heavy_tailed("uint8")
        m = np.stack([s.m for s in reference.adamax(g.astype(np.float64))])
        optimizer = scale_by_adamax(m_dtype="int8", u_dtype="uint8")

        def step(state, g):
            _, state = optimizer.update(g, state)
            return state, moments(state)

        run = jax.jit(lambda g: jax.lax.scan(step, optimizer.init(g[0]), g)[1])
        decoded, u = (np.asarray(x, np.float64) for x in run(jnp.asarray(g)))
        error = np.abs(decoded - m) / u
        assert np.max(error) < 0.02 / (1 - 0.9 / 0.999)
        assert np.max(error) < 0.06
        assert np.mean(error) < 0.006
        # It does not grow with age.
        assert np.max(error[-5000:]) < 1.5 * np.max(error[:5000])

    @pytest.mark.parametrize("small", [0.001, 0.003, 0.01, 0.1])
    @pytest.mark.parametrize("every", [50, 500])
    def test_small_persistent_gradients_beside_spikes(self, small, every):
        """They move a coordinate at the right mean speed, within 5 %."""
        rng = np.random.default_rng(0)
        shape = (20_000, 64)
        g = np.full(shape, small) * rng.uniform(0.9, 1.1, shape[1])
        spikes = rng.random(shape) < 1 / every
        # As many up as down, so that the spikes do not move it.
        spikes &= rng.permuted(np.arange(shape[0])[:, None] % 2 == 0, axis=0)
        g = np.where(spikes, rng.choice([-1.0, 1.0], shape), g).astype(np.float32)
        speed = {}
        for name, storage in {"float": {}, "int8": STORAGES[2]}.items():
            update, _ = trajectory(scale_by_adamax(**storage), jnp.asarray(g))
            speed[name] = np.mean(np.asarray(update[1000:], np.float64))
        assert speed["int8"] == pytest.approx(speed["float"], rel=0.05)

    @pytest.mark.parametrize("period", [2, 4, 10, 16])
    def test_periodic_gradients_do_not_resonate(self, period):
        """A small mean below a large alternation moves at its speed."""
        t = np.arange(50_000)
        wave = np.where(t % period < period / 2, 1.0, -1.0)
        g = jnp.asarray(wave[:, None] + 0.01, jnp.float32)
        speed = {}
        for name, storage in {"float": {}, "int8": {"m_dtype": "int8"}}.items():
            update, _ = trajectory(scale_by_adamax(**storage), g)
            speed[name] = np.mean(np.asarray(update[1000:], np.float64))
        assert speed["int8"] == pytest.approx(speed["float"], rel=0.05)

    def test_rounding_to_nearest_would_lose_them(self):
        """Why rounding is not to the nearest: the nearest code would never be left."""
        ratio, target = 0.0, 0.003
        for _ in range(1000):
            ratio = 0.9 * ratio + 0.1 * target
            ratio = 1.25 * (np.round(127 * np.sqrt(ratio / 1.25)) / 127) ** 2
        assert ratio < 0.5 * target

    def test_needs_b1_below_b2(self):
        for m_dtype in ("int8", "float8_e4m3fn", "float8_e5m2"):
            with pytest.raises(ValueError, match=r"b1 < b2, got b1=0.9 and b2=0.9"):
                scale_by_adamax(0.9, 0.9, m_dtype=m_dtype)
        scale_by_adamax(0.9, 0.9, m_dtype="bfloat16", u_dtype="uint8")


@pytest.mark.parametrize(("storage", "size"), list(zip(STORAGES, BYTES, strict=True)))
def test_bytes_of_ten_million_parameters(storage, size):
    params = {"a": jnp.ones([1000, 9000]), "b": jnp.ones(1_000_000)}
    state = adamax(**storage).init(params)
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    assert total == 10_000_000 * size + 8


@pytest.mark.parametrize("storage", STORAGES)
def test_update_is_close_to_float32(storage):
    g = jnp.asarray(heavy_tailed("uint8", steps=500))
    update, _ = trajectory(scale_by_adamax(**storage), g)
    exact, _ = trajectory(scale_by_adamax(), g)
    tolerance = [0, 0.02, 0.2][STORAGES.index(storage)]
    np.testing.assert_allclose(update, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("storage", STORAGES)
def test_non_finite_gradients(storage):
    """The update carries them; a guard keeps the state; without it, this is stored."""
    optimizer = scale_by_adamax(**storage)
    g = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0])
    update, state = jax.jit(optimizer.update)(g, optimizer.init(jnp.ones(4)))
    np.testing.assert_array_equal(jnp.isfinite(update), [False, False, False, True])
    if storage.get("u_dtype") == "uint8":
        np.testing.assert_array_equal(state.u[:3], [255, 255, 255])
        np.testing.assert_array_equal(state.m[:3], [0, 0, 0])
        _, state = optimizer.update(jnp.ones(4), state)
        chex.assert_tree_all_finite(moments(state))
    else:
        assert not np.any(np.isfinite(state.u.astype(jnp.float32)[:3]))
    guarded = optax.apply_if_finite(optimizer, max_consecutive_errors=3)
    before = guarded.init(jnp.ones(4))
    _, after = guarded.update(g, before)
    chex.assert_trees_all_equal(after.inner_state, before.inner_state)


@pytest.mark.parametrize("u_dtype", ["bfloat16", "float16", "float8_e5m2", "uint8"])
@pytest.mark.parametrize("m_dtype", ["float32", "bfloat16", "float16", "int8"])
def test_non_finite_gradients_in_mixed_storage(m_dtype, u_dtype):
    optimizer = scale_by_adamax(m_dtype=m_dtype, u_dtype=u_dtype)
    g = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1.0])
    update, state = optimizer.update(g, optimizer.init(jnp.ones(4)))
    np.testing.assert_array_equal(jnp.isfinite(update), [False, False, False, True])
    if m_dtype == "int8":
        np.testing.assert_array_equal(state.m[:3], [0, 0, 0])
    else:
        assert not np.any(np.isfinite(state.m.astype(jnp.float32)[:3]))


@pytest.mark.parametrize("source", STORAGES)
@pytest.mark.parametrize("target", STORAGES)
def test_conversion_rounds_once(source, target):
    g = jnp.asarray(heavy_tailed("uint8", steps=300))
    optimizer = optax.chain(adamax(**source), optax.scale(1.0))
    state = optimizer.init(g[0])
    for g_t in g:
        _, state = jax.jit(optimizer.update)(g_t, state)
    full = {"m_dtype": "float32", "u_dtype": "float32"}
    converted = convert_state(state, **(full | target))
    expected = adamax(**(full | target)).init(g[0])[0]
    assert jax.tree.map(jax.typeof, converted[0][0]) == jax.tree.map(
        jax.typeof, expected
    )
    before, after = moments(state), moments(converted)
    index = STORAGES.index(target)
    np.testing.assert_allclose(after[1], before[1], rtol=[0, 2**-8, 0.126][index])
    error = np.abs(after[0] - before[0]) / np.maximum(before[1], 1e-30)
    # Half a step of the codes at that ratio, which is to u as it will be stored.
    ratio = np.abs(before[0]) / np.maximum(before[1], 1e-30)
    half_a_step = 1.25 * (2 * 127 * np.sqrt(ratio / 1.25) + 1) / 127**2 / 2
    assert np.all(error <= [0, 2**-8, 1.15 * half_a_step][index])
    # Back in float32, nothing is rounded any more, and training goes on.
    back = convert_state(converted, **full)
    chex.assert_trees_all_equal(moments(back), after)
    adamax(**full).update(g[0], back[0])


def test_conversion_of_one_keeps_the_other():
    g = jnp.asarray(heavy_tailed("uint8", steps=20))
    optimizer = adamax(m_dtype="bfloat16", u_dtype="uint8")
    state = optimizer.init(g[0])
    for g_t in g:
        _, state = optimizer.update(g_t, state)
    chex.assert_trees_all_equal(convert_state(state), state)
    converted = convert_state(state, m_dtype="float32")
    chex.assert_trees_all_equal(moments(converted), moments(state))
    chex.assert_trees_all_equal(converted[0].u, state[0].u)
    assert float(converted[0].u_scale) == float(state[0].u_scale) < 1


def test_moments_needs_one_state():
    with pytest.raises(ValueError, match="holds 0 ScaleByAdamaxState"):
        moments(optax.adam(1e-3).init(jnp.ones(1)))


@pytest.mark.parametrize("storage", [*STORAGES[1:], {"u_dtype": "uint8"}])
def test_a_none_gradient_counts_as_zero_where_u_is_narrow(storage):
    """u decays with the others, and m does not stay behind to make a huge step."""
    params = {"a": jnp.ones(3), "b": {"c": jnp.full(3, 2.0)}}
    optimizer = scale_by_adamax(**storage)
    step = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for _ in range(20):
        _, state = step(params, state)
    zero = {"a": jnp.ones(3), "b": {"c": jnp.zeros(3)}}
    for missing in (
        {"a": jnp.ones(3), "b": None},
        {"a": jnp.ones(3), "b": {"c": None}},
    ):
        later = expected = state
        for _ in range(5000):
            updates, later = step(missing, later)
            _, expected = step(zero, expected)
        chex.assert_trees_all_equal_structs(updates, missing)
        chex.assert_trees_all_equal(later, expected)
        update, _ = step(jax.tree.map(lambda p: 1e-3 * p, params), later)
        assert np.all(np.abs(update["b"]["c"]) <= 1.0091 / 0.88)


@pytest.mark.parametrize("name", ["b1", "b2", "eps"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_hyperparameters_in_half_precision(name, dtype):
    with pytest.raises(TypeError, match=rf"{name} has dtype.*hyperparam_dtype"):
        adamax(**{name: jnp.array(0.5, dtype)})


def test_injected_into_half_precision_parameters():
    params = jnp.ones(2, jnp.bfloat16)
    with pytest.raises(TypeError, match=r"hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(adamax)().init(params)
    inject = optax.inject_hyperparams(adamax, hyperparam_dtype=jnp.float32)
    optimizer = inject(m_dtype="int8", u_dtype="uint8")
    updates, _ = optimizer.update(params, optimizer.init(params))
    assert updates.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["m_dtype", "u_dtype"])
def test_dtypes_without_a_meaning(name):
    for value in ("int16", "uint8" if name == "m_dtype" else "int8", "complex64"):
        with pytest.raises(
            ValueError, match=rf"{name} must be None or one of.*{value}"
        ):
            adamax(**{name: value})
    with pytest.raises(TypeError, match=rf"{name} must be None or one of.*'narrow'"):
        adamax(**{name: "narrow"})


def test_dtypes_as_strings_or_types():
    expected = scale_by_adamax(m_dtype="int8", u_dtype="uint8").init(jnp.ones(2))
    for m_dtype, u_dtype in [(jnp.int8, jnp.uint8), (np.dtype("int8"), np.dtype("u1"))]:
        state = scale_by_adamax(m_dtype=m_dtype, u_dtype=u_dtype).init(jnp.ones(2))
        chex.assert_trees_all_equal(state, expected)


def test_complex_parameters():
    params = {"a": jnp.ones(2, jnp.complex64)}
    for m_dtype in ("int8", "bfloat16"):
        with pytest.raises(TypeError, match=r"\['a'\] has dtype complex64, whose m"):
            adamax(m_dtype=m_dtype).init(params)
    optimizer = scale_by_adamax(m_dtype="float32", u_dtype="uint8")
    g = {"a": jnp.array([3 + 4j, 0])}
    update, state = optimizer.update(g, optimizer.init(params))
    np.testing.assert_allclose(update["a"], [0.6 + 0.8j, 0], rtol=1e-6)
    assert state.m["a"].dtype == jnp.complex64
    assert state.u["a"].dtype == jnp.uint8


def test_storage_of_each_leaf_when_parameters_mix():
    """Wide leaves take the plain recurrence, narrow ones share the scale."""
    optimizer = scale_by_adamax()
    g = jnp.asarray(heavy_tailed("bfloat16", steps=100, size=4))
    mixed = {"half": g.astype(jnp.bfloat16), "full": g}
    _, state = trajectory(optimizer, mixed)
    _, alone = trajectory(optimizer, g)
    np.testing.assert_array_equal(state.u["full"], alone.u)
    error = np.abs(state.m["full"] - alone.m) / np.maximum(alone.u, 1e-30)
    assert np.max(error) < 1e-6
    assert state.u["half"].dtype == jnp.bfloat16
    assert np.all(alone.u_scale == 1) and state.u_scale[-1] < 1


@pytest.mark.parametrize("storage", STORAGES)
def test_temporary_memory_is_no_more_than_optax_takes(storage):
    g = jnp.ones(1_000_000)

    def temporary(optimizer):
        update = jax.jit(optimizer.update, donate_argnums=1)
        compiled = update.lower(g, optimizer.init(g)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    with jax.numpy_dtype_promotion("standard"):
        allowed = temporary(optax.scale_by_adamax())
    assert temporary(scale_by_adamax(**storage)) <= allowed + 1000


@pytest.mark.parametrize("u_dtype", ["float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_a_conversion_keeps_the_bound_of_steps(u_dtype, dtype):
    """Where u is too large to be stored, m is cut down with it, as by an update."""
    g = jnp.full(3, 1e6, dtype)
    optimizer = scale_by_adamax()
    state = optimizer.init(g)
    for _ in range(50):
        _, state = optimizer.update(g, state)
    narrow = convert_state(state, u_dtype=u_dtype)
    update, _ = scale_by_adamax(u_dtype=u_dtype).update(0 * g, narrow)
    assert np.all(np.abs(update) <= 1.15)
    assert np.all(np.abs(update) > 0.1)
