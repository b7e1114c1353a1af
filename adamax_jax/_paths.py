"""Places in trees: what they are called, and which lies inside which."""

from collections.abc import Callable, Iterable
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


def path_finder(paths: Iterable[Any]) -> Callable[[Any], Any]:
    """A function from the path of a leaf to that of the same leaf in another tree.

    It returns None where there is none. A container around a single array, in one of
    the trees, adds an entry to the path: Flax NNX's variables.
    """
    known = set(paths)
    inside = {path[:-1]: path for path in known if path}

    def find(path):
        candidates = (path, inside.get(path), path[:-1])
        return next((key for key in candidates if key in known), None)

    return find
