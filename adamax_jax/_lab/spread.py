"""Parameters and an optimizer's state over several devices, as shapes: no memory."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from adamax_jax import zero_shardings
from adamax_jax._lab.shapes import Shape

AXIS = "data"
# What the devices share: the state alone (ZeRO-1), or the parameters as well (FSDP).
Shared = Literal["state", "everything"]


def spread(
    optimizer: optax.GradientTransformation,
    arrays: Mapping[str, Shape],
    dtype: Any,
    mesh: Mesh | AbstractMesh,
    shared: Shared,
) -> tuple[Any, Any]:
    """The parameters and the state, with how they are divided."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    params: Any = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
        for name, shape in arrays.items()
    }
    if shared == "everything":
        # A state with one array for each parameter is divided as they are to be.
        params = _state(optax.trace(0.9), params, mesh).trace
    return params, _state(optimizer, params, mesh)


def _state(optimizer, params, mesh):
    shardings = zero_shardings(optimizer, params, mesh, AXIS)
    state = jax.eval_shape(optimizer.init, params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings,
    )


def bytes_on_a_device(tree: Any) -> int:
    """Those of the arrays, but for single numbers."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.size > 1
    )


def ideal_bytes(params: Any, state: Any, shared: Shared, devices: int) -> int:
    """The fewest that a device moves in a step.

    It reads the gradient once, and reads and writes parameters and state once. Of
    parameters that all devices hold, it needs those of its part of the state alone.
    """
    parts = devices if shared == "state" else 1
    return 3 * bytes_on_a_device(params) // parts + 2 * bytes_on_a_device(state)
