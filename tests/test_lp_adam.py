"""The L^p family: Adam at 2, AdaMax at infinity, and right in between."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sequences
from dying import DECAYS, dying_gradients, exact_mean_beside, noise_of_rounding
from sequences import compiled_trajectory, descend, long, long_but, trajectory
from versions import as_users_compile

from adamax_jax import (
    ScaleByLpAdamState,
    adamax,
    adamaxw,
    lp_adam,
    lp_adamw,
    scale_by_adamax,
    scale_by_lp_adam,
)

ORDERS = (1, 1.5, 2, 3, 4, 6, 8, 16, 64, 1024, 1e4, 1e6)
# Where v = u^p, in float32, is off by more than 1 % or not finite.
TEXTBOOK_FAILS = (8, 16, 64, 1024, 1e4, 1e6)
B2 = 0.999


def gradients(steps=2000, size=64, **options):
    """Over twelve decades, zeros included."""
    return jnp.asarray(sequences.gradients(steps, size, **options), jnp.float32)


def exact_norm(g, p, b2=B2):
    """u of every step in float64, from logarithms of the paper's v and 1 - b2^(p t)."""
    log_b2 = np.log(b2)
    log_weight = np.log(-np.expm1(p * log_b2))
    log_v = np.full(g.shape[1:], -np.inf)
    norms = []
    with np.errstate(divide="ignore"):
        for t, norm in enumerate(np.abs(np.asarray(g, np.float64)), 1):
            log_v = np.logaddexp(p * log_b2 + log_v, log_weight + p * np.log(norm))
            norms.append(np.exp((log_v - np.log(-np.expm1(p * t * log_b2))) / p))
    return np.array(norms)


def exact_updates(g, p, b1=0.9, b2=B2, eps=1e-8, nesterov=False, eps_inside=False):
    """The updates in float64."""
    m = np.zeros(g.shape[1:])
    updates = []
    g = np.asarray(g, np.float64)
    norms = exact_norm(np.abs(g) + eps if eps_inside else g, p, b2)
    for t, (now, u) in enumerate(zip(g, norms, strict=True), 1):
        m = b1 * m + (1 - b1) * now
        m_hat = m / (1 - b1**t)
        if nesterov:
            m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * now / (1 - b1**t)
        updates.append(m_hat / (u if eps_inside else u + eps))
    return np.array(updates)


def relative_error(actual, exact):
    """The largest, where exact is not 0; 0 must be met exactly."""
    actual = np.asarray(actual, np.float64)
    assert np.all(actual[exact == 0] == 0)
    there = exact != 0
    return np.max(np.abs(actual[there] / exact[there] - 1))


@functools.cache
def with_traced_numbers(jit=jax.jit, **options):
    """A compiled run, one for all hyperparameters: a function of them and of g."""

    @jit
    def run(numbers, g):
        return compiled_trajectory(scale_by_lp_adam(**numbers, **options))(g)

    return lambda g, **numbers: run(jax.tree.map(jnp.float32, numbers), g)


@functools.cache
def exact_norm_of_gradients(p):
    return exact_norm(gradients(), p)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("traced", [False, True])
def test_u_is_the_norm_for_every_p(p, traced):
    g = gradients()
    updates, state = (
        with_traced_numbers()(g, p=p) if traced else trajectory(scale_by_lp_adam(p), g)
    )
    assert np.isfinite(updates).all()
    assert np.isfinite(state.m).all()
    assert relative_error(state.u, exact_norm_of_gradients(p)) < 1e-5


@jax.jit
def by_the_textbook(g, p):
    """v = b2^p v + (1 - b2^p) |g|^p."""

    def step(v, now):
        t, norm = now
        decay = jnp.float32(B2) ** p
        v = decay * v + (1 - decay) * norm**p
        return v, (v / (1 - decay**t)) ** (1 / p)

    steps = jnp.arange(1.0, len(g) + 1)
    return jax.lax.scan(step, jnp.zeros(g.shape[1:]), (steps, jnp.abs(g)))[1]


@pytest.mark.parametrize("p", ORDERS)
def test_the_textbook_recurrence_fails_where_it_is_known_to(p):
    """On the same gradients."""
    u = by_the_textbook(gradients(), jnp.float32(p))
    with np.errstate(all="ignore"):
        error = np.abs(np.asarray(u, np.float64) / exact_norm_of_gradients(p) - 1)
    wrong = ~(error[:, 1:] < 0.01)
    assert (wrong.mean() > 0.2) == (p in TEXTBOOK_FAILS)


