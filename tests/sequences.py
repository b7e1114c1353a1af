"""Gradient sequences, and optimizers run over them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

TWO_BYTES = {"m_dtype": "int8", "u_dtype": "uint8"}
STORAGES = {
    "own": {},
    "bfloat16": {"m_dtype": "bfloat16", "u_dtype": "bfloat16"},
    "two bytes": TWO_BYTES,
}
ONE_BYTE = {"m_dtype": "int8", "shared_axes": -1}
EVERY_STORAGE = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


def long(value):
    """The value as a parameter of a test, marked as long."""
    values = value if isinstance(value, tuple) else [value]
    return pytest.param(*values, marks=pytest.mark.long)


def long_but(plain, values):
    """The values as parameters of a test, all but some of them marked as long."""
    return [value if value in plain else long(value) for value in values]


SCHEDULE = optax.linear_schedule(0.1, 0.0, 40)


def pairs(theirs, ours):
    """An optimizer of Optax and one of ours, alone and in what holds optimizers."""
    return {
        name: (wrap(theirs), wrap(ours))
        for name, wrap in {
            "alone": lambda make: make(0.1),
            "a schedule": lambda make: make(SCHEDULE),
            "MultiSteps": lambda make: optax.MultiSteps(make(0.1), 3),
            "masked": lambda make: optax.masked(make(0.1), {"a": True, "b": False}),
            "injected": lambda make: optax.inject_hyperparams(make)(SCHEDULE),
        }.items()
    }


# The bound of |m/u| at the default decay rates, and what a rounding leaves of a u.
LONGEST_STEP, ROUNDING_LEAVES = 1.0091, 0.88
# How far storing u moves it at most, relative to itself.
ROUNDING_OF_U = {"own": 0, "bfloat16": 2**-8, "two bytes": 1 / 8}


def gradients(steps=1000, size=64, seed=0, decades=12, zeros=0.1):
    """Gradients in float64: log-uniform over decades, sign flips, zeros.

    The first coordinate never sees a gradient.
    """
    rng = np.random.default_rng(seed)
    shape = (steps, size)
    g = 10.0 ** rng.uniform(-decades / 2, decades / 2, shape)
    g *= rng.choice([-1.0, 1.0], shape)
    g[rng.random(shape) < zeros] = 0.0
    g[:, 0] = 0.0
    return g


# Thirty of a tree, in two parts; of NumPy, since JAX may be imported but not started.
TREES = [
    {"a": g[:32].reshape(4, 8), "b": g[32:]}
    for g in np.float32(gradients(steps=30, decades=4))
]
BEFORE, AFTER = TREES[:20], TREES[20:]
PARAMS = jax.tree.map(np.ones_like, TREES[0])


def bits(x):
    """Floats of few bits as integers: XLA on the CPU stacks those much faster."""
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return jax.lax.bitcast_convert_type(x, f"u{x.dtype.itemsize}") if is_narrow else x


def numbers(x, dtype):
    """The floats of which these are the :func:`bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def trajectory(transformation, gradients, jit=jax.jit):
    """The updates and the states after each step, stacked, from one compiled scan."""
    return compiled_trajectory(transformation, jit)(gradients)


def compiled_trajectory(transformation, jit=jax.jit):
    """The same as a function of the gradients, which compiles once for each shape."""

    def step(state, g):
        update, state = transformation.update(g, state)
        return state, jax.tree.map(bits, (update, state))

    @jit
    def run(gradients):
        first = jax.tree.map(lambda g: g[0], gradients)
        state = transformation.init(first)
        steps = jax.lax.scan(step, state, gradients)[1]
        like = jax.eval_shape(transformation.update, first, state)
        return jax.tree.map(lambda x, y: numbers(x, y.dtype), steps, like)

    return run


def updates_of(transformation, gradients):
    """The updates after each step alone: no states are stacked."""
    run = compiled_trajectory(transformation)
    return jax.jit(lambda gradients: run(gradients)[0])(gradients)


@functools.lru_cache(maxsize=16)
def compiled_step(optimizer, jit=jax.jit):
    """One step of training, compiled once for an optimizer."""

    @jit
    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(optimizer, params, state, gradients, jit=jax.jit):
    """The parameters and the state after some steps of a compiled loop."""
    for g in gradients:
        params, state = compiled_step(optimizer, jit)(params, state, g)
    return params, state


def descend(optimizer, params, gradients):
    """The parameters after each step of a compiled loop."""
    state = optimizer.init(params)
    for g in gradients:
        params, state = compiled_step(optimizer)(params, state, g)
        yield params
