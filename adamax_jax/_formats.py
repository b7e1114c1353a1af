"""How m and u are stored: one class for each format. Knows no optimizer.

A u below 32 bits is stored as ``u / u_scale``. The scalar takes the decay; where it
falls below 1, it is doubled and the stored numbers are halved, which is exact. Rounding
is monotone, so it commutes with a maximum: the next stored u is the maximum of the
stored one and of the rounded gradient, computed on their ``codes``, integers in the
order of the numbers. So each stored number was rounded once, at any age.

m is an average, for which that does not hold. Rounded to nearest it would stay for ever
where a step changes it by less than half the distance of two numbers. So it is rounded
up or down in proportion to its place between the two, by a ``dither`` in [0, 1), which
leaves no bias.

A format knows its ``largest`` number, at which gradients are clipped. A mean
``is_ratio`` if it is stored as m/u. A norm ``saturates`` if infinity becomes its
largest number. A u up to its ``smallest`` number has decayed: ``max_growth`` lets it
take any gradient. ``decayed`` and ``grown`` are the codes of ``b2 * u`` and of
``max_growth * u``; ``no_limit`` is above every code.

To add a format, write a class and put it into ``MEANS`` or ``NORMS``.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adamax_jax._numerics import number, quotient, within
from adamax_jax._xla import (
    as_rounded,
    larger,
    narrowed,
    smaller,
    zeros_in_the_kernel_of,
)

# Of float32.
_MAX, _TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_INFINITY, _NAN, _SIGN = 0x7F800000, 0x7FC00000, -(1 << 31)
# 2^32 divided by the golden ratio.
_GOLDEN = 0x9E3779B1


class Wide:
    """32 bits and more, for m and for u: numbers as they are. A u is its own code."""

    is_ratio = is_scaled = saturates = False
    smallest, no_limit, minimum = 0.0, float("inf"), staticmethod(smaller)

    def __init__(self, dtype):
        self.dtype, self.largest = jnp.dtype(dtype), float(jnp.finfo(dtype).max)

    def read(self, stored, *_):
        return stored

    def write(self, x, *_):
        return (
            x if x.dtype == self.dtype else within(x, self.largest).astype(self.dtype)
        )

    def next(self, stored, u, magnitude, c, next_u):
        return self.write(u)

    def average(self, u, dither):
        return self.write(u)

    def encode(self, u, u_scale):
        return u

    def decayed(self, u, c):
        return c.decay * u

    def grown(self, u, c):
        # Finite, so that an infinite gradient is cut off too.
        return smaller(c.max_growth * u, number(self.largest, u.dtype))


class Bfloat16Mean:
    """The upper 16 bits of a float32."""

    is_ratio, largest = False, _MAX

    def read(self, stored, *_):
        return stored.astype(jnp.float32)

    def write(self, m, u, dither, *_):
        bits = _bits(m)
        magnitude, sign = bits & ~_SIGN, bits & _SIGN
        magnitude = _upper_half(magnitude, _carry(dither, 16))
        return as_rounded(m, _float(magnitude | sign)).astype(jnp.bfloat16)


class Int8Mean:
    """m/u, as the sign and the leading bits of the float32 ``|m/u| + KNEE``.

    These are 16 codes per octave well above the knee, and equal steps of 2^-12 below
    it: a small persistent mean is kept beside a rare large gradient. The last code,
    127, is 1.307. -128 is NaN. With a ``unit``, a power of 2, the ratio is m/(unit u).
    """

    is_ratio, largest = True, float("inf")
    SHIFT, KNEE, LAST, NAN = 19, 1.375 * 2.0**-8, 127, 128
    FIRST = int(np.float32(KNEE).view(np.int32)) >> SHIFT
    LARGEST_RATIO = float(np.int32((LAST + FIRST) << SHIFT).view(np.float32)) - KNEE

    def ratio(self, stored, unit=1.0):
        code = stored.astype(jnp.int32)
        magnitude = jnp.abs(code)
        bits = (magnitude + self.FIRST) << self.SHIFT
        # As bits: under jax.disable_jit, jax.debug_nans reports a NaN among constants.
        ratio = _float(jnp.where(magnitude == self.NAN, _NAN, bits)) - self.KNEE
        ratio = unit * ratio
        return jnp.where(code < 0, -ratio, ratio)

    def read(self, stored, u, norm, unit=1.0):
        ratio = self.ratio(stored, unit).astype(u.dtype)
        if norm.saturates:
            return ratio * u
        # Finite, also beside an infinite u, and where a ratio is a little above 1.
        end = number(float(jnp.finfo(u.dtype).max), u.dtype)
        return larger(smaller(ratio * smaller(u, end), end), -end)

    def write(self, m, u, dither, unit=1.0):
        # Beside a u of 0, m is 0.
        divisor = jnp.where(u == 0, 1, u)
        # Of |m|, since XLA:CPU writes to memory a quotient that is read twice. The
        # outer abs clears the sign of a NaN, whose bits then are above infinity's.
        ratio = quotient(jnp.abs(m), divisor, is_positive=True) * (1 / unit)
        ratio = ratio.astype(jnp.float32)
        bits = _bits(jnp.abs(ratio + self.KNEE))
        code = ((bits + _carry(dither, self.SHIFT)) >> self.SHIFT) - self.FIRST
        code = jnp.where(bits < _INFINITY, jnp.minimum(code, self.LAST), self.NAN)
        return narrowed(jnp.where(m < 0, -code, code), jnp.int8)


class _ScaledNorm:
    """A u below 32 bits, stored as ``u / u_scale``."""

    is_scaled, no_limit = True, np.iinfo(np.int32).max
    # The code of infinity, the least growth, and functions that each format has.
    infinity: int
    STEP: float
    encode: Any
    codes_of: Any
    store: Any

    def minimum(self, code, limit):
        """NaN stays, whose code is above infinity's."""
        # Plus zeros: the choice needs the sharding of both.
        code = code + jnp.zeros_like(limit)
        return jnp.where(code > self.infinity, code, jnp.minimum(code, limit))

    def write(self, u, u_scale):
        return self.store(self.encode(u, u_scale), u, u_scale)

    def growth(self, c):
        """The largest factor for a stored number: one step of it at least."""
        return larger(c.max_growth, self.STEP) * (c.u_scale / c.next_u_scale)

    def next(self, stored, u, magnitude, c, next_u):
        """The next u in codes; ``u``, the same in floats, has its derivatives."""
        code = next_u(self, self.codes_of(stored), magnitude, c)
        return self.store(code, u, c.next_u_scale)


