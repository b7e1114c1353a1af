"""Parameters in half precision that train as float32 ones: ``master_weights``."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adamax_jax._checks import (
    check_array,
    check_dtype,
    check_optimizer,
    check_state,
    is_array,
)
from adamax_jax._halves import is_half, join, split, step, threshold_of
from adamax_jax._state import copied, map_states, place, some_states
from adamax_jax._trees import leaves_beside, name_of, path_finder


class MasterWeightsState(NamedTuple):
    """State of :func:`master_weights`.

    Attributes:
      count: The number of updates so far; int32 scalar. ``inner_state`` has another:
        ``optax.tree.get(state, "ScaleByAdamaxState").count``.
      residual: What the parameters in half precision lack of float32 ones: integers in
        a tree of the parameters' structure and shapes, None for all other parameters
        (give ``optax.tree.map_params`` ``is_leaf=lambda x: x is None``).
      inner_state: The state of the wrapped optimizer, for float32 parameters.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    residual: optax.Params
    inner_state: optax.OptState


# A pickle names this place, whatever file the class moves to.
MasterWeightsState.__module__ = "adamax_jax"


def master_weights(
    optimizer: optax.GradientTransformation, residual_dtype: DTypeLike = "int16"
) -> optax.GradientTransformationExtraArgs:
    """Trains parameters in half precision as if they were in float32.

    A step that is shorter than half the distance of a parameter to the next number of
    its dtype is rounded away: in bfloat16, one of 1e-3 beside a parameter of 1. Here
    the state keeps, in two bytes or in one, the residual that is left over when the
    float32 parameter is rounded. With p the parameter, r its residual
    and ``update`` that of the wrapped optimizer,

    ::

      x_t = p_{t-1} + r_{t-1} + update(g_t, p_{t-1} + r_{t-1})
      p_t = round(x_t)
      r_t = x_t - p_t

    So the optimizer sees float32 parameters and gradients, for its weight decay too,
    and its ``init`` makes the state of such.

    With bfloat16 parameters and ``residual_dtype="int16"``, p and r together are in
    every bit the float32 master weights of mixed-precision training, in 4 bytes instead
    of 6, as far as the compiler rounds the wrapped optimizer's arithmetic alike. That
    holds for parameters between 2^-110 and 2^126 in size, and for 0, with two
    exceptions. Where one step takes a parameter past 0 to less than 2^-15 of its size,
    it is off by up to 2^-23 of that size, since no float32 update leads there. And a
    parameter that is infinite in half precision stays infinite. float16 parameters are
    exact where they are 2^-16 at least (but for the same exceptions), and known to
    2^-40 below. With "int8" x has 16 significant bits (in float16 18), and is rounded
    up or down in proportion to its place between two numbers, by ``count``, so that
    steps far below that move it at the right speed. Derivatives pass as if nothing was
    rounded. Parameters in 32 bits or more, and complex ones, have no residual: the
    optimizer updates them as it would without this wrapper.

    **Updates** are in float32 for all parameters with a residual: one in bfloat16
    cannot always lead exactly from one bfloat16 number to another.
    ``optax.apply_updates`` and ``flax.nnx.Optimizer`` add them to p;
    ``equinox.apply_updates`` would turn the parameters into float32: use Optax's, of
    ``eqx.filter(model, eqx.is_inexact_array)``, and ``eqx.combine``. Under
    ``jax.numpy_dtype_promotion("strict")`` neither adds float32 to bfloat16: allow
    "standard" around that addition.

    **Order.** This wrapper goes around everything that changes an update, including
    ``optax.chain``, ``optax.lookahead`` and ``optax.contrib.schedule_free``, and around
    ``optax.apply_if_finite``, which wants updates in the gradients' dtype. Only what
    hands updates on as they are may go around it: ``optax.masked``,
    ``optax.partition``, ``optax.MultiSteps``, and ``optax.chain`` if it is the last.

    **Loss scaling**, which float16 gradients need, is undone inside, in float32:
    ``master_weights(optax.chain(optax.scale(1 / scale), optimizer))``.

    **Parameters that others change.** The residual belongs to the parameter it was
    taken from. It is an offset of at most half the distance to the next number: where
    somebody else changes a parameter (by clipping, tying, or loading), the float32
    number is within that of the new value. :func:`set_full_params` sets both.

    Args:
      optimizer: Any optimizer, this package's or Optax's.
      residual_dtype: "int16" or "int8".

    Returns:
      An optimizer whose ``update`` needs the parameters, and whose state is a
      :class:`MasterWeightsState`.

    Raises:
      ValueError: If ``residual_dtype`` is another dtype; by ``update``, without
        parameters, or if a residual does not have its parameter's shape.
      TypeError: If ``optimizer`` is none or ``residual_dtype`` is no dtype; by
        ``init``, if a parameter has 8 bits or is no array; by ``update``, if the
        state is another optimizer's or a parameter has other than half precision where
        it had that at ``init``, or the other way round.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from adamax_jax import adamax, full_params, master_weights
      >>> params = jnp.ones(2, jnp.bfloat16)
      >>> optimizer = master_weights(adamax(1e-3))
      >>> state = optimizer.init(params)
      >>> gradients = jnp.array([1.0, -1.0], jnp.bfloat16)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(gradients, state, params)
      ...     with jax.numpy_dtype_promotion("standard"):
      ...         params = optax.apply_updates(params, updates)
      >>> params
      Array([0.996094, 1], dtype=bfloat16)
      >>> [round(float(x), 4) for x in full_params(params, state)]
      [0.998, 1.002]

    References:
      Micikevicius et al., `Mixed Precision Training
      <https://arxiv.org/abs/1710.03740>`_, 2018, on master weights. Zamirai et al.,
      `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020, on what
      is lost without.
    """
    residual_dtype = check_dtype(
        "residual_dtype", residual_dtype, ("int16", "int8"), optional=False
    )
    check_optimizer(optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params):
        _check_params(params)
        return MasterWeightsState(
            count=jnp.zeros([], jnp.int32),
            residual=jax.tree.map(
                lambda p: jnp.zeros_like(p, residual_dtype) if is_half(p) else None,
                params,
            ),
            inner_state=optimizer.init(jax.tree.map(_in_full, params)),
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "master_weights needs the parameters: call "
                "update(gradients, state, params)."
            )
        check_state(state, MasterWeightsState)
        residuals = _beside(state.residual, params)
        _check_residuals(residuals, params, residual_dtype)
        leaves, treedef = jax.tree.flatten(params)
        full = [
            p if r is None else join(p, r)
            for p, r in zip(leaves, residuals, strict=True)
        ]
        updates, inner_state = optimizer.update(
            jax.tree.map(_in_full, updates),
            state.inner_state,
            jax.tree.unflatten(treedef, full),
            **extra_args,
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        threshold = threshold_of(count)
        steps, new_residuals = [], []
        for u, p, r, x in zip(
            leaves_beside(updates, params), leaves, residuals, full, strict=True
        ):
            if u is not None and r is not None:
                u, r = step(p, x, u, threshold, residual_dtype)
            if u is not None:
                steps.append(u)
            if r is not None:
                new_residuals.append(r)
        return (
            jax.tree.unflatten(jax.tree.structure(updates), steps),
            MasterWeightsState(
                count=count,
                residual=jax.tree.unflatten(
                    jax.tree.structure(state.residual), new_residuals
                ),
                inner_state=inner_state,
            ),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def full_params(params: optax.Params, state: optax.OptState) -> optax.Params:
    """The float32 parameters that :func:`master_weights` trains, to evaluate or export.

    Args:
      params: The parameters.
      state: Their :class:`MasterWeightsState`, or an optimizer's state with some in it.

    Returns:
      The parameters, in float32 where they have a residual, else as they are; they
      share no memory with the arguments.

    Raises:
      ValueError: If there is no :class:`MasterWeightsState` in the state, two of them
        have a residual at one path, the shapes of parameters and residuals differ, or a
        residual has no parameter.
      TypeError: If a parameter with a residual has other than half precision.

    Examples:
      As of :func:`master_weights`.
    """
    residuals = _Residuals(state, params)

    def joined(path, p):
        _, r = residuals.of(path, p)
        return p if r is None else join(p, r)

    full = jax.tree_util.tree_map_with_path(joined, params)
    residuals.check_all_were_used()
    return copied(full)


def set_full_params(
    params: optax.Params, state: optax.OptState, full: optax.Params
) -> tuple[optax.Params, optax.OptState]:
    """Parameters and a state that stand for given float32 parameters.

    So the weights of another run become half-precision parameters without loss.
    ``set_full_params(params, state, params)`` forgets the residuals.

    Args:
      params: The parameters, whose dtypes are kept.
      state: Their :class:`MasterWeightsState`, or an optimizer's state with some in it.
      full: The new values, in the structure of ``params``.

    Returns:
      The parameters and the state, where the old ones lie and without sharing memory
      with any of the arguments, of which :func:`full_params` makes ``full`` again:
      exactly, or as exactly as :func:`master_weights` says of the dtypes.

    Raises:
      ValueError, TypeError: As :func:`full_params`; ValueError also if ``full`` has
        another structure or other shapes than the parameters, or is complex where they
        are real.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import adamax, full_params, master_weights, set_full_params
      >>> full = jnp.array([0.1, 0.2])
      >>> params = full.astype(jnp.bfloat16)
      >>> state = master_weights(adamax()).init(params)
      >>> full_params(params, state)
      Array([0.10009766, 0.20019531], dtype=float32)
      >>> params, state = set_full_params(params, state, full)
      >>> full_params(params, state)
      Array([0.1, 0.2], dtype=float32)
    """
    residuals = _Residuals(state, params)
    new_residuals = {}

    def half(path, p, x):
        if not is_array(p):
            return p
        if jnp.shape(x) != jnp.shape(p) or jnp.iscomplexobj(x) > jnp.iscomplexobj(p):
            raise ValueError(
                f"full has shape {jnp.shape(x)} and dtype {jnp.result_type(x)} at "
                f"{name_of(path)}, but the parameter has {jnp.shape(p)} and "
                f"{jnp.result_type(p)}."
            )
        residual_path, r = residuals.of(path, p)
        if r is None:
            return place(jnp.asarray(x, jnp.result_type(p)), p)
        new_p, new_r = split(jnp.asarray(x, jnp.float32), p.dtype, r.dtype)
        new_residuals[residual_path] = place(new_r, r)
        return place(new_p, p)

    params = jax.tree_util.tree_map_with_path(half, params, full)
    residuals.check_all_were_used()

    def replaced(node):
        residual = jax.tree_util.tree_map_with_path(
            lambda path, old: new_residuals[path], node.residual
        )
        return node._replace(residual=residual)

    return params, copied(map_states(replaced, state, MasterWeightsState))


class _Residuals:
    """The residuals in a state, by the paths of their parameters."""

    def __init__(self, state, params):
        self._found, self._unused, owners = {}, [], {}
        for owner, part in some_states(state, MasterWeightsState):
            leaves = dict(jax.tree.leaves_with_path(part.residual))
            find = path_finder(part.residual, params)
            for path, _ in jax.tree.leaves_with_path(params):
                residual_path = find(path)
                if residual_path is None:
                    continue
                if path in owners:
                    raise ValueError(
                        f"The state has two residuals at {name_of(path)}, in the "
                        f"MasterWeightsState at {name_of(owners[path])} and at "
                        f"{name_of(owner)}: give the state of one model with its "
                        "parameters, and then that of the other."
                    )
                owners[path] = owner
                self._found[path] = residual_path, leaves.pop(residual_path)
            self._unused += leaves

    def of(self, path, p):
        """The path and the residual of a parameter; None and None if it has none."""
        residual_path, r = self._found.get(path, (None, None))
        if r is not None:
            _check_fit(path, p, r)
        return residual_path, r

    def check_all_were_used(self):
        """Refuses parameters among which those of some residuals are missing."""
        for path in self._unused:
            raise ValueError(
                f"The state has a residual at {name_of(path)}, where there is no "
                "parameter: give the parameters in the structure that init was given "
                "(of a Flax NNX model, nnx.state(model, nnx.Param))."
            )


def _beside(residual, params):
    try:
        return leaves_beside(residual, params)
    except ValueError as error:
        raise ValueError(
            "The parameters have another structure than those that init was given: "
            f"{jax.tree.structure(params)}, where the state has "
            f"{jax.tree.structure(residual)}."
        ) from error


def _check_fit(path, p, r):
    """Refuses a residual beside a parameter of another shape or kind of dtype."""
    if not is_half(p):
        raise TypeError(
            f"The parameter at {name_of(path)} has dtype {jnp.result_type(p)}, but at "
            "init it had half precision. If equinox.apply_updates promoted it, use "
            "optax.apply_updates, which keeps dtypes."
        )
    if r.shape != p.shape:
        raise ValueError(
            f"The residual at {name_of(path)} has shape {r.shape}, but the parameter "
            f"has {p.shape}."
        )


def _check_params(params):
    for path, p in jax.tree.leaves_with_path(params):
        check_array(path, p)
        dtype = jnp.result_type(p)
        if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1:
            raise TypeError(
                f"The parameter at {name_of(path)} has dtype {dtype}; master_weights "
                "needs bfloat16 or float16. Leave it out with optax.masked."
            )


def _check_residuals(residuals, params, residual_dtype):
    """Refuses a state that does not belong to the parameters."""
    for (path, p), r in zip(jax.tree.leaves_with_path(params), residuals, strict=True):
        if r is None:
            if is_array(p) and is_half(p):
                raise TypeError(
                    f"The parameter at {name_of(path)} has dtype {p.dtype}, but at "
                    "init it had 32 bits or more."
                )
            continue
        _check_fit(path, p, r)
        if r.dtype != residual_dtype:
            raise TypeError(
                f"The residual at {name_of(path)} has dtype {r.dtype}, but this "
                f"optimizer stores {residual_dtype.name}: make a new state with init, "
                "and set_full_params."
            )


def _in_full(p):
    """A parameter at init, or its gradient, as the wrapped optimizer sees it."""
    if not is_half(p):
        return p
    if isinstance(p, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding)
    return jnp.asarray(p, jnp.float32)
