"""What each of many devices holds and moves in a step, computed from shapes alone.

Nothing is measured or allocated here. The shapes are those that the optimizers' own
``init`` and ``zero_shardings`` give, and the bytes moved are the fewest possible. The
rows are those of ``notebooks/03_flax_and_scale.ipynb``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from adamax_jax import zero_shardings
from adamax_jax._lab import shapes
from adamax_jax._lab.contenders import HALF, OPTIMIZERS

AXIS = "data"
# What is sharded: the state alone, or the parameters as well.
Divided = Literal["ZeRO-1", "FSDP"]
MODELS = {"Llama 2 7B": shapes.llama2(), "Llama 2 70B": shapes.llama2_70b()}
DEVICES = (8, 64, 256)
METHODS = {
    name: (OPTIMIZERS[name], jnp.float32)
    for name in (
        "optax.adam",
        "adamax float32",
        "adamax bfloat16/bfloat16",
        "adamax int8/uint8",
        "adamax int8 and shared u",
    )
} | {
    name: (HALF[name], jnp.bfloat16)
    for name in (
        "bfloat16: optax.adam and a float32 copy",
        "bfloat16: adamax int8/uint8 and int16",
        "bfloat16: adamax int8/uint8 and int8",
    )
}


def sharded(
    optimizer: optax.GradientTransformation,
    arrays: Mapping[str, shapes.Shape],
    dtype: Any,
    mesh: Mesh | AbstractMesh,
    divided: Divided,
) -> tuple[Any, Any]:
    """The parameters and the state as shapes with shardings."""
    replicated = NamedSharding(mesh, PartitionSpec())
    params: Any = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)
        for name, shape in arrays.items()
    }
    if divided == "FSDP":
        # The trace of momentum has the shapes of the parameters, and is sharded.
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
    """The bytes of the arrays on one device, without scalars."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if x.size > 1
    )


def ideal_bytes(params: Any, state: Any, divided: Divided, devices: int) -> int:
    """The fewest bytes that a device can move in a step.

    It reads the gradient once, and reads and writes parameters and state once. With
    ZeRO-1 it does so for its part of the parameters, which all devices hold.
    """
    parts = devices if divided == "ZeRO-1" else 1
    return 3 * bytes_on_a_device(params) // parts + 2 * bytes_on_a_device(state)


@dataclass
class ScaleRow:
    """What one of the devices holds and moves; all numbers are bytes."""

    model: str
    parameters: int
    devices: int
    divided: str
    optimizer: str
    parameter_bytes: int
    state_bytes: int
    # In its own memory, in a step of the optimizer.
    moved_bytes: int
    # The new parameters that an all-gather brings to the device.
    gathered_bytes: int


def row(
    model: str,
    arrays: Mapping[str, shapes.Shape],
    devices: int,
    divided: Divided,
    method: str,
) -> ScaleRow:
    """Computes the row of one method."""
    optimizer, dtype = METHODS[method]
    mesh = AbstractMesh((devices,), (AXIS,))
    params, state = sharded(optimizer, arrays, dtype, mesh, divided)
    held = bytes_on_a_device(params)
    return ScaleRow(
        model=model,
        parameters=sum(map(math.prod, arrays.values())),
        devices=devices,
        divided=divided,
        optimizer=method,
        parameter_bytes=held,
        state_bytes=bytes_on_a_device(state),
        moved_bytes=ideal_bytes(params, state, divided, devices),
        gathered_bytes=held if divided == "ZeRO-1" else 0,
    )


def rows() -> list[ScaleRow]:
    """All methods, on both models, over each number of devices."""
    ways: tuple[Divided, Divided] = ("ZeRO-1", "FSDP")
    return [
        row(model, arrays, devices, divided, method)
        for model, arrays in MODELS.items()
        for divided in ways
        for method in METHODS
        for devices in DEVICES
    ]