@pytest.mark.parametrize("p", [1, 2, 3.5, 16])
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True}, {"nesterov": True, "eps_inside": True}], ids=str
)
def test_updates_against_float64(p, options):
    g = gradients(1000)
    numbers = {"p": p, "b1": 0.8, "b2": 0.99, "eps": 1e-3}
    exact = exact_updates(g, **numbers, **options)
    known, _ = trajectory(scale_by_lp_adam(**numbers, **options), g)
    traced, _ = with_traced_numbers(**options)(g, **numbers)
    for updates in (known, traced):
        # m is a sum, in which terms may cancel: an update is compared to those around
        # it.
        np.testing.assert_allclose(updates, exact, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("p", long_but([1.5, 3, 64], [1, 1.5, 2, 3, 8, 64, 1e4]))
def test_u_does_not_drift(p):
    """Errors of single steps are not added up, whatever the gradients."""
    steps = 8000
    random = np.random.default_rng(0)
    sizes = np.logspace(-1, 1, 16)
    kinds = {
        "constant": np.ones((steps, 16)),
        "a drop": np.where(np.arange(steps) < 3000, 1.0, 1e-3)[:, None],
        "rare": np.where(random.random((steps, 16)) < 0.02, 1.0, 0.0),
        "normal": random.standard_normal((steps, 16)),
        "settled": np.where(np.arange(steps) < 100, 1.0, 0.2)[:, None],
    }
    g = jnp.asarray(np.stack([kind * sizes for kind in kinds.values()], 1), jnp.float32)
    _, state = trajectory(scale_by_lp_adam(p), g)
    for i, kind in enumerate(kinds):
        error = relative_error(state.u[:, i], exact_norm(g[:, i], p))
        # A change below half a unit in the last place is none.
        assert error < (1e-4 if kind == "settled" else 1e-5), kind


@pytest.mark.parametrize("b2", [0.0, 1e-8, 1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_small_decay_rates(b2, p):
    """Of a gradient there is next to nothing left, but that to all digits."""
    g = jnp.array([1.0, 1e-3 * b2 + 1e-20, 2.0])
    _, state = trajectory(scale_by_lp_adam(p, b2=b2), g)
    with np.errstate(divide="ignore"):
        exact = exact_norm(g, p, max(b2, 1e-30))
    assert relative_error(state.u, exact) < 2e-6


@pytest.mark.parametrize("nesterov", [False, True])
def test_p_of_2_is_adam(nesterov, x64):
    """In float64; in float32 Optax's own bias correction is off by 1.7e-5."""
    g = jnp.asarray(sequences.gradients(1000, 64), jnp.float64)
    ours, state = trajectory(scale_by_lp_adam(2, b2=0.999**0.5, nesterov=nesterov), g)
    with jax.numpy_dtype_promotion("standard"):
        theirs, other = trajectory(optax.scale_by_adam(b2=0.999, nesterov=nesterov), g)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-12)
    t = np.arange(1, 1001)[:, None]
    np.testing.assert_allclose(state.u**2, other.nu / (1 - 0.999**t), rtol=1e-10)


def test_p_of_2_is_adam_in_float32():
    g = gradients(1000)
    ours, _ = trajectory(scale_by_lp_adam(2, b2=0.999**0.5), g)
    with jax.numpy_dtype_promotion("standard"):
        theirs, _ = trajectory(optax.scale_by_adam(b2=0.999), g)
    exact = exact_updates(g, 2, b2=0.999**0.5)
    ours, theirs = (np.abs(np.asarray(x) - exact).max() for x in (ours, theirs))
    # Of updates of the order of 1.
    assert ours < 1e-5
    assert theirs < 5e-5


@pytest.mark.parametrize(
    ("eps_inside", "options"),
    long_but(
        [(True, {}), (False, {"nesterov": True}), (True, {"eps": 0.0})],
        itertools.product([True, False], [{}, {"nesterov": True}, {"eps": 0.0}]),
    ),
)
def test_p_of_infinity_is_adamax_to_the_bit(eps_inside, options):
    g = gradients(1000)
    options = options | {"eps_inside": eps_inside}
    expected, other = trajectory(scale_by_adamax(**options), g, as_users_compile)
    known = trajectory(scale_by_lp_adam(jnp.inf, **options), g, as_users_compile)
    traced = with_traced_numbers(as_users_compile, **options)(g, p=jnp.inf)
    for updates, state in (known, traced):
        np.testing.assert_array_equal(state.u, other.u)
        np.testing.assert_array_equal(state.m, other.m)
        np.testing.assert_array_equal(updates, expected)


def after_ties(p, g):
    """The sum of the last updates and u, after gradients that are the decayed u."""
    transformation = scale_by_lp_adam(p, b2=0.5)
    state = transformation.init(g)
    for scale in (1.0, 0.5, 0.25):
        update, state = transformation.update(scale * g, state)
    return jnp.sum(update), state.u


after_ties_with_derivatives = jax.jit(
    jax.value_and_grad(after_ties, (0, 1), has_aux=True)
)


@pytest.mark.parametrize("p", [jnp.inf, 1e30, 1e39, 3.4e38])
def test_ties_at_infinity(p):
    """A gradient that is exactly the decayed u; and finite derivatives."""
    g = jnp.ones(3)
    _, u = jax.jit(functools.partial(after_ties, p))(g)
    np.testing.assert_array_equal(u, 0.25 * g)
    in_float32 = jnp.float32(p if p <= 3.4e38 else jnp.inf)
    (_, u), (by_p, by_g) = after_ties_with_derivatives(in_float32, g)
    np.testing.assert_array_equal(u, 0.25 * g)
    assert np.isfinite(by_p) and np.isfinite(by_g).all()


def test_means_of_few_bits_do_not_overflow():
    for dtype in (jnp.float16, jnp.float8_e4m3fn):
        transformation = scale_by_lp_adam(3)
        state = transformation.init(jnp.ones(1, dtype))
        types = jax.tree.map(jax.typeof, state)
        for g in (1e6, 1.0, 1.0):
            update, state = transformation.update(jnp.full(1, g, jnp.float32), state)
            assert np.isfinite(update).all()
        assert jax.tree.map(jax.typeof, state) == types


def test_weakly_typed_parameters_and_a_tiny_eps():
    """Which its weight makes subnormal, that is 0, where it is late."""
    transformation = scale_by_lp_adam(1, eps=1e-36, eps_inside=True)
    params = jnp.asarray(0.0)
    state = transformation.init(params)
    types = jax.tree.map(jax.typeof, state)
    for g in (params, None, None, None, params):
        update, state = transformation.update(g, state)
        assert g is None or update == 0
        assert jax.tree.map(jax.typeof, state) == types
    state = state._replace(m=0 * state.m, u=0 * state.u, count=jnp.int32(1000))
    update, state = transformation.update(params, state)
    assert update == 0
    assert state.u == 0


def test_aliases_are_adamax_at_infinity():
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.standard_normal(5), jnp.float32)
    g = jnp.asarray(rng.standard_normal((20, 5)), jnp.float32)
    for ours, theirs in (
        (lp_adam(0.1, jnp.inf, eps_inside=True), adamax(0.1)),
        (
            lp_adamw(0.1, jnp.inf, weight_decay=0.2, eps_inside=True),
            adamaxw(0.1, weight_decay=0.2),
        ),
    ):
        pairs = zip(descend(ours, params, g), descend(theirs, params, g), strict=True)
        for actual, expected in pairs:
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("p", [1, 2, 3.5, 100, jnp.inf])
def test_the_first_step_is_the_sign(p):
    g = jnp.array([3e-6, -2.0, 5e4, 0.0])
    transformation = scale_by_lp_adam(p, eps=0.0)
    update, _ = transformation.update(g, transformation.init(g))
    np.testing.assert_allclose(update, [1, -1, 1, 0], rtol=1e-6)


def squared_length(p, g, scales):
    """Of a few updates along a gradient of several sizes."""
    transformation = scale_by_lp_adam(p)
    state = transformation.init(g)
    total = 0.0
    for scale in scales:
        update, state = transformation.update(scale * g, state)
        total += jnp.sum(update**2)
    return total


by_p_and_g = jax.jit(jax.grad(squared_length, (0, 1)))
by_g_alone = jax.jit(jax.grad(squared_length, 1), static_argnums=0)


@pytest.mark.parametrize("p", [1.0, 3.5, 1000.0])
@pytest.mark.parametrize(
    "g", [[0.0, 0.0], [1.0, 0.0], [1e-15, 1e15], [2.0, 2.0], [1e-25, 1e25]], ids=str
)
@pytest.mark.parametrize(
    "scales", [(1.0, 0.0, 0.5), (1e12, 1e-12, 1e12), (1.0, 1.0, 1.0)]
)
def test_derivatives_are_finite(p, g, scales):
    """Through the updates by the gradient, and by p, which is traced for that."""
    g = jnp.array(g)
    by_p, by_g = by_p_and_g(jnp.float32(p), g, scales)
    assert np.isfinite(by_p)
    assert np.isfinite(by_g).all()
    assert np.isfinite(by_g_alone(p, g, scales)).all()


@pytest.mark.parametrize("traced", [False, True])
def test_derivatives_at_a_tie(traced):
    """Where the old u and the new gradient weigh the same, to the bit."""

    def next_u(u, g, p):
        transformation = scale_by_lp_adam(p, b2=0.75)
        state = transformation.init(g)._replace(count=jnp.int32(2000), u=u)
        return transformation.update(g, state)[1].u

    u, g = jnp.float32(1), jnp.float32(3)
    by_u, by_g = jax.grad(next_u, (0, 1))(u, g, jnp.float32(1) if traced else 1)
    np.testing.assert_allclose([by_u, by_g], [0.75, 0.25], rtol=1e-6)


def sine_of_updates(g, p):
    return jnp.sum(jnp.sin(trajectory(scale_by_lp_adam(p), g)[0]))


hessian_at_known_p = jax.jit(jax.hessian(sine_of_updates), static_argnums=1)
hessian_at_traced_p = jax.jit(jax.hessian(sine_of_updates))


@pytest.mark.parametrize("p", long_but([3.5], [2.0, 3.5, 100.0]))
def test_second_derivatives_are_finite(p):
    g = jnp.array([[1.0], [0.7], [0.0], [2.0]])
    assert np.isfinite(hessian_at_known_p(g, p)).all()
    assert np.isfinite(hessian_at_traced_p(g, jnp.float32(p))).all()


@functools.cache
def jacobians(rule, eps):
    """By the gradients and the numbers, backwards and forwards, compiled."""

    def length(g, numbers):
        return jnp.sum(trajectory(rule(**numbers, eps=eps), g)[0])

    return jax.jit(
        lambda *args: [d(length, (0, 1))(*args) for d in (jax.jacrev, jax.jacfwd)]
    )


@pytest.mark.parametrize(
    ("scale", "eps"),
    long_but([(1e-25, 0.0)], [(1e-25, 0.0), (1e25, 0.0), (1e25, 1e-8)]),
)
@pytest.mark.parametrize(
    ("rule", "numbers"), [(scale_by_adamax, {}), (scale_by_lp_adam, {"p": 3.0})]
)
def test_derivatives_without_a_floor(rule, numbers, scale, eps):
    """Where the square of the denominator vanishes or overflows."""
    g = scale * jnp.array([[1.0], [0.5], [2.0]])
    numbers = jax.tree.map(jnp.float32, numbers | {"b1": 0.9, "b2": 0.999})
    by_all = jacobians(rule, eps)(g, numbers)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(by_all))


