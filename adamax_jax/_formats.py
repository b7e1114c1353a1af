"""How m and u are stored: a class for each format, independent of the optimizer.

A u below 32 bits is stored as ``u / u_scale``. The scalar takes the decay. If it falls
below 1, it is doubled and the stored numbers are halved, which is exact. Rounding is
monotone, so it commutes with a maximum: the next stored u is the maximum of the stored
u and the rounded gradient. It is computed on ``codes``, integers in the order of the
numbers. So each stored number was rounded once, at any age.

m is an average, and rounding does not commute with averages. Rounded to nearest, m
would not change if a step changes it by less than half the distance of two numbers. So
m is rounded stochastically, which has no bias: a remainder above ``dither``, a fraction
in [0, 1), rounds up.

All formats have

- ``largest``, the max to which gradients are clipped.

Formats of m have

- ``is_ratio``: whether m is stored as m/u.

Formats of u have

- ``is_scaled``: whether u is stored as ``u / u_scale``;
- ``saturates``: whether infinity is stored as the largest number;
- ``smallest``: a u up to this number has decayed, and ``max_growth`` does not limit it;
- ``decayed`` and ``grown``, the codes of ``b2 * u`` and of ``max_growth * u``;
- ``no_limit``, which is above every code.

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

# Constants of float32.
_MAX, _TINY = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)
_INFINITY, _NAN, _SIGN = 0x7F800000, 0x7FC00000, -(1 << 31)
# 2^32 divided by the golden ratio.
_GOLDEN = 0x9E3779B1


class Wide:
    """32 bits and more, for m and u: stored unchanged. The code of u is u itself."""

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
        # Finite, so that infinite gradients are clipped too.
        return smaller(c.max_growth * u, number(self.largest, u.dtype))


class Bfloat16Mean:
    """m in bfloat16, the upper 16 bits of a float32."""

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

    Well above KNEE there are 16 codes per octave, and below it equal steps of 2^-12. So
    small means are not lost after a rare large gradient. Code 127, the max, is 1.307,
    and -128 is NaN. With ``unit``, a power of 2, the ratio is ``m / (unit * u)``.
    """

    is_ratio, largest = True, float("inf")
    SHIFT, KNEE, LAST, NAN = 19, 1.375 * 2.0**-8, 127, 128
    FIRST = int(np.float32(KNEE).view(np.int32)) >> SHIFT
    LARGEST_RATIO = float(np.int32((LAST + FIRST) << SHIFT).view(np.float32)) - KNEE

    def ratio(self, stored, unit=1.0):
        code = stored.astype(jnp.int32)
        magnitude = jnp.abs(code)
        bits = (magnitude + self.FIRST) << self.SHIFT
        # NaN as bits, since jax.debug_nans and jax.disable_jit report NaN constants.
        ratio = _float(jnp.where(magnitude == self.NAN, _NAN, bits)) - self.KNEE
        ratio = unit * ratio
        return jnp.where(code < 0, -ratio, ratio)

    def read(self, stored, u, norm, unit=1.0):
        ratio = self.ratio(stored, unit).astype(u.dtype)
        if norm.saturates:
            return ratio * u
        # Finite, even if u is infinite or a ratio slightly above 1.
        end = number(float(jnp.finfo(u.dtype).max), u.dtype)
        return larger(smaller(ratio * smaller(u, end), end), -end)

    def write(self, m, u, dither, unit=1.0):
        # The stored u, or any nonzero value where u, and therefore m, is 0.
        divisor = jnp.where(u == 0, 1, u)
        # Divides |m|, since XLA:CPU would write a quotient with two readers to memory.
        # The outer abs clears the sign bit of NaN, so that its bits exceed infinity's.
        ratio = quotient(jnp.abs(m), divisor, is_positive=True) * (1 / unit)
        ratio = ratio.astype(jnp.float32)
        bits = _bits(jnp.abs(ratio + self.KNEE))
        code = ((bits + _carry(dither, self.SHIFT)) >> self.SHIFT) - self.FIRST
        code = jnp.where(bits < _INFINITY, jnp.minimum(code, self.LAST), self.NAN)
        return narrowed(jnp.where(m < 0, -code, code), jnp.int8)


class _ScaledNorm:
    """A u below 32 bits, stored as ``u / u_scale``."""

    is_scaled, no_limit = True, np.iinfo(np.int32).max
    # Each format has: the code of infinity, the min growth, and three functions.
    infinity: int
    STEP: float
    encode: Any
    codes_of: Any
    store: Any

    def minimum(self, code, limit):
        """The minimum of codes. NaN, whose code is above infinity's, stays NaN."""
        # Adding zeros gives it the sharding of both, which ``where`` needs.
        code = code + jnp.zeros_like(limit)
        return jnp.where(code > self.infinity, code, jnp.minimum(code, limit))

    def write(self, u, u_scale):
        return self.store(self.encode(u, u_scale), u, u_scale)

    def growth(self, c):
        """The max factor for a stored number, at least STEP."""
        return larger(c.max_growth, self.STEP) * (c.u_scale / c.next_u_scale)

    def next(self, stored, u, magnitude, c, next_u):
        """The next stored u, from codes. ``u``, in floats, has the derivatives."""
        code = next_u(self, self.codes_of(stored), magnitude, c)
        return self.store(code, u, c.next_u_scale)


