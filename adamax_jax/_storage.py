"""How m and u are kept in few bytes: ``write`` and ``read``. Knows no optimizer.

Rounding is monotone, so it commutes with a maximum. The infinity norm
``u = max(b2 * u, |g|)`` is therefore stored so that its decay is exact and every
stored number was rounded once, when it was set:

- What is stored is ``u / u_scale``. The scalar ``u_scale`` takes the decay; where it
  falls below 1 it is doubled and the stored numbers are halved, which is exact.
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

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from adamax_jax._complex import by_parts, number, within
from adamax_jax._quotient import quotient

FLOATS = (
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
)
M_DTYPES = (*FLOATS, "int8")
U_DTYPES = (*FLOATS, "uint8")

# uint8: the leading bits of a float32, 4 codes per octave and linear in between. Code 1
# is 2^-32, code 255 is 1.5 * 2^31; code 0 is 0.
_DROPPED_BITS = 21
_OFFSET = ((127 - 32) << (23 - _DROPPED_BITS)) - 1

# A float of one byte for m holds ratios up to this. At the default decay rates |m|
# stays below 1.01 u, and a uint8 u may have been rounded down by a ninth of itself.
_LARGEST_RATIO = 1.25

# int8: the leading bits of a float32 again, of the ratio plus a number: 16 codes per
# octave well above it and equal steps of 2^-12 below, so that a small persistent mean
# is kept next to a rare large gradient. Between two codes the bits are linear in the
# ratio, since those of the number end in zeros. Code 127 is 1.307; -128 is NaN.
_DROPPED_BITS_OF_M = 19
_KNEE = 1.375 * 2.0**-8
_START = int(np.float32(_KNEE).view(np.int32)) >> _DROPPED_BITS_OF_M
_CODES = 127

# The bits of float32 numbers.
_INFINITY, _NAN = 0x7F800000, 0x7FC00000

_LESS = 1 - 2.0**-22

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
    largest = largest_u(u_dtype)
    return largest if is_ratio(m_dtype) else min(largest, _largest(m_dtype))


def largest_u(dtype: Any) -> float:
    """The largest gradient whose u a dtype holds."""
    # That of code 255.
    return 1.5 * 2.0**31 if dtype == jnp.uint8 else _largest(dtype)


def decay_scale(u_scale: jax.Array, b2: jax.Array) -> jax.Array:
    """The next ``u_scale``: ``b2 * u_scale``, doubled until it is at least 1."""
    scale = b2 * u_scale
    # frexp: scale = fraction * 2^exponent with a fraction in [1/2, 1).
    _, exponent = jnp.frexp(lax.stop_gradient(scale))
    power = jnp.ldexp(jnp.ones_like(scale), 1 - exponent)
    return jnp.where(scale > 0, scale * power, 1)


def read(
    stored_m: jax.Array, stored_u: jax.Array, u_scale: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """m and u as numbers, in float32 at least.

    Args:
      stored_m, stored_u: What :func:`write` returned, or zeros.
      u_scale: The ``u_scale`` that was given to it, decayed since then.
    """
    u = _read_u(stored_u, u_scale)
    if not is_ratio(stored_m.dtype):
        narrow = not is_wide(stored_m.dtype)
        return stored_m.astype(jnp.float32) if narrow else stored_m, u
    ratio = read_ratio(stored_m).astype(u.dtype)
    if stored_u.dtype == jnp.uint8:
        return ratio * u, u
    # Beside an infinite u that many share, the others have a mean of 0; and a ratio may
    # be a little above 1.
    largest = number(_largest(u.dtype), u.dtype)
    return jnp.clip(ratio * jnp.minimum(u, largest), -largest, largest), u


def read_ratio(stored_m: jax.Array) -> jax.Array:
    """m/u, of an m that is stored as that."""
    if stored_m.dtype != jnp.int8:
        return stored_m.astype(jnp.float32)
    code = stored_m.astype(jnp.int32)
    size = jnp.abs(code)
    ratio = _number((size + _START) << _DROPPED_BITS_OF_M) - _KNEE
    ratio = jnp.where(size > _CODES, jnp.nan, ratio)
    return jnp.where(code < 0, -ratio, ratio)


def write(
    m: jax.Array,
    u: jax.Array,
    u_scale: ArrayLike,
    m_dtype: Any,
    u_dtype: Any,
    dither: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """m and u rounded to dtypes; what is finite stays finite.

    And a positive u positive, in bfloat16 where u / u_scale is a normal number.

    Args:
      m: The mean, real or complex, in float32 or float64.
      u: The norm; real, in the same precision. Both :func:`within_dtypes`.
      u_scale: What a stored u is multiplied by when it is read.
      m_dtype, u_dtype: What to store them in.
      dither: Which of its two neighbours an m below 32 bits becomes: a number in
        [0, 1), compared with the place of m between them; 1/2 for the nearer one.
    """
    stored_u = _write_u(u, u_scale, u_dtype)
    if is_ratio(m_dtype):
        divisor = _divisor(stored_u, u_scale).astype(u.dtype)
        return _write_ratio(m, divisor, jnp.dtype(m_dtype), dither), stored_u
    if is_wide(m_dtype):
        return m.astype(m_dtype), stored_u
    return _write_bfloat16(m, dither), stored_u


def within_dtypes(
    m: jax.Array, u: jax.Array, m_dtype: Any, u_dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """m and u where dtypes hold them: beyond, both shrink, and the step is the same."""
    largest = number(largest_stored(m_dtype, u_dtype), u.dtype)
    is_beyond = jnp.isfinite(u) & (u > largest)
    share = jnp.where(is_beyond, largest / jnp.where(is_beyond, u, 1), 1)
    m = by_parts(lambda part: part * share, m)
    return m, jnp.where(is_beyond, largest, u)


@jax.custom_jvp
def as_rounded(exact: jax.Array, rounded: jax.Array) -> jax.Array:
    """What was stored in place of a number, with the derivatives of that."""
    return rounded.astype(exact.dtype)


@as_rounded.defjvp
def _(primals, tangents):
    return as_rounded(*primals), tangents[0]


def as_stored(u: jax.Array, u_scale: ArrayLike, dtype: Any) -> jax.Array:
    """What u will be when it is read again."""
    return _read_u(_write_u(u, u_scale, dtype), u_scale)


def next_larger(stored_u: jax.Array, u_scale: ArrayLike) -> jax.Array:
    """What a u below 32 bits would be if the next larger number were stored."""
    unsigned = jnp.dtype(f"uint{8 * stored_u.dtype.itemsize}")
    bits = lax.bitcast_convert_type(stored_u, unsigned)
    if stored_u.dtype == jnp.uint8:
        last = unsigned.type(255)
    else:
        last = np.array(jnp.finfo(stored_u.dtype).max).view(unsigned)
    # The last, infinity and NaN have none.
    bits = jnp.where(bits < last, bits + unsigned.type(1), bits)
    return _read_u(lax.bitcast_convert_type(bits, stored_u.dtype), u_scale)


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
    return jnp.where(stored == 0, 0, _number_of_code(stored)) * u_scale


def _number_of_code(stored):
    """What a code of uint8 stands for, if it is not 0."""
    return _number((stored.astype(jnp.int32) + _OFFSET) << _DROPPED_BITS)


def _divisor(stored_u, u_scale):
    """The u that will be read; of 0, beside which m is 0, any other number."""
    if stored_u.dtype == jnp.uint8:
        return _number_of_code(stored_u) * jnp.asarray(u_scale, jnp.float32)
    u = _read_u(stored_u, u_scale)
    return jnp.where(u == 0, 1, u)


def _write_u(u, u_scale, dtype):
    """The number of a dtype nearest to ``u / u_scale``; u ends with its range."""
    largest = largest_u(dtype)
    if u.dtype == jnp.float64 and dtype != jnp.float64:
        u = within(u, largest)
    if is_wide(dtype):
        return u.astype(dtype)
    inverse_scale = 1 / jnp.asarray(u_scale, jnp.float32)
    scaled = u.astype(jnp.float32) * inverse_scale
    end = largest * inverse_scale
    if dtype == jnp.bfloat16:
        # A little less, so that the product with the scale will be finite.
        size, last = _bits(scaled * _LESS), _bits(end * _LESS) & -(1 << 16)
        rounded = _number(_bfloat16(size, 0x7FFF, last))
        return as_rounded(scaled, rounded).astype(dtype)
    if dtype != jnp.uint8:
        keep = (u == 0) | jnp.isinf(u)
        clipped = jnp.clip(scaled, _smallest(dtype), end)
        return _narrowed(_nearest(jnp.where(keep, scaled, clipped), dtype), dtype)
    # abs clears the sign of a NaN, which then counts as the end, as an infinity does.
    bits = jnp.minimum(_bits(jnp.abs(scaled)), _bits(end))
    # Adding half a code rounds to nearest; a carry goes on to the next octave.
    code = ((bits + (1 << (_DROPPED_BITS - 1))) >> _DROPPED_BITS) - _OFFSET
    # What is not 0 does not become 0.
    return _narrowed(jnp.maximum(code, jnp.minimum(bits, 1)), jnp.uint8)


def _write_ratio(m, u, dtype, dither):
    """m / u rounded to a byte, or to float16; what is not finite becomes NaN."""
    if dtype == jnp.int8:
        return _write_int8(m, u, dither)
    ratio = quotient(m, u, is_positive=True)
    return _narrowed(as_rounded(ratio, _neighbour(ratio, dither, dtype)), dtype)


def _write_int8(m, u, dither):
    # Of |m|, with m's sign in the end: what reads a quotient twice, XLA:CPU writes to
    # memory. abs clears the sign of a NaN, so that its bits are above infinity's.
    ratio = quotient(jnp.abs(m), u, is_positive=True).astype(jnp.float32)
    bits = _bits(jnp.abs(ratio + _KNEE))
    code = (
        (bits + _carry(dither, 1 << _DROPPED_BITS_OF_M)) >> _DROPPED_BITS_OF_M
    ) - _START
    size = jnp.where(bits < _INFINITY, jnp.minimum(code, _CODES), _CODES + 1)
    return _narrowed(jnp.where(m < 0, -size, size), jnp.int8)


def _narrowed(x, dtype):
    """Numbers that a dtype has, in that dtype.

    XLA:CPU computes a conversion anew wherever it is read, and everything before it,
    which then is read in more than one place and written to memory. A choice between
    two arrays it keeps. On a TPU such a choice would take a kernel of its own.
    """
    is_float = jnp.issubdtype(dtype, jnp.floating)

    def chosen(x):
        # Either what it would be anyway; of floats, 0 has a sign.
        special = jnp.full([], jnp.nan if is_float else 0, dtype)
        is_special = x != x if is_float else x == 0
        return jnp.where(is_special, special, x.astype(dtype))

    return lax.platform_dependent(x, cpu=chosen, default=lambda x: x.astype(dtype))


def _nearest(x, dtype):
    """The nearest number of a float dtype, as float32; below its normal numbers, x.

    A cast does that as well, but XLA:CPU cast to float8 by way of float16 before JAX
    0.10.2, and so rounded twice. (Smaller numbers it would take for normal ones.)
    """
    info = jnp.finfo(dtype)
    rounded = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=info.nmant)
    return jnp.where(x < float(info.smallest_normal), x, rounded)


def _neighbour(ratio, dither, dtype):
    """The number of a float dtype below |ratio| or above it, with its sign, as float32.

    Above if its place between the two exceeds a dither: with one that is uniform in
    [0, 1) their mean is the ratio.
    """
    info = jnp.finfo(dtype)
    size, sign = _size_and_sign(ratio)
    whole = 1 << (jnp.finfo(jnp.float32).nmant - info.nmant)
    carry = _carry(dither, whole)
    # float32's numbers and those of another dtype are equally far apart, but for the
    # bits that this lacks, from one power of two to the next.
    last = _bits(_largest_ratio(dtype))
    rounded = (jnp.minimum(size, last) + carry) & -whole
    # And below its smallest normal number as right above that.
    normal = float(info.smallest_normal)
    small = (_bits(_number(size) + normal) + carry) & -whole
    rounded = jnp.where(size < _bits(normal), _bits(_number(small) - normal), rounded)
    return _number(jnp.where(size < _INFINITY, rounded | sign, _NAN))


def _write_bfloat16(x, dither):
    """The same in bfloat16, which has float32's exponents; infinities stay."""
    size, sign = _size_and_sign(x)
    last = _INFINITY - (1 << 16)
    rounded = sign | _bfloat16(size, _carry(dither, 1 << 16), last)
    return as_rounded(x, _number(rounded)).astype(jnp.bfloat16)


