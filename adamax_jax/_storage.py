"""How m and u are kept in few bytes; knows nothing of the optimizer.

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
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

# uint8: the leading bits of a float32, 4 codes per octave and linear in between. Code 1
# is 2^-32, code 255 is 1.5 * 2^31; code 0 is 0.
_DROPPED_BITS = 21
_OFFSET = ((127 - 32) << (23 - _DROPPED_BITS)) - 1

# One byte for m holds ratios up to this. At the default decay rates |m| stays below
# 1.01 u, and a uint8 u may have been rounded down by a ninth of itself. In int8, code c
# is the ratio sign(c) * _LARGEST_RATIO * (c / 127)^2: linear codes would lose a small
# persistent mean next to a rare large gradient; the square keeps 8e-5.
_LARGEST_RATIO = 1.25
_ROUNDING = 0.88
_CODES = 127


def is_wide(u_dtype) -> bool:
    """Whether u of this dtype is stored as it is, without a scale."""
    return jnp.dtype(u_dtype).itemsize >= 4


def is_ratio(m_dtype) -> bool:
    """Whether m of this dtype is stored as its ratio to u."""
    return jnp.dtype(m_dtype).itemsize == 1


def _ends(dtype):
    """The smallest positive and the largest finite number of a dtype."""
    if dtype == jnp.uint8:
        return 1, 255
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal), float(info.max)


def complex_dtype(real):
    """The complex dtype whose parts have this dtype, float32 or float64."""
    return jnp.complex128 if real == jnp.float64 else jnp.complex64


def decay_scale(u_scale: jax.Array, b2: jax.Array) -> jax.Array:
    """The next ``u_scale``: ``b2 * u_scale``, doubled until it is at least one half."""
    scale = b2 * u_scale
    # frexp: scale = fraction * 2^exponent with a fraction in [1/2, 1).
    _, exponent = jnp.frexp(lax.stop_gradient(scale))
    return jnp.where(scale > 0, scale * jnp.ldexp(jnp.ones_like(scale), -exponent), 1)


def decode_u(stored: jax.Array, u_scale: ArrayLike) -> jax.Array:
    """u, in float32 or the stored dtype, whichever is wider."""
    if is_wide(stored.dtype):
        return stored
    u_scale = jnp.asarray(u_scale, jnp.float32)
    if stored.dtype != jnp.uint8:
        return stored.astype(jnp.float32) * u_scale
    bits = (stored.astype(jnp.int32) + _OFFSET) << _DROPPED_BITS
    number = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(stored == 0, 0, number) * u_scale


def encode_u(u: jax.Array, u_scale: ArrayLike, dtype) -> jax.Array:
    """Rounds ``u / u_scale`` to the nearest number of a dtype.

    What is positive stays positive and what is finite stays finite.
    """
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


def saturates(u_dtype) -> bool:
    """Whether u of this dtype ends below the range of float32."""
    u_dtype = jnp.dtype(u_dtype)
    return not is_wide(u_dtype) and u_dtype != jnp.bfloat16


def is_saturated_u(stored: jax.Array) -> jax.Array:
    """Where a stored u is at an end of its dtype's range."""
    if is_wide(stored.dtype):
        return jnp.zeros(stored.shape, bool)
    smallest, largest = _ends(stored.dtype)
    return (stored == smallest) | (stored == largest)


def is_saturated_m(stored: jax.Array) -> jax.Array:
    """Where a stored m is at an end of its dtype's range."""
    if jnp.dtype(stored.dtype).itemsize >= 4:
        return jnp.zeros(stored.shape, bool)
    if stored.dtype == jnp.int8:
        return jnp.abs(stored) == _CODES
    largest = _LARGEST_RATIO if is_ratio(stored.dtype) else _ends(stored.dtype)[1]
    return jnp.abs(stored) == jnp.asarray(largest, stored.dtype)


def kept_share(u: jax.Array, stored_u: jax.Array) -> jax.Array:
    """What is left of a u that was too large to be stored, else 1.

    m shrinks with it, so that no step becomes longer. Rounding alone takes at most a
    ninth off, which does not count.
    """
    is_lost = (stored_u < _ROUNDING * u) & jnp.isfinite(u)
    return jnp.where(is_lost, stored_u / jnp.where(is_lost, _ROUNDING * u, 1), 1)


def decode_m(stored: jax.Array, u: jax.Array) -> jax.Array:
    """m, given the u that is stored beside it."""
    if not is_ratio(stored.dtype):
        return stored
    ratio = stored.astype(u.dtype)
    if stored.dtype == jnp.int8:
        ratio = ratio * jnp.abs(ratio) * (_LARGEST_RATIO / _CODES**2)
    return ratio * u


def encode_m(
    m: jax.Array, u: jax.Array, stored_u: jax.Array, dtype, dither: ArrayLike
) -> jax.Array:
    """Rounds m to a dtype.

    Args:
      m: The mean.
      u: The infinity norm.
      stored_u: The infinity norm as :func:`decode_u` will read it.
      dtype: What to store m in.
      dither: Which of its two neighbours an int8 code becomes: a number in [0, 1),
        compared with the place of m between them.
    """
    if jnp.dtype(dtype).itemsize >= 4:
        return m.astype(dtype)
    if not is_ratio(dtype):
        _, largest = _ends(dtype)
        return jnp.where(jnp.isinf(m), m, jnp.clip(m, -largest, largest)).astype(dtype)
    # What multiplies the ratio later, but for a u that was too large to be stored: then
    # m shrinks with it, as in kept_share.
    divisor = jnp.maximum(stored_u, _ROUNDING * u)
    # What is not finite has no code; the update has already carried it to the user.
    undefined = (divisor == 0) | ~jnp.isfinite(m)
    # Of |m|, with m's sign in the end: a quotient that is read twice, XLA:CPU writes to
    # memory in between.
    ratio = jnp.where(undefined, 0, jnp.abs(m) / jnp.where(undefined, 1, divisor))
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


def dither(count: jax.Array) -> jax.Array:
    """A number in [0, 1) for each count: a hash, so that no period resonates with it.

    The hash is Chris Wellons's lowbias32, https://github.com/skeeto/hash-prospector.
    """
    x = count.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    return (x >> 8).astype(jnp.float32) * 2.0**-24
