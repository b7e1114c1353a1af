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
from dying import DECAYS, EPS_OF_M, dying_gradients, exact_mean, noise_of_rounding
from hypothesis import given
from sequences import (
    LONGEST_STEP,
    ROUNDING_LEAVES,
    STORAGES,
    bits,
    trajectory,
    updates_of,
)
from versions import AS_USERS_DO, needs_new_xla

from adamax_jax import adamax, convert_state, moments, scale_by_adamax
from adamax_jax._formats import MEANS, NORMS
from adamax_jax._state import read, stored_as

NARROW = ["bfloat16", "uint8"]
BYTES_PER_PARAMETER = {"own": 8, "bfloat16": 4, "two bytes": 2}
# How far an update may be from that of float32, at gradients of every size.
FAR_FROM_FLOAT32 = {"own": 0, "bfloat16": 0.02, "two bytes": 0.2}
EVERY_STORAGE = pytest.mark.parametrize("name", STORAGES)
# Decades on either side of 1 that a dtype holds with a full significand, spikes and the
# factor of 2 of the scale included.
DECADES = {"bfloat16": 6, "uint8": 6}
# The numbers of the uint8 scale: code 0 is 0, 4 codes per octave, code 1 is 2^-32.
UINT8 = np.array([0.0] + [2.0 ** (k // 4 - 32) * (1 + k % 4 / 4) for k in range(255)])


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

    The quotient |g| / u_scale is a float32: where it is within 2^-21 of the middle
    between two neighbours, either of them is right.
    """
    x = exact(g, decays_shown_by(u_scale, b2)) / np.asarray(u_scale)[:, None]
    actual = numbers(stored, u_dtype)
    assert np.all(actual >= rounded(x * (1 - 2**-21), u_dtype))
    assert np.all(actual <= rounded(x * (1 + 2**-21), u_dtype))
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


def every_number(dtype):
    """All numbers of a dtype of up to 16 bits that are 0, or positive and normal."""
    if dtype in ("int8", "uint8"):
        return np.arange(128 if dtype == "int8" else 256).astype(dtype)
    dtype = jnp.dtype(dtype)
    patterns = np.arange(2 ** (8 * dtype.itemsize))
    x = patterns.astype(f"uint{8 * dtype.itemsize}").view(dtype)
    # Of bfloat16, what a scale of one half leaves a normal float32.
    smallest = max(float(jnp.finfo(dtype).smallest_subnormal), 2.0**-124)
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float64)
    is_positive = np.isfinite(wide) & (wide >= smallest)
    return x[is_positive | (patterns == 0)]


@jax.jit
def written_back(m, u, u_scale):
    """What is stored again of what was read, and that."""
    read_m, read_u = read(m, u, u_scale)
    return stored_as(read_m, read_u, m.dtype, u.dtype, u_scale), read_u


# An eager call compiles a program for each operation and shape.
moments_of = jax.jit(moments)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("u_dtype", NARROW)
def test_every_u_that_is_read_is_written_back_as_it_was(u_dtype):
    just_below_2 = np.nextafter(np.float32(2), np.float32(0))
    everything = every_number(u_dtype)
    for u_scale in (1.0, 1.998, 1.5, 4 / 3, just_below_2):
        # The range of u ends with the numbers of the dtype, whatever the scale.
        known = UINT8 if u_dtype == "uint8" else everything.astype(np.float64)
        u = jnp.asarray(everything[known * u_scale <= known.max()])
        m = jnp.zeros(u.shape)
        (_, again), number = written_back(m, u, jnp.float32(u_scale))
        assert_same_bits(again, u)
        np.testing.assert_allclose(
            number, numbers(u, u_dtype) * np.float64(u_scale), rtol=2**-23
        )


@pytest.mark.parametrize("m_dtype", ["int8", "bfloat16"])
def test_every_m_that_is_read_is_written_back_as_it_was(m_dtype):
    m = every_number(m_dtype)
    m = jnp.asarray(np.concatenate([m, -m[1:]]))
    for u in (1.0, 3.7, 1e-6):
        (again, _), _ = written_back(m, jnp.full(m.shape, u), jnp.float32(1))
        assert_same_bits(again, m)


def test_every_dtype_is_one_that_this_file_tests():
    assert {*NORMS} == {*NARROW, "float32", "float64"}
    assert {*MEANS} == {*NORMS, "int8"} - {"uint8"}


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
    assert np.all(u_scale >= 1) and np.all(u_scale < 2)
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
    g = heavy_tailed("bfloat16", steps=200)
    stored, u_scale = norms("bfloat16")(jnp.asarray(g), np.full(len(g), np.float32(b2)))
    assert np.all((u_scale >= 1) & (u_scale < 2))
    u = numbers(stored, "bfloat16") * np.asarray(u_scale, np.float64)[:, None]
    np.testing.assert_allclose(u, exact(g, np.full(len(g), b2)), rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("u_dtype", NARROW)
def test_out_of_range(u_dtype):
    """What is positive stays positive, and what is finite finite.

    Gradients above the end count as the end; those below are divided by the smallest.
    """
    largest = 1.5 * 2.0**31 if u_dtype == "uint8" else float(jnp.finfo(u_dtype).max)
    smallest = (
        UINT8[1] if u_dtype == "uint8" else float(jnp.finfo(u_dtype).smallest_subnormal)
    )
    optimizer = scale_by_adamax(eps=0.0, m_dtype="int8", u_dtype=u_dtype)
    g = np.float32([1e-36, -1e-36, 3e38, -3e38, 0.0])
    update, state = jax.jit(optimizer.update)(g, optimizer.init(g))
    expected = np.array(np.sign(g))
    if u_dtype != "bfloat16":
        expected[:2] = 0
    # A first m/u of 0.1 lies between two codes that are 4 % of it apart.
    np.testing.assert_allclose(update, expected, rtol=0.04)
    if u_dtype != "bfloat16":
        stored = numbers(state.u, u_dtype)
        np.testing.assert_array_equal(stored[[0, 1, 4]], [smallest, smallest, 0])
        u = stored[2:4] * float(state.u_scale)
        np.testing.assert_allclose(u, largest, rtol=1 - ROUNDING_LEAVES)

    def step(state, _):
        update, state = optimizer.update(0 * g, state)
        return state, update

    # The bound, times what u may have been rounded down, at all ages.
    state, updates = jax.jit(lambda s: jax.lax.scan(step, s, length=3000))(state)
    assert np.all(np.abs(updates) <= LONGEST_STEP / ROUNDING_LEAVES)
    u = np.asarray(moments_of(state)[1])
    assert np.all(np.isfinite(u)) and np.all(u[:4] > 0) and u[4] == 0


# The longest step at the default rates where rounding adds to it, beside a wide u.
BOUNDS = {
    "float32": 1.0092,
    "bfloat16": 1.04,
    "int8": 1.10,
}


@pytest.mark.parametrize("m_dtype", ["int8", "bfloat16", "float32"])
def test_no_step_gets_past_the_bound_out_of_range(m_dtype):
    """Gradients beyond both ends, and none after them."""
    rng = np.random.default_rng(0)
    g = np.float32(10 ** rng.uniform(-36, 37, [500, 32]) * rng.choice([-1, 1], 32))
    g[:, ::2] = np.float32(10 ** rng.uniform(4, 37, [500, 16]))
    g[rng.random(g.shape) < 0.5] = 0
    optimizer = scale_by_adamax(eps=0.0, m_dtype=m_dtype, u_dtype="uint8")
    update = updates_of(optimizer, jnp.asarray(g))
    assert np.all(np.abs(update) <= BOUNDS[m_dtype] / ROUNDING_LEAVES)


@pytest.mark.parametrize("m_dtype", ["int8", "float32"])
def test_no_step_gets_past_the_bound_just_out_of_range(m_dtype):
    """Where less than half of u is cut off: m shrinks there, too."""
    g = np.linspace(1, 2, 9, dtype=np.float32) * np.float32(1.5 * 2.0**31)
    g = np.concatenate([np.tile(g, [60, 1]), np.zeros([2, 9], np.float32)])
    optimizer = scale_by_adamax(m_dtype=m_dtype, u_dtype="uint8")
    update = updates_of(optimizer, jnp.asarray(g))
    # The decay of the scale brings a u below its end back into the range.
    assert np.all(np.abs(update) <= BOUNDS[m_dtype] / ROUNDING_LEAVES)


def test_complex_m_shrinks_with_u():
    g = jnp.array([3e20 + 4e20j, 1j])
    optimizer = scale_by_adamax(m_dtype="float32", u_dtype="uint8")
    _, state = optimizer.update(g, optimizer.init(g))
    for _ in range(20):
        update, state = optimizer.update(0 * g, state)
        assert np.all(np.abs(update) <= LONGEST_STEP / ROUNDING_LEAVES)


def mean_speeds(g, storage):
    """The mean update of each coordinate in float32 and in a storage, once begun."""
    for options in ({}, storage):
        update = updates_of(scale_by_adamax(**options), jnp.asarray(g, jnp.float32))
        yield np.mean(np.asarray(update[1000:]), axis=0, dtype=np.float64)


class TestMean:
    """m in int8: not exact, since it is an average, but bounded and unbiased."""

    def test_error_stays_bounded(self):
        """Over 20,000 steps, against float64.

        A code moves m/u by at most one step of the scale, 1/16 at its end. A stored
        error decays by b1 a step, while u may decay by b2: the errors add up to
        (1/16) / (1 - b1 / b2) = 0.63 at worst. As they are of either sign, they stay
        far below that. To compare m alone, both ratios are to the u that is stored.
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
        assert np.max(error) < 0.06
        assert np.mean(error) < 0.006
        # It does not grow with age.
        assert np.max(error[-5000:]) < 1.5 * np.max(error[:5000])

    @pytest.mark.parametrize("every", [50, 500])
    def test_small_persistent_gradients_beside_spikes(self, every):
        """They move a coordinate at the right mean speed, within 5 %."""
        smalls = [0.001, 0.003, 0.01, 0.1]
        steps, size = 20_000, 64
        columns = []
        for small in smalls:
            rng = np.random.default_rng(0)
            g = np.full((steps, size), small) * rng.uniform(0.9, 1.1, size)
            spikes = rng.random(g.shape) < 1 / every
            # As many up as down, so that the spikes do not move it.
            spikes &= rng.permuted(np.arange(steps)[:, None] % 2 == 0, axis=0)
            columns.append(np.where(spikes, rng.choice([-1.0, 1.0], g.shape), g))
        wide, narrow = mean_speeds(np.hstack(columns), STORAGES["two bytes"])
        np.testing.assert_allclose(
            narrow.reshape(len(smalls), size).mean(axis=1),
            wide.reshape(len(smalls), size).mean(axis=1),
            rtol=0.05,
        )

    def test_periodic_gradients_do_not_resonate(self):
        """A small mean below a large alternation moves at its speed."""
        t = np.arange(50_000)
        waves = [np.where(t % n < n / 2, 1.0, -1.0) for n in (2, 4, 10, 16)]
        wide, narrow = mean_speeds(np.stack(waves, 1) + 0.01, {"m_dtype": "int8"})
        np.testing.assert_allclose(narrow, wide, rtol=0.05)

    def test_rounding_to_nearest_would_lose_them(self):
        """Why rounding is not to the nearest: the nearest code would never be left."""
        ratio, target = 0.0, 0.002
        for _ in range(1000):
            ratio = 0.9 * ratio + 0.1 * target
            ratio = np.round(ratio * 2**12) / 2**12
        assert ratio < 0.5 * target


@functools.lru_cache
def narrow_updates(m_dtype, u_dtype):
    """The updates for every decay of m, and the m in the end."""

    def run(b1, g):
        optimizer = scale_by_adamax(b1=b1, m_dtype=m_dtype, u_dtype=u_dtype)

        def step(state, g_t):
            update, state = optimizer.update(g_t, state)
            return state, update

        state, updates = jax.lax.scan(step, optimizer.init(g[0]), g)
        return updates, bits(state.m)

    every = jax.jit(jax.vmap(run, in_axes=(0, None)))
    updates, m = every(jnp.asarray(DECAYS), jnp.asarray(dying_gradients()))
    return np.asarray(updates, np.float64), np.asarray(m)


def pairs_of_dtypes(m_dtypes=(*EPS_OF_M, "int8"), u_dtypes=("float32", "uint8", "own")):
    """Of m and u."""
    return pytest.mark.parametrize(
        ("m_dtype", "u_dtype"),
        [
            (m, m if u == "own" else u)
            for m in m_dtypes
            for u in u_dtypes
            if u != "own" or m == "bfloat16"
        ],
    )


class TestNarrowMeans:
    """Every m below 32 bits dies as the exact one does, and has no bias."""

    @pairs_of_dtypes()
    def test_travel_and_last_step(self, m_dtype, u_dtype):
        """Within what the rounding of u does to each step, and 4 standard deviations.

        Of the numbers that are left after thousands of steps there are few: one that
        is the smallest may come and go besides.
        """
        actual, _ = narrow_updates(m_dtype, u_dtype)
        exact = exact_mean()
        steps = exact.ratio * exact.correction
        travel, last = noise_of_rounding(exact, m_dtype)
        of_u = {"float32": 1e-5, "uint8": 1 / 8}.get(u_dtype, 2**-8)
        size = np.abs(steps)
        error = np.abs(actual.sum(axis=1) - steps.sum(axis=0))
        assert np.all(error <= of_u * size.sum(axis=0) + 4 * travel)
        error = np.abs(actual[:, -1] - steps[-1])
        assert np.all(error <= of_u * size[-1] + 4 * last + 1e-12)

    @pairs_of_dtypes(m_dtypes=("int8",))
    def test_what_has_ended_is_0_and_stays_0(self, m_dtype, u_dtype):
        """After a spike, and after gradients that are all the same."""
        updates, m = narrow_updates(m_dtype, u_dtype)
        ended = [0, 1, 8, 9]
        np.testing.assert_array_equal(m[:, ended], 0)
        moves = updates[:, 1000:, ended] != 0
        # No zero is followed by another number.
        assert not np.any(moves[:, 1:] & ~moves[:, :-1])

    @pairs_of_dtypes(m_dtypes=("bfloat16",))
    def test_bfloat16_shrinks_as_the_exact_mean(self, m_dtype, u_dtype):
        """Its smallest number is that of float32, which is not reached at b1=0.997."""
        updates, m = narrow_updates(m_dtype, u_dtype)
        assert np.all(np.abs(updates[:, -1, [0, 1, 8, 9]]) < 1e-15)
        np.testing.assert_array_equal(m[:2, [0, 1, 8, 9]], 0)

    @pairs_of_dtypes()
    def test_no_bias(self, m_dtype, u_dtype):
        """The mean travel over 32 dither sequences, within 4 standard errors."""
        steps, sequences = 300, 32
        rng = np.random.default_rng(1)
        sizes = 10 ** rng.uniform(-3, 0, [steps, 16])
        g = np.float32(sizes * np.where(rng.random(sizes.shape) < 0.4, -1, 1))
        # One u throughout, a power of 2 in all dtypes but for the decay of the scale.
        g[0] = 1
        optimizer = scale_by_adamax(0.9, 0.99999, 0.0, m_dtype=m_dtype, u_dtype=u_dtype)

        def run(count, g):
            def step(state, g_t):
                update, state = optimizer.update(g_t, state)
                return state, update

            start = optimizer.init(g[0])._replace(count=count)
            return jnp.sum(jax.lax.scan(step, start, g)[1], axis=0)

        # So many steps later the bias correction is 1, and the hash another.
        counts = 10_000 + 1_000_003 * jnp.arange(sequences, dtype=jnp.int32)
        travel = np.asarray(jax.jit(jax.vmap(run, (0, None)))(counts, jnp.asarray(g)))
        m, u, exact = 0.0, 0.0, 0.0
        for g_t in g.astype(np.float64):
            m = 0.9 * m + 0.1 * g_t
            u = np.maximum(0.99999 * u, np.abs(g_t))
            exact = exact + m / u
        error = np.mean(travel, axis=0, dtype=np.float64) - exact
        standard_error = np.std(travel, axis=0, ddof=1) / np.sqrt(sequences)
        assert np.all(standard_error > 0)
        assert np.all(np.abs(error) <= 4 * standard_error + 1e-4 * np.abs(exact))

    @pairs_of_dtypes(u_dtypes=("float32", "uint8"))
    def test_bound(self, m_dtype, u_dtype):
        """Gradients that shrink as b2^t, which come closest to it, and others."""
        updates, _ = narrow_updates(m_dtype, u_dtype)
        t = np.arange(5000)[:, None]
        closest = np.float32(0.999**t * 10.0 ** np.arange(-3, 3))
        optimizer = scale_by_adamax(eps=0.0, m_dtype=m_dtype, u_dtype=u_dtype)
        at_the_bound = updates_of(optimizer, jnp.asarray(closest))
        largest = max(np.max(np.abs(updates[1])), float(jnp.max(at_the_bound)))
        assert largest <= BOUNDS[m_dtype] / (
            ROUNDING_LEAVES if u_dtype == "uint8" else 1
        )


class TestStepOfTheStored:
    """A step is taken from what the state holds."""

    RULES = pytest.mark.parametrize(
        "rule", [{}, {"nesterov": True}, {"eps_inside": False, "eps": 0.5}], ids=str
    )
    DTYPES = ("bfloat16", "int8")

    @RULES
    @pytest.mark.parametrize("u_dtype", ["float32", "uint8"])
    @pytest.mark.parametrize("m_dtype", ["float32", *DTYPES])
    def test_it_is_the_quotient_of_the_moments(self, m_dtype, u_dtype, rule):
        """The paper's formula in float64, given m and u as they are read."""
        optimizer = scale_by_adamax(m_dtype=m_dtype, u_dtype=u_dtype, **rule)
        self.assert_steps(optimizer, rule)

    @pytest.mark.parametrize("m_dtype", DTYPES)
    def test_of_a_shared_u(self, m_dtype):
        self.assert_steps(scale_by_adamax(m_dtype=m_dtype, shared_axes=-1), {})

    def test_of_a_bfloat16_u(self):
        self.assert_steps(scale_by_adamax(m_dtype="bfloat16", u_dtype="bfloat16"), {})

    def assert_steps(self, optimizer, rule):
        g = np.float32(np.random.default_rng(0).standard_normal([9, 4, 5]))
        update, state = jax.jit(optimizer.update), optimizer.init(g[0])
        for t, g_t in enumerate(g, 1):
            step, state = update(g_t, state)
            m, u = (np.asarray(x, np.float64) for x in moments_of(state))
            m_hat = m / (1 - 0.9**t)
            if rule.get("nesterov"):
                m_hat = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g_t / (1 - 0.9**t)
            expected = m_hat / (u + (0.5 if "eps" in rule else 0))
            np.testing.assert_allclose(step, expected, rtol=1e-5, atol=1e-7)

    @RULES
    @pytest.mark.parametrize(
        ("m_dtype", "u_dtype"),
        [("float32", "uint8"), ("bfloat16", "bfloat16"), ("int8", "uint8")],
    )
    def test_its_derivatives_are_those_of_float32(self, m_dtype, u_dtype, rule):
        """From the same numbers: as if this step did not round them."""
        first = np.float32([1.0, -3.0, 0.5, 2.0])
        second = np.float32([0.2, 3.5, 0.1, 1])
        weights = np.float32([1.0, 2.0, 3.0, 4.0])

        def derivative(optimizer, state):
            return jax.grad(lambda g: weights @ optimizer.update(g, state)[0])(second)

        narrow = scale_by_adamax(m_dtype=m_dtype, u_dtype=u_dtype, **rule)
        wide = scale_by_adamax(**rule)

        @jax.jit
        def derivatives():
            _, state = narrow.update(first, narrow.init(first))
            same = convert_state(state, m_dtype="float32", u_dtype="float32")
            return derivative(narrow, state), derivative(wide, same)

        np.testing.assert_allclose(*derivatives(), rtol=1e-5)


@pytest.mark.parametrize("m_dtype", ["float32", *EPS_OF_M, "int8"])
def test_the_largest_gradients_at_every_scale(m_dtype):
    """A bfloat16 u is read as a finite number at every age: steps of 1."""
    optimizer = scale_by_adamax(m_dtype=m_dtype, u_dtype="bfloat16")
    g = jnp.array([np.finfo(np.float32).max, -3.398e38, 3.3895e38, 1.0])

    def step(state, _):
        update, state = optimizer.update(g, state)
        return state, (update, moments(state)[1])

    _, (updates, u) = jax.lax.scan(step, optimizer.init(g), length=1500)
    assert np.all(np.isfinite(u))
    expected = np.broadcast_to(np.sign(g), updates.shape)
    rounding = {"int8": 0.15}
    np.testing.assert_allclose(updates, expected, rtol=rounding.get(m_dtype, 0.04))


@pytest.mark.parametrize("m_dtype", ["float32", "bfloat16", "int8"])
def test_float64_u_beside_a_mean_of_less_range(m_dtype, x64):
    """What float32 cannot hold counts as its end, for u as for m."""
    optimizer = scale_by_adamax(m_dtype=m_dtype, u_dtype="float64")
    g = np.array([1e300, -1e39, 1.0])
    state = optimizer.init(g)
    step = jax.jit(optimizer.update)
    for _ in range(5):
        update, state = step(g, state)
        np.testing.assert_allclose(update, np.sign(g), rtol=0.1)


@pytest.mark.parametrize("u_dtype", ["float32", "bfloat16", "uint8"])
@pytest.mark.parametrize("m_dtype", ["float32", "bfloat16", "int8"])
def test_others_stand_still_beside_an_infinite_u(m_dtype, u_dtype):
    """That they share: also at the next step."""
    optimizer = scale_by_adamax(m_dtype=m_dtype, u_dtype=u_dtype, shared_axes=-1)
    state = optimizer.init(np.ones([2, 4], "f"))
    step = jax.jit(optimizer.update)
    for row in ([1.0, 1, 1, 1], [np.inf, 1, 1, 0], [1.0, 1, 1, 1], [0.0, 1, -1, 1]):
        update, state = step(np.float32([row, [1.0, 2, 3, 4]]), state)
    update = np.asarray(update)
    np.testing.assert_array_less(np.abs(update[0, 1:]), 1e-6)
    assert not np.isfinite(update[0, 0])
    assert np.all(np.isfinite(update[1])) and np.all(update[1] > 0)


@EVERY_STORAGE
def test_bytes_of_ten_million_parameters(name):
    params = {"a": jnp.ones([1000, 9000]), "b": jnp.ones(1_000_000)}
    state = jax.eval_shape(adamax(**STORAGES[name]).init, params)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert total == 10_000_000 * BYTES_PER_PARAMETER[name] + 8


@EVERY_STORAGE
def test_update_is_close_to_float32(name):
    g = jnp.asarray(heavy_tailed("uint8", steps=500))
    update = updates_of(scale_by_adamax(**STORAGES[name]), g)
    exact = updates_of(scale_by_adamax(), g)
    np.testing.assert_allclose(update, exact, rtol=0, atol=FAR_FROM_FLOAT32[name])


@EVERY_STORAGE
def test_non_finite_gradients(name):
    """The update carries them; a guard keeps the state; without it, this is stored."""
    optimizer = scale_by_adamax(**STORAGES[name])
    g, ones = np.float32([np.nan, np.inf, -np.inf, 1.0]), np.ones(4, np.float32)
    step = jax.jit(optimizer.update)
    update, state = step(g, optimizer.init(ones))
    np.testing.assert_array_equal(np.isfinite(update), [False, False, False, True])
    if name == "two bytes":
        u = np.asarray(moments_of(state)[1])
        np.testing.assert_allclose(u[:3], 1.5 * 2.0**31, rtol=1 / 8)
        np.testing.assert_array_equal(np.asarray(state.m)[:3], [-128, -128, -128])
    else:
        assert not np.any(np.isfinite(np.float32(state.u)[:3]))
    # Without it, these coordinates are lost, the others are not.
    update, _ = step(ones, state)
    np.testing.assert_array_equal(np.isfinite(update), [False, False, False, True])
    guarded = optax.apply_if_finite(optimizer, max_consecutive_errors=3)
    before = guarded.init(ones)
    update, after = jax.jit(guarded.update)(g, before)
    chex.assert_trees_all_equal(after.inner_state, before.inner_state)
    np.testing.assert_array_equal(update, np.zeros(4))


@pytest.mark.parametrize("u_dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize("m_dtype", ["float32", "bfloat16", "int8"])
def test_non_finite_gradients_in_mixed_storage(m_dtype, u_dtype):
    optimizer = scale_by_adamax(m_dtype=m_dtype, u_dtype=u_dtype)
    g, ones = np.float32([np.nan, np.inf, -np.inf, 1.0]), np.ones(4, np.float32)
    step = jax.jit(optimizer.update)
    update, state = step(g, optimizer.init(ones))
    np.testing.assert_array_equal(np.isfinite(update), [False, False, False, True])
    if m_dtype == "int8":
        np.testing.assert_array_equal(np.asarray(state.m)[:3], [-128, -128, -128])
    else:
        assert not np.any(np.isfinite(np.float32(state.m)[:3]))
    update, _ = step(ones, state)
    np.testing.assert_array_equal(np.isfinite(update), [False, False, False, True])


def test_dtypes_as_strings_or_types():
    expected = scale_by_adamax(m_dtype="int8", u_dtype="uint8").init(jnp.ones(2))
    for m_dtype, u_dtype in [(jnp.int8, jnp.uint8), (np.dtype("int8"), np.dtype("u1"))]:
        state = scale_by_adamax(m_dtype=m_dtype, u_dtype=u_dtype).init(jnp.ones(2))
        chex.assert_trees_all_equal(state, expected)


def test_complex_parameters():
    optimizer = scale_by_adamax(m_dtype="float32", u_dtype="uint8")
    g = {"a": jnp.array([3 + 4j, 0])}
    update, state = optimizer.update(g, optimizer.init(g))
    # To the u that is stored: 5, rounded after a division by the scale.
    _, u = moments(state)
    expected = np.array([3 + 4j, 0]) / np.array([u["a"][0], 1])
    np.testing.assert_allclose(update["a"], expected, rtol=1e-6)
    np.testing.assert_allclose(u["a"], [5, 1e-8], rtol=1 / 8)
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
    assert np.all(alone.u_scale == 1) and 1 < state.u_scale[-1] < 2


@needs_new_xla
@EVERY_STORAGE
def test_temporary_memory_is_no_more_than_optax_takes(name):
    g = jnp.ones(1_000_000)

    def temporary(optimizer):
        update = jax.jit(optimizer.update, donate_argnums=1)
        compiled = update.lower(g, optimizer.init(g)).compile(AS_USERS_DO)
        return compiled.memory_analysis().temp_size_in_bytes

    with jax.numpy_dtype_promotion("standard"):
        allowed = temporary(optax.scale_by_adamax())
    assert temporary(scale_by_adamax(**STORAGES[name])) <= allowed + 1000
