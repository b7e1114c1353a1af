"""Real arithmetic on complex numbers, division by u, and casts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from adamax_jax._xla import clip, divisible


def by_parts(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """A function of real arrays, applied to the parts of complex ones.

    In real arithmetic nothing is squared. A complex division by u would overflow above
    1e19, and a complex product with a real number turns an infinity into NaN.
    """
    if not any(map(jnp.iscomplexobj, arrays)):
        return function(*arrays)
    real = function(*(x.real for x in arrays))
    imaginary = function(*(x.imag for x in arrays))
    return jax.tree.map(lax.complex, real, imaginary)


def within(x: jax.Array, largest: float) -> jax.Array:
    """Clips finite numbers to a magnitude; infinities and NaN stay."""
    if jnp.iscomplexobj(x):
        # A little less, since the modulus of a clipped number is rounded.
        return _shortened(x, number((1 - 2.0**-20) * largest, jnp.real(x).dtype), 1.0)
    if largest >= float(jnp.finfo(x.dtype).max):
        return x
    is_beyond = (jnp.abs(x) > largest) & (jnp.abs(x) < jnp.inf)
    return jnp.where(is_beyond, jnp.where(x < 0, -largest, largest), x)


def at_most(x: jax.Array, size: jax.Array) -> jax.Array:
    """Clips to the magnitudes in an array, real infinities too."""
    if jnp.iscomplexobj(x):
        return _shortened(x, size, 1 + 2.0**-20)
    return clip(x, size)


def _shortened(x, size, tolerance):
    """Complex numbers clipped in modulus; they keep their direction.

    A number with finite parts counts as finite, even if its modulus overflows. Where
    size is |x| + eps, ``tolerance`` has the purpose that :func:`clip` explains.
    """
    # Plus zeros, for the shape and the sharding of both.
    half = jnp.abs(by_parts(lambda part: part / 2, x)) + jnp.zeros_like(size)
    is_beyond = jnp.isfinite(half) & (half > tolerance / 2 * size)
    share = jnp.where(is_beyond, (size / 2) / jnp.where(is_beyond, half, 1), 1)
    return by_parts(lambda part: part * share, x)


def quotient(x: jax.Array, y: jax.Array, is_positive: bool = False) -> jax.Array:
    """x / y for y >= 0, where x/0 is defined as 0.

    Args:
      x: Real numbers.
      y: Real numbers, of x's shape or broadcast to it.
      is_positive: Whether no y can be 0, so that none is looked for.
    """
    x, y = divisible(x, y)
    if is_positive:
        return divide(x, y)
    # The inner where keeps the derivative of the untaken branch finite. Compared with
    # ==, a NaN goes on to the update instead of being hidden.
    is_zero = y == 0
    return jnp.where(is_zero, 0, divide(x, jnp.where(is_zero, 1, y)))


@jax.custom_jvp
def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, whose own derivative by y divides by y^2, which is 0 for a y of 1e-23."""
    return x / y


divide.defjvps(
    lambda x_dot, ratio, x, y: x_dot / y,
    lambda y_dot, ratio, x, y: -ratio * (y_dot / y),
)


@jax.custom_jvp
def root_of_sum(u: jax.Array, square: jax.Array) -> jax.Array:
    """sqrt(u^2 + square), for u and square >= 0, whose own derivative by 0 is NaN."""
    return jnp.hypot(u, jnp.sqrt(square))


@root_of_sum.defjvp
def _(primals, tangents):
    root = root_of_sum(*primals)
    is_zero = root == 0
    divisor = jnp.where(is_zero, 1, root)
    by_u = jnp.where(is_zero, 1, primals[0] / divisor)
    by_square = jnp.where(is_zero, 0, 0.5 / divisor)
    return root, by_u * tangents[0] + by_square * tangents[1]


def dtype_of(x: Any) -> Any:
    """The dtype of a leaf, or the one that JAX makes of it: of NumPy's float64, say.

    jnp.result_type takes as long as a computation.
    """
    return x.dtype if isinstance(x, jax.Array) else jnp.result_type(x)


def arithmetic_dtype(*dtypes: Any) -> Any:
    """What numbers of these dtypes are computed in: float32, or float64.

    float64 where one of them, or the parts of a complex one, is.
    """
    doubles = {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}
    is_double = any(jnp.dtype(dtype) in doubles for dtype in dtypes)
    return jnp.float64 if is_double else jnp.float32


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