@functools.cache
def value_and_gradient(known_p, eps_inside):
    """Compiled, of some gradients and hyperparameters, p among them if it is traced."""

    def value(point):
        numbers = dict(point) if known_p is None else {"p": known_p, **point}
        g = numbers.pop("g")
        transformation = scale_by_lp_adam(**numbers, eps_inside=eps_inside)
        return jnp.sum(jnp.sin(trajectory(transformation, g)[0]))

    return jax.jit(jax.value_and_grad(value))


@pytest.mark.parametrize(
    ("p", "traced", "eps_inside"),
    [
        (1.0, True, True),
        (2.0, False, False),
        (3.5, True, False),
        long((16.0, False, True)),
        long((1000.0, True, True)),
    ],
)
def test_derivatives_are_right(p, traced, eps_inside, x64):
    """By the gradients and all hyperparameters, against differences."""
    g = jnp.asarray(sequences.gradients(6, 4, decades=1, zeros=0), jnp.float64)
    point = {"g": g, "b1": 0.9, "b2": 0.99, "eps": 1e-2}
    if traced:
        point["p"] = p
    point = jax.tree.map(jnp.float64, point)
    run = value_and_gradient(p if not traced else None, eps_inside)
    h = 1e-6
    _, gradient = run(point)
    for seed in range(3):
        random = np.random.default_rng(seed)
        # Of a size with each number, so that all stay in their ranges.
        d = jax.tree.map(lambda x, r=random: x * r.standard_normal(x.shape), point)
        ahead, _ = run(jax.tree.map(lambda x, d: x + h * d, point, d))
        behind, _ = run(jax.tree.map(lambda x, d: x - h * d, point, d))
        expected = (ahead - behind) / (2 * h)
        actual = sum(
            jnp.sum(a * b)
            for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(d), strict=True)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-8)


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1))
def by_decay_rates(b1, b2):
    g = jnp.array([[1.0, 0.5], [0.5, 2.0], [1.0, 0.0]])
    return jnp.sum(trajectory(scale_by_lp_adam(2.0, b1, b2), g)[0])


