"""Workarounds for XLA, none of which changes a result.

Each names the compiler, the last jaxlib that was seen to need it, and the test that
fails without it. When ``pyproject.toml`` requires a later jaxlib, try to remove them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def _one_of(function: Callable[..., Any], is_first: Callable[..., Any]) -> Any:
    """A maximum or minimum of two arrays, with the derivative of one of them.

    The derivative of ``jnp.maximum`` compares both arguments with the result by ``==``.
    XLA (all backends, jaxlib 0.10.2) may recompute an argument in another kernel, with
    another rounding. Then neither equals the result, and the derivative is 0. A single
    comparison of the arguments avoids that. Test: ``test_derivatives.py``.
    """

    @jax.custom_jvp
    def chosen(x, y):
        return function(x, y)

    @chosen.defjvp
    def _(primals, tangents):
        result = chosen(*primals)
        # Adding zeros gives tangents the shape and the sharding of the result.
        x_dot, y_dot = (dot + jnp.zeros_like(result) for dot in tangents)
        return result, jnp.where(is_first(*primals), x_dot, y_dot)

    return chosen


# Of two equal arguments ``larger`` takes the second, ``smaller`` the first.
larger = _one_of(jnp.maximum, jnp.greater)
smaller = _one_of(jnp.minimum, jnp.less_equal)


@jax.custom_jvp
def clip(x: jax.Array, size: jax.Array) -> jax.Array:
    """Clips x to [-size, size], with the derivative of x where |x| is close to size.

    If size is |x| + eps, the two differ by rounding only. Then even a single comparison
    is not safe: XLA may compute it twice, with two results, and choose neither
    derivative. (No such program was seen: no test fails without this margin.)
    """
    return jnp.maximum(jnp.minimum(x, size), -size)


@clip.defjvp
def _(primals, tangents):
    x, size = primals
    result = clip(x, size)
    x_dot, size_dot = (dot + jnp.zeros_like(result) for dot in tangents)
    is_clipped = jnp.abs(x) > (1 + 2.0**-20) * size
    return result, jnp.where(is_clipped, jnp.sign(x) * size_dot, x_dot)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The maximum of magnitudes along axes, which keep size 1; 0 if there are none.

    Its derivative is that of one element, found by its index, for the same reason as in
    ``larger``.
    """
    if not axes:
        return x
    maximum = jnp.max(x, axes, keepdims=True, initial=0)
    # A no-op that ends a kernel. XLA:CPU (jaxlib 0.10.2) takes several times as long on
    # some CPUs if the maximum and the operations after it are one kernel.
    # Test: ``test_bench.py::test_a_shared_maximum_is_a_kernel_of_its_own``.
    info = jnp.finfo(x.dtype)
    return lax.platform_dependent(
        maximum,
        cpu=lambda x: lax.reduce_precision(x, info.nexp, info.nmant),
        default=lambda x: x,
    )


@largest.defjvp
def _(axes, primals, tangents):
    (x,), (x_dot,) = primals, tangents
    result = largest(x, axes)
    for axis in axes if x.size else ():
        index = lax.broadcasted_iota(jnp.int32, x.shape, axis)
        is_largest = index == jnp.argmax(x, axis, keepdims=True).astype(jnp.int32)
        x, x_dot = (
            jnp.sum(jnp.where(is_largest, y, 0), axis, keepdims=True)
            for y in (x, x_dot)
        )
    return result, x_dot if x.size else jnp.zeros_like(result)


@jax.custom_jvp
def as_rounded(exact: jax.Array, rounded: jax.Array) -> jax.Array:
    """``rounded``, with the derivatives of ``exact``."""
    return rounded.astype(exact.dtype)


as_rounded.defjvps(lambda exact_dot, *_: exact_dot, None)


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts 32-bit integers to 8 bits; 128 wraps around to -128 in int8.

    XLA:CPU (jaxlib 0.10.2) recomputes a cast, and everything before it, in each reader.
    It writes the result of ``where`` to memory once. On a TPU ``where`` would be a
    kernel of its own. Test: ``test_bench.py::test_a_step_is_three_kernels_a_leaf``.
    """

    def chosen(x):
        return jnp.where(x == 0, jnp.zeros([], dtype), x.astype(dtype))

    return lax.platform_dependent(x, cpu=chosen, default=lambda x: x.astype(dtype))


def zeros_in_the_kernel_of(bits: jax.Array) -> jax.Array:
    """uint32 zeros that depend on data: the sign bits of nonnegative numbers.

    XLA (TPU and GPU, jaxlib 0.10.2) computes what depends on the index alone, such as a
    hash of it, in separate kernels, one for each axis. A sum with these zeros depends
    on the data. Test: ``test_aot.py::test_averages_move_no_byte_more``.
    """
    return lax.bitcast_convert_type(bits, jnp.uint32) >> np.uint32(31)


def divisible(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x and y, both scaled down where y is huge and broadcast.

    XLA (GPU and CPU, jaxlib 0.10.2) multiplies by the reciprocal of a divisor that is
    broadcast. Above 2^126 the reciprocal is subnormal and flushed to 0. Test:
    ``test_adamax.py::TestEndsOfTheRange``.
    """
    if y.shape == x.shape:
        return x, y
    factor = jnp.where(y > 2.0**120, 2.0**-4, 1.0).astype(y.dtype)
    return x * factor, y * factor
