"""What a step moves on devices that are not there, from what JAX compiles for them."""

import importlib.metadata
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

from adamax_jax._lab.contenders import (
    GROWTH,
    HALF,
    OPTIMIZERS,
    REFERENCE,
    SHARED,
    SHARED_NAME,
    optax_step,
)
from adamax_jax._lab.shapes import Shape
from adamax_jax._lab.spread import AXIS, Shared, ideal_bytes, spread
from adamax_jax._lab.targets import TARGETS, devices
from adamax_jax._lab.traffic import Traffic, traffic

# One array that does not fit on the chip, where compilers keep arrays of less.
MATRIX = {"matrix": (2**14, 2**13)}
FOUR = "4 devices: "
# The packages that compile.
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


class Contender(NamedTuple):
    """An optimizer, and what it works on."""

    optimizer: optax.GradientTransformation
    # Of parameters and gradients.
    dtype: Any = jnp.float32
    devices: int = 1
    shared: Shared = "state"


def contenders() -> dict[str, Contender]:
    """By their names; what comes before a colon says what else they are compared to."""
    whole = OPTIMIZERS | {SHARED_NAME: SHARED} | GROWTH
    half = HALF | {
        f"bfloat16: {name}": OPTIMIZERS[name]
        for name in ("adamax bfloat16/bfloat16", "adamax int8/uint8")
    }
    among_four = (REFERENCE, "adamax float32", "adamax int8/uint8")
    return (
        {name: Contender(optimizer) for name, optimizer in whole.items()}
        | {name: Contender(optimizer, jnp.bfloat16) for name, optimizer in half.items()}
        | {FOUR + name: Contender(OPTIMIZERS[name], devices=4) for name in among_four}
    )


def reference_of(name: str) -> str:
    """What a contender is compared to."""
    start, colon, _ = name.rpartition(": ")
    return start + colon + REFERENCE


class Step(NamedTuple):
    """A compiled step of a contender, on one of the devices."""

    traffic: Traffic
    temporary_bytes: int
    # To read the gradient once, and to read and write parameters and state once.
    ideal_bytes: int


def compile_step(
    contender: Contender, target: str, arrays: Mapping[str, Shape] = MATRIX
) -> Step:
    """Compiles a step for a kind of device, and reads what it does."""
    executable, (params, state) = compiled(contender, target, arrays)
    memory: Any = executable.memory_analysis()
    return Step(
        traffic(executable),
        memory.temp_size_in_bytes,
        ideal_bytes(params, state, contender.shared, contender.devices),
    )


def compiled(
    contender: Contender, target: str, arrays: Mapping[str, Shape]
) -> tuple[Any, tuple[Any, Any]]:
    """A compiled step, and the parameters and the state it is for, as shapes."""
    among = np.array(devices(target)[: contender.devices])
    mesh = Mesh(among, (AXIS,), axis_types=(AxisType.Auto,))
    optimizer = contender.optimizer
    trees = spread(optimizer, arrays, contender.dtype, mesh, contender.shared)
    params, _ = trees
    step = jax.jit(
        optax_step(optimizer),
        donate_argnums=(0, 1),
        out_shardings=jax.tree.map(lambda x: x.sharding, trees),
    )
    options = dict(TARGETS[target].compiler_options)
    return step.lower(*trees, params).compile(options), trees


@dataclass
class CompiledRow:
    """What a step of one contender moves on one kind of device."""

    device: str
    contender: str
    kernels: int
    moved_bytes_per_parameter: float
    # Its bytes relative to those of optax.adamax on the same parameters.
    ratio: float
    # Its bytes relative to the fewest there can be.
    ratio_to_ideal: float
    temporary_bytes_per_parameter: float
    collective_bytes_per_parameter: dict[str, float]

    @property
    def what(self) -> str:
        """The row in a few words."""
        return f"{self.device}, {self.contender}"


def measure(targets: Sequence[str]) -> Iterator[list[CompiledRow]]:
    """Compiles for one device and contender after the other."""
    parameters = sum(map(math.prod, MATRIX.values()))
    for target in targets:
        moved: dict[str, int] = {}
        for name, contender in contenders().items():
            try:
                step = compile_step(contender, target)
            except Exception as error:
                if name == reference_of(name):
                    raise
                print(
                    f"left out: {target}, {name}: {_first_line(error)}", file=sys.stderr
                )
                continue
            moved[name] = step.traffic.moved_bytes
            yield [
                CompiledRow(
                    device=target,
                    contender=name,
                    kernels=step.traffic.kernels,
                    moved_bytes_per_parameter=moved[name] / parameters,
                    ratio=moved[name] / moved[reference_of(name)],
                    ratio_to_ideal=moved[name] / step.ideal_bytes,
                    temporary_bytes_per_parameter=step.temporary_bytes / parameters,
                    collective_bytes_per_parameter={
                        collective: size / parameters
                        for collective, size in step.traffic.collectives.items()
                    },
                )
            ]


def _first_line(error):
    # XLA's go on with its own stack.
    return str(error).partition("\n")[0]


def text(rows: Sequence[CompiledRow], targets: Sequence[str]) -> str:
    """The table, and what is said below it."""
    lines = [
        "| compiled for | optimizer | kernels | bytes moved per parameter "
        "| / optax.adamax | / ideal | temporary, bytes per parameter "
        "| collectives, bytes per parameter |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        collectives = ", ".join(
            f"{name} {size:.2f}"
            for name, size in row.collective_bytes_per_parameter.items()
        )
        lines.append(
            f"| {row.device} | {row.contender} | {row.kernels} "
            f"| {row.moved_bytes_per_parameter:.2f} | {row.ratio:.2f} "
            f"| {row.ratio_to_ideal:.2f} | {row.temporary_bytes_per_parameter:.2f} "
            f"| {collectives} |"
        )
    return "\n".join(lines) + f"\n\n{_caption(settings(targets))}"


def settings(targets: Sequence[str]) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "compiled_not_run": True,
        "versions": {p: v for p in ("adamax_jax", *PACKAGES) if (v := _version(p))},
        "arrays": {name: list(shape) for name, shape in MATRIX.items()},
        "command": f"python -m adamax_jax bench --for {','.join(targets)}",
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _caption(settings):
    (shape,) = settings["arrays"].values()
    versions = ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
    return (
        "Compiled, not run: nothing here is a time. A step on one array of "
        f"{' x '.join(map(str, shape))} parameters, in float32 with such gradients, or "
        'in bfloat16 where a row begins with it. "4 devices" that all hold the '
        "parameters share the state (ZeRO-1); bytes are those of one of them, and "
        "collectives are apart. Ideal is to read the gradient once, and to read and "
        "write parameters and state once; optax.adamax is that of the same parameters. "
        f"{versions}; {settings['command']}.\n"
    )
