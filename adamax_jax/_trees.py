"""Trees: to lists of leaves and back, gradients that are None, names of leaves.

Arrays alone are put into a user's containers, which may look at what they are given,
and None where a parameter has no gradients. Whatever else belongs to a leaf is kept in
lists.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adamax_jax._formats import NORMS
from adamax_jax._numerics import dtype_like, dtype_of


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


def is_trained(p: Any) -> bool:
    """Whether a parameter has gradients: not integers, booleans and keys."""
    return jnp.issubdtype(jnp.result_type(p), jnp.inexact)


def zeros_beside(zeros: Callable[..., Any], params: Any) -> Any:
    """What ``zeros`` makes of the path and the array of each parameter.

    None where it has no gradients, so that models whose arrays are not all floats, as
    those that ``eqx.filter(model, eqx.is_array)`` leaves, have a state too.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, p: zeros(path, p) if is_trained(p) else None, params
    )


def dtypes_beside(params: Any, m: Any) -> list[Any]:
    """The dtype of the parameter for every leaf of m; None where it is not known.

    The parameters may be missing, lie in other containers, or have functions where m
    has None, as an Equinox model: none of the arithmetic needs them.
    """
    places, treedef = jax.tree.flatten(m, is_leaf=_is_none)
    try:
        beside = treedef.flatten_up_to(params)
    except ValueError:
        beside = [None] * len(places)
    return [
        dtype_of(p) if hasattr(p, "dtype") else None
        for place, p in zip(places, beside, strict=True)
        if place is not None
    ]


def update_leaves(
    update_leaf: Callable[..., Any],
    updates: Any,
    m: Any,
    u: Any,
    dtypes: list[Any],
    *,
    decays_by_scale: bool,
) -> tuple[Any, Any, Any]:
    """The trees of steps, m and u, made leaf by leaf.

    ``update_leaf`` has those of a leaf from g, m, u and the step's dtype: that of g, or
    of the parameter, in ``dtypes``, where it has more bits.

    A gradient of None has no step, and leaves m and u as they are. But where a narrow u
    ``decays_by_scale``, it does so with all the others, and so that no m is left beside
    a vanishing u, None counts as zero there.
    """
    steps, new_m, new_u = [], [], []
    for g, leaf_m, leaf_u, dtype in zip(
        leaves_beside(updates, m),
        jax.tree.leaves(m),
        jax.tree.leaves(u),
        dtypes,
        strict=True,
    ):
        if g is not None:
            step_dtype = _wider(dtype_of(g), dtype)
            step, leaf_m, leaf_u = update_leaf(g, leaf_m, leaf_u, step_dtype)
            steps.append(step)
        elif decays_by_scale and NORMS[leaf_u.dtype.name].is_scaled:
            zero = jnp.zeros_like(leaf_m, dtype_like(leaf_m, jnp.float32))
            _, leaf_m, leaf_u = update_leaf(zero, leaf_m, leaf_u, zero.dtype)
        new_m.append(leaf_m)
        new_u.append(leaf_u)
    return (
        jax.tree.unflatten(jax.tree.structure(updates), steps),
        jax.tree.unflatten(jax.tree.structure(m), new_m),
        jax.tree.unflatten(jax.tree.structure(u), new_u),
    )


def _wider(dtype, other):
    return dtype if other is None or other.itemsize <= dtype.itemsize else other


def _is_none(leaf):
    return leaf is None


def name_of(path: Any) -> str:
    """A path in a tree, as an error shows it."""
    return jax.tree_util.keystr(path) or "the root of the tree"


def is_inside(path: Any, other: Any) -> bool:
    """Whether a path leads into the subtree at another path, or to its root."""
    return path[: len(other)] == other


def ends_of(path: Any) -> list[Any]:
    """The ends of a path, the longest, which is the path itself, first."""
    return [path[start:] for start in range(len(path) + 1)]


def path_finder(tree: Any, other: Any) -> Callable[[Any], Any]:
    """A function from the path of a leaf of ``other`` to that of the same in ``tree``.

    It returns None where there is none. A container around a single array, in one of
    the trees, adds an entry to the path: Flax NNX's variables.
    """
    known = {path for path, _ in jax.tree.leaves_with_path(tree)}
    inside = {path[:-1]: path for path in known if path}
    boxes, other_boxes = (
        Counter(path[:-1] for path, _ in jax.tree.leaves_with_path(x))
        for x in (tree, other)
    )

    def find(path):
        if path in known:
            return path
        if boxes[path] == 1 and path in inside:
            return inside[path]
        return path[:-1] if path[:-1] in known and other_boxes[path[:-1]] == 1 else None

    return find
