"""Derivatives through several updates of training, as meta-learning takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adamax_jax import adamaxw, lp_adam, scale_by_adamax

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

    state = optimizer.init(params)
    for target in jnp.asarray(TARGETS, params["w"].dtype):
        gradients = jax.grad(loss)(params, target)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return loss(params, jnp.ones([2, 3], params["w"].dtype))


@pytest.mark.parametrize(
    "name",
    [
        "adamax",
        "shared u, bounded growth",
        "family",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("nesterov", "eps outside", "bounded growth", "shared u")
        ),
    ],
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
    for i, derivative in enumerate(derivatives):
        ahead = function(*unflatten(flat.at[i].add(h)))
        behind = function(*unflatten(flat.at[i].add(-h)))
        expected = (ahead - behind) / (2 * h)
        np.testing.assert_allclose(derivative, expected, rtol=1e-5, atol=1e-8)
    assert np.all(np.abs(derivatives) > 1e-6)


def later_by_earlier(m_dtype, u_dtype):
    """The derivatives of the third step by the first gradient."""
    optimizer = scale_by_adamax(0.8, 0.9, m_dtype=m_dtype, u_dtype=u_dtype)

    def third(first):
        state = optimizer.init(jnp.zeros(3))
        for g in (first, jnp.array([0.5, 0.3, -1.1]), jnp.array([0.3, -0.6, 2.0])):
            step, state = optimizer.update(g, state)
        return jnp.sum(step)

    return jax.grad(third)(jnp.array([1.0, -2.0, 0.7]))


@pytest.mark.parametrize(
    ("m_dtype", "u_dtype", "rtol"),
    [
        ("bfloat16", "bfloat16", 0.03),
        ("float16", "float16", 0.003),
        ("float8_e4m3fn", "float32", 0.04),
        ("float8_e4m3fn", "bfloat16", 0.04),
        ("float8_e4m3fn", "float8_e4m3fn", 0.4),
    ],
)
def test_they_pass_through_narrow_floats(m_dtype, u_dtype, rtol):
    """About as exact as the numbers are; a float8 u is known to an eighth, and is one
    of two terms that cancel."""
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
