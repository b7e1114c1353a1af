"""Places in trees: what they are called, and which lies inside which."""

from typing import Any

import jax


def name_of(path: Any) -> str:
    """A path in a tree, as an error shows it."""
    return jax.tree_util.keystr(path) or "the root of the tree"


def is_inside(path: Any, other: Any) -> bool:
    """Whether a path leads into the subtree at another path, or to its root."""
    return path[: len(other)] == other


def ends_of(path: Any) -> list[Any]:
    """The ends of a path, the longest, which is the path itself, first."""
    return [path[start:] for start in range(len(path) + 1)]
