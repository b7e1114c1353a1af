"""``bench --for DEVICES``: what a step moves on devices that are not there.

JAX compiles for TPUs and GPUs without having them. The programs are read, not run:
kernels, the bytes that they move in device memory, temporary memory, collectives.
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from adamax_jax._lab.command import Command, table
from adamax_jax._lab.contenders import HALF, OPTIMIZERS, REFERENCE, optax_step
from adamax_jax._lab.scale import AXIS, Divided, ideal_bytes, sharded
from adamax_jax._lab.shapes import Shape

# One array that does not fit on the chip, where compilers keep smaller ones.
MATRIX = {"matrix": (2**14, 2**13)}

# Modules that compile, and the packages that have them. The last is ptxas' folder.
TPU = {"libtpu": "libtpu"}
CUDA = {
    "jax_plugins.xla_cuda13": "jax[cuda13-local]",
    "jax_cuda13_plugin": "jax[cuda13-local]",
    "nvidia.cu13.bin": "nvidia-cuda-nvcc",
}
VERSIONS = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
# libtpu where there is no TPU: does not ask the cloud which TPU this machine is, does
# not wait for another process, and has a host and a type to report.
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
# The platform and four devices or more on one host.
TARGETS = {
    "v4": ("tpu", "v4:2x2x1"),
    "v5e": ("tpu", "v5e:2x2"),
    "v5p": ("tpu", "v5p:2x2x1"),
    "v6e": ("tpu", "v6e:2x2"),
    "tpu7x": ("tpu", "tpu7x:2x2x1"),
    "h100": ("cuda", "h100"),
}
# jaxlib cannot print the instructions of a TPU7x's SparseCores.
_OPTIONS = {
    "tpu7x": {"xla_tpu_enable_sparse_core_collective_offload_all_gather": False}
}


def needs(targets: Iterable[str]) -> dict[str, str]:
    """The modules that compile for some devices, with the packages that have them."""
    return {
        module: package
        for target in targets
        for module, package in (CUDA if TARGETS[target][0] == "cuda" else TPU).items()
    }


def missing(targets: Iterable[str]) -> list[str]:
    """The modules that compile for some devices and cannot be imported."""
    return [module for module in needs(targets) if not _is_there(module)]


def _is_there(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        # Raised for a package that the module is in.
        return False


def devices(target: str) -> list[Any]:
    """At least four devices of a kind, to compile for.

    JAX is left on the CPU, unless it was told where to run: it would try the plugins of
    the devices that are not there.

    Raises:
      ImportError: If what compiles for the device is not installed.
    """
    if absent := missing([target]):
        raise ImportError(
            f"To compile for {target}, {', '.join(absent)} must be there to import: "
            "pip install 'adamax_jax[aot]'"
        )
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    platform, topology = TARGETS[target]
    options = {"topology": "1x1x4", "target_config": _H100} if target == "h100" else {}
    description = topologies.get_topology_desc(topology, platform, **options)
    return list(description.devices)


class Contender(NamedTuple):
    """An optimizer and what it works on; several devices are for the tests."""

    optimizer: optax.GradientTransformation
    # The dtype of parameters and gradients.
    dtype: Any = jnp.float32
    devices: int = 1
    divided: Divided = "ZeRO-1"


def contenders() -> dict[str, Contender]:
    """The rows of the table; "bfloat16: " begins those of bfloat16 parameters."""
    half = HALF | {
        f"bfloat16: {name}": OPTIMIZERS[name]
        for name in ("adamax bfloat16/bfloat16", "adamax int8/uint8")
    }
    return {name: Contender(optimizer) for name, optimizer in OPTIMIZERS.items()} | {
        name: Contender(optimizer, jnp.bfloat16) for name, optimizer in half.items()
    }


def reference_of(name: str) -> str:
    """The row that another one is compared to."""
    start, colon, _ = name.rpartition(": ")
    return start + colon + REFERENCE


def compile_step(
    contender: Contender, target: str, arrays: Mapping[str, Shape] = MATRIX
) -> tuple[Any, int]:
    """Compiles a step; returns it and the fewest bytes that it can move."""
    mesh = Mesh(
        np.array(devices(target)[: contender.devices]),
        (AXIS,),
        axis_types=(AxisType.Auto,),
    )
    optimizer, dtype, count, divided = contender
    params, state = trees = sharded(optimizer, arrays, dtype, mesh, divided)
    step = jax.jit(
        optax_step(optimizer),
        donate_argnums=(0, 1),
        out_shardings=jax.tree.map(lambda x: x.sharding, trees),
    )
    executable = step.lower(*trees, params).compile(_OPTIONS.get(target, {}))
    return executable, ideal_bytes(params, state, divided, count)


# An instruction of optimized HLO, the text of a compiled program: the name, the shape,
# the opcode and the rest, which names operands and the computation that it calls.
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*?[\]})]) ([a-z][\w-]*)\((.*)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.M | re.S)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAMES = re.compile(r"%([\w.-]+)")
_ATTRIBUTES = re.compile(r"(?:calls|to_apply|control-predecessors)=(?:\{[^}]*\}|\S+)")
# Another name for an array that exists, or no work on arrays.
_FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id"
    "|replica-id|.*-done|async-update"
)
# Copies to and from the chip, which run beside the kernels.
_COPY = re.compile("copy-start|slice-start")
_COLLECTIVE = re.compile(
    "(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    "(-start|-done)?"
)
_CALLED = re.compile(r"(?:calls|to_apply)=%([\w.-]+)")
# Instructions that may read a part of an operand: the bytes are not known here.
_PARTS = re.compile(
    r" (?:slice|slice-start|dynamic-slice|dynamic-update-slice|gather|scatter"
    r"|while|conditional|custom-call)\("
)


class Kernel(NamedTuple):
    """An instruction on arrays. It reads each operand and writes each result once."""

    opcode: str
    # NaN where the kernel may read a part of an operand.
    read_bytes: float
    written_bytes: int


class Program(NamedTuple):
    """What a compiled program does in one step on one device."""

    kernels: list[Kernel]
    copies: list[Kernel]
    # The bytes of the results of each kind of collective.
    collectives: dict[str, int]

    @property
    def moved_bytes(self) -> float:
        """The bytes that are read and written in device memory; NaN: unknown."""
        moves = self.kernels + self.copies
        return sum(move.read_bytes + move.written_bytes for move in moves)


def read(text: str) -> Program:
    """Reads a compiled program: ``executable.as_text()``."""
    computations = dict(_COMPUTATION.findall(re.sub(r"/\*.*?\*/", "", text)))
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.M)
    if entry is None:
        raise ValueError("The text is not HLO: no computation begins with ENTRY.")
    program = Program([], [], {})
    _add(entry[1], computations, program)
    return program


def _add(name, computations, program):
    """Adds the instructions of a computation, and of those that it calls."""
    shapes, origins = {}, {}
    for line in computations[name].splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            raise ValueError(f"Not an instruction of HLO: {line.strip()}")
        result, shape, opcode, rest = match.groups()
        shapes[result] = shape
        operands = [n for n in _NAMES.findall(_ATTRIBUTES.sub("", rest)) if n in shapes]
        # A bitcast gives an array another shape: both are one array.
        origins[result] = origins[operands[0]] if opcode == "bitcast" else result
        if opcode == "call":
            _add(_CALLED.findall(rest)[0], computations, program)
        elif collective := _COLLECTIVE.fullmatch(opcode):
            # A pair of start and done is counted where the result is.
            kind, end = collective.groups()
            size = 0 if end == "-start" else sum(_sizes(shape))
            program.collectives[kind] = program.collectives.get(kind, 0) + size
        elif _FREE.fullmatch(opcode) or not any(
            # Single numbers, as the step count, take no kernel of their own.
            _sizes(shapes[n])
            for n in [result, *operands]
        ):
            continue
        else:
            reads = {origins[n]: _bytes(shapes[origins[n]]) for n in operands}
            in_part = _PARTS.search(_with_fused(line, computations))
            read = math.nan if in_part else sum(reads.values())
            is_copy = _COPY.fullmatch(opcode)
            # The result of a copy names what it writes and what it reads.
            written = _bytes(next(_ARRAY.finditer(shape))[0] if is_copy else shape)
            moves = program.copies if is_copy else program.kernels
            moves.append(Kernel(opcode, read, written))


def _with_fused(text, computations):
    """An instruction with the computations that are fused in it."""
    called = [computations[name] for name in _CALLED.findall(text)]
    return "\n".join([text, *(_with_fused(each, computations) for each in called)])


def _sizes(shape, on_chip=True):
    """The bytes of the arrays in a shape, without scalars.

    Arrays in other memory spaces than that of the device, 0, are on the chip.
    """
    return [
        math.prod(sizes) * _itemsize(dtype)
        for dtype, dims, layout in _ARRAY.findall(shape)
        if (sizes := [int(n) for n in dims.split(",") if n]) and math.prod(sizes) > 1
        if on_chip or "S(" not in layout
    ]


def _bytes(shape):
    return sum(_sizes(shape, on_chip=False))


def _itemsize(dtype):
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


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
    parameters = sum(map(math.prod, MATRIX.values()))
    for target in targets:
        moved: dict[str, float] = {}
        for name, contender in contenders().items():
            try:
                executable, ideal = compile_step(contender, target)
            except Exception as error:
                if name == reference_of(name):
                    raise
                # XLA's messages go on with its own stack.
                why = str(error).partition("\n")[0]
                print(f"left out: {target}, {name}: {why}", file=sys.stderr)
                continue
            program = read(executable.as_text())
            moved[name] = program.moved_bytes
            temporary = executable.memory_analysis().temp_size_in_bytes
            yield CompiledRow(
                device=target,
                contender=name,
                kernels=len(program.kernels),
                moved_bytes_per_parameter=moved[name] / parameters,
                ratio=moved[name] / moved[reference_of(name)],
                ratio_to_ideal=moved[name] / ideal,
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
    (shape,) = settings["arrays"].values()
    versions = ", ".join(f"{k} {v}" for k, v in settings["versions"].items())
    return table(columns, cells) + (
        "\n\nCompiled, not run: nothing here is a time. A step on one array of "
        f"{' x '.join(map(str, shape))} parameters, in float32 with such gradients, or "
        "in bfloat16 where a row begins with it. Ideal is to read the gradient once, "
        "and to read and write parameters and state once; optax.adamax is that of the "
        f"same parameters. {versions}; {settings['command']}.\n"
    )


def _settings(options):
    return {
        "compiled_not_run": True,
        "versions": {p: v for p in ("adamax_jax", *VERSIONS) if (v := _version(p))},
        "arrays": {name: list(shape) for name, shape in MATRIX.items()},
        "command": f"python -m adamax_jax bench --for {','.join(options.targets)}",
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _problem(options):
    given = {
        "--figure": options.figure,
        "--max-size": options.max_size,
        "--repetitions": options.repetitions,
    }
    for name, value in given.items():
        if value is not None:
            return f"{name} is for times, and --for measures none: leave one out."
    return None


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
    problem=_problem,
)
