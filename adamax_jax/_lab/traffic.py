"""What a compiled step moves: its kernels, their bytes in device memory, collectives.

It is read from the optimized HLO, the program as the compiler leaves it: every
instruction there that works on arrays is a kernel, and reads its operands and writes
its results once. ``cost_analysis`` would also count what stays on the chip. Single
numbers, as the step count, are left out: they are neither kernels nor bytes here. What
is not known here is an error.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# Bytes of one number.
BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
BYTES |= {f"{kind}{8 * n}": n for kind in "su" for n in (1, 2, 4, 8)}
BYTES |= {f"f{8 * n}": n for n in (2, 4, 8)}
BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1, "token": 0}
# Memory spaces: 0 is that of the device. On a TPU's chip are 1 the vector memory, 2
# what its parts signal each other with, 3 the common memory and 6 the scalar memory.
DEVICE, ON_CHIP = 0, (1, 2, 3, 6)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Only another name for what is there, or no work at all.
FREE = _words(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id "
    "replica-id copy-done slice-done async-update async-done"
)
# The custom calls of that kind: slices brought to the chip side by side are an array.
FREE_CUSTOM_CALLS = ("ConcatBitcast",)
# Copies that run beside the others. Of their result, which is also what they read and a
# signal, the place of what they write.
COPIES = {"copy-start": 0, "slice-start": 1}
# Read all of their operands and write all of their results.
KERNELS = _words(
    "fusion copy reduce broadcast iota transpose reshape concatenate pad reverse "
    "abs add and atan2 bitcast-convert cbrt ceil clamp compare complex convert cosine "
    "count-leading-zeros divide erf exponential exponential-minus-one floor imag "
    "is-finite log log-plus-one logistic maximum minimum multiply negate not or popcnt "
    "power real reduce-precision remainder round-nearest-afz round-nearest-even rsqrt "
    "select shift-left shift-right-arithmetic shift-right-logical sign sine sqrt "
    "subtract tan tanh xor"
)
# Read as much of their first operand as they write.
SLICES = _words("slice dynamic-slice slice-start")
# What is known of a kernel's operands does not tell what a fusion with these reads.
NOT_IN_A_FUSION = _words(
    "dynamic-update-slice gather scatter while conditional call custom-call"
)
COLLECTIVES = _words(
    "all-gather all-reduce all-to-all collective-permute reduce-scatter"
)


@dataclass(frozen=True)
class Traffic:
    """What one device does in one step."""

    # Instructions on arrays, but for collectives and copies that run beside the others.
    kernels: int
    # In device memory, with what layouts pad.
    read_bytes: int
    written_bytes: int
    # The larger of operands and results, by the collective's name.
    collectives: Mapping[str, int]

    @property
    def moved_bytes(self) -> int:
        """What is read and what is written."""
        return self.read_bytes + self.written_bytes


def traffic(executable: Any) -> Traffic:
    """What a compiled function moves."""
    return traffic_of_text(executable.as_text())


def traffic_of_text(text: str) -> Traffic:
    """What a program in optimized HLO moves."""
    computations, entry = parse(text)
    count = _Count(computations)
    count.add(entry)
    return Traffic(count.kernels, count.read, count.written, dict(count.collectives))


class Array(NamedTuple):
    """An array, with its layout."""

    dtype: str
    dims: tuple[int, ...]
    # As "{1,0:T(8,128)}" has it: from minor to major, and how tiles lie in tiles.
    order: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = DEVICE

    @property
    def is_number(self) -> bool:
        """Whether it has no more than one element."""
        return math.prod(self.dims) <= 1

    @property
    def bytes(self) -> int:
        """Those it takes, with what its layout pads."""
        dims = [self.dims[axis] for axis in reversed(self.order)]
        for tile in self.tiles:
            # Each tile divides the last dimensions, those inside of the tile before.
            dims = [1] * (len(tile) - len(dims)) + dims
            inner = dims[len(dims) - len(tile) :]
            parts = [-(-n // t) for n, t in zip(inner, tile, strict=True)]
            dims = dims[: len(dims) - len(tile)] + parts + list(tile)
        return math.prod(dims) * BYTES[self.dtype]


Shape = Array | tuple["Shape", ...]


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: Shape
    opcode: str
    # By their names.
    operands: tuple[str, ...]
    # The computation that it runs or, in a fusion, consists of.
    calls: str | None
    # Of a parameter, which one of the computation's it is.
    parameter: int | None
    # Of a custom call, what is called.
    target: str | None


Computation = dict[str, Instruction]


def arrays_of(shape: Shape) -> Iterator[Array]:
    """The arrays in a shape that are more than a number."""
    if isinstance(shape, Array):
        if not shape.is_number:
            yield shape
        return
    for part in shape:
        yield from arrays_of(part)


class _Count:
    """Goes through the instructions, and through what they call."""

    def __init__(self, computations: Mapping[str, Computation]):
        self._computations = computations
        self.kernels = self.read = self.written = 0
        self.collectives = collections.Counter()

    def add(self, computation: Computation) -> None:
        """Counts what a computation does."""
        for instruction in computation.values():
            self._add_instruction(instruction, computation)

    def _add_instruction(self, instruction, computation):
        opcode = instruction.opcode
        base = opcode.removesuffix("-start").removesuffix("-done")
        operands = _operands(instruction, computation)
        if opcode in ("call", "async-start"):
            self.add(self._computations[instruction.calls])
        elif opcode in FREE or instruction.target in FREE_CUSTOM_CALLS:
            return
        elif base in COLLECTIVES:
            self._add_collective(base, instruction, computation)
        elif not any(map(list, map(arrays_of, (instruction.shape, *operands)))):
            return
        elif opcode in COPIES:
            self.read += self._bytes_read(instruction, computation)
            self.written += _device_bytes(_written(instruction))
        elif opcode in KERNELS or opcode in SLICES:
            self.kernels += 1
            self.read += self._bytes_read(instruction, computation)
            self.written += _device_bytes(instruction.shape)
        else:
            raise _unknown(instruction)

    def _bytes_read(self, instruction, computation):
        """Those of an operand that is used several times are read once."""
        parts = self._parts_read(instruction)
        read = collections.Counter()
        for i, name in enumerate(instruction.operands):
            origin = _origin(name, computation)
            whole = _device_bytes(computation[origin].shape)
            part = _all_bytes(parts[i]) if i in parts else whole
            read[origin] = min(whole, read[origin] + part)
        return read.total()

    def _parts_read(self, instruction):
        """Of operands that are not read in whole, what is read, by their place."""
        if instruction.opcode in SLICES:
            return {0: _written(instruction)}
        if instruction.opcode != "fusion":
            return {}
        fused = self._computations[instruction.calls]
        self._check_fused(fused)
        parts = {}
        for parameter in fused.values():
            uses = [i for i in fused.values() if parameter.name in i.operands]
            if parameter.opcode == "parameter" and all(map(_is_slice, uses)):
                parts[parameter.parameter] = tuple(use.shape for use in uses)
        return parts

    def _check_fused(self, fused):
        """Refuses what may read a part of an operand unseen."""
        for instruction in fused.values():
            if instruction.opcode == "fusion":
                self._check_fused(self._computations[instruction.calls])
            elif (
                instruction.opcode in NOT_IN_A_FUSION
                or instruction.opcode in COLLECTIVES
                or (
                    instruction.opcode in SLICES
                    and fused[instruction.operands[0]].opcode != "parameter"
                )
            ):
                raise _unknown(instruction)

    def _add_collective(self, base, instruction, computation):
        if instruction.opcode.endswith("-start"):
            # It is counted where its result is.
            return
        start = instruction
        if instruction.opcode.endswith("-done"):
            (start,) = (computation[name] for name in instruction.operands)
        operands = _operands(start, computation)
        size = max(_all_bytes(operands), _all_bytes(instruction.shape))
        self.collectives[base] += size


def _operands(instruction, computation):
    """The shapes of the operands."""
    return tuple(computation[name].shape for name in instruction.operands)


def _written(instruction):
    """The part of its result that an instruction writes."""
    if instruction.opcode in COPIES:
        return instruction.shape[COPIES[instruction.opcode]]
    return instruction.shape


def _is_slice(instruction):
    return instruction.opcode in SLICES


def _origin(name, computation):
    """The operand itself, where a bitcast only gives it another shape."""
    while computation[name].opcode == "bitcast":
        (name,) = computation[name].operands
    return name


def _device_bytes(shape):
    for array in arrays_of(shape):
        if array.space != DEVICE and array.space not in ON_CHIP:
            raise ValueError(f"The memory space S({array.space}) is not known here.")
    return sum(array.bytes for array in arrays_of(shape) if array.space == DEVICE)


def _all_bytes(shape):
    return sum(array.bytes for array in arrays_of(shape))


def _unknown(instruction):
    return ValueError(
        f"What the instruction {instruction.opcode} moves is not known here: "
        f"%{instruction.name}."
    )


_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_LINE = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*)")
_OPCODE = re.compile(r"\s*([\w-]+)\(")
_CALLS = re.compile(r"\b(?:calls|to_apply)=%([\w.-]+)")
_TARGET = re.compile(r'\bcustom_call_target="([^"]*)"')
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_LAYOUT = re.compile(r"([\d,]*)(?::(?:T((?:\([\d,]*\))+))?(?:S\((\d+)\))?)?")


def parse(text: str) -> tuple[dict[str, Computation], Computation]:
    """All computations by their names, and that with which the program begins."""
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.fullmatch(line):
                current = computations[head[2]] = {}
                entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            instruction = _instruction(_COMMENT.sub("", line))
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("The text is no HLO: no computation begins with ENTRY.")
    return computations, entry


def _instruction(line):
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError(f"No instruction of HLO: {line.strip()}")
    name, rest = match.groups()
    shape, rest = _shape(rest)
    opcode = _OPCODE.match(rest)
    if opcode is None:
        raise ValueError(f"No instruction of HLO: {line.strip()}")
    inside, attributes = _in_parentheses(rest[opcode.end() - 1 :])
    operands = re.findall(r"%([\w.-]+)", inside)
    calls = _CALLS.search(attributes)
    target = _TARGET.search(attributes)
    return Instruction(
        name,
        shape,
        opcode[1],
        tuple(operands),
        calls=calls[1] if calls else None,
        parameter=int(inside) if opcode[1] == "parameter" else None,
        target=target[1] if target else None,
    )


def _shape(text) -> tuple[Shape, str]:
    """The shape that a text begins with, and the rest of the text."""
    if not text.startswith("("):
        match = _ARRAY.match(text)
        if match is None:
            raise ValueError(f"No shape of HLO: {text}")
        return _array(*match.groups()), text[match.end() :]
    inside, rest = _in_parentheses(text)
    parts: list[Shape] = []
    while inside:
        part, inside = _shape(inside)
        parts.append(part)
        inside = inside.removeprefix(",").lstrip()
    return tuple(parts), rest


def _array(dtype, dims, layout):
    if dtype not in BYTES:
        raise ValueError(f"The dtype {dtype} is not known here.")
    dims = _numbers(dims)
    match = _LAYOUT.fullmatch(layout or "")
    if match is None:
        raise ValueError(f"The layout {{{layout}}} is not known here.")
    order, tiles, space = match.groups()
    return Array(
        dtype,
        dims,
        _numbers(order) or tuple(reversed(range(len(dims)))),
        tuple(map(_numbers, re.findall(r"\(([\d,]*)\)", tiles or ""))),
        int(space or DEVICE),
    )


def _numbers(text) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _in_parentheses(text: str) -> tuple[str, str]:
    """What is between the first parenthesis and its partner, and what follows."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[1:i], text[i + 1 :]
    raise ValueError(f"A parenthesis is not closed: {text}")
