"""``bench --for DEVICES``: what a step moves on devices that are not there.

JAX compiles for TPUs and GPUs without having them. The programs are read, not run.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from adamax_jax._lab.command import Command, is_installed, table, versions
from adamax_jax._lab.contenders import HALF, OPTIMIZERS, REFERENCE, optax_step

# A matrix that does not fit on the chip, where compilers keep smaller arrays.
MATRIX = (2**14, 2**13)

# Modules that compile, and the packages that have them. The last has ptxas.
TPU = {"libtpu": "libtpu"}
CUDA = {
    "jax_plugins.xla_cuda13": "jax[cuda13-local]",
    "jax_cuda13_plugin": "jax[cuda13-local]",
    "nvidia.cu13.bin": "nvidia-cuda-nvcc",
}
VERSIONS = ("adamax_jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
VERSIONS += ("nvidia-cuda-nvcc",)
# Without a TPU, libtpu must not ask the cloud which TPU this machine is, nor wait for
# another process, and needs a host and a type to report.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
# NVIDIA's H100 SXM as its driver describes it.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  threads_per_core_limit: 2048
  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  clock_rate_ghz: 1.98  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
"""
# The topologies of four devices that are compiled for.
TARGETS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
    "h100": "1x1x4",
}


def needs(targets: Iterable[str]) -> dict[str, str]:
    """The modules that compile for some devices, with the packages that have them."""
    needed = [CUDA if target == "h100" else TPU for target in targets]
    return {module: package for each in needed for module, package in each.items()}


def missing(targets: Iterable[str]) -> list[str]:
    """The modules that compile for some devices and are not installed."""
    return [module for module in needs(targets) if not is_installed(module)]


def devices(target: str) -> list[Any]:
    """At least four devices of a kind, to compile for.

    JAX is left on the CPU, unless it was told where to run: it would try the plugins of
    the devices that are not there.
    """
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    name, platform, options = TARGETS[target], "tpu", {}
    if target == "h100":
        platform, options = "cuda", {"topology": name, "target_config": _H100}
    topology = topologies.get_topology_desc(name, platform, **options)
    return list(topology.devices)


def contenders() -> Mapping[str, tuple[optax.GradientTransformation, Any]]:
    """The optimizers, with the dtype of the parameters and gradients of each."""
    half = HALF | {
        f"bfloat16: {name}": OPTIMIZERS[name]
        for name in ("adamax bfloat16/bfloat16", "adamax int8/uint8")
    }
    in_float32 = {name: (each, jnp.float32) for name, each in OPTIMIZERS.items()}
    return in_float32 | {name: (each, jnp.bfloat16) for name, each in half.items()}


def reference_of(name: str) -> str:
    """The row that another one is compared to: that of parameters in its dtype."""
    start, colon, _ = name.rpartition(": ")
    return start + colon + REFERENCE


def compile_step(
    optimizer: optax.GradientTransformation, params: Any, state: Any
) -> Any:
    """Compiles a step for the devices of the parameters and the state, as shapes."""
    step = jax.jit(
        optax_step(optimizer),
        donate_argnums=(0, 1),
        out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)),
    )
    return step.lower(params, state, params).compile()


