"""Splits a float32 number into one in half precision and a residual, and joins them.

With p the half-precision number nearest to x, and r the residual:

- bfloat16 is the upper half of a float32. With the bits as integers,
  ``bits(x) = 2^16 bits(p) + r``. r is in [-2^15, 2^15), so that int16 is exact.
- float16 has other exponents. ``x = p + r ulp(p) / 2^15``, where ulp(p) is the distance
  from p to the next number. |r| is at most 2^14, and exact for |x| above 2^-16.

A residual of 8 bits is the upper half of r.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_HALF = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
# Bits, of float32 and of float16.
_NAN, _INFINITY_OF_FLOAT16 = 0x7FC00000, 0x7C00


def is_half(x: Any) -> bool:
    """Whether x is in half precision."""
    return jnp.result_type(x) in _HALF


def threshold_of(count: jax.Array) -> jax.Array:
    """The threshold in [0, 1) at which an 8-bit residual rounds up, for each count.

    Multiples of the golden ratio: those of any consecutive counts, or of every second
    or tenth, are evenly spread. So steps far below the smallest residual move a
    parameter at the right speed.
    """
    x = count.astype(jnp.uint32) * np.uint32(0x9E3779B9)
    return (x >> 8).astype(jnp.float32) * 2.0**-24


@jax.custom_jvp
def join(p: jax.Array, r: jax.Array) -> jax.Array:
    """The float32 numbers x that p and r represent. Their derivative by p is 1."""
    if p.dtype == jnp.float16:
        p = _wide(p)
        return p + r.astype(jnp.float32) * _unit(p, r.dtype)
    low = r.astype(jnp.int32)
    if r.dtype == jnp.int8:
        low = low << 8
    high = _bits(_wide(p))
    # If other code has set p to 0 or infinity, bits below 0 or above infinity would be
    # those of NaN. (Compares bits, since floats compare subnormal numbers as 0.)
    is_zero = (high & 0x7FFFFFFF) == 0
    has_residual = jnp.isfinite(p) & ~(is_zero & (low < 0))
    return _float(high + jnp.where(has_residual, low, 0))


@join.defjvp
def _(primals, tangents):
    return join(*primals), tangents[0].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("dtype", "residual_dtype"))
def split(x: jax.Array, dtype: Any, residual_dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Splits float32 numbers into p, of a dtype, and r, rounding to nearest."""
    if residual_dtype == jnp.int8:
        x = _with_8_bits(x, dtype, 0.5)
    p = _round(x, dtype)
    return p, _residual_of(x, p, residual_dtype)


# Jitted for the same reason as ``update_leaf``.
@functools.partial(jax.jit, static_argnames="residual_dtype")
def step(
    p: jax.Array, x: jax.Array, u: jax.Array, threshold: jax.Array, residual_dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Adds u to x. Returns the update of p and the new residual."""
    return _step(p, x, u.astype(jnp.float32), threshold, residual_dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _step(p, x, u, threshold, residual_dtype):
    x = x + u
    if residual_dtype == jnp.int8:
        x = _with_8_bits(x, p.dtype, threshold)
    new_p = _round(x, p.dtype)
    # Adding -0 leaves a parameter of -0 unchanged too.
    old = p.astype(jnp.float32)
    update = jnp.where(_wide(new_p) == old, -0.0, _wide(new_p) - old)
    # p as optax.apply_updates computes it, which may differ from ``_round(x)``.
    new_p = (old + update).astype(p.dtype)
    return update, _residual_of(x, new_p, residual_dtype)


@_step.defjvp
def _(residual_dtype, primals, tangents):
    """The derivatives without rounding."""
    update, r = _step(*primals, residual_dtype)
    p_dot, x_dot, u_dot, _ = tangents
    no_tangent = np.zeros(r.shape, jax.dtypes.float0)
    return (update, r), (x_dot + u_dot - p_dot.astype(jnp.float32), no_tangent)


def _round(x, dtype):
    """Rounds to half precision, to nearest; bfloat16 rounds ties away from 0."""
    if dtype == jnp.float16:
        return x.astype(dtype)
    # Ties away from 0 leave a residual of 16 bits. In half of the bit patterns of NaN
    # the carry would reach the sign bit.
    high = jnp.where(jnp.isnan(x), _NAN, _bits(x) + 0x8000) >> 16
    return lax.bitcast_convert_type(high.astype(jnp.int16), jnp.bfloat16)


def _wide(p):
    """Casts half precision to float32.

    Uses bits, since XLA:GPU (jaxlib 0.10.2) removes a cast to half precision and the
    cast back, so that x - p would be 0. Test: ``test_excess_precision.py``.
    """
    bits = lax.bitcast_convert_type(p, jnp.int16).astype(jnp.int32)
    if p.dtype == jnp.bfloat16:
        return _float(bits << 16)
    magnitude = bits & 0x7FFF
    is_finite = magnitude < _INFINITY_OF_FLOAT16
    # The exponent of 1 is 15 in float16, 127 in float32; that of infinity is the max.
    exponent = jnp.where(is_finite, 127 - 15, 255 - 31)
    normal = _float((magnitude << 13) + (exponent << 23))
    subnormal = magnitude.astype(jnp.float32) * 2.0**-24
    wide = jnp.where(magnitude < 1 << 10, subnormal, normal)
    return jnp.where(bits < 0, -wide, wide)


def _with_8_bits(x, dtype, threshold):
    """Rounds x stochastically to 8 residual bits."""
    if dtype == jnp.float16:
        p = _wide(_round(x, dtype))
        unit = _unit(p, jnp.int8)
        r = jnp.floor((x - p) / unit + threshold)
        return jnp.where(jnp.isfinite(p), p + r * unit, x)
    bits = (_bits(x) + jnp.floor(threshold * 256).astype(jnp.int32)) & ~0xFF
    return jnp.where(jnp.isfinite(x), _float(bits), x)


def _residual_of(x, p, dtype):
    """x - p as integers, clipped to those of the dtype."""
    wide = _wide(p)
    if p.dtype == jnp.bfloat16:
        r = _bits(x) - _bits(wide)
        r = r >> 8 if dtype == jnp.int8 else r
        # The difference of bits is a distance only if the signs are the same.
        has_residual = jnp.isfinite(wide) & (jnp.signbit(x) == jnp.signbit(wide))
    else:
        r = jnp.round((x - wide) / _unit(wide, dtype))
        has_residual = jnp.isfinite(wide)
    ends = jnp.iinfo(dtype)
    r = jnp.clip(jnp.where(has_residual, r, 0), ends.min, ends.max)
    return r.astype(dtype)


def _unit(p, residual_dtype):
    """The value of 1 in the residual of a float16 number p, given in float32."""
    power = _float(_bits(p) & 0x7F800000)
    info = jnp.finfo(jnp.float16)
    # Finite for an infinite p too, so that its residual of 0 means 0.
    power = jnp.clip(power, float(info.smallest_normal), 2.0 ** (info.maxexp - 1))
    ulp = power * float(info.eps)
    # So half an ulp is at most half of the max integer.
    return ulp / (jnp.iinfo(residual_dtype).max + 1)


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)
