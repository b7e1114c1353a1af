"""What XLA needs to be told: work-arounds, none of which changes a number.

Each says which compiler it is for, up to which jaxlib that was seen, and which test
fails without it. When ``pyproject.toml`` asks for a later jaxlib, try without them.
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
    XLA (all backends, jaxlib 0.10.2) computes an argument anew in another kernel and
    may round it differently there. Then none equals the result, and the derivative is
    0. One comparison of the arguments has no such case. Test: ``test_derivatives.py``.
    """

    @jax.custom_jvp
    def chosen(x, y):
        return function(x, y)

    @chosen.defjvp
    def _(primals, tangents):
        result = chosen(*primals)
        # Plus zeros: tangents get the shape and the sharding of the result.
        x_dot, y_dot = (dot + jnp.zeros_like(result) for dot in tangents)
        return result, jnp.where(is_first(*primals), x_dot, y_dot)

    return chosen


# Of two equal arguments the larger is the second, the smaller the first.
larger = _one_of(jnp.maximum, jnp.greater)
smaller = _one_of(jnp.minimum, jnp.less_equal)


@jax.custom_jvp
def clip(x: jax.Array, size: jax.Array) -> jax.Array:
    """x clipped to [-size, size], with the derivative of x where |x| is about size.

    Where size is |x| + eps they are always equal but for rounding, so that not even
    one comparison is safe: XLA may compute it twice, and choose none of the two. (No
    program in which it does was seen: no test fails without this margin.)
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
    """The maximum of magnitudes along axes, which keep size 1, or 0 of no numbers.

    With the derivative of one of them, found by its index, for the same reason as that
    of ``larger``.
    """
    if not axes:
        return x
    maximum = jnp.max(x, axes, keepdims=True, initial=0)
    # Rounds nothing, but ends a kernel of XLA:CPU (jaxlib 0.10.2), which takes several
    # times as long on some CPUs where the maximum and what follows are one.
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
    """What was stored in place of a number, with the derivatives of that number."""
    return rounded.astype(exact.dtype)


as_rounded.defjvps(lambda exact_dot, *_: exact_dot, None)


def narrowed(x: jax.Array, dtype: Any) -> jax.Array:
    """32-bit integers in an integer dtype of 8 bits, where 128 is -128.

    XLA:CPU (jaxlib 0.10.2) computes a conversion anew wherever it is read, and all that
    comes before it. A choice between two arrays it writes to memory once. On a TPU that
    choice would be a kernel of its own.
    Test: ``test_bench.py::test_a_step_is_three_kernels_a_leaf``.
    """

    def chosen(x):
        return jnp.where(x == 0, jnp.zeros([], dtype), x.astype(dtype))

    return lax.platform_dependent(x, cpu=chosen, default=lambda x: x.astype(dtype))


def zeros_in_the_kernel_of(bits: jax.Array) -> jax.Array:
    """Zeros, as uint32: the sign bits of the int32 bits of numbers that have no sign.

    What depends on the place in an array alone, as a hash of it, XLA (TPU and GPU,
    jaxlib 0.10.2) computes in kernels of its own, one for each axis. Begun with these
    zeros it depends on the numbers.
    Test: ``test_aot.py::test_averages_move_no_byte_more``.
    """
    return lax.bitcast_convert_type(bits, jnp.uint32) >> np.uint32(31)


def divisible(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x and y, both made smaller where y is huge and shared by several x.

    XLA (GPU and CPU, jaxlib 0.10.2) multiplies by the reciprocal of a divisor that is
    broadcast. Above 2^126 that is subnormal, which counts as 0.
    Test: ``test_adamax.py::TestEndsOfTheRange``.
    """
    if y.shape == x.shape:
        return x, y
    factor = jnp.where(y > 2.0**120, 2.0**-4, 1.0).astype(y.dtype)
    return x * factor, y * factor
