"""Codes of four parts looked up by AVX-512: sixteen codes a part, in one of 64 tables of sixteen multiples.

A part's six bits c and l say the table, and a code the place in it: code (c + 1) - 10 l (`part_vectors`). A vector of
sixteen float32, or of four times sixteen bytes, is permuted by one instruction, where computing takes ten. bfloat16 is
looked up in one of 512 tables, 16 KiB, as a step is one of eight but for powers of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types

from flexflow_engine.cpu.vectors import everywhere, filled, shuffled
from flexflow_plugins.codecs.part_format import FIRST_EXPONENT, GROUP_SIZE, LEAST, LOW_EIGHTHS, MAX_EXPONENT, NUM_PARTS

_PART = GROUP_SIZE // NUM_PARTS
"""Numbers of a part; a code has as many values."""
_NUM_TABLES = 64
_ALIGNMENT = 64
"""Of the longest vector, in bytes."""
_LARGEST_POWER = 2.0 ** ((FIRST_EXPONENT + MAX_EXPONENT) // 8 - 127)
"""Of two, that is not above the largest steps."""
_BYTE, _WORD, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _CODES = ir.VectorType(ir.FloatType(), _PART), ir.VectorType(_WORD, _PART)
_INTEGERS, _PAIRS = ir.VectorType(_BYTE, GROUP_SIZE), ir.VectorType(ir.IntType(16), GROUP_SIZE // 2)
_BFLOATS = ir.VectorType(ir.IntType(16), 2 * _PART)
_TABLES = [[code * (bits % 8 + 1) - LOW_EIGHTHS * (bits // 8) for code in range(_PART)] for bits in range(_NUM_TABLES)]


def multiples_looked_up(builder: Any, source: Any, grids: Any, order: Sequence[int] = range(_PART)) -> Iterator[Any]:
    """The multiples of each part, float32 [16]. source: pointer to the group's 32 bytes. grids: as
    `decode_group_integers` has them. order: which of a part's numbers is at each place.
    """
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _CODES])
    look_up = builder.module.declare_intrinsic("llvm.x86.avx512.permvar.sf.512", [], kind)  # by the four lowest bits
    shifts = ir.Constant(_CODES, [4 * (number % 8) for number in order])
    rows = [[float(m) for m in row] for row in _TABLES]
    for part, table in enumerate(_tables(builder, _FLOATS, rows, _table_numbers(builder, grids))):
        place = builder.gep(source, [_LONG(part * _PART // 2)])
        halves = builder.load(builder.bitcast(place, ir.VectorType(_WORD, 2).as_pointer()), align=1)
        eight_times = shuffled(builder, halves, halves, [number // 8 for number in order])
        yield builder.call(look_up, [table, builder.lshr(eight_times, shifts)])


def bfloats_looked_up(builder: Any, source: Any, grids: Any, exponent: Any) -> Iterator[Any]:
    """The numbers of two parts each, as the bits of bfloat16 [32]. exponent: a step's eight bits, whose three lowest
    and a part's six say which of 512 tables has its numbers, for the largest steps; for others they are powers of two
    smaller.
    """
    kind = ir.FunctionType(_BFLOATS, [_BFLOATS, _BFLOATS])
    look_up = builder.module.declare_intrinsic("llvm.x86.avx512.permvar.hi.512", [], kind)  # by the five lowest bits
    lower = builder.module.declare_intrinsic("llvm.usub.sat.v32i16", [], kind)  # a zero stays one
    eighth = builder.and_(exponent, _WORD(7))
    halvings = builder.sub(_WORD(MAX_EXPONENT // 8), builder.lshr(exponent, _WORD(3)))
    below = everywhere(builder, builder.trunc(builder.shl(halvings, _WORD(7)), ir.IntType(16)), 2 * _PART)
    begin = builder.mul(eighth, _WORD(_NUM_TABLES))
    numbers = [builder.or_(begin, number) for number in _table_numbers(builder, grids)]
    tables = _tables(builder, ir.VectorType(ir.IntType(16), _PART), _bfloat_tables(), numbers)
    twice = [shuffled(builder, table, table, range(2 * _PART)) for table in tables]  # the fifth bit is another code's
    of_second = ir.Constant(ir.VectorType(ir.IntType(1), 2 * _PART), [n >= _PART for n in range(2 * _PART)])
    for half in range(2):
        place = builder.gep(source, [_LONG(half * _PART)])
        packed = builder.load(builder.bitcast(place, ir.VectorType(_BYTE, _PART).as_pointer()), align=1)
        spread = builder.zext(packed, _CODES)
        codes = builder.bitcast(builder.or_(spread, builder.shl(spread, filled(_CODES, 12))), _BFLOATS)
        first, second = (builder.call(look_up, [table, codes]) for table in twice[2 * half : 2 * half + 2])
        yield builder.call(lower, [builder.select(of_second, second, first), below])


def integers_looked_up(builder: Any, source: Any, grids: Any) -> Any:
    """The multiples of all parts less LEAST, uint8 [64]."""
    kind = ir.FunctionType(_INTEGERS, [_INTEGERS, _INTEGERS])
    look_up = builder.module.declare_intrinsic("llvm.x86.avx512.pshuf.b.512", [], kind)  # in each part's own 16 bytes
    rows = [[m - LEAST for m in row] for row in _TABLES]
    tables = _tables(builder, ir.VectorType(_BYTE, _PART), rows, _table_numbers(builder, grids))
    halves = [_joined(builder, *tables[part : part + 2]) for part in (0, 2)]
    packed = builder.load(builder.bitcast(source, ir.VectorType(_BYTE, GROUP_SIZE // 2).as_pointer()), align=1)
    pairs = builder.zext(packed, _PAIRS)
    spread = builder.or_(pairs, builder.shl(pairs, filled(_PAIRS, 4)))
    codes = builder.and_(spread, filled(_PAIRS, 0x0F0F))
    return builder.call(look_up, [_joined(builder, *halves), builder.bitcast(codes, _INTEGERS)])


@cache
def _bfloat_tables() -> list[list[int]]:
    """Of the steps of _LARGEST_POWER and so many eighths of it more, 64 each: bits of the bfloat16 next to a number."""
    eighths, multiples = _LARGEST_POWER / 64 * torch.arange(8, 16), torch.tensor(_TABLES)
    bits = (eighths[:, None, None] * multiples).bfloat16().view(torch.int16).view(-1, _PART)
    return [[number & 0xFFFF for number in row] for row in bits.tolist()]


def _table_numbers(builder: Any, grids: Any) -> list[Any]:
    """What each part's six bits are."""
    return [builder.and_(builder.lshr(grids, _WORD(6 * part)), _WORD(_NUM_TABLES - 1)) for part in range(NUM_PARTS)]


def _tables(builder: Any, kind: Any, rows: Sequence[Sequence[Any]], numbers: Sequence[Any]) -> list[Any]:
    """Tables of these numbers. rows: all tables, which a module has once, as constant vectors of `kind`."""
    name = f"part_tables.{kind.element}"
    if name not in builder.module.globals:
        tables = ir.GlobalVariable(builder.module, ir.ArrayType(kind, len(rows)), name)
        tables.linkage, tables.global_constant, tables.align = "internal", True, _ALIGNMENT
        tables.initializer = ir.Constant(tables.value_type, [ir.Constant(kind, list(row)) for row in rows])
    tables = builder.module.globals[name]
    return [builder.load(builder.gep(tables, [_WORD(0), number])) for number in numbers]


def _joined(builder: Any, a: Any, b: Any) -> Any:
    return shuffled(builder, a, b, range(2 * a.type.count))
