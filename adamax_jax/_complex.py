"""Complex numbers, part by part: the optimizers compute with real arrays alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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

    Where the parts of a complex number are finite, it is, whatever its modulus.
    """
    if not jnp.iscomplexobj(x):
        return _real_within(x, largest)
    # A little less, since the modulus of what is cut off is rounded.
    return _complex_within(x, number(_LESS * largest, jnp.real(x).dtype))


def at_most(x: jax.Array, size: jax.Array) -> jax.Array:
    """The same for sizes in an array, beside x; a real infinity is cut off too."""
    if not jnp.iscomplexobj(x):
        return jnp.clip(x, -size, size)
    return _complex_within(x, size)


def _complex_within(x, end):
    half = jnp.abs(by_parts(lambda part: part / 2, x))
    is_beyond = jnp.isfinite(half) & (half > end / 2)
    share = jnp.where(is_beyond, (end / 2) / jnp.where(is_beyond, half, 1), 1)
    return by_parts(lambda part: part * share, x)


_LESS = 1 - 2.0**-20


def _real_within(x, largest):
    """By the bits, in which numbers are in order: fewer operations on a CPU."""
    unsigned = np.dtype(f"uint{8 * x.dtype.itemsize}")
    end, infinity = (np.array(n, x.dtype).view(unsigned) for n in (largest, np.inf))
    bits = lax.bitcast_convert_type(x, unsigned)
    sign = bits & unsigned.type(1 << (8 * x.dtype.itemsize - 1))
    # Of unsigned numbers, what is within becomes large.
    is_beyond = (bits ^ sign) - (end + 1) < infinity - (end + 1)
    return jnp.where(is_beyond, lax.bitcast_convert_type(sign | end, x.dtype), x)


def dtype_of(x: Any) -> Any:
    """The dtype of a leaf; jnp.result_type takes as long as a computation."""
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def dtype_like(x: ArrayLike | DTypeLike, real: DTypeLike) -> Any:
    """The dtype ``real``, or where x is complex the one whose parts have it.

    Where x is complex, ``real`` is float32 or float64.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        return real
    return jnp.complex128 if real == jnp.float64 else jnp.complex64


def cast(tree: Any, real: DTypeLike) -> Any:
    """The numbers of a tree in the dtype ``real``, or in parts of it."""
    return jax.tree.map(lambda x: number(x, dtype_like(x, real)), tree)


def number(x: Any, dtype: DTypeLike) -> jax.Array:
    """A number as an array of a dtype, also of float64 where x64 is off.

    There a Python number is a float32, for jnp.asarray too before JAX 0.11.
    """
    if isinstance(x, float) and jnp.dtype(dtype) == jnp.float64:
        return jnp.full([], x, dtype)
    return jnp.asarray(x, dtype)
