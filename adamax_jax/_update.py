"""The update of one leaf, which AdaMax and the L^p family share."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from adamax_jax._formats import NORMS, formats
from adamax_jax._numerics import (
    arithmetic_dtype,
    at_most,
    by_parts,
    cast,
    dtype_of,
    number,
    quotient,
    root_of_sum,
    within,
)
from adamax_jax._shared_axes import maximum_over
from adamax_jax._xla import as_rounded


class Rule(NamedTuple):
    """The static part of an update: each rule compiles its own program."""

    nesterov: bool
    eps_inside: bool
    # Whether every denominator is nonzero, so that 0/0 cannot occur.
    is_positive: bool
    # next_u(norm, u, magnitude, c) returns u_t, given u_{t-1} and |g| + eps. Both u are
    # codes of the format ``norm``; the magnitude is a float.
    next_u: Callable[..., Any]
    # Whether u is an average, which is rounded stochastically, or a maximum.
    is_average: bool = False
    # In int8, m is stored as m / (ratio_unit * u), clipped to 1.3.
    ratio_unit: float = 1.0


class Scalars(NamedTuple):
    """The scalars of step t, the same for every leaf."""

    b1: ArrayLike
    # Computed in Python if b1 is a number: in float32, 1 - 0.9 has a relative error of
    # 2e-7.
    one_minus_b1: ArrayLike
    # 1 / (1 - b1^t), a factor: XLA replaces division by a scalar with a product, except
    # in leaves of a single element, which would then differ in bits.
    correction: ArrayLike
    # b1 (1 - b1^t) / (1 - b1^(t+1)): the factor of m_t in Nesterov momentum.
    b1_ahead: ArrayLike
    eps: ArrayLike
    # In [0, 1): an m below 32 bits rounds up if its remainder exceeds this.
    dither: ArrayLike
    # The factor of u_{t-1} in u_t: b2, or its counterpart in the L^p family.
    decay: ArrayLike
    # Max factor by which u grows; None for no bound.
    max_growth: ArrayLike | None = None
    # A u below 32 bits is stored divided by a scale: ``u_scale`` before the step,
    # ``next_u_scale`` after it. If the scale was doubled, the stored numbers are
    # multiplied by ``halving``, a power of 1/2.
    u_scale: ArrayLike = 1.0
    next_u_scale: ArrayLike = 1.0
    halving: ArrayLike = 1.0
    # Only for the L^p family.
    p: ArrayLike | None = None
    one_minus_decay: ArrayLike | None = None
    weight: ArrayLike | None = None
    # Only for Adam; None for 0.
    eps_root: ArrayLike | None = None


# Jitted at module level: leaves of one shape share one trace in all optimizers, and an
# update outside of jax.jit takes one dispatch per leaf.
@functools.partial(jax.jit, static_argnames=("rule", "step_dtype"))
def update_leaf(g, stored_m, stored_u, c, rule, step_dtype):
    """Returns the step of one leaf, in ``step_dtype``, and its new stored m and u.

    Args:
      g: The gradient, real or complex.
      stored_m, stored_u: Arrays of g's shape; u has size 1 along shared axes.
      c: The :class:`Scalars` of the step.
      rule: The :class:`Rule`.
      step_dtype: The dtype of the step.
    """
    mean, norm = formats(stored_m.dtype, stored_u.dtype)
    dtype = arithmetic_dtype(dtype_of(g), stored_m.dtype, stored_u.dtype)
    g, c, u = cast((g, c, norm.read(stored_u, c.u_scale)), dtype)
    m = cast(mean.read(stored_m, u, norm, rule.ratio_unit), dtype)

    # u_t = max(b2 * u_{t-1}, |g_t| + eps), in floats and as stored.
    magnitude, g = _magnitude_and_gradient(g, mean, norm)
    magnitude = maximum_over(magnitude, u.shape)
    magnitude = magnitude + c.eps if rule.eps_inside else magnitude
    u = rule.next_u(NORMS[u.dtype.name], u, magnitude, c)
    if rule.is_average:
        stored_u = norm.average(u, c.dither)
    else:
        stored_u = norm.next(stored_u, u, magnitude, c, rule.next_u)
    read_u = as_rounded(u, norm.read(stored_u, c.next_u_scale))
    if c.max_growth is not None:
        g = at_most(g, read_u)

    # m_t = b1 * m_{t-1} + (1 - b1) * g_t, with the terms in Optax's order, so that the
    # compiler fuses them to the same bits.
    m = by_parts(lambda g, m: c.one_minus_b1 * g + c.b1 * m, g, m)
    stored_m = mean.write(m, read_u, c.dither, rule.ratio_unit)

    # m_t / ((1 - b1^t) * u_t), of the stored m and u, so that the step matches the
    # stored state. Its derivatives are those of the unrounded m and u.
    step = _step(g, m, u, c, rule)
    if mean.is_ratio and rule.eps_inside and not rule.nesterov:
        ratio = mean.ratio(stored_m, rule.ratio_unit)
        rounded = c.correction * ratio.astype(dtype)
    else:
        read_m = cast(mean.read(stored_m, read_u, norm, rule.ratio_unit), dtype)
        rounded = _step(g, read_m, read_u, c, rule)
    return as_rounded(step, rounded).astype(step_dtype), stored_m, stored_u


def _magnitude_and_gradient(g, mean, norm):
    """|g| and g, clipped to what is stored, so that the bound of m/u holds."""
    clipped = within(g, min(mean.largest, norm.largest))
    if norm.saturates and not jnp.iscomplexobj(g):
        # ``norm`` clips |g| when it stores it. XLA:CPU would write a clipped gradient,
        # which u and m both read, to memory.
        return jnp.abs(g), clipped
    return jnp.abs(clipped), clipped


def _step(g, m, u, c, rule):
    """m / ((1 - b1^t) * u).

    Divides first: m/u is about 1 at most, but m / (1 - b1^t) may overflow.
    """

    def real_step(g, m):
        ahead = c.b1_ahead * m + c.one_minus_b1 * g if rule.nesterov else m
        root = u if c.eps_root is None else root_of_sum(u, c.eps_root)
        denominator = root if rule.eps_inside else root + c.eps
        return c.correction * quotient(ahead, denominator, rule.is_positive)

    return by_parts(real_step, g, m)


def mean_scalars(b1: ArrayLike, t: jax.Array) -> dict[str, Any]:
    """The scalars of m at step t (a float array)."""
    left = one_minus_power(b1, t)
    return {
        "b1": b1,
        "one_minus_b1": 1 - b1,
        "correction": 1 / left,
        "b1_ahead": number(b1, t.dtype) * (left / one_minus_power(b1, t + 1)),
    }


def is_surely_positive(eps: Any) -> bool:
    """Whether eps is a Python number above 0, and not flushed to 0 as a subnormal.

    The factor of 4 covers a division by ``u_scale``, below 2, and the rounding of u.
    """
    return isinstance(eps, float) and eps >= 4 * float(jnp.finfo(jnp.float32).tiny)


def one_minus_power(b: ArrayLike, t: ArrayLike) -> jax.Array:
    """1 - b^t, accurate also for b close to 1: -expm1(t log b)."""
    if isinstance(b, float):
        if b == 0:
            return jnp.ones_like(t)
        return -jnp.expm1(t * number(math.log(b), jnp.result_type(t)))
    t = jnp.asarray(t)
    b = number(b, t.dtype)
    # The inner ``where`` keeps the derivative at b = 0 finite.
    is_zero = b == 0
    log_b = jnp.log(jnp.where(is_zero, 1, b))
    return jnp.where(is_zero, 1 - b**t, -jnp.expm1(t * log_b))


def dither_of(count: jax.Array) -> jax.Array:
    """A hash of the count, in [0, 1), without a period that gradients might share.

    The hash is Chris Wellons's lowbias32, https://github.com/skeeto/hash-prospector.
    """
    x = count.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    return (x >> 8).astype(jnp.float32) * 2.0**-24


def scalar_dtype(*trees: Any) -> Any:
    """The dtype of a step's scalars: the widest that any leaf needs."""
    dtypes = {dtype_of(leaf) for leaf in jax.tree.leaves(trees)}
    return arithmetic_dtype(jnp.result_type(float), *dtypes)
