"""What AdaMax and the L^p family share: the mean, its correction, and the quotient."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


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
    # 1 / (1 - b1^t). The compiler would replace a division by one scalar by this
    # product anyway, but not in leaves of a single element, whose bits would differ.
    correction: ArrayLike
    # That of the step t + 1, for Nesterov's look ahead.
    next_correction: ArrayLike
    eps: ArrayLike


def coefficients(b1: ArrayLike, eps: ArrayLike, t: jax.Array) -> Coefficients:
    """The scalars of step t that both need."""
    return Coefficients(
        b1=b1,
        one_minus_b1=1 - b1,
        correction=1 / one_minus_power(b1, t),
        next_correction=1 / one_minus_power(b1, t + 1),
        eps=eps,
    )


def with_eps(norm: jax.Array, c: Coefficients, rule: Rule) -> jax.Array:
    """|g| + eps, or |g| where eps is added to the denominator."""
    return norm + c.eps if rule.eps_inside else norm


def mean_and_step(
    g: Any, m: Any, u: Any, c: Coefficients, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """The next mean and the step, of real arrays; u is the next one already."""
    # In the order of Optax's sum, which the compiler fuses to the same bits.
    m = c.one_minus_b1 * g + c.b1 * m
    if rule.nesterov:
        m_hat = c.b1 * c.next_correction * m + c.one_minus_b1 * c.correction * g
    else:
        m_hat = c.correction * m
    denominator = u if rule.eps_inside else u + c.eps
    return m, _quotient(m_hat, denominator, rule.is_positive)


def _quotient(m_hat, denominator, is_positive):
    """The step; by the paper's rule, 0/0 is 0."""
    if is_positive:
        return divide(m_hat, denominator)
    # The inner where keeps the derivative of the untaken branch finite. Compared with
    # ==, a NaN goes on to the update instead of being hidden.
    is_zero = denominator == 0
    return jnp.where(is_zero, 0, divide(m_hat, jnp.where(is_zero, 1, denominator)))


@jax.custom_jvp
def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y; JAX's own derivative divides by y^2, which is 0 for a y of 1e-23."""
    return x / y


divide.defjvps(
    lambda x_dot, ratio, x, y: x_dot / y,
    lambda y_dot, ratio, x, y: -ratio * (y_dot / y),
)


def is_surely_positive(eps: Any) -> bool:
    """Whether eps is known and above 0, also where subnormal numbers count as 0."""
    return isinstance(eps, float) and eps >= float(jnp.finfo(jnp.float32).tiny)


def one_minus_power(b: ArrayLike, t: ArrayLike) -> jax.Array:
    """1 - b^t, exact to rounding also for b close to 1: -expm1(t log b)."""
    if isinstance(b, float):
        return -jnp.expm1(t * math.log(b)) if b > 0 else jnp.ones_like(t)
    b = jnp.asarray(b, float)
    # The inner where keeps the derivative at b = 0 finite.
    is_zero = b == 0
    log_b = jnp.log(jnp.where(is_zero, 1, b))
    return jnp.where(is_zero, 1 - b**t, -jnp.expm1(t * log_b))
