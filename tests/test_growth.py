"""``max_growth``: u grows by at most a factor in one step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import sequences
from jax import lax
from sequences import gradients, long_but, trajectory, updates_of

from adamax_jax import adamax, adamaxw, diagnose, moments, scale_by_adamax

K = 1.125
DECAYS = {"b1": 0.875, "b2": 1 - 2**-6}
BOUND = (1 - 0.875) / (1 - 0.875 / (1 - 2**-6))
# A step of a code of u, as a factor, at most; float32 has steps that do not count.
STEP_OF_U = {"float32": 1, "bfloat16": 1 + 2**-7, "uint8": 1.25}
U_DTYPES = pytest.mark.parametrize("u_dtype", STEP_OF_U)


def moments_of(states):
    """m and u after each step, from a trajectory."""
    return jax.jit(jax.vmap(moments))(states)


@pytest.mark.parametrize(
    ("u", "is_bounded"), [(1.5, False), (1.99, False), (2.01, True), (2.5, True)]
)
def test_a_u_of_more_than_twice_eps_is_bounded(u, is_bounded):
    """What is below has seen no gradient, or not for long."""
    eps = 2.0**-20
    optimizer = scale_by_adamax(eps=eps, max_growth=K)
    state = optimizer.init(np.zeros(1, "f"))._replace(u=np.float32([u * eps]))
    _, state = optimizer.update(np.ones(1, "f"), state)
    expected = K * u * eps if is_bounded else 1.0
    np.testing.assert_allclose(state.u, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "eps_inside", "nesterov"),
    long_but(
        [
            ("float64", True, False),
            ("float64", False, True),
            ("complex128", True, True),
        ],
        itertools.product(["float64", "complex128"], [True, False], [False, True]),
    ),
)
def test_it_is_the_reference_in_float64(x64, dtype, eps_inside, nesterov):
    options = DECAYS | {"nesterov": nesterov, "eps_inside": eps_inside, "max_growth": K}
    g = gradients(decades=4)
    if dtype == np.complex128:
        g = g + 1j * gradients(decades=4, seed=1)
    update, state = trajectory(scale_by_adamax(**options), g)
    update, u = np.asarray(update), np.asarray(state.u)
    for t, exact in enumerate(reference.adamax(g, **options)):
        np.testing.assert_allclose(u[t], exact.u, rtol=1e-12)
        np.testing.assert_allclose(update[t], exact.update, rtol=1e-10, atol=1e-12)


def test_a_growth_that_is_never_reached_changes_nothing():
    g = np.float32(gradients())
    plain, plain_state = trajectory(scale_by_adamax(), g)
    bounded, state = trajectory(scale_by_adamax(max_growth=1e30), g)
    np.testing.assert_array_equal(state.u, plain_state.u)
    # The compiler may join the product and the sum of the mean in one rounding.
    np.testing.assert_allclose(bounded, plain, rtol=0, atol=1e-6)


@U_DTYPES
def test_u_grows_by_the_factor_or_by_one_step_of_its_dtype(u_dtype):
    """After gradients of 1, others of 1e3: u rises to them, and not at once."""
    options = {**DECAYS, "max_growth": K, "m_dtype": "float32", "u_dtype": u_dtype}
    # Different ones, so that all codes of an octave come up.
    size = np.linspace(1, 2, 16, dtype=np.float32)
    steps = 100
    scale = np.where(np.arange(steps) < 10, 1, 100)[:, None]
    g = np.float32(size * scale)
    _, states = trajectory(scale_by_adamax(**options), g)
    u = np.asarray(moments_of(states)[1])
    growth = u[1:] / u[:-1]
    # Half a step of the dtype is the rounding of what was cut off.
    largest = max(K, STEP_OF_U[u_dtype]) * (1 + (STEP_OF_U[u_dtype] - 1) / 2)
    assert growth.max() <= largest + 1e-6
    assert np.all(growth[9:20] > 1.03)
    # It took a while, and got there.
    assert np.all(u[14] < 30)
    np.testing.assert_allclose(u[-1], g[-1], rtol=0.13)


@U_DTYPES
@pytest.mark.parametrize("eps_inside", [True, False])
def test_the_first_gradient_is_taken_whole(u_dtype, eps_inside):
    """Also if zeros came before it; they leave u at eps, which is no gradient."""
    optimizer = scale_by_adamax(
        max_growth=K, u_dtype=u_dtype, m_dtype="float32", eps_inside=eps_inside
    )
    g = np.zeros([9, 3], np.float32)
    g[[0, 1, 8], [0, 1, 2]] = 2
    update, states = trajectory(optimizer, g)
    update, u = np.asarray(update), np.asarray(moments_of(states)[1])
    for i, t in enumerate((0, 1, 8)):
        assert u[t, i] == pytest.approx(2, rel=0.13)
        correction = (1 - 0.9) / (1 - 0.9 ** (t + 1))
        assert update[t, i] == pytest.approx(correction, rel=0.14)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_u_follows_a_quantile(share):
    """Of gradients that are 1 or 0: u stays at 1 where the ones are frequent enough.

    One of them raises u by ln k, as long as it is below 1, all others lower it by
    -ln b2: it rises if share * ln k > (1 - share) * -ln b2.
    """
    k, b2, steps = 1.1, 0.98, 4000
    rises = share * np.log(k) > (1 - share) * -np.log(b2)
    assert rises == (share == 0.3)
    is_one = np.random.default_rng(0).random([steps, 50]) < share
    # u begins at 1e-3, which the first gradient sets.
    g = np.float32(np.where(np.arange(steps)[:, None] == 0, 1e-3, is_one))
    _, states = trajectory(scale_by_adamax(b2=b2, max_growth=k), g)
    u = np.asarray(states.u)[-1000:]
    assert (np.median(u) > 0.8) if rises else (np.median(u) < 1e-3)


STORAGES = sequences.STORAGES | {"one byte": sequences.ONE_BYTE}
IN_STORAGES = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


@IN_STORAGES
def test_steps_stay_within_the_bound(storage):
    """No gradient in m exceeds u, also where the rounding of u lies below it."""
    rng = np.random.default_rng(0)
    g = gradients(steps=500, size=64, decades=2).reshape(500, 8, 8)
    g *= np.where(rng.random(g.shape) < 0.02, 1e6, 1)
    # The same sign for long: what makes steps long.
    g[250:] = np.abs(g[250:])
    updates = updates_of(
        scale_by_adamax(**DECAYS, max_growth=K, **storage), jnp.asarray(g, jnp.float32)
    )
    rounding = 1.1 if storage else 1 + 1e-6
    assert np.max(np.abs(updates)) <= BOUND * rounding


@U_DTYPES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_no_gradient_exceeds_the_u_of_its_step_as_it_is_stored(u_dtype, dtype):
    """Without momentum, so that a step is the gradient by u."""
    g = np.float32(gradients(steps=200, size=64, decades=2))
    if dtype == jnp.complex64:
        g = g + np.complex64(1j) * g[::-1]
    optimizer = scale_by_adamax(
        b1=0.0, b2=0.98, max_growth=K, m_dtype="float32", u_dtype=u_dtype
    )
    size = np.abs(updates_of(optimizer, g))
    assert size.max() == pytest.approx(1, abs=2e-6)


@IN_STORAGES
def test_a_spike_holds_nothing_up(storage):
    """After a gradient of 1e6 among noise u is where it was, and steps as long."""
    rng = np.random.default_rng(0)
    g = rng.normal(size=[200, 32, 32]).astype(np.float32)
    g[100] *= 1e6
    optimizer = scale_by_adamax(b2=0.98, max_growth=1.1, **storage)
    updates, states = trajectory(optimizer, g)
    u = np.asarray(moments_of(states)[1])
    # One step by the factor, or by one code.
    assert np.all(u[100] <= 1.27 * u[99])
    rms = np.sqrt(np.mean(np.square(updates), axis=(1, 2)))
    assert 0.8 < rms[101:].mean() / rms[50:100].mean() < 1.3


@pytest.mark.parametrize("u_dtype", ["bfloat16", "uint8"])
def test_a_narrow_u_follows_the_wide_one(u_dtype):
    """Under noise, within one step of its dtype."""
    g = np.random.default_rng(0).normal(size=[2000, 100]).astype(np.float32)

    def median(u_dtype):
        optimizer = scale_by_adamax(
            b2=0.98, max_growth=1.1, m_dtype="float32", u_dtype=u_dtype
        )
        _, states = trajectory(optimizer, g)
        return np.median(np.asarray(moments_of(states)[1])[500:])

    ratio = median(u_dtype) / median("float32")
    assert 1 / STEP_OF_U[u_dtype] < ratio < STEP_OF_U[u_dtype]


@U_DTYPES
def test_float64_gradients_beside_a_narrower_u(x64, u_dtype):
    optimizer = scale_by_adamax(max_growth=K, m_dtype="float64", u_dtype=u_dtype)
    g = np.array([[1.0, 1e-3], [1e300, 1e-3], [1e300, 5e-4]])
    updates, states = trajectory(optimizer, g)
    u = np.asarray(moments_of(states)[1])
    assert updates.dtype == jnp.float64
    assert np.all(u[1:, 0] / u[:-1, 0] < 1.27)
    assert np.all(u[1:, 0] / u[:-1, 0] > 1.05)
    assert np.all(np.abs(updates) < 1.2)


def test_a_shared_u_grows_by_the_factor():
    optimizer = scale_by_adamax(**DECAYS, max_growth=K, shared_axes=-1)
    g = np.ones([2, 4, 8], np.float32)
    g[1, 0, 3], g[1, 1, 0] = 1e3, 1.06
    updates, states = jax.device_get(trajectory(optimizer, g))
    np.testing.assert_allclose(states.u[1, :, 0], [K, 1.06, 1, 1], rtol=1e-6)
    # The others of a row see their own gradients.
    expected = np.ones(8)
    expected[3] = (0.875 + K) / (0.875 + 1)
    np.testing.assert_allclose(updates[1, 0] * K, expected, rtol=1e-6)


@U_DTYPES
def test_u_never_grows_by_more_than_the_factor(u_dtype):
    """Relative to the last u, at any decay; or to the next number, where k is less."""
    b2, k = np.meshgrid([0.0, 0.5, 0.835, 0.9, 0.99, 0.999], [1.1, 1.3, 2.0, 4.0])
    start = np.linspace(1, 2, 16, dtype=np.float32)
    g = np.concatenate([[start], np.full([30, 16], 1e6, np.float32)])

    def norms(b2, k):
        optimizer = scale_by_adamax(
            0.0, b2, max_growth=k, m_dtype="float32", u_dtype=u_dtype
        )

        def step(state, g):
            state = optimizer.update(g, state)[1]
            return state, moments(state)[1]

        return lax.scan(step, optimizer.init(g[0]), g)[1]

    every = jax.jit(jax.vmap(norms))
    u = np.asarray(every(np.float32(b2.ravel()), np.float32(k.ravel())), np.float64)
    growth, k = u[:, 1:9] / u[:, :8], k.ravel()[:, None, None]
    rounding = {"float32": 1e-6, "bfloat16": 2**-8, "uint8": 1e-6}[u_dtype]
    # In uint8 one step may be more.
    allowed = np.maximum(k, 1.27) if u_dtype == "uint8" else k
    assert np.all(growth <= allowed * (1 + rounding))
    # By as much where it is not rounded; in uint8 by a code, net of the decay.
    octave = u[:, 4:9] / u[:, :5]
    assert np.all(octave >= (1.01 if u_dtype == "uint8" else k**4 * (1 - 4 * rounding)))


@pytest.mark.parametrize("u_dtype", ["bfloat16", "uint8"])
def test_a_factor_of_2_is_exact(u_dtype):
    """The stored numbers double, where b2 is a power of 2 and so is their scale."""
    optimizer = scale_by_adamax(b1=0.0, b2=0.5, max_growth=2.0, u_dtype=u_dtype)
    g = np.concatenate([[np.linspace(1, 2, 16)], np.full([8, 16], 1e6)])
    _, states = trajectory(optimizer, np.float32(g))
    u = np.asarray(moments_of(states)[1])
    np.testing.assert_array_equal(u[1:], 2 * u[:-1])


@pytest.mark.parametrize("u_dtype", ["bfloat16", "uint8"])
def test_nan_reaches_a_narrow_u_and_the_whole_slice_that_shares_it(u_dtype):
    """As without a bound: of uint8 it is the largest number, and nothing moves."""
    optimizer = scale_by_adamax(
        max_growth=2.0, m_dtype="float32", u_dtype=u_dtype, shared_axes=-1
    )
    g = np.ones([3, 2, 4], np.float32)
    g[1, 0, 0] = np.nan
    updates, states = jax.device_get(trajectory(optimizer, g))
    u = np.asarray(moments_of(states)[1])
    assert np.isnan(u[1:, 0]).all() if u_dtype == "bfloat16" else (u[1:, 0] > 2e9).all()
    assert np.isnan(updates[1:, 0, 0]).all()
    assert not np.any(np.abs(updates[1:, 0, 1:]) > 1e-6)
    np.testing.assert_allclose(updates[:, 1], 1, rtol=0.13)


def test_infinities_are_cut_off_and_nan_is_not():
    g = np.ones([3, 3], np.float32)
    g[1] = np.inf, -np.inf, np.nan
    optimizer = scale_by_adamax(**DECAYS, max_growth=K)
    updates, states = jax.device_get(trajectory(optimizer, g))
    np.testing.assert_allclose(states.u[1, :2], K, rtol=1e-6)
    assert np.all(np.isfinite(updates[:, :2]))
    assert np.all(np.isnan(updates[1:, 2]))


@pytest.mark.parametrize("u_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("k", "first"), [(1.1, 3.2e38), (1.1, 3.4e38), (100.0, 1e37), (1e30, 1e9)]
)
def test_an_infinity_is_cut_off_where_the_product_overflows(k, first, u_dtype):
    optimizer = scale_by_adamax(
        b2=0.99, max_growth=k, m_dtype="float32", u_dtype=u_dtype
    )
    updates, states = trajectory(optimizer, np.float32([[first], [np.inf], [1.0]]))
    assert np.all(np.isfinite(updates))
    assert np.all(np.isfinite(moments_of(states)[1]))


@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("u_dtype", ["float32", "uint8"])
def test_after_a_long_pause_any_gradient_is_taken(u_dtype, eps_inside):
    """When u has decayed to twice eps; before, it grows from where it is."""
    optimizer = scale_by_adamax(
        b2=0.98, max_growth=K, m_dtype="float32", u_dtype=u_dtype, eps_inside=eps_inside
    )
    for pause, is_forgotten in ((700, False), (950, True)):
        g = np.zeros([pause + 2, 1], np.float32)
        g[0], g[-1] = 1, 1e3
        updates, states = trajectory(optimizer, g)
        u = np.asarray(moments_of(states)[1])[:, 0]
        assert np.all(np.abs(updates) < 1.3)
        assert (u[-2] <= 2.2e-8) == is_forgotten
        assert (u[-1] > 900) == is_forgotten
        if not is_forgotten:
            assert 1.1 < u[-1] / u[-2] < 1.27


def test_a_u_at_the_smallest_number_takes_any_gradient_without_eps():
    """Where the floor of u is that of its dtype, and not eps."""
    optimizer = scale_by_adamax(
        b1=0.5, b2=0.9, eps=0.0, max_growth=K, m_dtype="float32", u_dtype="uint8"
    )
    g = np.zeros([502, 1], np.float32)
    g[0], g[-1] = 1, 10
    _, states = trajectory(optimizer, g)
    u = np.asarray(moments_of(states)[1])[:, 0]
    assert 0 < u[-2] < 5e-3
    assert u[-1] == pytest.approx(10, rel=0.13)


def test_none_leaves_a_leaf_as_it_is():
    optimizer = scale_by_adamax(max_growth=K)
    params = {"a": np.ones(2, "f"), "b": np.ones(2, "f")}
    _, state = optimizer.update(params, optimizer.init(params))
    _, after = optimizer.update({"a": np.full(2, 9.0, "f"), "b": None}, state)
    np.testing.assert_array_equal(after.u["b"], state.u["b"])
    np.testing.assert_allclose(after.u["a"], K, rtol=1e-6)


@pytest.mark.parametrize("make", [adamax, adamaxw])
def test_it_may_be_injected_and_scheduled(make):
    g = np.float32(gradients(steps=20, decades=2))
    injected = optax.inject_hyperparams(make)(
        0.1, max_growth=lambda count: jnp.where(count < 10, 1e9, 1.5)
    )

    def last_u(optimizer, state=None):
        params = np.zeros(g.shape[1], np.float32)
        state = optimizer.init(params)
        step = jax.jit(optimizer.update)
        for x in g:
            _, state = step(x, state, params)
        return optax.tree.get(state, "u")

    late, plain = last_u(injected), last_u(make(0.1))
    late, plain = np.asarray(late), np.asarray(plain)
    assert np.all(late <= plain)
    assert np.any(late < plain)


def test_derivatives_are_those_of_finite_differences(x64):
    g = gradients(steps=6, size=8, decades=3)[:, 1:] + 0.5

    def loss(point):
        scale, k, b2 = point
        optimizer = scale_by_adamax(b2=b2, max_growth=k)
        state = optimizer.init(jnp.zeros(7))
        total = 0.0
        for x in g:
            update, state = optimizer.update(jnp.asarray(x) * scale**2, state)
            total += jnp.sum(update * jnp.arange(7.0))
            scale = scale + 0.01 * jnp.tanh(total)
        return total

    at, step = np.array([1.1, 1.2, 0.9]), 1e-6
    value = jax.jit(loss)
    expected = [(value(at + d) - value(at - d)) / (2 * step) for d in step * np.eye(3)]
    actual = jax.jit(jax.grad(loss))(at)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "value", [1, 0.5, -2.0, 0, np.inf, np.nan, np.float32(1), 1 + 1e-9, 1e39]
)
def test_numbers_that_are_no_growth_are_refused(value):
    for make in (scale_by_adamax, adamax, adamaxw):
        with pytest.raises(ValueError, match=r"max_growth must be .* got"):
            make(max_growth=value)


@pytest.mark.parametrize("value", ["1.1", jnp.ones(2), 1.1 + 0j, jnp.bfloat16(1.1)])
def test_what_is_no_number_is_refused(value):
    with pytest.raises((TypeError, ValueError), match="max_growth"):
        adamax(max_growth=value)


def test_dead_units_are_seen_as_before():
    optimizer = scale_by_adamax(max_growth=K)
    state = optimizer.init(np.zeros(4, np.float32))
    for _ in range(3):
        _, state = optimizer.update(np.float32([0, 1, 2, 3]), state)
    assert float(jax.jit(diagnose)(state).total["unseen"]) == 0.25


# Noise of mean 0 and deviation 1: where theta settles, by the factor, and the fraction
# of the gradients that is cut off, of which the docstring tells.
SKEWED = {
    "exponential": (lambda x: -1 - np.log(x), {1.1: 0.10, 2: 0.03, None: 0.025}),
    "events": (
        lambda x: ((x < 0.05) - 0.05) / (0.05 * 0.95) ** 0.5,
        {1.1: 0.23, 2: 0.03, None: 0.03},
    ),
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("noise", SKEWED)
def test_the_mean_of_cut_off_gradients_is_biased_where_they_are_skewed(noise):
    """Loss: half the mean of (theta + noise)^2, least at 0; events in 5 % of steps."""
    make, expected = SKEWED[noise]
    drawn = 1 - np.random.default_rng(0).random((4000, 128))
    noises = jnp.asarray(make(drawn), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def settled(optimizer):
        def step(carry, now):
            theta, state = carry
            update, state = optimizer.update(theta + now, state)
            return (theta + update, state), theta

        start = jnp.zeros(128), optimizer.init(jnp.zeros(128))
        return jnp.mean(lax.scan(step, start, noises)[1][2000:])

    for k, bias in expected.items():
        found = float(settled(adamax(1e-3, b2=0.99, max_growth=k)))
        assert found == pytest.approx(bias, abs=0.01), k
    assert abs(settled(optax.adam(1e-3))) < 0.01


@pytest.mark.parametrize(
    ("degrees", "k", "fraction"),
    [(1e6, 1.1, 0.079), (1e6, 2.0, 0.0004), (0.3, 1.1, 0.0955), (0.3, 2.0, 0.0135)],
)
def test_which_fraction_of_the_gradients_is_cut_off(degrees, k, fraction):
    """At most s, where s ln k = -(1 - s) ln b2; Student's t, normal or heavy-tailed."""
    g = np.random.default_rng(0).standard_t(degrees, (2000, 500)).astype(np.float32)
    _, state = trajectory(scale_by_adamax(b2=0.99, max_growth=k), jnp.asarray(g))
    found = (np.abs(g[500:]) > 1.00001 * np.asarray(state.u)[500:]).mean()
    assert found == pytest.approx(fraction, rel=0.03, abs=1e-4)
    s = np.log(0.99) / (np.log(0.99) - np.log(k))
    assert found < 1.02 * s