class Bfloat16Norm(_ScaledNorm):
    """The upper 16 bits of a float32. Its codes are float32 bits."""

    saturates, largest, smallest = False, _MAX, 4 * _TINY
    infinity, STEP = _INFINITY, 1 + 2.0**-7

    def read(self, stored, u_scale):
        return stored.astype(jnp.float32) * _float32(u_scale)

    def encode(self, u, u_scale):
        # A little less, so that the largest number is finite also when it is read.
        inverse = (1 - 2.0**-22) / _float32(u_scale)
        bits = _bits(jnp.abs(_float32(u) * inverse))
        end = _bits(_MAX * inverse) & -(1 << 16)
        return _nearest(bits, jnp.minimum(bits, end))

    def codes_of(self, stored):
        return _bits(stored)

    def decayed(self, code, c):
        return _bits(_float(code) * _float32(c.halving))

    def grown(self, code, c):
        bits = _bits(_float(code) * _float32(self.growth(c)))
        # Finite, so that an infinite gradient is cut off too.
        end = self.encode(self.largest, c.next_u_scale)
        return jnp.minimum(_nearest(bits, bits), end)

    def average(self, u, dither):
        bits = _bits(jnp.abs(u))
        bits = _upper_half(bits, _carry_of_each(dither, 16, bits))
        return as_rounded(u, _float(bits)).astype(jnp.bfloat16)

    def store(self, code, u, u_scale):
        scaled = _float32(u) / _float32(u_scale)
        return as_rounded(scaled, _float(code)).astype(jnp.bfloat16)


