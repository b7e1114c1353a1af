"""What AdaMax has in common with Adam: the mean's correction, and the quotient."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Leaf(NamedTuple):
    """A leaf's step, and its new state."""

    step: jax.Array | None
    m: jax.Array
    u: jax.Array


def update_leaves(update_leaf, updates, m, u):
    """The trees of steps, m and u; update_leaf gets None where there is no gradient."""
    leaves = jax.tree.map(update_leaf, updates, m, u, is_leaf=lambda g: g is None)

    def pick(field):
        return jax.tree.map(
            lambda leaf: getattr(leaf, field),
            leaves,
            is_leaf=lambda x: isinstance(x, Leaf),
        )

    return pick("step"), pick("m"), pick("u")


def corrected_mean(g, m, c, nesterov):
    """m / (1 - b1^t), or one step ahead of it."""
    if nesterov:
        return c.b1 * c.next_correction * m + c.one_minus_b1 * c.correction * g
    return c.correction * m


def quotient(m_hat, denominator, is_positive):
    """The step; by the paper's rule, 0/0 is 0."""
    if is_positive:
        return divide(m_hat, denominator)
    # The inner where keeps the derivative of the untaken branch finite. Compared with
    # ==, a NaN goes on to the update instead of being hidden.
    is_zero = denominator == 0
    return jnp.where(is_zero, 0, divide(m_hat, jnp.where(is_zero, 1, denominator)))


@jax.custom_jvp
def divide(x, y):
    """x / y, whose own derivative by y divides by y^2, which is 0 for a y of 1e-23."""
    return x / y


divide.defjvps(
    lambda x_dot, ratio, x, y: x_dot / y,
    lambda y_dot, ratio, x, y: -ratio * (y_dot / y),
)


def is_surely_positive(eps):
    """Whether eps is known and above 0, also where subnormal numbers count as 0."""
    return isinstance(eps, float) and eps >= float(jnp.finfo(jnp.float32).tiny)


def one_minus_power(b, t):
    """1 - b^t, exact to rounding also for b close to 1: -expm1(t log b)."""
    if isinstance(b, float):
        return -jnp.expm1(t * math.log(b)) if b > 0 else jnp.ones_like(t)
    b = jnp.asarray(b, float)
    # The inner where keeps the derivative at b = 0, which is that of b^t, from becoming
    # NaN.
    is_zero = b == 0
    log_b = jnp.log(jnp.where(is_zero, 1, b))
    return jnp.where(is_zero, 1 - b**t, -jnp.expm1(t * log_b))
