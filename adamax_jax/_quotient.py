"""Division by u: 0/0 is 0, and derivatives are those of the result."""

import jax
import jax.numpy as jnp


def quotient(x: jax.Array, y: jax.Array, is_positive: bool = False) -> jax.Array:
    """x / y for y >= 0; by the paper's rule, 0/0 is 0, and so is what else y = 0 gives.

    Args:
      x: Real numbers.
      y: Real numbers, of x's shape or broadcast to it.
      is_positive: Whether no y can be 0, so that it need not be looked for.
    """
    if y.shape != x.shape:
        # A division by numbers that many share becomes a product with their
        # reciprocals, which are 0 above 2^126, where they would be subnormal.
        factor = jnp.where(y > _LARGEST_DIVISOR, 2.0**-4, 1.0).astype(y.dtype)
        x, y = x * factor, y * factor
    if is_positive:
        return divide(x, y)
    # The inner where keeps the derivative of the untaken branch finite. Compared with
    # ==, a NaN goes on to the update instead of being hidden.
    is_zero = y == 0
    return jnp.where(is_zero, 0, divide(x, jnp.where(is_zero, 1, y)))


_LARGEST_DIVISOR = 2.0**120


@jax.custom_jvp
def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, whose own derivative by y divides by y^2, which is 0 for a y of 1e-23."""
    return x / y


divide.defjvps(
    lambda x_dot, ratio, x, y: x_dot / y,
    lambda y_dot, ratio, x, y: -ratio * (y_dot / y),
)
