"""The optimizers whose cost is measured, and a step of them."""

from collections.abc import Callable
from typing import Any

import optax

from adamax_jax import adam, adamax, master_weights
from adamax_jax._lab.float32_copy import with_float32_copy

REFERENCE = "optax.adamax"
LEARNING_RATE = 1e-3

TWO_BYTES = adamax(LEARNING_RATE, m_dtype="int8", u_dtype="uint8")
# Along the last axis, by arrays that have more than one.
SHARED_NAME = "adamax int8 and shared u"
SHARED = adamax(LEARNING_RATE, m_dtype="int8", u_dtype="float32", shared_axes=-1)
OPTIMIZERS = {
    REFERENCE: optax.adamax(LEARNING_RATE),
    "optax.adam": optax.adam(LEARNING_RATE),
    "adamax float32": adamax(LEARNING_RATE),
    "adamax bfloat16/bfloat16": adamax(
        LEARNING_RATE, m_dtype="bfloat16", u_dtype="bfloat16"
    ),
    "adamax int8/uint8": TWO_BYTES,
    "adam float32": adam(LEARNING_RATE),
    "adam int8/uint8": adam(LEARNING_RATE, m_dtype="int8", u_dtype="uint8"),
}
_STORAGES: dict[str, dict[str, Any]] = {
    "adamax float32": {},
    "adamax int8/uint8": {"m_dtype": "int8", "u_dtype": "uint8"},
    SHARED_NAME: {"m_dtype": "int8", "u_dtype": "float32", "shared_axes": -1},
}
# As the README advises those who come from Adam.
GROWTH = {
    f"{name}, bounded growth": adamax(LEARNING_RATE, b2=0.99, max_growth=1.1, **storage)
    for name, storage in _STORAGES.items()
}
# Of parameters and gradients in bfloat16: as they are, and as float32 ones.
HALF = {
    "bfloat16: optax.adamax": optax.adamax(LEARNING_RATE),
    "bfloat16: optax.adam and a float32 copy": with_float32_copy(
        optax.adam(LEARNING_RATE)
    ),
    "bfloat16: adamax float32 and int16": master_weights(
        adamax(LEARNING_RATE, m_dtype="float32", u_dtype="float32")
    ),
    "bfloat16: adamax int8/uint8 and int16": master_weights(TWO_BYTES),
    "bfloat16: adamax int8/uint8 and int8": master_weights(TWO_BYTES, "int8"),
}

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def optax_step(optimizer: optax.GradientTransformation) -> Step:
    """The update and its addition to the parameters."""

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step
