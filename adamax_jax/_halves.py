"""A float32 number as one in half precision and a residual: ``join`` and ``split``.

With p the nearest half-precision number to x, and r the residual:

- bfloat16 is the first half of a float32. With both read as integers,
  ``bits(x) = 2^16 bits(p) + r``: r is at most 2^15, and 16 bits hold it exactly.
- float16 has other exponents. ``x = p + r ulp(p) / 2^15``, where ulp(p) is the distance
  of p to the next number: r is at most 2^14, and exact for x above 2^-16.

A residual of 8 bits is the first half of that.
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
    """A number in [0, 1) for each count, by which a residual of 8 bits is rounded up.

    Multiples of the golden ratio: of any numbers in a row, or of every second or tenth,
    each part of the range has its share, so that a step far below the smallest residual
    moves a parameter at the right speed.
    """
    x = count.astype(jnp.uint32) * np.uint32(0x9E3779B9)
    return (x >> 8).astype(jnp.float32) * 2.0**-24


@jax.custom_jvp
def join(p: jax.Array, r: jax.Array) -> jax.Array:
    """The float32 numbers x that p and r stand for; their derivative by p is 1."""
    if p.dtype == jnp.float16:
        p = _wide(p)
        return p + r.astype(jnp.float32) * _unit(p, r.dtype)
    low = r.astype(jnp.int32)
    if r.dtype == jnp.int8:
        low = low << 8
    high = _bits(_wide(p))
    # If somebody else set p: below the bits of 0 there are those of NaN, and so above
    # infinity. (A comparison of floats takes subnormal numbers for 0.)
    is_zero = (high & 0x7FFFFFFF) == 0
    has_residual = jnp.isfinite(p) & ~(is_zero & (low < 0))
    return _float(high + jnp.where(has_residual, low, 0))


@join.defjvp
def _(primals, tangents):
    return join(*primals), tangents[0].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("dtype", "residual_dtype"))
def split(x: jax.Array, dtype: Any, residual_dtype: Any) -> tuple[jax.Array, jax.Array]:
    """p of a dtype and r that stand for float32 numbers, or for the nearest ones."""
    if residual_dtype == jnp.int8:
        x = _with_8_bits(x, dtype, 0.5)
    p = _round(x, dtype)
    return p, _residual_of(x, p, residual_dtype)


# Jitted for the same reason as the update of a leaf.
@functools.partial(jax.jit, static_argnames="residual_dtype")
def step(
    p: jax.Array, x: jax.Array, u: jax.Array, threshold: jax.Array, residual_dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """The update of p and its new residual, where x is to change by u."""
    return _step(p, x, u.astype(jnp.float32), threshold, residual_dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _step(p, x, u, threshold, residual_dtype):
    x = x + u
    if residual_dtype == jnp.int8:
        x = _with_8_bits(x, p.dtype, threshold)
    new_p = _round(x, p.dtype)
    # A difference of -0 leaves also a parameter of -0 as it is.
    old = p.astype(jnp.float32)
    update = jnp.where(_wide(new_p) == old, -0.0, _wide(new_p) - old)
    # What optax.apply_updates makes of it, which is not always the same.
    new_p = (old + update).astype(p.dtype)
    return update, _residual_of(x, new_p, residual_dtype)


@_step.defjvp
def _(residual_dtype, primals, tangents):
    """As if nothing was rounded."""
    update, r = _step(*primals, residual_dtype)
    p_dot, x_dot, u_dot, _ = tangents
    no_tangent = np.zeros(r.shape, jax.dtypes.float0)
    return (update, r), (x_dot + u_dot - p_dot.astype(jnp.float32), no_tangent)


def _round(x, dtype):
    """The nearest numbers in half precision; in bfloat16, ties away from 0."""
    if dtype == jnp.float16:
        return x.astype(dtype)
    # So what is left of a tie has 16 bits. Half of the patterns of NaN would be carried
    # over into the sign.
    high = jnp.where(jnp.isnan(x), _NAN, _bits(x) + 0x8000) >> 16
    return lax.bitcast_convert_type(high.astype(jnp.int16), jnp.bfloat16)


def _wide(p):
    """The float32 numbers that numbers in half precision are.

    By bits, since XLA:GPU (jaxlib 0.10.2) takes out a cast to half precision and the
    one back, so that x - p would be 0. Test: ``test_excess_precision.py``.
    """
    bits = lax.bitcast_convert_type(p, jnp.int16).astype(jnp.int32)
    if p.dtype == jnp.bfloat16:
        return _float(bits << 16)
    magnitude = bits & 0x7FFF
    is_finite = magnitude < _INFINITY_OF_FLOAT16
    # The exponent of 1 is 15 in float16, 127 in float32, and that of infinity the last.
    exponent = jnp.where(is_finite, 127 - 15, 255 - 31)
    normal = _float((magnitude << 13) + (exponent << 23))
    subnormal = magnitude.astype(jnp.float32) * 2.0**-24
    wide = jnp.where(magnitude < 1 << 10, subnormal, normal)
    return jnp.where(bits < 0, -wide, wide)


def _with_8_bits(x, dtype, threshold):
    """Rounds x stochastically to what p and a residual of 8 bits can hold."""
    if dtype == jnp.float16:
        p = _wide(_round(x, dtype))
        unit = _unit(p, jnp.int8)
        r = jnp.floor((x - p) / unit + threshold)
        return jnp.where(jnp.isfinite(p), p + r * unit, x)
    bits = (_bits(x) + jnp.floor(threshold * 256).astype(jnp.int32)) & ~0xFF
    return jnp.where(jnp.isfinite(x), _float(bits), x)


def _residual_of(x, p, dtype):
    """x minus p, in integers, clipped to those that there are."""
    wide = _wide(p)
    if p.dtype == jnp.bfloat16:
        r = _bits(x) - _bits(wide)
        r = r >> 8 if dtype == jnp.int8 else r
        # Bits of numbers of different signs have no distance.
        has_residual = jnp.isfinite(wide) & (jnp.signbit(x) == jnp.signbit(wide))
    else:
        r = jnp.round((x - wide) / _unit(wide, dtype))
        has_residual = jnp.isfinite(wide)
    ends = jnp.iinfo(dtype)
    r = jnp.clip(jnp.where(has_residual, r, 0), ends.min, ends.max)
    return r.astype(dtype)


def _unit(p, residual_dtype):
    """What one in the residual of a float16 stands for; p in float32."""
    power = _float(_bits(p) & 0x7F800000)
    info = jnp.finfo(jnp.float16)
    # Also for an infinite p, whose residual of 0 is to stand for 0.
    power = jnp.clip(power, float(info.smallest_normal), 2.0 ** (info.maxexp - 1))
    ulp = power * float(info.eps)
    # Half an ulp is at most half of the largest integer.
    return ulp / (jnp.iinfo(residual_dtype).max + 1)


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)
