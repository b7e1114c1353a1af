"""How m and u are kept in few bytes: ``write`` and ``read``. Knows no optimizer.

Rounding is monotone, so it commutes with a maximum. The infinity norm
``u = max(b2 * u, |g|)`` is therefore stored so that its decay is exact and every
stored number was rounded once, when it was set:

- What is stored is ``u / u_scale``. The scalar ``u_scale`` takes the decay; where it
  falls below one half it is doubled and the stored numbers are halved, which is exact.
- A number that is read, multiplied by its scale, divided by it again and rounded comes
  back as it was: the products in float32 are off by 2^-22 at most, which a rounding to
  fewer bits undoes.

The mean ``m`` is an average, which has no such property. Rounded to nearest at every
step, it would stay for ever where a step changes it by less than half the distance of
two numbers, while ``u`` decays. So it is rounded up or down in proportion to its place
between them, which leaves no bias. And where its dtype has a smaller range than
float32, it is stored as its ratio to ``u``, so that it is lost only where it is small
beside ``u``.

To add a format, add its name below and what it means to the functions that ask for a
dtype.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from adamax_jax._complex import by_parts
from adamax_jax._quotient import quotient

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
    """Whether m of this dtype is stored as its ratio to u."""
    return not is_wide(m_dtype) and m_dtype != jnp.bfloat16


def is_bounded_ratio(m_dtype: Any) -> bool:
    """Whether m of this dtype is stored as a ratio that is cut off: in one byte."""
    return jnp.dtype(m_dtype).itemsize == 1


def arithmetic_dtype(*dtypes: Any) -> Any:
    """What numbers stored in these dtypes are computed in: float32, or float64.

    float64 where one of them, or the parts of a complex one, is.
    """
    doubles = {jnp.dtype(jnp.float64), jnp.dtype(jnp.complex128)}
    is_double = any(jnp.dtype(dtype) in doubles for dtype in dtypes)
    return jnp.float64 if is_double else jnp.float32


def largest_stored(m_dtype: Any, u_dtype: Any) -> float:
    """The largest gradient whose m and u these dtypes hold, whatever ``u_scale`` is."""
    if u_dtype == jnp.uint8:
        # That of code 255, times one half.
        return 1.5 * 2.0**30
    largest_u = float(jnp.finfo(u_dtype).max)
    if not is_wide(u_dtype):
        return largest_u / 2
    return (
        min(largest_u, float(jnp.finfo(m_dtype).max)) if is_wide(m_dtype) else largest_u
    )


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
      dither: Which of its two neighbours an m below 32 bits becomes: a number in
        [0, 1), compared with the place of m between them; 1/2 for the nearer one.
    """
    stored_u = _write_u(u, u_scale, u_dtype)
    next_u = _read_u(stored_u, u_scale).astype(u.dtype)
    # Rounding leaves this of u at least: what is below was cut off at the largest
    # number of its dtype.
    least_u = _ROUNDING_LEAVES * u
    if is_ratio(m_dtype):
        # Multiplied by the u that will be read, the ratio shrinks m by itself.
        ratio_to = jnp.maximum(next_u, least_u)
        return _write_ratio(m, ratio_to, jnp.dtype(m_dtype), dither), stored_u
    if _range_ends_below(u_dtype, u.dtype):
        is_cut = (next_u < least_u) & jnp.isfinite(u)
        share = jnp.where(is_cut, next_u / jnp.where(is_cut, least_u, 1), 1)
        m = by_parts(lambda part: part * share, m)
    return _write_float(m, m_dtype, dither), stored_u


def as_stored(u: jax.Array, u_scale: ArrayLike, dtype: Any) -> jax.Array:
    """What u will be when it is read again."""
    return _read_u(_write_u(u, u_scale, dtype), u_scale)


def is_saturated(
    stored_m: jax.Array, stored_u: jax.Array, u_scale: ArrayLike
) -> jax.Array:
    """Where a stored m or u is at an end of the range of its dtype."""
    return _is_saturated_m(stored_m) | _is_saturated_u(stored_u, u_scale)


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
        if _range_ends_below(dtype, u.dtype):
            u = _clip(u, float(jnp.finfo(dtype).max))
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


def _write_float(m, dtype, dither):
    """m rounded to a float dtype of float32's range; what is finite stays finite."""
    largest = float(jnp.finfo(dtype).max)
    if is_wide(dtype):
        if _range_ends_below(dtype, m.dtype):
            m = by_parts(lambda part: _clip(part, largest), m)
        return m.astype(dtype)
    m = _clip(m, largest)
    return jnp.where(jnp.isfinite(m), _neighbour(m, dither, dtype), m).astype(dtype)


