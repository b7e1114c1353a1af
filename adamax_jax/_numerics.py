"""Real arithmetic on complex numbers, division by u, and casts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from adamax_jax._xla import clip, divisible


def by_parts(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Applies a function of real arrays to the real and imaginary parts separately.

    So nothing is squared: a complex division by u would overflow above 1e19, and a
    complex product with a real number turns infinity into NaN.
    """
    if not any(map(jnp.iscomplexobj, arrays)):
        return function(*arrays)
    real = function(*(x.real for x in arrays))
    imaginary = function(*(x.imag for x in arrays))
    return jax.tree.map(lax.complex, real, imaginary)


def within(x: jax.Array, largest: float) -> jax.Array:
    """Clips finite numbers to a magnitude; infinity and NaN stay."""
    if jnp.iscomplexobj(x):
        # Slightly less, since the modulus of a clipped number is rounded.
        return _clip_modulus(
            x, number((1 - 2.0**-20) * largest, jnp.real(x).dtype), 1.0
        )
    if largest >= float(jnp.finfo(x.dtype).max):
        return x
    is_beyond = (jnp.abs(x) > largest) & (jnp.abs(x) < jnp.inf)
    return jnp.where(is_beyond, jnp.where(x < 0, -largest, largest), x)


def at_most(x: jax.Array, size: jax.Array) -> jax.Array:
    """Clips x to the magnitudes ``size``, real infinities too."""
    if jnp.iscomplexobj(x):
        return _clip_modulus(x, size, 1 + 2.0**-20)
    return clip(x, size)


def _clip_modulus(x, size, tolerance):
    """Clips the modulus of complex numbers and keeps their argument.

    A number with finite parts counts as finite, even if its modulus overflows. If
    ``size`` is |x| + eps, ``tolerance`` is needed as in :func:`clip`.
    """
    # Adding zeros gives the shape and the sharding of both.
    half = jnp.abs(by_parts(lambda part: part / 2, x)) + jnp.zeros_like(size)
    is_beyond = jnp.isfinite(half) & (half > tolerance / 2 * size)
    factor = jnp.where(is_beyond, (size / 2) / jnp.where(is_beyond, half, 1), 1)
    return by_parts(lambda part: part * factor, x)


def quotient(x: jax.Array, y: jax.Array, is_positive: bool = False) -> jax.Array:
    """x / y for y >= 0, where x/0 is defined as 0.

    Args:
      x: Real numbers.
      y: Real numbers, of x's shape or broadcast to it.
      is_positive: Whether every y is nonzero, so that no test for 0 is needed.
    """
    x, y = divisible(x, y)
    if is_positive:
        return divide(x, y)
    # The inner ``where`` keeps the derivative of the branch not taken finite. A NaN is
    # not 0, so that the update shows it.
    is_zero = y == 0
    return jnp.where(is_zero, 0, divide(x, jnp.where(is_zero, 1, y)))


@jax.custom_jvp
def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y. Its derivatives do not divide by y^2, which may underflow."""
    return x / y


divide.defjvps(
    lambda x_dot, ratio, x, y: x_dot / y,
    lambda y_dot, ratio, x, y: -ratio * (y_dot / y),
)


@jax.custom_jvp
def root_of_sum(u: jax.Array, square: jax.Array) -> jax.Array:
    """sqrt(u^2 + square) for u, square >= 0, with finite derivatives at 0."""
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
    """The dtype that JAX gives a leaf; it may differ from that of a NumPy array.

    Calls jnp.result_type, which takes as long as a computation, only if it has to.
    """
    return x.dtype if isinstance(x, jax.Array) else jnp.result_type(x)


def arithmetic_dtype(*dtypes: Any) -> Any:
    """float64 if one of the dtypes is float64 or complex128, else float32."""
    doubles = {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}
    is_double = any(jnp.dtype(dtype) in doubles for dtype in dtypes)
    return jnp.float64 if is_double else jnp.float32


def dtype_like(x: ArrayLike | DTypeLike, real: DTypeLike) -> Any:
    """``real``, or the complex dtype with parts of dtype ``real`` if x is complex.

    If x is complex, ``real`` must be float32 or float64.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
        return real
    return jnp.complex128 if real == jnp.float64 else jnp.complex64


def cast(tree: Any, real: DTypeLike) -> Any:
    """Casts the numbers of a tree to ``real``; of complex ones, the parts."""
    return jax.tree.map(lambda x: number(x, dtype_like(x, real)), tree)


def number(x: Any, dtype: DTypeLike) -> jax.Array:
    """Converts a number to an array of a dtype, to float64 even without jax_enable_x64.

    Without it, JAX makes a float32 of a Python number, before JAX 0.11 also in
    jnp.asarray.
    """
    if isinstance(x, float) and jnp.dtype(dtype) == jnp.float64:
        return jnp.full([], x, dtype)
    return jnp.asarray(x, dtype)
