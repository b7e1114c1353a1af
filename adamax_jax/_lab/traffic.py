"""What a compiled step moves: its kernels, their bytes in device memory, collectives.

It is read from the optimized HLO, the program as the compiler leaves it: every
instruction there that works on arrays is a kernel, and reads its operands and writes
its results once. ``cost_analysis`` would also count what stays on the chip. Single
numbers, as the step count, are left out: they are neither kernels nor bytes here. What
is not known here is an error.
"""

import collections
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adamax_jax._lab.hlo import DEVICE, Computation, arrays_of, parse

# Memory spaces: 0 is that of the device. On a TPU's chip are 1 the vector memory, 2
# what its parts signal each other with, 3 the common memory and 6 the scalar memory.
ON_CHIP = (1, 2, 3, 6)


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
