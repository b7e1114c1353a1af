"""What a step needs of each of many devices, reckoned from shapes: on paper.

Nothing is measured or allocated here. The shapes are those that the optimizers' own
``init`` and ``zero_shardings`` give, and the bytes moved the fewest there can be.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from adamax_jax._lab import shapes
from adamax_jax._lab.contenders import HALF, OPTIMIZERS, SHARED, SHARED_NAME
from adamax_jax._lab.spread import (
    AXIS,
    Shared,
    bytes_on_a_device,
    ideal_bytes,
    spread,
)

MODELS = {"Llama 2 7B": shapes.llama2(), "Llama 2 70B": shapes.llama2_70b()}
DEVICES = (8, 64, 256)
# What is divided: the state beside parameters that all devices hold, or all of it.
DIVIDED: dict[str, Shared] = {"ZeRO-1": "state", "FSDP": "everything"}
METHODS = {
    name: (OPTIMIZERS[name], jnp.float32)
    for name in (
        "optax.adam",
        "adamax float32",
        "adamax bfloat16/bfloat16",
        "adamax int8/uint8",
    )
}
METHODS[SHARED_NAME] = (SHARED, jnp.float32)
METHODS |= {
    name: (HALF[name], jnp.bfloat16)
    for name in (
        "bfloat16: optax.adam and a float32 copy",
        "bfloat16: adamax int8/uint8 and int16",
        "bfloat16: adamax int8/uint8 and int8",
    )
}


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
    # What an all-gather of the new parameters gives it.
    gathered_bytes: int


def row(
    model: str,
    arrays: Mapping[str, shapes.Shape],
    devices: int,
    divided: str,
    method: str,
) -> ScaleRow:
    """Reckons one method's."""
    optimizer, dtype = METHODS[method]
    shared = DIVIDED[divided]
    mesh = AbstractMesh((devices,), (AXIS,))
    params, state = spread(optimizer, arrays, dtype, mesh, shared)
    held = bytes_on_a_device(params)
    return ScaleRow(
        model=model,
        parameters=sum(map(math.prod, arrays.values())),
        devices=devices,
        divided=divided,
        optimizer=method,
        parameter_bytes=held,
        state_bytes=bytes_on_a_device(state),
        moved_bytes=ideal_bytes(params, state, shared, devices),
        gathered_bytes=held if shared == "state" else 0,
    )


def rows() -> list[ScaleRow]:
    """All methods, on both models, over each number of devices."""
    return [
        row(model, arrays, devices, divided, method)
        for model, arrays in MODELS.items()
        for divided in DIVIDED
        for method in METHODS
        for devices in DEVICES
    ]


def markdown(rows: Sequence[ScaleRow]) -> str:
    """The table: a line for a method, with its numbers over more and more devices."""
    groups: dict[tuple[str, str, str], list[ScaleRow]] = {}
    for row in rows:
        groups.setdefault((row.model, row.divided, row.optimizer), []).append(row)
    lines = [
        "| model | divided | optimizer | parameters, GB per device "
        "| state, GB per device | moved per step, GB per device | all-gather, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for names, group in groups.items():
        numbers = [
            _over_devices([getattr(row, name) for row in group])
            for name in (
                "parameter_bytes",
                "state_bytes",
                "moved_bytes",
                "gathered_bytes",
            )
        ]
        lines.append(f"| {' | '.join([*names, *numbers])} |")
    over = ", ".join(str(n) for n in dict.fromkeys(row.devices for row in rows))
    return (
        "\n".join(lines)
        + f"\n\nReckoned from shapes, over {over} devices; GB are 10^9 bytes. Moved is "
        "to read the gradient once, and to read and write parameters and state once, "
        "by each device for its part; where u is shared, today's compilers read the "
        "gradient twice. Parameters and gradients are in float32, or in bfloat16 where "
        "an optimizer's name begins with it.\n"
    )


def _over_devices(sizes):
    """One number where they are the same."""
    texts = [f"{size / 1e9:.3g}" for size in sizes]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)