@pytest.mark.parametrize("b2", [0.0, 1e-9, 3e-8])
def test_derivatives_by_a_small_decay_rate(b2):
    assert np.isfinite(by_decay_rates(jnp.float32(b2), jnp.float32(b2))).all()


def test_the_last_count():
    """It stays there, and its product with p = infinity has derivatives."""

    def length(p, b2):
        transformation = scale_by_lp_adam(p, b2=b2)
        state = transformation.init(jnp.ones(2))
        state = state._replace(count=jnp.int32(2**31 - 2), u=jnp.ones(2))
        total = 0.0
        for _ in range(3):
            update, state = transformation.update(jnp.array([0.5, 2.0]), state)
            total += jnp.sum(update)
        return total, state.count

    by_numbers = jax.jit(jax.grad(length, (0, 1), has_aux=True))
    for p in (2.5, jnp.inf):
        derivatives, count = by_numbers(jnp.float32(p), jnp.float32(0.999))
        assert np.isfinite(derivatives).all()
        assert count == 2**31 - 1


@pytest.mark.parametrize("steps", [4, 10, 300, 1000])
def test_p_goes_to_infinity_by_its_inverse(steps):
    optimizer = optax.inject_hyperparams(lp_adam)(
        0.1, p=lambda count: 2 / jnp.maximum(1 - count / steps, 0)
    )
    g = jnp.ones(2)

    def step(state, _):
        updates, state = optimizer.update(g, state)
        return state, (updates, state.hyperparams["p"])

    # Compiled, where the division becomes a product.
    with jax.numpy_dtype_promotion("standard"):
        run = jax.jit(lambda: jax.lax.scan(step, optimizer.init(g), length=steps + 2))
        _, (updates, orders) = run()
    assert orders[0] == 2
    assert orders[-1] == jnp.inf
    assert np.all(np.diff(orders[: steps - 1]) > 0)
    np.testing.assert_allclose(updates, -0.1, rtol=1e-5)