def on_device(target: str, tree: Any) -> Any:
    """The shapes of a tree, on one device of a kind."""
    sharding = SingleDeviceSharding(devices(target)[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def ideal_bytes(params: Any, state: Any) -> int:
    """The fewest bytes that a step can move, but for scalars.

    It reads the gradient once, and reads and writes the parameters and the state once.
    """
    return 3 * _bytes_of_arrays(params) + 2 * _bytes_of_arrays(state)


def _bytes_of_arrays(tree):
    leaves = jax.tree.leaves(tree)
    return sum(x.size * x.dtype.itemsize for x in leaves if x.size > 1)


# An instruction of a compiled program: its name, the shape of the result, the opcode
# and the operands, as in
#   %new = (f32[100]{0}, s8[100]{0}) fusion(%p, %m), kind=kLoop, calls=%fused
_INSTRUCTION = re.compile(r"%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*?)\)")
# The bits of a number and the sizes of an array: of s8[100,7] 8 and 100,7. A scalar,
# f32[], has no sizes and is not found.
_ARRAY = re.compile(r"[a-z]+(\d*)\w*\[([\d,]+)\]")
# Instructions that name an array or copy it to the chip, beside the kernels.
_NO_KERNEL = re.compile("parameter|constant|(get-)?tuple(-element)?|bitcast|copy-.*")
# Instructions, also within kernels, that may read only a part of their operands.
_UNKNOWN = re.compile(
    r" (call|while|conditional|custom-call|gather|scatter|slice|dynamic-\w*-?slice)\("
)


def bytes_of_kernels(text: str) -> list[int]:
    """The bytes that each kernel of a compiled program moves in the device's memory.

    A kernel reads each operand and writes each result once. JAX's ``cost_analysis``
    has these bytes for TPUs, but not for GPUs: they are read from
    ``executable.as_text()``.

    Raises:
      ValueError: If an instruction may read only a part of its operands.
    """
    if unknown := _UNKNOWN.search(text):
        raise ValueError(f"It is not known how many bytes a {unknown[1]} moves.")
    sizes: dict[str, int] = {}
    kernels = []
    for name, shape, opcode, operands in _INSTRUCTION.findall(
        text.split("\nENTRY ")[1]
    ):
        sizes[name] = sum(
            math.prod(map(int, dims.split(","))) * int(bits or 8) // 8
            for bits, dims in _ARRAY.findall(shape)
        )
        inputs = set(re.findall(r"%([\w.-]+)", operands))
        moved = sizes[name] + sum(sizes[operand] for operand in inputs)
        # Instructions on scalars take no kernel of their own.
        if moved and not _NO_KERNEL.fullmatch(opcode):
            kernels.append(moved)
    return kernels


@dataclass
class CompiledRow:
    """What a step of one contender moves on one kind of device."""

    device: str
    contender: str
    kernels: int
    moved_bytes_per_parameter: float
    # Its bytes relative to those of optax.adamax on the same parameters.
    ratio: float
    # Its bytes relative to the fewest possible.
    ratio_to_ideal: float
    temporary_bytes_per_parameter: float


def measure(targets: Sequence[str]) -> Iterator[CompiledRow]:
    """Compiles for one device and contender after the other."""
    parameters = math.prod(MATRIX)
    for target in targets:
        moved: dict[str, int] = {}
        for name, (optimizer, dtype) in contenders().items():
            try:
                params = jax.ShapeDtypeStruct(MATRIX, dtype)
                state = jax.eval_shape(optimizer.init, params)
                params, state = on_device(target, (params, state))
                executable = compile_step(optimizer, params, state)
                kernels = bytes_of_kernels(executable.as_text())
            except Exception as error:
                if name == reference_of(name):
                    raise
                # XLA's messages go on with its own stack.
                why = str(error).partition("\n")[0]
                print(f"left out: {target}, {name}: {why}", file=sys.stderr)
                continue
            moved[name] = sum(kernels)
            temporary = executable.memory_analysis().temp_size_in_bytes
            yield CompiledRow(
                device=target,
                contender=name,
                kernels=len(kernels),
                moved_bytes_per_parameter=moved[name] / parameters,
                ratio=moved[name] / moved[reference_of(name)],
                ratio_to_ideal=moved[name] / ideal_bytes(params, state),
                temporary_bytes_per_parameter=temporary / parameters,
            )


def _text(rows: Sequence[CompiledRow], options: argparse.Namespace) -> str:
    columns = ["compiled for", "optimizer", "kernels", "bytes moved per parameter"]
    columns += ["/ optax.adamax", "/ ideal", "temporary, bytes per parameter"]
    cells = [
        [
            row.device,
            row.contender,
            str(row.kernels),
            f"{row.moved_bytes_per_parameter:.2f}",
            f"{row.ratio:.2f}",
            f"{row.ratio_to_ideal:.2f}",
            f"{row.temporary_bytes_per_parameter:.2f}",
        ]
        for row in rows
    ]
    settings = _settings(options)
    listed = ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
    return table(columns, cells) + (
        f"\n\nCompiled, not run: nothing here is a time. A step on {MATRIX[0]} x "
        f"{MATRIX[1]} parameters, in float32 with such gradients, or "
        "in bfloat16 where a row begins with it. Ideal is to read the gradient once, "
        "and to read and write parameters and state once; optax.adamax is that of the "
        f"same parameters. {listed}; {settings['command']}.\n"
    )


def _settings(options):
    return {
        "compiled_not_run": True,
        "versions": versions(*VERSIONS),
        "shape": MATRIX,
        "command": f"python -m adamax_jax bench --for {','.join(options.targets)}",
    }


COMMAND = Command(
    name="bench",
    needs=lambda options: needs(options.targets),
    extra="aot",
    total=lambda options: len(options.targets) * len(contenders()),
    results=lambda options: measure(options.targets),
    describe=lambda row: f"{row.device}, {row.contender}",
    text=_text,
    numbers=lambda rows, options: (
        _settings(options) | {"rows": [asdict(row) for row in rows]}
    ),
    problem=lambda options: (
        "--max-size and --repetitions are for times, and --for measures none."
        if options.max_size or options.repetitions
        else None
    ),
)
