"""HLO, the language of XLA's compilers, as far as a count of bytes needs to read it."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Bytes of one number.
BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}
BYTES |= {f"{kind}{8 * n}": n for kind in "su" for n in (1, 2, 4, 8)}
BYTES |= {f"f{8 * n}": n for n in (2, 4, 8)}
BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1, "token": 0}
# The memory space of the device; others are on its chip, or the host's.
DEVICE = 0


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