def test_hyperparameters_of_any_dtype(x64):
    """With 64 bits allowed and strict promotion, which the suite asks for."""
    g = jnp.ones(2, jnp.float32)
    for numbers in (
        {"p": jnp.float32(2), "b2": jnp.float32(0.999)},
        {"p": jnp.int32(2), "b1": jnp.float64(0.9), "eps": jnp.float32(1e-8)},
    ):
        transformation = scale_by_lp_adam(**numbers)
        update, _ = transformation.update(g, transformation.init(g))
        assert update.dtype == jnp.float32
        np.testing.assert_allclose(update, 1, rtol=1e-6)


LONGEST = {1: 100, 1.5: 11.83, 2: 5.15, 3: 2.51, 8: 1.24, 64: 1.0017, np.inf: 1.0091}


def worst_gradients(p, age, b1=0.9):
    """For which Hölder's inequality is an equality; the largest is 1."""
    if p == 1:
        return np.where(age == 0, 1.0, 0.0)
    # |g|^(p - 1) is in proportion to the weight in m by that in u.
    log_ratio = np.log(b1) / p - np.log(B2) if p < np.inf else -np.log(B2)
    log_g = age * log_ratio * (p / (p - 1) if p < np.inf else 1)
    # Float32's subnormal numbers, which would count as 0, are kept out.
    return np.exp(np.maximum(log_g - log_g.max(), -60))


