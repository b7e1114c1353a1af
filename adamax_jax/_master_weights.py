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
from adamax_jax._state import copied, map_states, put_like, some_states
from adamax_jax._trees import leaves_beside, name_of, path_finder


class MasterWeightsState(NamedTuple):
    """State of :func:`master_weights`.

    Attributes:
      count: The number of updates so far; int32 scalar. ``inner_state`` has its own:
        ``optax.tree.get(state, "ScaleByAdamaxState").count``.
      residual: Each float32 parameter minus its half-precision value: integers in a
        tree with the parameters' structure and shapes, None for all other parameters
        (give ``optax.tree.map_params`` ``is_leaf=lambda x: x is None``).
      inner_state: The state of the wrapped optimizer, for float32 parameters.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    residual: optax.Params
    inner_state: optax.OptState


# Pickles refer to this module, even if the class moves to another file.
MasterWeightsState.__module__ = "adamax_jax"


def master_weights(
    optimizer: optax.GradientTransformation, residual_dtype: DTypeLike = "int16"
) -> optax.GradientTransformationExtraArgs:
    r"""Trains parameters in half precision as if they were in float32.

    With p the parameter, r its residual, g the gradient, and ``update`` that of the
    wrapped optimizer:

    .. math::

      x_t &= p_{t-1} + r_{t-1} + \mathrm{update}(g_t, p_{t-1} + r_{t-1}) \\
      p_t &= \mathrm{round}(x_t) \\
      r_t &= x_t - p_t

    A step shorter than half the distance to the next number of a dtype is rounded away:
    in bfloat16, 1e-3 at a parameter of 1. The residual keeps what is rounded away. So
    the optimizer sees float32 parameters and gradients, and with bfloat16 and "int16" p
    and r are the float32 master weights of mixed-precision training, in 4 bytes instead
    of 6. :doc:`how_it_works` has their exact range, and what happens if other code
    changes p.

    Put this wrapper around everything that changes updates: ``apply_if_finite``,
    ``lookahead``, ``schedule_free``, and a ``chain`` that does so after the optimizer.
    Only ``optax.masked``, ``partition``, ``MultiSteps``, and a ``chain`` in which the
    wrapper is the last part, such as one that clips gradients, may go around it. Undo
    loss scaling inside, in float32: ``master_weights(optax.chain(optax.scale(1 /
    scale), optimizer))``.

    Args:
      optimizer: Any optimizer, this package's or Optax's.
      residual_dtype: "int16", or "int8" for 16 significant bits (18 for float16),
        rounded without bias.

    Returns:
      An optimizer whose ``update`` needs the parameters, and whose state is a
      :class:`MasterWeightsState`. Its updates have the gradients' shapes. They are
      float32 for half-precision parameters: ``optax.apply_updates`` and
      ``flax.nnx.Optimizer`` add them, ``equinox.apply_updates`` would promote the
      parameters. Other parameters are updated as without this wrapper.

    Raises:
      ValueError: If ``residual_dtype`` is another dtype; by ``update``, without
        parameters, or if a residual does not have its parameter's structure or shape.
      TypeError: If ``optimizer`` has no ``init`` and ``update``, or ``residual_dtype``
        is no dtype; by ``init``, if a parameter has 8 bits or is no array; by
        ``update``, if the state is another optimizer's or a parameter has not the kind
        of dtype that it had at ``init``.

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
      <https://arxiv.org/abs/1710.03740>`_, 2018. Zamirai et al., `Revisiting BFloat16
      Training <https://arxiv.org/abs/2010.06192>`_, 2020.
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
      state: Their :class:`MasterWeightsState`, or an optimizer's state that contains
        one or more.

    Returns:
      The parameters, in float32 if they have a residual, else unchanged. They share no
      memory with the arguments.

    Raises:
      ValueError: If there is no :class:`MasterWeightsState` in the state, two of them
        have a residual at one path, a residual has another shape than its parameter, or
        it has no parameter.
      TypeError: If a parameter with a residual is not in half precision.

    Examples:
      >>> import jax.numpy as jnp
      >>> from adamax_jax import adamax, full_params, master_weights
      >>> params = {"scale": jnp.ones(1, jnp.bfloat16)}
      >>> state = master_weights(adamax()).init(params)
      >>> full_params(params, state)
      {'scale': Array([1.], dtype=float32)}
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
    """Sets the float32 parameters that :func:`master_weights` trains.

    The weights of another run become half-precision parameters without loss.
    ``set_full_params(params, state, params)`` sets the residuals to 0.

    Args:
      params: The parameters, whose dtypes are kept.
      state: Their :class:`MasterWeightsState`, or an optimizer's state that contains
        one or more.
      full: The new values, in the structure of ``params``.

    Returns:
      The new parameters and the new state, on the devices of the old ones, sharing no
      memory with the arguments. :func:`full_params` of both gives ``full`` again, as
      exactly as :func:`master_weights` stores a dtype.

    Raises:
      ValueError: As :func:`full_params`; also if ``full`` has another structure or
        other shapes than the parameters, or is complex where they are real.
      TypeError: As :func:`full_params`.

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
            return put_like(jnp.asarray(x, jnp.result_type(p)), p)
        new_p, new_r = split(jnp.asarray(x, jnp.float32), p.dtype, r.dtype)
        new_residuals[residual_path] = put_like(new_r, r)
        return put_like(new_p, p)

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
        """Raises ValueError if a residual has no parameter."""
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
    """Raises an error if p is not in half precision or r has another shape."""
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
    """Raises an error if residuals and parameters do not fit."""
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
    """Casts half precision to float32: what the wrapped optimizer is given."""
    if not is_half(p):
        return p
    if isinstance(p, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding)
    return jnp.asarray(p, jnp.float32)