class Uint8Norm(_ScaledNorm):
    """The leading bits of a float32: 4 codes per octave, linear in between.

    Code 1 is 2^-32 and code 255 is 1.5 * 2^31; code 0 is 0. NaN and infinity count as
    the largest number.
    """

    saturates, largest, smallest = True, 1.5 * 2.0**31, 2.0**-32
    # The shifted bits of 1, and what they have more than a code.
    SHIFT, ONE, OFFSET = 21, 127 * 4, (127 - 32) * 4 - 1
    # Adds more codes than any decay takes away; 1 + 1/4 would not at b2 = 0.835.
    STEP = 1.27
    infinity, LAST = (_INFINITY >> SHIFT) - OFFSET, 255

    def read(self, stored, u_scale):
        code = stored.astype(jnp.int32)
        # Not a choice: XLA:CPU would write the numbers to memory for two readers.
        bits = (code + self.OFFSET * jnp.minimum(code, 1)) << self.SHIFT
        return _float(bits) * _float32(u_scale)

    def encode(self, u, u_scale):
        bits = _bits(jnp.abs(_float32(u) * (1 / _float32(u_scale))))
        # To nearest; a carry goes on to the next octave, or to the sign bit.
        half = 1 << (self.SHIFT - 1)
        code = lax.shift_right_logical(bits + half, jnp.int32(self.SHIFT)) - self.OFFSET
        # What is not 0 does not become 0.
        return jnp.maximum(code, jnp.minimum(bits, 1))

    def average(self, u, dither):
        bits = _bits(jnp.abs(u))
        # A carry of NaN goes on to the sign bit.
        bits_up = bits + _carry_of_each(dither, self.SHIFT, bits)
        code = lax.shift_right_logical(bits_up, jnp.int32(self.SHIFT)) - self.OFFSET
        # What is not 0 does not become 0.
        code = jnp.clip(code, jnp.minimum(bits, 1), self.LAST)
        return narrowed(code, jnp.uint8)

    def codes_of(self, stored):
        return stored.astype(jnp.int32)

    def decayed(self, code, c):
        bits = _bits(c.halving)
        smallest = jnp.minimum(code, jnp.minimum(bits, 1))
        return jnp.maximum(code + (bits >> self.SHIFT) - self.ONE, smallest)

    def grown(self, code, c):
        # n codes are a factor of 1 + n/4 at most within an octave, as the bits say.
        return code + (_bits(self.growth(c)) >> self.SHIFT) - self.ONE

    def store(self, code, u, u_scale):
        return narrowed(
            jnp.minimum(code, self.encode(self.largest, u_scale)), jnp.uint8
        )


_WIDE = {name: Wide(name) for name in ("float64", "float32")}
MEANS = _WIDE | {"bfloat16": Bfloat16Mean(), "int8": Int8Mean()}
NORMS = _WIDE | {"bfloat16": Bfloat16Norm(), "uint8": Uint8Norm()}
COMPLEX_MEANS = {name: Wide(name) for name in ("complex128", "complex64")}


def formats(m_dtype: Any, u_dtype: Any) -> tuple[Any, Any]:
    """The formats of m and u in these dtypes."""
    means = MEANS | COMPLEX_MEANS
    return means[jnp.dtype(m_dtype).name], NORMS[jnp.dtype(u_dtype).name]


def default_dtype(dtype: Any) -> Any:
    """What a parameter's state is stored in: its own dtype, or bfloat16 below 32 bits.

    float32 stands for the dtype of a parameter that is not known.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype if jnp.finfo(dtype).bits >= 32 else jnp.bfloat16)


def next_scale(u_scale: jax.Array, b2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``b2 * u_scale``, doubled until it is at least 1, and the factor for stored u."""
    scale = b2 * u_scale
    # frexp: scale = fraction * 2^exponent with a fraction in [1/2, 1).
    _, exponent = jnp.frexp(lax.stop_gradient(scale))
    power = jnp.ldexp(jnp.ones_like(scale), 1 - exponent)
    # With b2 = 0 nothing is left of u.
    is_gone = scale == 0
    return jnp.where(is_gone, 1, scale * power), jnp.where(is_gone, 0, 1 / power)


def _carry(dither, shift):
    """The integer to add before truncating ``shift`` bits.

    A remainder above ``dither``, as a fraction of the truncated bits, rounds up.
    """
    whole = 1 << shift
    return whole - 1 - jnp.floor(dither * float(whole)).astype(jnp.int32)


def _carry_of_each(dither, shift, bits):
    """As ``_carry``, but another one for each number, evenly spread over an array.

    One for all would be noise of the learning rate: where all of u is rounded up, all
    steps are shorter. Multiples of the golden ratio leave no gaps (Weyl's sequence).
    """
    place = zeros = zeros_in_the_kernel_of(bits)
    for axis in range(bits.ndim):
        index = zeros + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        step = _GOLDEN * math.prod(bits.shape[axis + 1 :]) % (1 << 32)
        place += index * np.uint32(step)
    # A sum modulo 1, in units of 2^-32. A dither has 24 bits.
    place += (dither * 2.0**24).astype(jnp.uint32) << np.uint32(8)
    return (place >> np.uint32(32 - shift)).astype(jnp.int32)


def _upper_half(magnitude, carry):
    """float32 bits rounded up or down to 16; finite stays finite, infinity and NaN too.

    Infinity and NaN have larger bits than any number.
    """
    finite = jnp.minimum(magnitude, _INFINITY - (1 << 16))
    return jnp.maximum(finite + carry, magnitude) & -(1 << 16)


def _nearest(bits, finite):
    """float32 bits rounded to their upper half; infinity and NaN stay."""
    return jnp.maximum(finite + (1 << 15), bits) & -(1 << 16)


def _float32(x):
    return jnp.asarray(x, jnp.float32)


def _bits(x):
    return lax.bitcast_convert_type(_float32(x), jnp.int32)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)
