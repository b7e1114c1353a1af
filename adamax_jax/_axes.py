"""Which axes of a parameter share one u."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from adamax_jax._checks import name_of

Axes = int | Sequence[int] | None
SharedAxes = Axes | Callable[[Any, Any], Axes]


def check_shared_axes(shared_axes: Any) -> Any:
    """Returns axes, or a function to them, refusing what is neither."""
    return shared_axes if callable(shared_axes) else _integers(shared_axes, "")


def axes_of(path: Any, leaf: Any, shared_axes: Any) -> tuple[int, ...]:
    """The axes of one parameter that share a u: none of those with fewer than two."""
    ndim = jnp.ndim(leaf)
    if ndim < 2:
        return ()
    place = f" for the parameter at {name_of(path)}"
    axes = shared_axes(path, leaf) if callable(shared_axes) else shared_axes
    axes = _integers(axes, place)
    normal = tuple(axis % ndim for axis in axes)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(
            f"shared_axes must be axes from {-ndim} to {ndim - 1}{place}, which has "
            f"shape {jnp.shape(leaf)}, got {axes}. A function of the path and the "
            "parameter chooses them for each."
        )
    if len(set(normal)) < len(normal):
        raise ValueError(
            f"shared_axes must be different axes{place}, which has shape "
            f"{jnp.shape(leaf)}, got {axes}."
        )
    return normal


def axes_between(m_shape: tuple[int, ...], u_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that u of one shape shares beside m of another."""
    sizes = list(zip(m_shape, u_shape, strict=False))
    fits = all(kept in (1, size) for size, kept in sizes)
    if len(m_shape) != len(u_shape) or not fits:
        raise ValueError(
            f"The optimizer state has u of shape {u_shape} beside m of shape "
            f"{m_shape}: they must agree but for axes along which u has size 1."
        )
    return tuple(axis for axis, (size, kept) in enumerate(sizes) if size != kept)


def maximum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The maximum over some axes, which keep size 1; 0 over no numbers at all."""
    return jnp.max(x, axes, keepdims=True, initial=0) if axes else x


def _integers(axes, place):
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
            f"that returns one of these{place}, got {axes!r}. Inside "
            "optax.inject_hyperparams, which makes arrays of numbers, pass that "
            'static_args="shared_axes".'
        ) from error
