"""Master weights as mixed-precision training usually keeps them: a float32 copy."""

import jax
import jax.numpy as jnp
import optax


def with_float32_copy(
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """An optimizer that trains float32 weights, kept in its state.

    The parameters, in half precision, are these weights, rounded.
    """

    def in_float32(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init_fn(params):
        full = in_float32(params)
        return full, optimizer.init(full)

    def update_fn(updates, state, params=None):
        full, inner = state
        updates, inner = optimizer.update(in_float32(updates), inner, full)
        full = optax.apply_updates(full, updates)
        # To the rounded copy; optax.apply_updates rounds the sum once more.
        updates = jax.tree.map(
            lambda x, p: x.astype(p.dtype).astype(x.dtype) - p.astype(x.dtype),
            full,
            params,
        )
        return updates, (full, inner)

    return optax.GradientTransformation(init_fn, update_fn)
