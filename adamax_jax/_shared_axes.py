"""Shared axes: one u for several coordinates. u has size 1 along a shared axis."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from adamax_jax._trees import name_of
from adamax_jax._xla import largest

Axes = int | Sequence[int] | None
SharedAxes = Axes | Callable[[Any, Any], Axes]
Shape = tuple[int, ...]


def check_shared_axes(shared_axes: Any) -> Any:
    """Returns a tuple of axes, or the function that gives them. Raises TypeError."""
    return shared_axes if callable(shared_axes) else _integers(shared_axes, "")


def zeros_shared(path: Any, leaf: Any, dtype: Any, shared_axes: Any) -> jax.Array:
    """Zeros for the u of one parameter, sharded as the parameter is."""
    zeros = jnp.zeros_like(leaf, dtype=dtype)
    axes = _axes_of(path, leaf, shared_axes)
    # The maximum gives shape and sharding. zeros_like drops its value, since XLA takes
    # seconds to evaluate a maximum of constants.
    return (
        jnp.zeros_like(jnp.max(zeros, axes, keepdims=True, initial=0))
        if axes
        else zeros
    )


def shape_of_shared(path: Any, whole: Any, shared_axes: Axes) -> Shape:
    """The shape of the u of one parameter, or of an array of its shape."""
    axes = _axes_of(path, whole, shared_axes)
    return tuple(1 if axis in axes else size for axis, size in enumerate(whole.shape))


def shape_beside(path: Any, m: jax.Array, u: jax.Array, shared_axes: Any) -> Shape:
    """The shape that u should have, given m.

    If axes are shared, they are read from the shape of u: a state of stacked layers may
    be updated layer by layer, with one axis fewer than at init, and only init calls a
    ``shared_axes`` function.
    """
    if callable(shared_axes) or (shared_axes and u.shape != m.shape):
        return u.shape if is_shared(u.shape, m.shape) else m.shape
    return shape_of_shared(path, m, shared_axes)


def maximum_over(x: jax.Array, shape: Shape) -> jax.Array:
    """The maximum of x along the axes that a u of this shape shares."""
    return largest(x, _differing(x.shape, shape))


def is_shared(shape: Shape, whole: Shape) -> bool:
    """Whether ``shape`` is ``whole``, but with size 1 along shared axes."""
    return len(shape) == len(whole) and all(
        kept in (1, size) for kept, size in zip(shape, whole, strict=True)
    )


def can_reshare(shape: Shape, other: Shape) -> bool:
    """Whether :func:`reshare` can turn a u of one shape into the other."""
    return len(shape) == len(other) and all(
        size == kept or 1 in (size, kept)
        for size, kept in zip(shape, other, strict=True)
    )


def reshare(u: jax.Array, shape: Shape) -> jax.Array:
    """Changes which axes share u: takes the maximum along new ones.

    u is broadcast along axes that are no longer shared.
    """
    pairs = enumerate(zip(u.shape, shape, strict=True))
    axes = tuple(axis for axis, (size, kept) in pairs if kept == 1 and size != 1)
    return jnp.broadcast_to(largest(u, axes), shape)


def spec_of_shared(spec: PartitionSpec, whole: Shape, shape: Shape) -> PartitionSpec:
    """The PartitionSpec of a u of ``shape``, where ``spec`` shards ``whole``."""
    shared = _differing(whole, shape)
    if not shared:
        return spec
    entries = [*spec, *[None] * (len(whole) - len(spec))]
    for axis in shared:
        entries[axis] = None
    return PartitionSpec(*entries)


def _axes_of(path, leaf, shared_axes):
    """The axes of one parameter that share a u; none if it has fewer than two."""
    ndim = jnp.ndim(leaf)
    if ndim < 2:
        return ()
    where = f" for the parameter at {name_of(path)}"
    axes = shared_axes(path, leaf) if callable(shared_axes) else shared_axes
    axes = _integers(axes, where)
    normal = tuple(axis % ndim for axis in axes)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"shared_axes must be axes from {-ndim} to {ndim - 1}{where}, which has "
            f"shape {jnp.shape(leaf)}, got {axes}. A function of the path and the "
            "parameter chooses them for each."
        )
    if len(set(normal)) < len(normal):
        raise ValueError(
            f"shared_axes must be different axes{where}, which has shape "
            f"{jnp.shape(leaf)}, got {axes}."
        )
    return normal


def _differing(whole, shape):
    """The axes along which two shapes of equal rank differ."""
    sizes = zip(whole, shape, strict=True)
    return tuple(axis for axis, (size, kept) in enumerate(sizes) if size != kept)


def _integers(axes, where):
    if axes is None:
        return ()
    items: Any = axes if isinstance(axes, Sequence) else [axes]
    try:
        if isinstance(axes, str | bytes) or any(isinstance(a, bool) for a in items):
            raise TypeError("neither text nor a bool is an axis")
        return tuple(operator.index(axis) for axis in items)
    except TypeError as error:
        raise TypeError(
            "shared_axes must be None, an integer, a tuple of integers or a function "
            f"that returns one of these{where}, got {axes!r}. Inside "
            "optax.inject_hyperparams, which makes arrays of numbers, pass that "
            'static_args="shared_axes".'
        ) from error
