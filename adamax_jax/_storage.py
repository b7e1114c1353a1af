"""How m and u are kept in few bytes: ``write`` and ``read``. Knows no optimizer.

Rounding is monotone, so it commutes with a maximum. The infinity norm
``u = max(b2 * u, |g|)`` is therefore stored so that its decay is exact and every
stored number was rounded once, when it was set:

- What is stored is ``u / u_scale``. The scalar ``u_scale`` takes the decay; where it
  falls below one half it is doubled and the stored numbers are halved, which is exact.
- A number that is read, multiplied by its scale, divided by it again and rounded comes
  back as it was: the products in float32 are off by 2^-22 at most, which a rounding to
  fewer bits undoes.

The mean ``m`` is an average, which has no such property; in one byte it is stored as
its ratio to ``u``, which is bounded.

To add a format, add its name below and what it means to the functions that ask for a
dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from adamax_jax._complex import by_parts

_FLOATS = (
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
)
M_DTYPES = (*_FLOATS, "int8")
U_DTYPES = (*_FLOATS, "uint8")

# uint8: the leading bits of a float32, 4 codes per octave and linear in between. Code 1
# is 2^-32, code 255 is 1.5 * 2^31; code 0 is 0.
_DROPPED_BITS = 21
_OFFSET = ((127 - 32) << (23 - _DROPPED_BITS)) - 1

# One byte for m holds ratios up to this. At the default decay rates |m| stays below
# 1.01 u, and a uint8 u may have been rounded down by a ninth of itself. In int8, code c
# is the ratio sign(c) * _LARGEST_RATIO * (c / 127)^2: linear codes would lose a small
# persistent mean next to a rare large gradient; the square keeps 8e-5.
_LARGEST_RATIO = 1.25
_CODES = 127

# Rounding leaves at least this share of u, a little less than 8/9.
_ROUNDING_LEAVES = 0.88


def is_wide(dtype: Any) -> bool:
    """Whether numbers of this dtype are stored as they are: 32 bits or more."""
    return jnp.dtype(dtype).itemsize >= 4


def is_ratio(m_dtype: Any) -> bool:
    """Whether m of this dtype is stored as its ratio to u: in one byte."""
    return jnp.dtype(m_dtype).itemsize == 1


def arithmetic_dtype(*dtypes: Any) -> Any:
    """What numbers stored in these dtypes are computed in: float32, or float64.

    float64 where one of them, or the parts of a complex one, is.
    """
    doubles = {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}
    is_double = any(jnp.dtype(dtype) in doubles for dtype in dtypes)
    return jnp.float64 if is_double else jnp.float32


def decay_scale(u_scale: jax.Array, b2: jax.Array) -> jax.Array:
    """The next ``u_scale``: ``b2 * u_scale``, doubled until it is at least one half."""
    scale = b2 * u_scale
    # frexp: scale = fraction * 2^exponent with a fraction in [1/2, 1).
    _, exponent = jnp.frexp(lax.stop_gradient(scale))
    return jnp.where(scale > 0, scale * jnp.ldexp(jnp.ones_like(scale), -exponent), 1)


def read(
    stored_m: jax.Array, stored_u: jax.Array, u_scale: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """m and u as numbers, in float32 at least.

    Args:
      stored_m, stored_u: What :func:`write` returned, or zeros.
      u_scale: The ``u_scale`` that was given to it, decayed since then.
    """
    u = _read_u(stored_u, u_scale)
    return _read_m(stored_m, u), u


def write(
    m: jax.Array,
    u: jax.Array,
    u_scale: ArrayLike,
    m_dtype: Any,
    u_dtype: Any,
    dither: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """m and u rounded to dtypes: positive u stays positive, finite numbers finite.

    Where u is above the largest number of its dtype, m shrinks with it, so that no step
    becomes longer.

    Args:
      m: The mean, real or complex, in float32 or float64.
      u: The norm; real, in the same precision.
      u_scale: What a stored u is multiplied by when it is read.
      m_dtype, u_dtype: What to store them in.
      dither: Which of its two neighbours an int8 code becomes: a number in [0, 1),
        compared with the place of m between them; 1/2 for the nearer one.
    """
    stored_u = _write_u(u, u_scale, u_dtype)
    next_u = _read_u(stored_u, u_scale).astype(u.dtype)
    # Rounding leaves this of u at least: what is below was cut off at the largest
    # number of its dtype.
    least_u = _ROUNDING_LEAVES * u
    if is_ratio(m_dtype):
        # Multiplied by the u that will be read, the ratio shrinks m by itself.
        ratio_to = jnp.maximum(next_u, least_u)
        return _write_ratio(m, ratio_to, m_dtype, dither), stored_u
    if _ends_below_float32(u_dtype):
        is_cut = (next_u < least_u) & jnp.isfinite(u)
        share = jnp.where(is_cut, next_u / jnp.where(is_cut, least_u, 1), 1)
        m = by_parts(lambda part: part * share, m)
    return _write_float(m, m_dtype), stored_u


def as_stored(u: jax.Array, u_scale: ArrayLike, dtype: Any) -> jax.Array:
    """What u will be when it is read again."""
    return _read_u(_write_u(u, u_scale, dtype), u_scale)


def is_saturated(stored_m: jax.Array, stored_u: jax.Array) -> jax.Array:
    """Where a stored m or u is the first or the last number of its dtype."""
    return _is_saturated_m(stored_m) | _is_saturated_u(stored_u)


def dither(count: jax.Array) -> jax.Array:
    """A number in [0, 1) for each count: a hash, so that no period resonates with it.

    The hash is Chris Wellons's lowbias32, https://github.com/skeeto/hash-prospector.
    """
    x = count.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    return (x >> 8).astype(jnp.float32) * 2.0**-24


def _read_u(stored, u_scale):
    """u, in float32 or the stored dtype, whichever is wider."""
    if is_wide(stored.dtype):
        return stored
    u_scale = jnp.asarray(u_scale, jnp.float32)
    if stored.dtype != jnp.uint8:
        return stored.astype(jnp.float32) * u_scale
    bits = (stored.astype(jnp.int32) + _OFFSET) << _DROPPED_BITS
    number = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(stored == 0, 0, number) * u_scale


def _write_u(u, u_scale, dtype):
    """The number of a dtype that is nearest to ``u / u_scale``."""
    if is_wide(dtype):
        return u.astype(dtype)
    scaled = u.astype(jnp.float32) * (1 / jnp.asarray(u_scale, jnp.float32))
    smallest, largest = _ends(dtype)
    if dtype != jnp.uint8:
        keep = (u == 0) | jnp.isinf(u)
        return jnp.where(keep, scaled, jnp.clip(scaled, smallest, largest)).astype(
            dtype
        )
    # abs clears the sign of a NaN, which then saturates like an infinity.
    bits = lax.bitcast_convert_type(jnp.abs(scaled), jnp.int32)
    # Adding half a code rounds to nearest; a carry goes on to the next octave.
    code = ((bits + (1 << (_DROPPED_BITS - 1))) >> _DROPPED_BITS) - _OFFSET
    return jnp.where(scaled == 0, 0, jnp.clip(code, smallest, largest)).astype(
        jnp.uint8
    )


def _read_m(stored, u):
    """m, given the u that is stored beside it."""
    if is_ratio(stored.dtype):
        ratio = stored.astype(u.dtype)
        if stored.dtype == jnp.int8:
            ratio = ratio * jnp.abs(ratio) * (_LARGEST_RATIO / _CODES**2)
        return ratio * u
    return stored if is_wide(stored.dtype) else stored.astype(jnp.float32)


def _write_float(m, dtype):
    """m rounded to nearest; what is finite stays finite."""
    if is_wide(dtype):
        return m.astype(dtype)
    _, largest = _ends(dtype)
    return jnp.where(jnp.isinf(m), m, jnp.clip(m, -largest, largest)).astype(dtype)


def _write_ratio(m, u, dtype, dither):
    """m / u rounded to one byte."""
    # What is not finite has no code; the update has already carried it to the user.
    undefined = (u == 0) | ~jnp.isfinite(m)
    # Of |m|, with m's sign in the end: a quotient that is read twice, XLA:CPU writes to
    # memory in between.
    ratio = jnp.where(undefined, 0, jnp.abs(m) / jnp.where(undefined, 1, u))
    if dtype != jnp.int8:
        code = jnp.minimum(ratio, _LARGEST_RATIO)
    else:
        square = jnp.minimum(ratio * (_CODES**2 / _LARGEST_RATIO), _CODES**2)
        below = jnp.floor(jnp.sqrt(square))
        # The place between below^2 and (below + 1)^2, linear in m: a dither that is
        # uniform in [0, 1) leaves no bias, while rounding to nearest would keep a mean
        # that changes by less than half a code per step where it is for ever.
        above = square - below * below > dither * (2 * below + 1)
        code = jnp.where(above, below + 1, below)
    return jnp.where(m < 0, -code, code).astype(dtype)


def _ends(dtype):
    """The smallest positive and the largest finite number of a dtype."""
    if dtype == jnp.uint8:
        return 1, 255
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal), float(info.max)


def _ends_below_float32(u_dtype):
    """Whether u of this dtype has a smaller range than float32."""
    return not is_wide(u_dtype) and u_dtype != jnp.bfloat16


def _is_saturated_u(stored):
    if is_wide(stored.dtype):
        return jnp.zeros(stored.shape, bool)
    smallest, largest = _ends(stored.dtype)
    return (stored == smallest) | (stored == largest)


def _is_saturated_m(stored):
    if is_wide(stored.dtype):
        return jnp.zeros(stored.shape, bool)
    if stored.dtype == jnp.int8:
        return jnp.abs(stored) == _CODES
    largest = _LARGEST_RATIO if is_ratio(stored.dtype) else _ends(stored.dtype)[1]
    return jnp.abs(stored) == jnp.asarray(largest, stored.dtype)