def _bfloat16(size, carry, last):
    """The first half of bits, and one more where the second half and a carry exceed it.

    Not beyond the last: as they are, the bits of infinity and NaN are larger, and what
    is between the last and the next is cut off.
    """
    return jnp.maximum(jnp.minimum(size, last) + carry, size) & -(1 << 16)


def _carry(dither, whole):
    """What added to a part of a whole exceeds that where the part exceeds a dither."""
    return whole - 1 - jnp.floor(dither * float(whole)).astype(jnp.int32)


def _size_and_sign(x):
    """The bits of a float32 without that of the sign, and that.

    By its bits, x is read once; what reads a quotient twice, XLA:CPU writes to memory.
    """
    bits = _bits(x.astype(jnp.float32))
    return bits & 0x7FFFFFFF, bits & ~0x7FFFFFFF


def _bits(x):
    if isinstance(x, float):
        return int(np.float32(x).view(np.int32))
    return lax.bitcast_convert_type(x, jnp.int32)


def _number(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _smallest(dtype):
    """The smallest positive number of a float dtype."""
    return float(jnp.finfo(dtype).smallest_subnormal)


def _largest_ratio(dtype):
    """The largest m/u of a float dtype."""
    return _LARGEST_RATIO if is_bounded_ratio(dtype) else _largest(dtype)


def _largest(dtype):
    """The largest number of a dtype; of bfloat16, that of float32, all but the same."""
    return float(jnp.finfo(jnp.float32 if dtype == jnp.bfloat16 else dtype).max)


def _is_saturated_u(stored, u_scale):
    if is_wide(stored.dtype):
        return jnp.zeros(stored.shape, bool)
    smallest = 1 if stored.dtype == jnp.uint8 else _smallest(stored.dtype)
    # Where gradients were cut off there, but for the rounding.
    largest = _ROUNDING_LEAVES * largest_u(stored.dtype)
    return (stored == smallest) | (_read_u(stored, u_scale) >= largest)


def _is_saturated_m(stored):
    if is_wide(stored.dtype):
        return jnp.zeros(stored.shape, bool)
    if stored.dtype == jnp.int8:
        return jnp.abs(stored) == _CODES
    largest = _largest_ratio(stored.dtype)
    return jnp.abs(stored) == jnp.asarray(largest, stored.dtype)