@pytest.mark.parametrize("p", LONGEST)
def test_the_longest_step(p):
    """The bound in How it works is approached, and never passed."""
    b1, steps = 0.9, 10_000
    q = 1 / (1 - 1 / p) if p > 1 else np.inf
    bound = (1 - b1) / (-np.expm1(p * np.log(B2))) ** (1 / p)
    bound /= (1 - (b1 / B2) ** q) ** (1 / q)
    assert bound == pytest.approx(LONGEST[p], rel=2e-3)
    worst = worst_gradients(p, np.arange(steps)[::-1])
    noise = np.random.default_rng(0).standard_t(2, steps)
    g = jnp.asarray(np.stack([worst, noise], axis=1), jnp.float32)
    updates, _ = trajectory(scale_by_lp_adam(p, eps=0.0), g)
    assert np.abs(updates).max() <= bound * (1 + 1e-5)
    assert updates[-1, 0] == pytest.approx(bound, rel=2e-4)


ORDERS_IN_TIME = {
    "a slow rise": lambda t: min(2 + 6 * t / 1000, 8),
    "a jump to the maximum": lambda t: 2.0 if t < 100 else np.inf,
    "a fall": lambda t: max(64 - t, 1.0),
}


@pytest.mark.parametrize("order", ORDERS_IN_TIME.values(), ids=ORDERS_IN_TIME)
def test_u_is_a_mean_whatever_p_does(order):
    """A constant gradient's is that gradient, and u lies between the extremes."""
    steps = 1200
    transformation = optax.inject_hyperparams(
        scale_by_lp_adam, hyperparam_dtype=jnp.float32
    )(jnp.float32(2))
    noise = np.random.default_rng(0).uniform(0.5, 2, steps)
    g = jnp.asarray(np.stack([np.full(steps, 3.0), noise], axis=1), jnp.float32)
    orders = jnp.asarray([order(t) for t in range(steps)], jnp.float32)

    def step(state, now):
        g, p = now
        state = state._replace(hyperparams=state.hyperparams | {"p": p})
        update, state = transformation.update(g, state)
        return state, (update, state.inner_state.u)

    _, (updates, u) = jax.lax.scan(step, transformation.init(g[0]), (g, orders))
    np.testing.assert_allclose(updates[:, 0], 1, rtol=2e-6)
    np.testing.assert_allclose(u[:, 0], 3, rtol=2e-6)
    assert np.all(u[:, 1] > 0.5)
    assert np.all(u[:, 1] < 2)


def test_p_is_scheduled_with_one_compilation():
    traces = []

    def order(count):
        traces.append(count)
        return jnp.where(count < 2, 2.0, jnp.inf)

    optimizer = optax.inject_hyperparams(lp_adam)(0.1, p=order)
    params = jnp.ones(3)
    state = optimizer.init(params)
    traces.clear()
    step = jax.jit(optimizer.update)
    for i in range(4):
        updates, state = step(jnp.full(3, 0.5**i), state, params)
    assert len(traces) == 1
    assert state.hyperparams["p"] == jnp.inf
    assert np.isfinite(updates).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_have_a_float32_norm(dtype):
    g = gradients(300, 16, decades=2).astype(dtype)
    updates, state = trajectory(scale_by_lp_adam(3), g)
    assert updates.dtype == dtype
    assert state.m.dtype == jnp.bfloat16
    assert state.u.dtype == jnp.float32
    exact = exact_norm(g.astype(jnp.float32), 3)
    assert relative_error(state.u, exact) < 2e-5
    assert np.isfinite(updates.astype(jnp.float32)).all()


@functools.cache
def exact_dying_mean(p):
    return exact_mean_beside(exact_dying_norm(p), eps=1e-8)


def exact_dying_norm(p):
    g = dying_gradients()
    return exact_norm(g, p, b2=np.float64(np.float32(B2)))


