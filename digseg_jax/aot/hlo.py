# SPDX-License-Identifier: Apache-2.0
"""Parser of a compiled program's text (optimized HLO): its operations, collectives, large buffers.

Everything is per device. A loop's body counts as often as it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# bytes per element
BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Operations without a buffer of their own, and those that move no data themselves.
_VIEWS = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all"}
NO_TRAFFIC = _VIEWS | {"while", "conditional", "call", "partition-id", "replica-id"}
# bf16[8,64]{1,0:T(8,128)S(1)}: type, dimensions, layout (minor to major), tiles and memory space
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CHAIN = re.compile(r"channel_id=(\d+),.*\bchain_id=\"(\d+)\"")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type, dimensions and tiled layout, as the text states them."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0  # memory space; 0 is the device's main memory

    @property
    def bytes(self) -> float:
        """Bytes without padding."""
        return math.prod(self.dims) * BYTES.get(self.dtype, 0)

    @property
    def padded_bytes(self) -> float:
        """Bytes with the minor dimensions rounded up to whole tiles, as TPUs store them."""
        dims = list(self.dims)
        for size, axis in zip(reversed(self.tile), self.minor_to_major, strict=False):
            dims[axis] = -(-dims[axis] // size) * size
        return math.prod(dims) * BYTES.get(self.dtype, 0)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: results (several for a tuple), operation, names of operands and called computations."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    text: str
    root: bool

    @property
    def op_name(self) -> str:
        """Its place in the JAX program."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
    """Computations by name, and the name of the entry computation."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    @functools.cached_property
    def named(self) -> dict[str, dict[str, Instruction]]:
        """Instructions by computation and name, for looking up operands."""
        return {where: {i.name: i for i in body} for where, body in self.computations.items()}


def parse(text: str) -> Module:
    """Parses the text of a compiled program.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name = "", ""
    lines: list[str] = []

    for line in text.splitlines():
        # a computation: header, instructions, closing brace
        header = re.match(r"^(ENTRY )?%([\w.\-]+) \(.*\{\s*$", line)
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line == "}" and name:
            computations[name], name = tuple(filter(None, map(_instruction, lines))), ""
        elif name and _INSTRUCTION.match(line):
            lines.append(line)
        elif name and lines:  # line breaks inside a kernel's metadata
            lines[-1] += line

    if not entry:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    """Parses one line; None if it is not an instruction."""
    head = _INSTRUCTION.match(line)
    if not head:
        return None

    # Result type, which may be a tuple with spaces inside, then the operation.
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:end], rest[end:]
    opcode = _OPCODE.match(rest)
    if not opcode:
        return None

    # Operands are in the parentheses, called computations among the attributes behind them.
    start = opcode.end() - 1
    inner = rest[start : start + _closing(rest[start:])]
    calls = [name for group in _CALLS.findall(rest) for name in _NAMES.findall(group)]

    return Instruction(
        head[2],
        tuple(_shape(m) for m in _ARRAY.finditer(types)),
        opcode[1],
        tuple(_NAMES.findall(inner)),
        tuple(calls),
        rest,
        bool(head[1]),
    )


def _closing(text: str) -> int:
    """Index after the parenthesis that closes the first one."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _shape(found: re.Match[str]) -> Shape:
    """A shape from a match of _ARRAY."""
    dims = tuple(int(d) for d in found[2].split(",") if d)
    order = tuple(int(d) for d in (found[3] or "").split(",") if d)
    layout = found[4] or ""
    tile = re.search(r"T\(([\d,]*)\)", layout)
    space = re.search(r"S\((\d+)\)", layout)
    return Shape(
        found[1],
        dims,
        order,
        tuple(int(d) for d in tile[1].split(",") if d) if tile else (),
        int(space[1]) if space else 0,
    )


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a `while` runs: XLA's own count, else the bound in its condition; 1 if unknown."""
    said = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text)
    if said:
        return int(said[1])

    # Loops of JAX count from 0 up to a constant; the largest one in the condition is the bound.
    condition = re.search(r"condition=%([\w.\-]+)", loop.text)
    bounds = [
        int(found[1])
        for instruction in (module.computations[condition[1]] if condition else ())
        if instruction.opcode == "constant"
        and (found := re.match(r"\s*constant\((\d+)\)", instruction.text))
    ]
    return max(bounds, default=1)


