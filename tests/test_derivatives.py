"""Derivatives through several updates of training, as meta-learning takes them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import long_but
from versions import as_users_compile

from adamax_jax import (
    adamax,
    adamaxw,
    lp_adam,
    master_weights,
    scale_by_adamax,
)

STEPS = 5
RULES = {
    "adamax": adamaxw,
    "nesterov": functools.partial(adamaxw, nesterov=True),
    "eps outside": functools.partial(adamaxw, eps_inside=False),
    "bounded growth": functools.partial(adamaxw, max_growth=1.3),
    "shared u": functools.partial(adamaxw, shared_axes=-1),
    "shared u, bounded growth": functools.partial(
        adamaxw, shared_axes=-1, max_growth=1.3
    ),
}
AT = {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 0.1, "weight_decay": 0.1}
FAMILY = AT | {"p": 3.0}
TARGETS = np.random.default_rng(0).normal(size=[STEPS, 2, 3])


def make_family(p, weight_decay, **kwargs):
    return optax.chain(optax.add_decayed_weights(weight_decay), lp_adam(p=p, **kwargs))


def loss_after_training(make, params, hyperparameters):
    """Of a regression whose targets change at each step."""
    optimizer = make(**hyperparameters)

    def loss(params, target):
        residual = params["w"] - target
        return jnp.sum(jnp.sin(residual) ** 2) + params["b"] ** 2 * jnp.sum(target)

    def step(carry, target):
        params, state = carry
        gradients = jax.grad(loss)(params, target)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), None

    targets = jnp.asarray(TARGETS, params["w"].dtype)
    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), targets)
    return loss(params, jnp.ones([2, 3], params["w"].dtype))


@pytest.mark.parametrize(
    "name",
    long_but(["shared u, bounded growth", "family"], [*RULES, "family"]),
)
def test_through_training_they_are_those_of_finite_differences(name, x64):
    """By the initial parameters and by every hyperparameter, each alone."""
    make, at = (make_family, FAMILY) if name == "family" else (RULES[name], AT)
    start = {"w": np.linspace(-1.0, 0.7, 6).reshape(2, 3), "b": np.float64(0.4)}
    point = jax.tree.map(jnp.float64, (start, at))
    function = jax.jit(functools.partial(loss_after_training, make))
    gradient = jax.jit(jax.grad(function, (0, 1)))(*point)
    flat, unflatten = jax.flatten_util.ravel_pytree(point)
    derivatives, _ = jax.flatten_util.ravel_pytree(gradient)
    h = 1e-6
    near = np.asarray(flat) + h * np.stack([np.eye(flat.size), -np.eye(flat.size)])
    ahead, behind = jax.jit(jax.vmap(jax.vmap(lambda x: function(*unflatten(x)))))(near)
    expected = (ahead - behind) / (2 * h)
    np.testing.assert_allclose(derivatives, expected, rtol=1e-5, atol=1e-8)
    assert np.all(np.abs(derivatives) > 1e-6)


@functools.cache
def later_by_earlier(m_dtype, u_dtype):
    """The derivatives of the third step by the first gradient."""
    optimizer = scale_by_adamax(0.8, 0.9, m_dtype=m_dtype, u_dtype=u_dtype)

    def third(first):
        state = optimizer.init(jnp.zeros(3))
        for g in (first, np.float32([0.5, 0.3, -1.1]), np.float32([0.3, -0.6, 2.0])):
            step, state = optimizer.update(g, state)
        return jnp.sum(step)

    return np.asarray(jax.jit(jax.grad(third))(np.float32([1.0, -2.0, 0.7])))


@pytest.mark.parametrize(
    ("m_dtype", "u_dtype", "rtol"),
    [
        ("bfloat16", "bfloat16", 0.03),
        ("bfloat16", "float32", 0.03),
        ("float32", "bfloat16", 0.03),
    ],
)
def test_they_pass_through_narrow_floats(m_dtype, u_dtype, rtol):
    """About as exact as the numbers are."""
    exact = later_by_earlier("float32", "float32")
    assert np.all(exact != 0)
    np.testing.assert_allclose(later_by_earlier(m_dtype, u_dtype), exact, rtol=rtol)


def test_integers_pass_none():
    """What an earlier gradient did to m and u is a constant there."""
    assert not np.any(later_by_earlier("int8", "uint8"))
    # Through the mean alone, as if u was a constant.
    of_m = later_by_earlier("float32", "uint8")
    assert np.all(of_m > 0)
    assert np.any(later_by_earlier("float32", "float32") < 0)


# Each coordinate is trained by two gradients of different sizes, whose product XLA may
# join with a sum in one kernel and not in another: so |g| has two roundings.
ROWS, COLUMNS = 400, 3
SHARED = {"shared_axes": -1}
GROWTH = {"b2": 0.9, "max_growth": 1.3}
OPTIMIZERS = {
    "adamax": adamax(0.1),
    "eps outside": adamax(0.1, eps_inside=False),
    "nesterov": adamax(0.1, nesterov=True),
    "growth": adamax(0.1, **GROWTH),
    "growth by 2": adamax(0.1, b2=0.99, max_growth=2.0),
    "growth, eps outside": adamax(0.1, **GROWTH, eps_inside=False),
    "shared u": adamax(0.1, **SHARED),
    "shared u, growth": adamax(0.1, **SHARED, **GROWTH),
    "adamaxw": adamaxw(0.1, weight_decay=0.1),
    "p = infinity": lp_adam(0.1, jnp.inf, eps_inside=True),
    "p = 3": lp_adam(0.1, 3),
    "p = 2.5": lp_adam(0.1, 2.5),
    "traced p": optax.inject_hyperparams(lp_adam)(
        0.1, p=lambda count: 2.0 + count.astype(float)
    ),
    "in a chain": optax.chain(optax.clip(10.0), adamax(0.1), optax.scale(1.0)),
    "injected": optax.inject_hyperparams(adamax)(0.1, b2=0.99),
}


# The others differ from these in kind by little.
SHORT = ("adamax", "growth", "shared u, growth", "p = infinity", "p = 3")


def losses_after(optimizer, a, steps=3):
    """The loss of each row after some steps from 0 towards multiples of a."""
    params = jnp.zeros_like(a)
    state = optimizer.init(params)
    for k in (1.0, 1.5, 0.4)[:steps]:
        updates, state = optimizer.update(params - k * a, state, params)
        params = optax.apply_updates(params, updates)
    return jnp.sum(params * params, axis=-1)


def finite_differences(function, a, h=1e-6):
    """Of each row by each of its own columns; NaN where the function has a kink."""
    columns = []
    for column in np.eye(COLUMNS):
        behind, here, ahead = (
            np.asarray(function(a + d * column[None])) for d in (-h, 0, h)
        )
        is_kink = np.abs(ahead - 2 * here + behind) > 1e-3 * h
        columns.append(np.where(is_kink, np.nan, (ahead - behind) / (2 * h)))
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize(
    "name",
    long_but(SHORT, OPTIMIZERS),
)
def test_compiled_and_eager_they_are_those_of_finite_differences(name, x64):
    """In forward and in reverse mode, in float64 and in float32.

    ``jnp.maximum`` fails this for a fifth of the coordinates where it is compiled, as
    users compile.
    """
    losses = functools.partial(losses_after, OPTIMIZERS[name])
    a = np.random.default_rng(0).normal(size=[ROWS, COLUMNS])
    expected = finite_differences(jax.jit(losses), a)
    is_smooth = np.isfinite(expected)
    assert np.mean(is_smooth) > 0.98
    assert np.mean(np.abs(expected[is_smooth]) > 1e-5) > 0.9

    reverse = jax.grad(lambda a: jnp.sum(losses(a)))

    def forward(a):
        columns = jnp.eye(COLUMNS, dtype=a.dtype)
        tangents = jnp.broadcast_to(columns[:, None], [COLUMNS, *a.shape])
        return jax.vmap(lambda dot: jax.jvp(losses, (a,), (dot,))[1], 0, -1)(tangents)

    for derivatives in (reverse, *map(as_users_compile, (reverse, forward))):
        actual = np.asarray(derivatives(a))
        np.testing.assert_allclose(
            actual[is_smooth], expected[is_smooth], rtol=1e-5, atol=1e-7
        )
    # Differences of float32 numbers tell nothing; its derivatives are about the same.
    actual = np.asarray(as_users_compile(reverse)(np.float32(a)))
    is_close = np.abs(actual - expected) <= 1e-3 * (1 + np.abs(expected))
    assert np.mean(is_close[is_smooth]) > 0.998


BFLOAT16 = {"m_dtype": "bfloat16", "u_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("options", "dtype"),
    long_but(
        [({}, "bfloat16"), (GROWTH, "float16")],
        itertools.product([{}, GROWTH], ["float32", "bfloat16", "float16"]),
    ),
)
def test_compiled_they_pass_through_half_precision(dtype, options):
    """Of the state and of master weights: as exact as numbers are; kinks may move."""
    a = np.random.default_rng(0).normal(size=[ROWS, COLUMNS]).astype(jnp.dtype(dtype))
    exact_optimizer = adamax(0.1, **options)
    optimizer = adamax(0.1, **BFLOAT16, **options)
    if dtype != "float32":
        optimizer = master_weights(optimizer)

    def derivatives(optimizer, a):
        losses = functools.partial(losses_after, optimizer)
        total = jax.grad(lambda a: jnp.sum(losses(a), dtype=jnp.float32))
        return np.asarray(as_users_compile(total)(a), np.float32)

    exact = derivatives(exact_optimizer, np.float32(a))
    # Optax adds updates to parameters of other dtypes.
    with jax.numpy_dtype_promotion("standard"):
        actual = derivatives(optimizer, a)
    is_close = np.abs(actual - exact) <= 0.05 * np.abs(exact) + 0.02
    assert np.mean(is_close) > 0.97