@pytest.mark.parametrize("p", [2.0, 8.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_means_of_half_precision_parameters_die(dtype, p):
    """Travel and last step over 20,000 steps, within 4 standard deviations.

    And 1e-4, to which u is known.
    """

    def run(b1, g):
        optimizer = scale_by_lp_adam(p, b1=b1)

        def step(state, g_t):
            update, state = optimizer.update(g_t, state)
            return state, update

        state = optimizer.init(jnp.zeros(g.shape[1], dtype))
        return jax.lax.scan(step, state, g)[1]

    every = jax.jit(jax.vmap(run, in_axes=(0, None)))
    updates = every(jnp.asarray(DECAYS), jnp.asarray(dying_gradients()))
    actual = np.asarray(updates, np.float64)
    exact = exact_dying_mean(p)
    steps = exact.ratio * exact.correction
    travel, last = noise_of_rounding(exact, "bfloat16")
    size = np.abs(steps)
    error = np.abs(actual.sum(axis=1) - steps.sum(axis=0))
    assert np.all(error <= 1e-4 * size.sum(axis=0) + 4 * travel)
    error = np.abs(actual[:, -1] - steps[-1])
    assert np.all(error <= 1e-4 * size[-1] + 4 * last + 1e-12)
    ended = [0, 1, 8, 9]
    assert np.all(np.abs(actual[:, -1, ended]) < 1e-12)


def test_complex_gradients_count_by_their_modulus():
    re, im = (gradients(500, seed=seed) for seed in (0, 1))
    g = jax.lax.complex(re, im)
    updates, state = trajectory(scale_by_lp_adam(3), g)
    assert state.u.dtype == jnp.float32
    norm = exact_norm(np.hypot(np.float64(re), np.float64(im)), 3)
    assert relative_error(state.u, norm) < 1e-5
    # Of each part as of a real gradient beside the same norm.
    m = np.zeros(g.shape[1:], complex)
    for t, (now, u, update) in enumerate(zip(g, norm, updates, strict=True), 1):
        m = 0.9 * m + 0.1 * np.asarray(now, np.complex128)
        exact = m / (1 - 0.9**t) / (u + 1e-8)
        np.testing.assert_allclose(update, exact, rtol=1e-5, atol=1e-6)


def test_state_keeps_its_types_and_what_has_no_gradient():
    params = {"a": jnp.ones(3), "b": jnp.ones([2, 0]), "c": jnp.float32(1)}
    transformation = scale_by_lp_adam(3)
    state = transformation.init(params)
    assert isinstance(state, ScaleByLpAdamState)
    types = jax.tree.map(jax.typeof, state)
    for update in (transformation.update, jax.jit(transformation.update)):
        updates, new = update(params, state, params)
        assert jax.tree.map(jax.typeof, new) == types
        assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)
    updates, last = transformation.update(params | {"a": None}, new)
    assert updates["a"] is None
    np.testing.assert_array_equal(last.u["a"], new.u["a"])
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sum(x.nbytes for x in arrays) == 8 * 3


@pytest.mark.parametrize("p", [0.5, 0, -1, float("nan")])
def test_p_below_1_is_refused(p):
    with pytest.raises(ValueError, match="p must be at least 1, or infinity, got"):
        lp_adam(0.1, p)


def test_what_else_is_refused():
    with pytest.raises(TypeError, match=r"p must be a number.*inject_hyperparams"):
        lp_adam(0.1, lambda count: 2.0)
    with pytest.raises(TypeError, match="p has dtype bfloat16"):
        lp_adam(0.1, jnp.bfloat16(2))
    with pytest.raises(ValueError, match=r"b2 must be in \[0, 1\)"):
        lp_adam(0.1, 2, b2=1.0)
    optimizer = lp_adamw(0.1, 2)
    with pytest.raises(ValueError, match="parameters"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


def operations(optimizer):
    g = jnp.ones(1000)
    text = jax.jit(optimizer.update).lower(g, optimizer.init(g)).as_text()
    found = re.findall(
        r"stablehlo\.(log|log_plus_one|exponential|exponential_minus_one|sqrt|power) "
        r".*tensor<1000xf32>",
        text,
    )
    return collections.Counter(found)


def test_what_it_costs():
    """A logarithm and an exponential for each number more than Adam, whose root falls.

    Where p is not a small whole number that is known when it is compiled, two of each.
    For p = 2 the root, as Adam.
    """
    for p in (1, 3.0, 16, np.float32(64)):
        assert operations(scale_by_lp_adam(p)) == {
            "exponential_minus_one": 1,
            "log_plus_one": 1,
        }
    for p in (2.5, 65, jnp.float32(3)):
        assert operations(scale_by_lp_adam(p)) == {
            "log": 1,
            "exponential": 1,
            "exponential_minus_one": 1,
            "log_plus_one": 1,
        }
    assert operations(scale_by_lp_adam(jnp.inf)) == {}
    assert operations(scale_by_lp_adam(2)) == {"sqrt": 1}
    with jax.numpy_dtype_promotion("standard"):
        assert operations(optax.scale_by_adam()) == {"sqrt": 1}