def walk(module: Module, *, fusions: bool) -> Iterator[tuple[Instruction, int, str]]:
    """All instructions that run: (instruction, how often it runs, its computation), from the entry on.

    fusions: also enter fused computations, whose intermediate results are no buffers.
    """
    stack = [(module.entry, 1)]
    while stack:
        name, times = stack.pop()
        for instruction in module.computations.get(name, ()):
            yield instruction, times, name
            if instruction.opcode == "fusion" and not fusions:
                continue
            if instruction.opcode in COLLECTIVES or instruction.opcode in ("reduce", "scatter", "sort"):
                continue  # their called computation is a scalar operation
            inner = times * (trip_count(module, instruction) if instruction.opcode == "while" else 1)
            stack += [(called, inner) for called in instruction.calls]


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a kind: how many run in a step, and the bytes that a device receives.

    overlapped_bytes: the part received while the device computes; it waits for the rest.
    """

    count: int
    bytes: float
    overlapped_bytes: float = 0.0


def collectives(module: Module, devices: int) -> dict[str, Collective]:
    """Collectives by kind, with the bytes that one device receives.

    In a ring over n devices these are (n-1)/n of the full array, twice that for an all-reduce. XLA's
    fused reduce-scatters, written as all-reduce and slice, count as reduce-scatters.

    A collective that the TPU compiler runs beside other operations is written once for its start, its
    end and every operation between them, with the same channel and chain: it counts once.
    """
    counts: collections.Counter[str] = collections.Counter()
    received: dict[str, float] = collections.defaultdict(float)
    overlapped: dict[str, float] = collections.defaultdict(float)
    chains = set()
    asynchronous = _asynchronous(module)
    for instruction, times, where in walk(module, fusions=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue

        # Parts of an overlapped collective share channel and chain: only the first one counts.
        chain = _CHAIN.search(instruction.text)
        if chain:
            if chain.groups() in chains:
                continue
            chains.add(chain.groups())

        # XLA names the fused computation of a reduce-scatter so; the operation in it is an all-reduce.
        if kind == "all-reduce" and "all-reduce-scatter" in where:
            kind = "reduce-scatter"

        # Chained, split into start and done, or inside an asynchronous
        # computation: all run beside others.
        n = _group_size(instruction, devices)
        counts[kind] += times
        share = times * _received(kind, instruction, module.named[where], n)
        received[kind] += share
        if chain or instruction.opcode.endswith("-start") or where in asynchronous:
            overlapped[kind] += share
    return {k: Collective(counts[k], received[k], overlapped[k]) for k in sorted(counts)}


def _asynchronous(module: Module) -> set[str]:
    """Names of the computations that run beside the operations after their start."""
    every = (i for body in module.computations.values() for i in body)
    return {name for i in every if i.opcode == "async-start" for name in i.calls}


def _received(kind: str, instruction: Instruction, own: dict[str, Instruction], n: int) -> float:
    """Bytes that a device receives in one run of a collective among n devices."""
    inputs = sum(s.bytes for o in instruction.operands if o in own for s in own[o].shapes)
    # An asynchronous start returns its inputs beside its results.
    results = sum(
        s.bytes for s in instruction.shapes if s.dtype != "u32" or kind != "collective-permute"
    )
    if instruction.opcode.endswith("-start") and len(instruction.shapes) > 1:
        results -= inputs

    # The full array is the result of a gather and the input of a scatter.
    whole = max(inputs, results)
    share = (n - 1) / n
    if kind == "all-reduce":
        return 2 * share * inputs
    return inputs if kind == "collective-permute" else share * whole


def _group_size(instruction: Instruction, devices: int) -> int:
    """Number of devices that take part together; all of them if the text does not say."""
    text = instruction.text
    # Three notations: axes of a mesh, listed groups, or [groups,size]<=[...].
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", mesh[2]))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return listed[1].count(",") + 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", text)
    return int(iota[1]) if iota else devices


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Results of one kind: bytes of one as stored, their number, and the operation behind them."""

    bytes: float
    count: int
    shape: str
    opcode: str
    op_name: str


def largest_buffers(module: Module, most: int = 12) -> list[Buffer]:
    """Results in main memory outside of fusions, largest first; equal ones are counted together.

    They need not live at the same time; those of one kind often do, as saved activations.
    """
    groups: collections.Counter[tuple[float, str, str, str]] = collections.Counter()
    for instruction, _, _ in walk(module, fusions=False):
        if instruction.opcode in NO_TRAFFIC or instruction.opcode.endswith(("-start", "-done")):
            continue  # asynchronous copies share buffers with their source
        for shape in instruction.shapes:
            if shape.space == 0 and shape.bytes:
                # by the bytes with padding: that is what the memory pays
                text = f"{shape.dtype}[{','.join(map(str, shape.dims))}]"
                groups[shape.padded_bytes, text, instruction.opcode, instruction.op_name] += 1
    ranked = sorted(groups.items(), key=lambda item: -item[0][0])[:most]
    return [Buffer(size, count, shape, op, name) for (size, shape, op, name), count in ranked]
