"""ZeRO-1: shards an optimizer's state over the devices that share a batch."""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adamax_jax._checks import check_optimizer
from adamax_jax._shared_axes import Shape, is_shared, spec_of_shared
from adamax_jax._trees import name_of, suffixes_of

_MAX_NAMED = 10


def zero_shardings(
    optimizer: optax.GradientTransformation,
    params: optax.Params,
    mesh: Mesh,
    axis: str,
) -> optax.OptState:
    """Shardings that spread an optimizer's state over one mesh axis (ZeRO stage 1).

    Data-parallel training replicates parameters, and needlessly the optimizer's state.
    With these shardings each of the N devices along ``axis`` stores and updates 1/N of
    it. Results are the same; the compiler adds one all-gather of the new parameters.

    An array of the state that belongs to a parameter is sharded as the parameter is,
    and over ``axis`` too: on the first dimension whose size ``axis`` divides,
    preferably an unsharded one. If the parameter is sharded over ``axis`` already
    (FSDP), the array only follows it. :doc:`devices` has the rules for other arrays,
    and for axes of type ``Explicit``.

    Give the shardings to ``jax.jit`` twice: for ``init``, so that the state is never
    whole on one device, and for the training step, or the compiler may shard the new
    parameters too. Call this function outside of ``jax.jit``.

    Args:
      optimizer: The optimizer; only its ``init`` is called, on abstract arrays.
      params: The parameters, or ``jax.ShapeDtypeStruct`` in their place.
      mesh: The mesh of devices.
      axis: The name of the mesh axis that the batch is sharded over.

    Returns:
      A tree of ``NamedSharding`` with the structure of ``optimizer.init(params)``, for
      ``out_shardings`` of ``jax.jit``, ``jax.device_put`` or a checkpoint's restore.

    Raises:
      ValueError: If the mesh has no such axis, or a parameter is sharded over another
        mesh.
      TypeError: If ``optimizer`` has no ``init`` and ``update``.

    Warns:
      UserWarning: If arrays stay replicated over ``axis``, since no dimension can be
        sharded. The message has their names and bytes.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec
      >>> from adamax_jax import adamax, zero_shardings
      >>> mesh = jax.make_mesh(
      ...     (len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,)
      ... )
      >>> params = {"kernel": jnp.ones([128, 64]), "bias": jnp.zeros(64)}
      >>> optimizer = adamax()
      >>> shardings = zero_shardings(optimizer, params, mesh, "data")
      >>> state = jax.jit(optimizer.init, out_shardings=shardings)(params)
      >>> tuple(state[0].m["kernel"].sharding.spec)
      ('data', None)
      >>> replicated = NamedSharding(mesh, PartitionSpec())
      >>> def step(params, state, gradients):
      ...     updates, state = optimizer.update(gradients, state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> step = jax.jit(step, out_shardings=(replicated, shardings))
      >>> params, state = step(params, state, params)

    References:
      Rajbhandari et al., `ZeRO: Memory Optimizations Toward Training Trillion Parameter
      Models <https://arxiv.org/abs/1910.02054>`_, 2020.
    """
    check_optimizer(optimizer)
    if axis not in mesh.axis_names:
        raise ValueError(
            f"axis must be the name of one of the mesh's axes {mesh.axis_names}, got "
            f"{axis!r}."
        )
    is_explicit = mesh.axis_types[mesh.axis_names.index(axis)] == AxisType.Explicit
    parameters = _parameters_by_suffix(params, mesh)
    unsharded = []

    def shard(path, leaf):
        parameter = _parameter_of(path, leaf.shape, parameters)
        if parameter is None and is_explicit:
            return NamedSharding(mesh, PartitionSpec())
        _, shape, spec = parameter or _Parameter(path, leaf.shape, PartitionSpec())
        spread = _spread(shape, spec, mesh, axis, is_explicit)
        if spread is None:
            if leaf.size > 1:
                unsharded.append((path, leaf))
            spread = spec
        return NamedSharding(mesh, spec_of_shared(spread, shape, leaf.shape))

    state = jax.eval_shape(optimizer.init, params)
    shardings = jax.tree_util.tree_map_with_path(shard, state)
    if unsharded:
        report = _report(unsharded, state, mesh, axis, is_explicit)
        warnings.warn(report, stacklevel=2)
    return shardings


