"""What AdaMax and the L^p family share: the mean, its correction, and the quotient."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adamax_jax._complex import by_parts, dtype_of, number, within
from adamax_jax._quotient import quotient
from adamax_jax._storage import (
    arithmetic_dtype,
    as_rounded,
    is_ratio,
    is_wide,
    largest_stored,
    largest_u,
    read,
    read_ratio,
)


class Rule(NamedTuple):
    """What is known of the equations before they are compiled."""

    nesterov: bool
    eps_inside: bool
    # Whether no denominator can be 0, so that 0/0 need not be looked for.
    is_positive: bool


class Coefficients(NamedTuple):
    """The scalars of one step that both need, the same for every leaf."""

    b1: ArrayLike
    # Not left to the leaves: 1 - 0.9 is off by 2e-7 of itself in float32, and by 2e-16
    # in Python.
    one_minus_b1: ArrayLike
    # Half of 1 / (1 - b1^t). The compiler would replace a division by one scalar by a
    # product anyway, but not in leaves of a single element, whose bits would differ.
    # Half, since a mean of the largest numbers, corrected, may be rounded to infinity.
    half_correction: ArrayLike
    # That of the step t + 1, for Nesterov's look ahead.
    half_next_correction: ArrayLike
    eps: ArrayLike


def coefficients(b1: ArrayLike, eps: ArrayLike, t: jax.Array) -> Coefficients:
    """The scalars of step t that both need."""
    return Coefficients(
        b1=b1,
        one_minus_b1=1 - b1,
        half_correction=0.5 / one_minus_power(b1, t),
        half_next_correction=0.5 / one_minus_power(b1, t + 1),
        eps=eps,
    )


def scalar_dtype(*trees: Any) -> Any:
    """What the scalars of a step are computed in: the widest that any leaf needs."""
    dtypes = {dtype_of(leaf) for leaf in jax.tree.leaves(trees)}
    return arithmetic_dtype(jnp.result_type(float), *dtypes)


def size_and_gradient(
    g: jax.Array, stored_m: jax.Array, stored_u: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """|g|, and g for the mean: cut off at what the state can hold.

    What is beyond counts as the end of the range, for m as for u. Where m reaches as
    far as u, real |g| are left as they are, since u is cut off when it is stored. So
    are plain float32 gradients beside a float32 state, for the bits of m.
    """
    largest = largest_stored(stored_m.dtype, stored_u.dtype)
    if jnp.iscomplexobj(g) or largest < largest_u(stored_u.dtype):
        g = within(g, largest)
        return jnp.abs(g), g
    if largest < float(jnp.finfo(g.dtype).max):
        return jnp.abs(g), within(g, largest)
    return jnp.abs(g), g


def with_eps(norm: jax.Array, c: Coefficients, rule: Rule) -> jax.Array:
    """|g| + eps, or |g| where eps is added to the denominator."""
    return norm + c.eps if rule.eps_inside else norm


def next_mean(g: jax.Array, m: jax.Array, c: Coefficients) -> jax.Array:
    """The mean, with one more gradient in it."""
    # In the order of Optax's sum, which the compiler fuses to the same bits.
    return by_parts(lambda g, m: c.one_minus_b1 * g + c.b1 * m, g, m)


def step_of_stored(
    g: jax.Array,
    m: jax.Array,
    u: jax.Array,
    stored_m: jax.Array,
    stored_u: jax.Array,
    u_scale: ArrayLike,
    c: Coefficients,
    rule: Rule,
) -> jax.Array:
    """The step of the new m and u, as they are stored.

    So what is done is what will be remembered. And where XLA does not make one kernel
    of all, that of the parameters reads few bytes. Derivatives are those of the step
    before m and u were rounded.
    """

    def step(m, u):
        return by_parts(lambda g, m: _step(g, m, u, c, rule), g, m)

    if is_ratio(stored_m.dtype) and rule.eps_inside and not rule.nesterov:
        ratio = read_ratio(stored_m).astype(u.dtype)
        return as_rounded(step(m, u), 2 * (c.half_correction * ratio))
    read_m, read_u = read(stored_m, stored_u, u_scale)
    rounded = step(read_m.astype(m.dtype), read_u.astype(u.dtype))
    if is_wide(stored_m.dtype) and is_wide(stored_u.dtype):
        return rounded
    return as_rounded(step(m, u), rounded)


def _step(g, m, u, c, rule):
    """m_hat / u, of real arrays."""
    if rule.nesterov:
        half_m_hat = (
            c.b1 * c.half_next_correction * m + c.one_minus_b1 * c.half_correction * g
        )
    else:
        half_m_hat = c.half_correction * m
    denominator = u if rule.eps_inside else u + c.eps
    return 2 * quotient(half_m_hat, denominator, rule.is_positive)


def is_surely_positive(eps: Any) -> bool:
    """Whether eps is known and above 0, also where subnormal numbers count as 0.

    And where it was divided by ``u_scale``, which is below 2, and rounded to bfloat16.
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
