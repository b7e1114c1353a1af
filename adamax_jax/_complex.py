"""Complex numbers, part by part: the optimizers compute with real arrays alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike


def by_parts(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """A function of real arrays, applied to complex ones part by part.

    In real arithmetic nothing is squared; a complex division by u would overflow above
    1e19, and a complex product with a real number turns an infinity into NaN.
    """
    if not any(map(jnp.iscomplexobj, arrays)):
        return function(*arrays)
    real = function(*(x.real for x in arrays))
    imaginary = function(*(x.imag for x in arrays))
    return jax.tree.map(lax.complex, real, imaginary)


def within(x: jax.Array, largest: float) -> jax.Array:
    """What is finite, cut off at a largest size; complex numbers keep their direction.

    Of a complex number that is the larger of its parts: its modulus may overflow.
    """
    if not jnp.iscomplexobj(x):
        return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
    size = jnp.maximum(jnp.abs(x.real), jnp.abs(x.imag))
    is_beyond = jnp.isfinite(size) & (size > largest)
    share = jnp.where(is_beyond, largest / jnp.where(is_beyond, size, 1), 1)
    return by_parts(lambda part: part * share, x)


def dtype_like(x: ArrayLike | DTypeLike, real: DTypeLike) -> Any:
    """The dtype ``real``, or where x is complex the one whose parts have it.

    Where x is complex, ``real`` is float32 or float64.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        return real
    return jnp.complex128 if real == jnp.float64 else jnp.complex64


def cast(tree: Any, real: DTypeLike) -> Any:
    """The numbers of a tree in the dtype ``real``, or in parts of it."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype_like(x, real)), tree)
