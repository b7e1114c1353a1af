"""The learning rate and decoupled weight decay.

Both keep the dtypes of the updates, which Optax's transformations promote.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adamax_jax._checks import (
    check_chained,
    check_factor,
    check_mask,
    check_scalar,
    check_shapes,
)
from adamax_jax._numerics import arithmetic_dtype, by_parts, dtype_like, number
from adamax_jax._trees import leaves_beside


def descend(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *others: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Chains a direction, other transformations and ``-learning_rate``."""
    parts = direction, *others, _scale("learning_rate", learning_rate, sign=-1)
    chain = optax.chain(*parts)

    def update_fn(updates, state, params=None, **extra_args):
        check_chained(state, len(parts))
        return chain.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Any
) -> optax.GradientTransformation:
    """Adds ``weight_decay`` times the parameters, keeping the updates' dtypes.

    Optax's transformation promotes dtypes, so that updates change dtype or strict
    promotion raises an error, and calls a mask function with the updates instead of the
    parameters.
    """
    scale = _scale("weight_decay", weight_decay, sign=1)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(
                "Weight decay needs the parameters: call "
                "update(gradients, state, params)."
            )
        check_shapes(updates, params)
        gradients = leaves_beside(updates, params)
        decays = _which_decay(mask, params)
        weights: Any = [
            jnp.asarray(p) if g is not None and is_decayed else None
            for g, p, is_decayed in zip(
                gradients, jax.tree.leaves(params), decays, strict=True
            )
        ]
        decay: Any
        decay, state = scale.update(weights, state)
        sums = [
            g if d is None else _add(g, d)
            for g, d in zip(gradients, decay, strict=True)
            if g is not None
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), sums), state

    return optax.GradientTransformation(scale.init, update_fn)


def _which_decay(mask, params):
    """A boolean for every parameter: whether it decays."""
    if mask is None:
        return [True] * len(jax.tree.leaves(params))
    # As in Optax: a container of booleans that is callable, such as an Equinox module,
    # is not a function.
    is_function = callable(mask) and all(map(callable, jax.tree.leaves(mask)))
    mask = mask(params) if is_function else mask
    check_mask(mask, params)
    return leaves_beside(mask, params)


def _add(g, d):
    """g + d, computed in at least float32, in g's dtype."""
    real = arithmetic_dtype(g.dtype, d.dtype)
    return (g.astype(dtype_like(g, real)) + d.astype(dtype_like(d, real))).astype(
        g.dtype
    )


def _scale(name, factor, sign):
    """Multiplies updates by a number, an array or a schedule, keeping their dtypes.

    ``optax.scale`` promotes dtypes: an array, as from ``inject_hyperparams``, would
    turn bfloat16 updates into float32, and raise an error under strict promotion.
    """
    if callable(factor):
        return _scale_by_schedule(lambda count: check_scalar(name, factor(count)), sign)
    factor = check_factor(name, factor)
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda g: _scaled(g, factor, sign), updates
        )
    )


def _scale_by_schedule(schedule, sign):
    """``optax.scale_by_schedule``, with its state, but keeping dtypes."""

    def update_fn(updates, state, params=None):
        del params
        factor = schedule(state.count)
        updates = jax.tree.map(lambda g: _scaled(g, factor, sign), updates)
        count = optax.safe_increment(state.count)
        return updates, optax.ScaleByScheduleState(count=count)

    init_fn = optax.scale_by_schedule(schedule).init
    return optax.GradientTransformation(init_fn, update_fn)


# Jitted for the same reason as ``update_leaf``.
@functools.partial(jax.jit, static_argnames="sign")
def _multiply(g, factor, *, sign):
    # By parts, since an infinite part would make the other one NaN.
    return by_parts(lambda part: sign * jnp.asarray(factor, part.dtype) * part, g)


def _scaled(g, factor, sign):
    is_long = g.dtype.itemsize > 4 and arithmetic_dtype(g.dtype) == jnp.float64
    if is_long and isinstance(factor, float):
        # Without jax_enable_x64, jax.jit takes a Python number for a float32.
        factor = number(factor, jnp.float64)
    return _multiply(g, factor, sign=sign)
