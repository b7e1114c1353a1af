"""From trees to lists of leaves and back; gradients that are None.

Arrays alone are put into a user's containers, which may look at what they are given:
whatever else belongs to a leaf is kept in lists.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adamax_jax._storage import is_wide


def leaves_beside(prefix: Any, tree: Any) -> list[Any]:
    """What a prefix of a tree, such as gradients or a mask, has for each of its leaves.

    A leaf of it may stand for a whole subtree; None in the gradients is a leaf.
    """
    leaves, treedef = jax.tree.flatten(prefix, is_leaf=_is_none)
    return [
        leaf
        for leaf, subtree in zip(leaves, treedef.flatten_up_to(tree), strict=True)
        for _ in jax.tree.leaves(subtree)
    ]


def update_leaves(
    update_leaf: Callable[..., Any], updates: Any, m: Any, u: Any, params: Any
) -> tuple[Any, Any, Any]:
    """The trees of steps, m and u, made leaf by leaf.

    ``update_leaf`` has those of a leaf from g, m, u and the step's dtype: that of g, or
    of the parameter, where it is known and has more bits.

    A gradient of None has no step. It leaves a wide u and its m as they are. A narrow
    u decays with all the others, by their common scale, and so that no m is left beside
    a vanishing u, None counts as zero there.
    """
    gradients = leaves_beside(updates, m)
    dtypes = _step_dtypes(gradients, m, params)
    steps, new_m, new_u = [], [], []
    for g, leaf_m, leaf_u, dtype in zip(
        gradients, jax.tree.leaves(m), jax.tree.leaves(u), dtypes, strict=True
    ):
        if g is not None:
            step, leaf_m, leaf_u = update_leaf(g, leaf_m, leaf_u, dtype)
            steps.append(step)
        elif not is_wide(leaf_u.dtype):
            kind = complex if jnp.iscomplexobj(leaf_m) else float
            zero = jnp.zeros_like(leaf_m, kind)
            _, leaf_m, leaf_u = update_leaf(zero, leaf_m, leaf_u, zero.dtype)
        new_m.append(leaf_m)
        new_u.append(leaf_u)
    return (
        jax.tree.unflatten(jax.tree.structure(updates), steps),
        jax.tree.unflatten(jax.tree.structure(m), new_m),
        jax.tree.unflatten(jax.tree.structure(u), new_u),
    )


def _step_dtypes(gradients, m, params):
    """The dtype of the step for every leaf of m; None where there is no gradient."""
    own = [None if g is None else jnp.result_type(g) for g in gradients]
    if params is None or all(dtype is None or is_wide(dtype) for dtype in own):
        # The parameters are not looked at without need: they may be an Equinox model
        # with functions in it, which m has None for.
        return own
    places, treedef = jax.tree.flatten(m, is_leaf=_is_none)
    beside = zip(places, treedef.flatten_up_to(params), strict=True)
    params = [p for place, p in beside if place is not None]
    return [
        None if d is None else max(d, jnp.result_type(p), key=lambda x: x.itemsize)
        for d, p in zip(own, params, strict=True)
    ]


def _is_none(leaf):
    return leaf is None
