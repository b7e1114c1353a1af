"""Gradient sequences, and optimizers run over them."""

import jax
import numpy as np

STORAGES = {
    "own": {},
    "bfloat16": {"m_dtype": "bfloat16", "u_dtype": "bfloat16"},
    "two bytes": {"m_dtype": "int8", "u_dtype": "uint8"},
}


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


def trajectory(transformation, gradients):
    """The updates and the states after each step, stacked, from one compiled scan."""
    return compiled_trajectory(transformation)(gradients)


def compiled_trajectory(transformation):
    """The same as a function of the gradients, which compiles once for each shape."""

    def step(state, g):
        update, state = transformation.update(g, state)
        return state, (update, state)

    @jax.jit
    def run(gradients):
        first = jax.tree.map(lambda g: g[0], gradients)
        return jax.lax.scan(step, transformation.init(first), gradients)[1]

    return run


def descend(optimizer, params, gradients):
    """The parameters after each step of a compiled loop."""

    @jax.jit
    def step(params, state, g):
        updates, state = optimizer.update(g, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state

    state = optimizer.init(params)
    for g in gradients:
        params, state = step(params, state, g)
        yield params
