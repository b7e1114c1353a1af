"""The storages and the optimizers that the commands compare."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamax_jax import adam, adamax, master_weights

# Storages of the state.
BFLOAT16: dict[str, Any] = {"m_dtype": "bfloat16", "u_dtype": "bfloat16"}
TWO_BYTES: dict[str, Any] = {"m_dtype": "int8", "u_dtype": "uint8"}
# One u for all numbers along the last axis, in arrays with more than one axis.
SHARED_U: dict[str, Any] = {"m_dtype": "int8", "u_dtype": "float32", "shared_axes": -1}
# AdaMax with the recommended memory; and with a bounded growth of u, for its cost.
RECOMMENDED: dict[str, Any] = {"b2": 0.98}
BOUNDED: dict[str, Any] = {"b2": 0.99, "max_growth": 2}

REFERENCE = "optax.adamax"
LEARNING_RATE = 1e-3


def with_float32_copy(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Mixed precision as usual: the state holds float32 weights, which are trained.

    The parameters, in half precision, are these weights, rounded.
    """

    def in_float32(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init_fn(params):
        full = in_float32(params)
        return full, optimizer.init(full)

    def update_fn(updates, state, params=None):
        full, inner = state
        updates, inner = optimizer.update(in_float32(updates), inner, full)
        full = optax.apply_updates(full, updates)
        # From the parameter to the rounded copy, in float32: optax.apply_updates
        # rounds the sum.
        updates = jax.tree.map(
            lambda x, p: x.astype(p.dtype).astype(x.dtype) - p.astype(x.dtype),
            full,
            params,
        )
        return updates, (full, inner)

    return optax.GradientTransformation(init_fn, update_fn)


# Parameters and gradients are in float32.
OPTIMIZERS = {
    REFERENCE: optax.adamax(LEARNING_RATE),
    "optax.adam": optax.adam(LEARNING_RATE),
    "adamax float32": adamax(LEARNING_RATE),
    "adamax bfloat16/bfloat16": adamax(LEARNING_RATE, **BFLOAT16),
    "adamax int8/uint8": adamax(LEARNING_RATE, **TWO_BYTES),
    "adamax int8 and shared u": adamax(LEARNING_RATE, **SHARED_U),
    "adamax float32, bounded growth": adamax(LEARNING_RATE, **BOUNDED),
    "adamax int8/uint8, bounded growth": adamax(LEARNING_RATE, **BOUNDED, **TWO_BYTES),
    "adamax int8 and shared u, bounded growth": adamax(
        LEARNING_RATE, **BOUNDED, **SHARED_U
    ),
    "adam float32": adam(LEARNING_RATE),
    "adam int8/bfloat16": adam(LEARNING_RATE, m_dtype="int8", u_dtype="bfloat16"),
    "adam int8/uint8": adam(LEARNING_RATE, **TWO_BYTES),
}
# Parameters and gradients are in bfloat16.
HALF = {
    "bfloat16: optax.adamax": optax.adamax(LEARNING_RATE),
    "bfloat16: optax.adam and a float32 copy": with_float32_copy(
        optax.adam(LEARNING_RATE)
    ),
    "bfloat16: adamax float32 and int16": master_weights(
        adamax(LEARNING_RATE, m_dtype="float32", u_dtype="float32")
    ),
    "bfloat16: adamax int8/uint8 and int16": master_weights(
        adamax(LEARNING_RATE, **TWO_BYTES)
    ),
    "bfloat16: adamax int8/uint8 and int8": master_weights(
        adamax(LEARNING_RATE, **TWO_BYTES), "int8"
    ),
}

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def optax_step(optimizer: optax.GradientTransformation) -> Step:
    """Returns the update and its addition to the parameters as one function."""

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step
