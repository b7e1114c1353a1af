"""Pytrees: lists of leaves, gradients that are None, names of leaves.

A user's containers may inspect what is put into them: only arrays are, and None for
parameters without gradients. Everything else that belongs to a leaf is kept in lists.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from adamax_jax._formats import NORMS
from adamax_jax._numerics import dtype_like, dtype_of


def leaves_beside(prefix: Any, tree: Any) -> list[Any]:
    """Broadcasts a prefix of a tree, such as a mask, to a list with an entry per leaf.

    A leaf of the prefix may stand for a whole subtree. None is a leaf, as in gradients.
    """
    leaves, treedef = jax.tree.flatten(prefix, is_leaf=_is_none)
    return [
        leaf
        for leaf, subtree in zip(leaves, treedef.flatten_up_to(tree), strict=True)
        for _ in jax.tree.leaves(subtree)
    ]


def is_trained(p: Any) -> bool:
    """Whether a parameter has gradients: integers, booleans and keys do not."""
    return jnp.issubdtype(jnp.result_type(p), jnp.inexact)


def zeros_beside(zeros: Callable[..., Any], params: Any) -> Any:
    """Maps ``zeros`` over paths and parameters; None if one has no gradients.

    So a model with other arrays than floats, as from
    ``eqx.filter(model, eqx.is_array)``, has a state too.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, p: zeros(path, p) if is_trained(p) else None, params
    )


def dtypes_beside(params: Any, m: Any) -> list[Any]:
    """The dtype of the parameter for every leaf of m; None if it is not known.

    The parameters may be missing, in other containers, or have functions where m has
    None, as in an Equinox model: arithmetic does not need them.
    """
    m_leaves, treedef = jax.tree.flatten(m, is_leaf=_is_none)
    try:
        beside = treedef.flatten_up_to(params)
    except ValueError:
        beside = [None] * len(m_leaves)
    return [
        dtype_of(p) if hasattr(p, "dtype") else None
        for leaf, p in zip(m_leaves, beside, strict=True)
        if leaf is not None
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
    """Applies ``update_leaf`` to each leaf and returns the trees of steps, m and u.

    ``update_leaf(g, m, u, step_dtype)`` returns ``(step, m, u)``. ``step_dtype`` is
    that of g, or that of the parameter, in ``dtypes``, if it has more bits.

    A gradient of None has no step, and leaves m and u unchanged. But if
    ``decays_by_scale``, one scalar decays every u below 32 bits. There None counts as
    0, so that m decays with u.
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
    """A path in a tree as text, for errors."""
    return jax.tree_util.keystr(path) or "the root of the tree"


def is_inside(path: Any, other: Any) -> bool:
    """Whether a path leads into the subtree at ``other``, or to its root."""
    return path[: len(other)] == other


def suffixes_of(path: Any) -> list[Any]:
    """The suffixes of a path, the longest, which is the path itself, first."""
    return [path[start:] for start in range(len(path) + 1)]


def path_finder(tree: Any, other: Any) -> Callable[[Any], Any]:
    """Returns a function from the path of a leaf in ``other`` to its path in ``tree``.

    It returns None if there is none. A container around a single array, in one of the
    trees, adds an entry to the path: Flax NNX's variables.
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