class Bfloat16Norm(_ScaledNorm):
    """u in bfloat16, the upper half of a float32. Its codes are float32 bits."""

    saturates, largest, smallest = False, _MAX, 4 * _TINY
    infinity, STEP = _INFINITY, 1 + 2.0**-7

    def read(self, stored, u_scale):
        return stored.astype(jnp.float32) * _float32(u_scale)

    def encode(self, u, u_scale):
        # Slightly less, so that the largest stored number is finite when read.
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
        # Finite, so that infinite gradients are clipped too.
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
    """u as the leading bits of a float32: 4 codes per octave, linear within an octave.

    Code 1 is 2^-32, code 255 is 1.5 * 2^31, and code 0 is 0. NaN and infinity are
    stored as the largest number.
    """

    saturates, largest, smallest = True, 1.5 * 2.0**31, 2.0**-32
    # ``bits(1.0) >> SHIFT``, and shifted bits minus code.
    SHIFT, ONE, OFFSET = 21, 127 * 4, (127 - 32) * 4 - 1
    # Adds more codes than any decay removes; 1 + 1/4 would not at b2 = 0.835.
    STEP = 1.27
    infinity, LAST = (_INFINITY >> SHIFT) - OFFSET, 255

    def read(self, stored, u_scale):
        code = stored.astype(jnp.int32)
        # A product, since XLA:CPU would write the result of ``where`` to memory.
        bits = (code + self.OFFSET * jnp.minimum(code, 1)) << self.SHIFT
        return _float(bits) * _float32(u_scale)

    def encode(self, u, u_scale):
        bits = _bits(jnp.abs(_float32(u) * (1 / _float32(u_scale))))
        # Rounds to nearest. A carry moves to the next octave, of NaN to the sign bit.
        half = 1 << (self.SHIFT - 1)
        code = lax.shift_right_logical(bits + half, jnp.int32(self.SHIFT)) - self.OFFSET
        # Nonzero values stay nonzero.
        return jnp.maximum(code, jnp.minimum(bits, 1))

    def average(self, u, dither):
        bits = _bits(jnp.abs(u))
        # The carry of a NaN may reach the sign bit.
        bits_up = bits + _carry_of_each(dither, self.SHIFT, bits)
        code = lax.shift_right_logical(bits_up, jnp.int32(self.SHIFT)) - self.OFFSET
        # Nonzero values stay nonzero.
        code = jnp.clip(code, jnp.minimum(bits, 1), self.LAST)
        return narrowed(code, jnp.uint8)

    def codes_of(self, stored):
        return stored.astype(jnp.int32)

    def decayed(self, code, c):
        bits = _bits(c.halving)
        smallest = jnp.minimum(code, jnp.minimum(bits, 1))
        return jnp.maximum(code + (bits >> self.SHIFT) - self.ONE, smallest)

    def grown(self, code, c):
        # Within an octave n codes are a factor of at most 1 + n/4, with bits ONE + n.
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
    """The formats of m and u for these dtypes."""
    means = MEANS | COMPLEX_MEANS
    return means[jnp.dtype(m_dtype).name], NORMS[jnp.dtype(u_dtype).name]


def default_dtype(dtype: Any) -> Any:
    """The default dtype of a parameter's state: its own, or bfloat16 below 32 bits.

    An integer dtype, that of a state whose parameter is unknown, gives float32.
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
    # With b2 = 0, u decays to 0 at once.
    is_gone = scale == 0
    return jnp.where(is_gone, 1, scale * power), jnp.where(is_gone, 0, 1 / power)


def _carry(dither, shift):
    """The integer to add before truncating ``shift`` bits.

    A remainder above ``dither``, as a fraction of the truncated bits, rounds up.
    """
    whole = 1 << shift
    return whole - 1 - jnp.floor(dither * float(whole)).astype(jnp.int32)


def _carry_of_each(dither, shift, bits):
    """As ``_carry``, with a threshold for each element, evenly spread over the array.

    With one threshold for all, all of u would round up at once and all steps would be
    shorter. Multiples of the golden ratio are evenly spread (Weyl's sequence).
    """
    threshold = zeros = zeros_in_the_kernel_of(bits)
    for axis in range(bits.ndim):
        index = zeros + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        step = _GOLDEN * math.prod(bits.shape[axis + 1 :]) % (1 << 32)
        threshold += index * np.uint32(step)
    # A sum modulo 1, in units of 2^-32. A dither has 24 bits.
    threshold += (dither * 2.0**24).astype(jnp.uint32) << np.uint32(8)
    return (threshold >> np.uint32(32 - shift)).astype(jnp.int32)


def _upper_half(magnitude, carry):
    """Truncates float32 bits to bfloat16 after adding ``carry``.

    Finite values stay finite. Infinity and NaN, whose bits are above those of any
    number, stay infinity and NaN.
    """
    finite = jnp.minimum(magnitude, _INFINITY - (1 << 16))
    return jnp.maximum(finite + carry, magnitude) & -(1 << 16)


def _nearest(bits, finite):
    """Rounds float32 bits to bfloat16, to nearest.

    ``finite`` holds the bits to be rounded, clipped so that they stay finite. Infinity
    and NaN in ``bits`` stay infinity and NaN.
    """
    return jnp.maximum(finite + (1 << 15), bits) & -(1 << 16)


def _float32(x):
    return jnp.asarray(x, jnp.float32)


def _bits(x):
    return lax.bitcast_convert_type(_float32(x), jnp.int32)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)
