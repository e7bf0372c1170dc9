"""Codes of four parts looked up by AVX-512: sixteen codes a part, in one of 64 tables of sixteen multiples.

A part's six bits c and l say the table, and a code the place in it: code (c + 1) - 10 l (`part_vectors`). A vector of
sixteen float32, or of four times sixteen bytes, is permuted by one instruction, where computing takes ten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types

from flexflow_engine.cpu.vectors import filled, shuffled
from flexflow_plugins.codecs.part_format import GROUP_SIZE, LEAST, LOW_EIGHTHS, NUM_PARTS

_PART = GROUP_SIZE // NUM_PARTS
"""Numbers of a part; a code has as many values."""
_NUM_TABLES = 64
_ALIGNMENT = 64
"""Of the longest vector, in bytes."""
_BYTE, _WORD, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _CODES = ir.VectorType(ir.FloatType(), _PART), ir.VectorType(_WORD, _PART)
_INTEGERS, _PAIRS = ir.VectorType(_BYTE, GROUP_SIZE), ir.VectorType(ir.IntType(16), GROUP_SIZE // 2)
_TABLES = [[code * (bits % 8 + 1) - LOW_EIGHTHS * (bits // 8) for code in range(_PART)] for bits in range(_NUM_TABLES)]


def multiples_looked_up(builder: Any, source: Any, grids: Any) -> Iterator[Any]:
    """The multiples of each part, float32 [16]. source: pointer to the group's 32 bytes. grids: as `decode_group`."""
    kind = ir.FunctionType(_FLOATS, [_FLOATS, _CODES])
    look_up = builder.module.declare_intrinsic("llvm.x86.avx512.permvar.sf.512", [], kind)  # by the four lowest bits
    shifts = ir.Constant(_CODES, [4 * (number % 8) for number in range(_PART)])
    for part, table in enumerate(_tables(builder, grids, _FLOATS, [[float(m) for m in row] for row in _TABLES])):
        place = builder.gep(source, [_LONG(part * _PART // 2)])
        halves = builder.load(builder.bitcast(place, ir.VectorType(_WORD, 2).as_pointer()), align=1)
        eight_times = shuffled(builder, halves, halves, [n // 8 for n in range(_PART)])
        yield builder.call(look_up, [table, builder.lshr(eight_times, shifts)])


def integers_looked_up(builder: Any, source: Any, grids: Any) -> Any:
    """The multiples of all parts less LEAST, uint8 [64]."""
    kind = ir.FunctionType(_INTEGERS, [_INTEGERS, _INTEGERS])
    look_up = builder.module.declare_intrinsic("llvm.x86.avx512.pshuf.b.512", [], kind)  # in each part's own 16 bytes
    tables = _tables(builder, grids, ir.VectorType(_BYTE, _PART), [[m - LEAST for m in row] for row in _TABLES])
    halves = [_joined(builder, *tables[part : part + 2]) for part in (0, 2)]
    packed = builder.load(builder.bitcast(source, ir.VectorType(_BYTE, GROUP_SIZE // 2).as_pointer()), align=1)
    pairs = builder.zext(packed, _PAIRS)
    spread = builder.or_(pairs, builder.shl(pairs, filled(_PAIRS, 4)))
    codes = builder.and_(spread, filled(_PAIRS, 0x0F0F))
    return builder.call(look_up, [_joined(builder, *halves), builder.bitcast(codes, _INTEGERS)])


def _tables(builder: Any, grids: Any, kind: Any, rows: Sequence[Sequence[Any]]) -> list[Any]:
    """The table of each part. rows: all tables, which a module has once, as constant vectors of `kind`."""
    name = f"part_tables.{kind.element}"
    if name not in builder.module.globals:
        tables = ir.GlobalVariable(builder.module, ir.ArrayType(kind, _NUM_TABLES), name)
        tables.linkage, tables.global_constant, tables.align = "internal", True, _ALIGNMENT
        tables.initializer = ir.Constant(tables.value_type, [ir.Constant(kind, list(row)) for row in rows])
    tables = builder.module.globals[name]
    chosen = (builder.and_(builder.lshr(grids, _WORD(6 * part)), _WORD(_NUM_TABLES - 1)) for part in range(NUM_PARTS))
    return [builder.load(builder.gep(tables, [_WORD(0), table])) for table in chosen]


def _joined(builder: Any, a: Any, b: Any) -> Any:
    return shuffled(builder, a, b, range(2 * a.type.count))