def _write_ratio(m, u, dtype, dither):
    """m / u rounded to a byte, or to float16."""
    if dtype == jnp.int8:
        return _write_int8(m, u, dither)
    largest = _LARGEST_RATIO if is_bounded_ratio(dtype) else _ends(dtype)[1]
    ratio = jnp.clip(quotient(m, u), -largest, largest)
    rounded = jnp.where(jnp.isnan(ratio), ratio, _neighbour(ratio, dither, dtype))
    return rounded.astype(dtype)


def _write_int8(m, u, dither):
    # What is not finite has no code; the update has already carried it to the user.
    undefined = (u == 0) | ~jnp.isfinite(m)
    # Of |m|, with m's sign in the end: a quotient that is read twice, XLA:CPU writes to
    # memory in between.
    ratio = jnp.where(undefined, 0, jnp.abs(m) / jnp.where(undefined, 1, u))
    square = jnp.minimum(ratio * (_CODES**2 / _LARGEST_RATIO), _CODES**2)
    below = jnp.floor(jnp.sqrt(square))
    # The place between below^2 and (below + 1)^2, linear in m.
    above = square - below * below > dither * (2 * below + 1)
    code = jnp.where(above, below + 1, below)
    return jnp.where(m < 0, -code, code).astype(jnp.int8)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _neighbour(x, dither, dtype):
    """The number of a float dtype below |x| or above it, with the sign of x.

    Above if the place of |x| between the two exceeds a dither: with one that is uniform
    in [0, 1) their mean is x. Derivatives pass as if nothing was rounded.
    """
    dither = jnp.asarray(dither, jnp.float32)
    if dtype == jnp.bfloat16:
        return _neighbour_in_bfloat16(x, dither).astype(x.dtype)
    size = jnp.abs(x).astype(jnp.float32)
    # The numbers of a dtype are equally far apart from one power of two to the next,
    # and at its lower end down to 0. Below float32's normal numbers nothing is kept.
    exponent = lax.bitcast_convert_type(size, jnp.int32) & 0x7F800000
    power = lax.bitcast_convert_type(exponent, jnp.float32)
    smallest = max(_ends(dtype)[0], float(jnp.finfo(jnp.float32).tiny))
    distance = jnp.maximum(power * float(jnp.finfo(dtype).eps), smallest)
    place = size / distance
    below = jnp.floor(place)
    size = jnp.where(place - below > dither, below + 1, below) * distance
    return jnp.where(x < 0, -size, size).astype(x.dtype)


@_neighbour.defjvp
def _neighbour_jvp(dtype, primals, tangents):
    x, dither = primals
    return _neighbour(x, dither, dtype), tangents[0]


def _neighbour_in_bfloat16(x, dither):
    """The same by the bits of a float32, of which bfloat16 keeps the first half.

    What is added carries over if the second half, the place between the neighbours,
    exceeds the dither. XLA:CPU reads x twice else, and writes it to memory in between.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    place = jnp.floor(dither * 2.0**16).astype(jnp.uint32)
    bits = (bits + (np.uint32(0xFFFF) - place)) & np.uint32(0xFFFF0000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _clip(x, largest):
    """What is finite cut off at a largest number."""
    return jnp.where(jnp.isinf(x), x, jnp.clip(x, -largest, largest))


def _ends(dtype):
    """The smallest positive and the largest finite number of a dtype."""
    if dtype == jnp.uint8:
        return 1, 255
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal), float(info.max)


def _range_ends_below(dtype, wider):
    """Whether the numbers of a dtype end at a lower power of two than those of another.

    Those of bfloat16 end with those of float32.
    """
    return dtype == jnp.uint8 or jnp.finfo(dtype).maxexp < jnp.finfo(wider).maxexp


def _is_saturated_u(stored, u_scale):
    if is_wide(stored.dtype):
        return jnp.zeros(stored.shape, bool)
    smallest, _ = _ends(stored.dtype)
    # Where gradients were cut off there, but for the rounding.
    largest = _ROUNDING_LEAVES * largest_stored(jnp.float32, stored.dtype)
    return (stored == smallest) | (_read_u(stored, u_scale) >= largest)


def _is_saturated_m(stored):
    if is_wide(stored.dtype):
        return jnp.zeros(stored.shape, bool)
    if stored.dtype == jnp.int8:
        return jnp.abs(stored) == _CODES
    is_bounded = is_bounded_ratio(stored.dtype)
    largest = _LARGEST_RATIO if is_bounded else _ends(stored.dtype)[1]
    return jnp.abs(stored) == jnp.asarray(largest, stored.dtype)
