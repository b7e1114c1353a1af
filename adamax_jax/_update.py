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
    """What is known of the equations before they are compiled."""

    nesterov: bool
    eps_inside: bool
    # Whether no denominator can be 0, so that 0/0 need not be looked for.
    is_positive: bool
    # next_u(norm, u, magnitude, c): the next u from the last one and from |g| + eps.
    # Both u are codes of the format ``norm``.
    next_u: Callable[..., Any]
    # Whether u is an average, which is rounded without bias, not a maximum.
    is_average: bool = False
    # Where m is stored as a ratio: of u times this. The largest ratio is 1.3.
    ratio_unit: float = 1.0


class Scalars(NamedTuple):
    """The scalars of step t, the same for every leaf."""

    b1: ArrayLike
    # Computed in Python where b1 is a number: in float32, 1 - 0.9 is off by 2e-7 of
    # itself.
    one_minus_b1: ArrayLike
    # 1 / (1 - b1^t). Not a divisor: the compiler would replace it by this product, but
    # not in leaves of a single element, whose bits would differ.
    correction: ArrayLike
    # b1 (1 - b1^t) / (1 - b1^(t+1)): the factor of m_t in Nesterov's look ahead.
    b1_ahead: ArrayLike
    eps: ArrayLike
    # In [0, 1): which of its two neighbours an m below 32 bits becomes.
    dither: ArrayLike
    # The factor of u_{t-1} in u_t: b2, or what takes its place in the L^p family.
    decay: ArrayLike
    # u grows by this factor at most; None for no bound.
    max_growth: ArrayLike | None = None
    # A u below 32 bits is stored divided by a scale: by this one before the step, by
    # the next one after it. Where the next one was doubled, the stored numbers are
    # multiplied by ``halving``, a power of 1/2.
    u_scale: ArrayLike = 1.0
    next_u_scale: ArrayLike = 1.0
    halving: ArrayLike = 1.0
    # Of the L^p family alone.
    p: ArrayLike | None = None
    one_minus_decay: ArrayLike | None = None
    weight: ArrayLike | None = None
    # Of Adam alone; None for 0.
    eps_root: ArrayLike | None = None


# Jitted here, once for all optimizers: leaves of one shape share one trace, and the
# update outside of jax.jit takes one dispatch a leaf.
@functools.partial(jax.jit, static_argnames=("rule", "step_dtype"))
def update_leaf(g, stored_m, stored_u, c, rule, step_dtype):
    """The step of one leaf, in ``step_dtype``, and its new m and u as stored.

    Args:
      g: The gradient, real or complex.
      stored_m, stored_u: Of its shape; u has size 1 along axes that share it.
      c: The :class:`Scalars` of the step.
      rule: The :class:`Rule`.
      step_dtype: A dtype.
    """
    mean, norm = formats(stored_m.dtype, stored_u.dtype)
    dtype = arithmetic_dtype(dtype_of(g), stored_m.dtype, stored_u.dtype)
    g, c, u = cast((g, c, norm.read(stored_u, c.u_scale)), dtype)
    m = cast(mean.read(stored_m, u, norm, rule.ratio_unit), dtype)

    # u_t = max(b2 * u_{t-1}, |g_t| + eps), as numbers and as they are stored.
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

    # m_t = b1 * m_{t-1} + (1 - b1) * g_t, in the order of Optax's sum, which the
    # compiler fuses to the same bits.
    m = by_parts(lambda g, m: c.one_minus_b1 * g + c.b1 * m, g, m)
    stored_m = mean.write(m, read_u, c.dither, rule.ratio_unit)

    # m_t / ((1 - b1^t) * u_t), of m and u as they are stored, so that the step matches
    # the state. Its derivatives are those of the unrounded m and u.
    step = _step(g, m, u, c, rule)
    if mean.is_ratio and rule.eps_inside and not rule.nesterov:
        ratio = mean.ratio(stored_m, rule.ratio_unit)
        rounded = c.correction * ratio.astype(dtype)
    else:
        read_m = cast(mean.read(stored_m, read_u, norm, rule.ratio_unit), dtype)
        rounded = _step(g, read_m, read_u, c, rule)
    return as_rounded(step, rounded).astype(step_dtype), stored_m, stored_u


def _magnitude_and_gradient(g, mean, norm):
    """|g| and g, both clipped to what the state can hold, so that m/u has its bound."""
    clipped = within(g, min(mean.largest, norm.largest))
    if norm.saturates and not jnp.iscomplexobj(g):
        # ``norm`` clips |g| itself. XLA:CPU would write to memory a clipped gradient
        # that both u and m read.
        return jnp.abs(g), clipped
    return jnp.abs(clipped), clipped


def _step(g, m, u, c, rule):
    """m / ((1 - b1^t) * u). The corrected m might overflow; m/u is about 1 at most."""

    def real_step(g, m):
        ahead = c.b1_ahead * m + c.one_minus_b1 * g if rule.nesterov else m
        root = u if c.eps_root is None else root_of_sum(u, c.eps_root)
        denominator = root if rule.eps_inside else root + c.eps
        return c.correction * quotient(ahead, denominator, rule.is_positive)

    return by_parts(real_step, g, m)


def mean_scalars(b1: ArrayLike, t: jax.Array) -> dict[str, Any]:
    """The scalars of the mean at step t, a float."""
    left = one_minus_power(b1, t)
    return {
        "b1": b1,
        "one_minus_b1": 1 - b1,
        "correction": 1 / left,
        "b1_ahead": number(b1, t.dtype) * (left / one_minus_power(b1, t + 1)),
    }


def is_surely_positive(eps: Any) -> bool:
    """Whether eps is known and above 0, also where subnormal numbers count as 0.

    The factor of 4 covers a division by ``u_scale``, below 2, and the rounding of u.
    """
    return isinstance(eps, float) and eps >= 4 * float(jnp.finfo(jnp.float32).tiny)


def one_minus_power(b: ArrayLike, t: ArrayLike) -> jax.Array:
    """1 - b^t, exact to rounding also for b close to 1: -expm1(t log b)."""
    if isinstance(b, float):
        if b == 0:
            return jnp.ones_like(t)
        return -jnp.expm1(t * number(math.log(b), jnp.result_type(t)))
    t = jnp.asarray(t)
    b = number(b, t.dtype)
    # The inner where keeps the derivative at b = 0 finite.
    is_zero = b == 0
    log_b = jnp.log(jnp.where(is_zero, 1, b))
    return jnp.where(is_zero, 1 - b**t, -jnp.expm1(t * log_b))


def dither_of(count: jax.Array) -> jax.Array:
    """A number in [0, 1) for each count: a hash, so that no period resonates with it.

    The hash is Chris Wellons's lowbias32, https://github.com/skeeto/hash-prospector.
    """
    x = count.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    x = x ^ (x >> 16)
    return (x >> 8).astype(jnp.float32) * 2.0**-24


def scalar_dtype(*trees: Any) -> Any:
    """What the scalars of a step are computed in: the widest that any leaf needs."""
    dtypes = {dtype_of(leaf) for leaf in jax.tree.leaves(trees)}
    return arithmetic_dtype(jnp.result_type(float), *dtypes)
