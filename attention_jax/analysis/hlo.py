"""Reading the text of a compiled program: what it moves, and what it sends between devices."""

import math
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

# `f32[8,16]{1,0:T(8,128)S(1)}`: type, shape, and layout: axes from minor to major, the tile that
# the last of them are padded to, and the memory, S(0) or nothing for the chip's main one.
_ARRAY = re.compile(r'\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\](?:\{([^{}]*)\})?')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?)(?:(?<=\s)|^)([a-z][\w\-]*)\((.*)')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) .*\{$')
_COLLECTIVES = (
    'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)  # fmt: skip
# Instructions that touch no data, or whose data the instruction before them has counted.
_FREE = (
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id',
    'replica-id', 'while', 'conditional', 'call',
)  # fmt: skip


class Array(NamedTuple):
    """An array in a compiled program."""

    dtype: str  # XLA's name
    shape: tuple[int, ...]  # as the program sees it
    bytes: int  # that it takes, padded to the tiles of its layout
    off_chip: bool  # it lies in the chip's main memory


class Instruction(NamedTuple):
    """An instruction of a compiled program."""

    computation: str  # name of the function it is in; '' for the program itself
    opcode: str  # e.g. 'fusion', 'all-gather-start'
    results: tuple[Array, ...]
    operands: tuple[Array, ...]
    text: str  # what follows the opcode


class Collective(NamedTuple):
    """What chips send to each other at one point of a program."""

    kind: str  # e.g. 'all-gather'
    bytes: int  # of the whole arrays, before they are split or after they are joined
    shapes: tuple[tuple[int, ...], ...]  # of these
    where: str  # the operation of the model that it serves, as JAX names it


def read_program(text: str) -> list[Instruction]:
    """Reads the instructions in `compiled.as_text()`, those of the program's functions included."""
    instructions = []
    computation, known = '', {}
    for line in text.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            header = _COMPUTATION.match(line)
            if header:
                computation, known = '' if header[1] else header[2], {}
            continue
        name, types, opcode, rest = match.groups()
        results = known[name] = _arrays(types)
        names = re.findall(r'%?([\w.\-]+)', rest[: _closing(rest)])
        operands = tuple(array for n in names for array in known.get(n, ()))
        instructions.append(Instruction(computation, opcode, results, operands, rest))
    return instructions


def collectives(instructions: Sequence[Instruction]) -> list[Collective]:
    """Returns what the chips send to each other, each exchange once.

    A TPU's compiler cuts an exchange into pieces that it puts between the computations it runs
    beside; they have one channel.
    """
    found = {}
    for i, instruction in enumerate(instructions):
        kind = instruction.opcode.removesuffix('-start')
        if kind not in _COLLECTIVES:
            continue
        operands, results = instruction.operands, _made(instruction)
        if instruction.computation.startswith('all-reduce-scatter'):
            kind = 'reduce-scatter'
        whole = max(operands, results, key=lambda arrays: sum(a.bytes for a in arrays))
        channel = re.search(r'channel_id=(\d+)', instruction.text)
        where = re.search(r'op_name="([^"]*)"', instruction.text)
        found[kind, channel[1] if channel else f'line {i}'] = Collective(
            kind=kind,
            bytes=math.ceil(sum(math.prod(a.shape) * _itemsize(a.dtype) for a in whole)),
            shapes=tuple(a.shape for a in whole),
            where=where[1] if where else '',
        )
    return list(found.values())


def batch_gathers(
    sent: Sequence[Collective],
    batch: int,
    chips: int,
    *,
    split: Collection[int] = (),
    parameters: Collection[int] = (),
) -> list[str]:
    """Finds what brings examples of other chips to each chip.

    That is an all-gather of anything but a split parameter that is large enough to hold a number of
    each of two chips' examples; and an all-reduce of rows of the whole batch, which is how a gather
    by index may be compiled.

    Args:
        sent: see `collectives`.
        batch: size of the global batch.
        chips: number of chips.
        split: numbers of entries of the parameters that are split over the chips.
        parameters: numbers of entries of all of them: sums of their shapes are gradients.

    Returns:
        A line for each: kind, shape, and the operation it serves.
    """
    lines = []
    for collective in sent:
        for shape in collective.shapes:
            size = math.prod(shape)
            if collective.kind in ('all-gather', 'collective-broadcast'):
                found = size not in split and size >= 2 * batch / chips
            elif collective.kind == 'all-reduce':
                found = len(shape) > 1 and shape[0] == batch and size not in parameters
            else:
                found = False
            if chips > 1 and found:
                lines.append(f'{collective.kind} {list(shape)} in {collective.where}')
    return lines


def bytes_moved(instructions: Sequence[Instruction]) -> tuple[int, int]:
    """Adds up what the kernels read and write, each operand and result once.

    Returns:
        Bytes in all, and of them those in the chip's main memory.
    """
    # What is called from a fusion or a reduction is part of that kernel; loops and branches are
    # programs of their own.
    bodies = {''}
    for i in instructions:
        if i.opcode in ('while', 'conditional', 'call'):
            called = re.findall(r'(?:body|to_apply|\w+_computations?)=\{?%?([\w.\-, %]+)', i.text)
            bodies |= {name.strip(' %') for names in called for name in names.split(',')}
    total = off_chip = 0
    for i in instructions:
        if i.computation not in bodies or i.opcode in _FREE or i.opcode.endswith('-done'):
            continue
        for array in (*_made(i), *i.operands):
            total += array.bytes
            off_chip += array.bytes * array.off_chip
    return total, off_chip


def _made(instruction: Instruction) -> tuple[Array, ...]:
    """The arrays that an instruction makes; the start of one gives its operands back beside."""
    results, n = instruction.results, len(instruction.operands)
    if not instruction.opcode.endswith('-start') or len(results) <= n:
        return results
    return results[:n] if instruction.opcode == 'copy-start' else results[n : 2 * n]


def _arrays(text: str) -> tuple[Array, ...]:
    return tuple(_array(*match.groups()) for match in _ARRAY.finditer(text))


def _array(dtype: str, dims: str, layout: str | None) -> Array:
    shape = tuple(int(n) for n in dims.split(',') if n)
    order, _, rest = (layout or '').partition(':')
    tile = re.match(r'T\(([\d,]+)\)', rest)
    padded = [shape[int(axis)] for axis in order.split(',') if axis and shape]  # minor to major
    for k, n in enumerate(reversed(tile[1].split(',')) if tile else ()):
        if k < len(padded):
            padded[k] = -(-padded[k] // int(n)) * int(n)
    size = math.prod(padded) if len(padded) == len(shape) else math.prod(shape)
    space = re.search(r'S\((\d+)\)', rest)
    return Array(dtype, shape, math.ceil(size * _itemsize(dtype)), not space or space[1] == '0')


def _itemsize(dtype: str) -> float:
    """Bytes of an entry, of XLA's name of a type."""
    if dtype in ('pred', 'bf16'):
        return {'pred': 1, 'bf16': 2}[dtype]
    return int(re.match(r'[a-z](\d+)', dtype)[1]) / 8


def _closing(text: str) -> int:
    """Position of the parenthesis that closes the operands."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == '(') - (character == ')')
        if not depth:
            return i
    return len(text)