class _Parameter(NamedTuple):
    path: Any
    shape: Shape
    spec: PartitionSpec


def _parameters_by_suffix(params, mesh):
    """A dictionary from path suffixes to the parameters with that suffix."""
    by_suffix: dict[Any, list[_Parameter]] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        parameter = _Parameter(path, jnp.shape(leaf), _own_spec(path, leaf, mesh))
        # Every path has the empty suffix: it is left out, unless the parameter is the
        # whole tree.
        for suffix in suffixes_of(path)[: max(1, len(path))]:
            by_suffix.setdefault(suffix, []).append(parameter)
    return by_suffix


def _parameter_of(path, shape, by_suffix):
    """The parameter that an array of the state belongs to; None if there is none.

    It has the longest common path suffix. Of several, it is the one with the shortest
    path: usually the suffix is the whole path, but optax.lookahead keeps the parameters
    twice and the state once. If none of these has a fitting shape, the array belongs to
    no parameter.
    """
    suffix = next((suffix for suffix in suffixes_of(path) if suffix in by_suffix), None)
    fitting = [p for p in by_suffix.get(suffix, []) if is_shared(shape, p.shape)]
    return min(fitting, key=lambda p: (len(p.path), p.shape != shape), default=None)


def _own_spec(path, leaf, mesh):
    """The PartitionSpec of a parameter on the mesh."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and _is_same(sharding.mesh, mesh):
        return sharding.spec
    if sharding is None or sharding.is_fully_replicated:
        return PartitionSpec()
    raise ValueError(
        f"The parameter at {name_of(path)} is sharded by {sharding}, which is not over "
        f"the given {mesh}."
    )


def _is_same(own, mesh):
    if isinstance(own, Mesh):
        same = own.axis_names == mesh.axis_names and own.shape == mesh.shape
        return same and np.array_equal(own.device_ids, mesh.device_ids)
    # An abstract mesh has no devices.
    return own.shape == mesh.shape


def _spread(shape, spec, mesh, axis, only_free):
    """Adds the axis to the spec; None if no dimension can be sharded."""
    axes = [_axes(entry) for entry in spec] + [()] * (len(shape) - len(spec))
    if any(axis in names for names in axes):
        return spec
    # Unsharded dimensions first: a sharded one gets a second axis only if there is no
    # other, and never if axes are explicit, since gradients are sharded otherwise.
    for dimension in sorted(range(len(shape)), key=lambda d: len(axes[d])):
        if only_free and axes[dimension]:
            break
        names = (*axes[dimension], axis)
        parts = math.prod(mesh.shape[name] for name in names)
        if shape[dimension] > 0 and shape[dimension] % parts == 0:
            axes[dimension] = names
            return PartitionSpec(*(names or None for names in axes))
    return None


def _axes(entry):
    """The axes over which a dimension is sharded, from its entry in a spec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _report(unsharded, state, mesh, axis, only_free):
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    part = sum(leaf.size * leaf.dtype.itemsize for _, leaf in unsharded)
    names = [f"{name_of(path)} {leaf.shape}" for path, leaf in unsharded]
    more = len(names) - _MAX_NAMED
    return (
        f"{part:,} of the optimizer state's {whole:,} bytes stay replicated over axis "
        f"{axis!r}, since {mesh.shape[axis]} divides no dimension"
        + (", of those that are not sharded already," if only_free else "")
        + " of "
        + ", ".join(names[:_MAX_NAMED])
        + (f" and {more} more." if more > 0 else ".")
    )
