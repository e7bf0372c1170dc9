"""Products of bfloat16 by AVX-512: an instruction multiplies pairs of columns and adds both products to a float32.

A vector's lanes are tokens: 32 bits are two columns of one, and the same two columns of a row are every lane's. Rows
that come next are not asked for: they are decoded first (`bfloats.multiplies_plain`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types

from flexflow_engine.cpu.vectors import BFloat, at, everywhere, filled, repeated
from flexflow_engine.products.bfloat_layout import LINE_COLUMNS, LINE_NBYTES, LINES, TILE_NBYTES, Places

_ROWS = 8
"""Of the matrix, at a time: as many sums of two blocks of tokens as the processor has registers for, with what is
multiplied.
"""
_GROUPS = 2 * LINES // _ROWS
_PAIR_NBYTES = 4
_WORD, _LONG = ir.IntType(32), ir.IntType(64)
_WORDS, _FLOATS = ir.VectorType(_WORD, LINES), ir.VectorType(ir.FloatType(), LINES)
_PAIRS = ir.VectorType(BFloat(), LINE_COLUMNS)


def multiply(builder: Any, places: Places, blocks: int) -> None:
    """So many blocks of tokens, two at most."""
    function = builder.module.declare_intrinsic(
        "llvm.x86.avx512bf16.dpbf16ps.512", [], ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
    )
    steps = builder.udiv(places.columns, _LONG(LINE_COLUMNS))
    tile = [(row, block) for row in range(_ROWS) for block in range(blocks)]

    def group_of_rows(group: Any, _: Sequence[Any]) -> list[Any]:
        first = builder.add(places.rows, builder.mul(places.stride, builder.mul(group, _LONG(_ROWS))))
        rows = [builder.add(first, builder.mul(places.stride, _LONG(row))) for row in range(_ROWS)]

        def add_columns(step: Any, sums: Sequence[Any]) -> list[Any]:
            skipped = builder.mul(step, _LONG(LINE_NBYTES))
            tokens = builder.add(places.tokens, builder.mul(step, _LONG(TILE_NBYTES)))
            for pair in range(LINES):
                vectors = [
                    builder.load(at(builder, builder.add(tokens, _LONG(pair * LINE_NBYTES)), beyond, _PAIRS), align=64)
                    for beyond in (builder.mul(places.block_nbytes, _LONG(block)) for block in range(blocks))
                ]
                place = builder.add(skipped, _LONG(pair * _PAIR_NBYTES))
                numbers = [
                    builder.bitcast(
                        everywhere(builder, builder.load(at(builder, row, place, _WORD), align=2), LINES), _PAIRS
                    )
                    for row in rows
                ]
                sums = [
                    builder.call(function, [total, numbers[row], vectors[block]])
                    for total, (row, block) in zip(sums, tile, strict=True)
                ]
            return list(sums)

        half, low = builder.udiv(group, _LONG(_GROUPS // 2)), builder.urem(group, _LONG(_GROUPS // 2))
        line = builder.add(builder.mul(half, _LONG(blocks * LINES)), builder.mul(low, _LONG(_ROWS)))
        target = builder.add(places.sums, builder.mul(line, _LONG(LINE_NBYTES)))
        where = [at(builder, target, _LONG((block * LINES + row) * LINE_NBYTES), _FLOATS) for row, block in tile]
        sums = repeated(builder, steps, _begun(builder, places.adds, where), add_columns)
        for total, place in zip(sums, where, strict=True):
            builder.store(total, place, align=LINE_NBYTES)
        return []

    repeated(builder, _LONG(_GROUPS), [], group_of_rows)


def _begun(builder: Any, adds: Any, where: Sequence[Any]) -> list[Any]:
    """What lies there, if `adds` is not 0, or else zeros."""
    before = builder.block
    with builder.if_then(builder.icmp_unsigned("!=", adds, _LONG(0))):
        found, there = [builder.load(place, align=LINE_NBYTES) for place in where], builder.block
    sums = [builder.phi(_FLOATS) for _ in where]
    for total, loaded in zip(sums, found, strict=True):
        total.add_incoming(filled(_FLOATS, 0.0), before)
        total.add_incoming(loaded, there)
    return sums
