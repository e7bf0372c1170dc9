"""Products of bfloat16 by Intel's AMX: eight registers of 16 lines of 64 bytes, and an instruction that multiplies two.

One has 16 rows of the matrix, 32 columns of each, loaded as they lie in memory; one has as many columns of 16 tokens.
Their products are added to one of float32, 16 rows by 16 tokens.

These tiles have a configuration, a thread's own, and libraries that use them too may count on what they configured
last: so a kernel puts back what it found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types

from flexflow_engine.cpu.vectors import ask_for, repeated
from flexflow_engine.products.bfloat_layout import ASKED_ROWS, LINE_COLUMNS, LINE_NBYTES, LINES, TILE_NBYTES, Places

_NUM_TILES = 8
_BYTE, _LONG = ir.IntType(8), ir.IntType(64)
_POINTER, _NOTHING = _BYTE.as_pointer(), ir.VoidType()
_ROWS_AT, _TOKENS_AT = 4, 6
"""The first of the tiles of the matrix, and of tokens; those before are sums."""


def configuration() -> bytes:
    """Of all tiles: palette 1, bytes of a line from byte 16 on, lines from byte 48 on."""
    line = LINE_NBYTES.to_bytes(2, "little")
    return bytes([1]) + bytes(15) + line * _NUM_TILES + bytes(16) + bytes([LINES] * _NUM_TILES) + bytes(8)


def write_configuration(builder: Any, address: Any) -> None:
    """This thread's, 64 bytes."""
    _call(builder, "sttilecfg", [builder.inttoptr(address, _POINTER)])


def take_over_configuration(builder: Any, address: Any) -> None:
    """As it was written; it empties all tiles."""
    _call(builder, "ldtilecfg", [builder.inttoptr(address, _POINTER)])


def multiply(builder: Any, places: Places, blocks: int) -> None:
    """So many blocks of tokens, two at most."""
    pairs = [(half, block) for half in range(2) for block in range(blocks)]
    sums = [builder.add(places.sums, _LONG(number * TILE_NBYTES)) for number in range(len(pairs))]
    with builder.if_else(builder.icmp_unsigned("!=", places.adds, _LONG(0))) as (adds, begins):
        with adds:
            for number, address in enumerate(sums):
                _load(builder, number, address, _LONG(LINE_NBYTES))
        with begins:
            for number in range(len(pairs)):
                _call(builder, "tilezero", [_BYTE(number)])

    def add_columns(step: Any, _: Sequence[Any]) -> list[Any]:
        tokens = builder.add(places.tokens, builder.mul(step, _LONG(TILE_NBYTES)))
        rows = builder.add(places.rows, builder.mul(step, _LONG(LINE_NBYTES)))
        for half in range(2):
            first = builder.add(rows, builder.mul(places.stride, _LONG(half * LINES)))
            _load(builder, _ROWS_AT + half, first, places.stride)
            for block in range(blocks):
                if half == 0:
                    place = builder.add(tokens, builder.mul(places.block_nbytes, _LONG(block)))
                    _load(builder, _TOKENS_AT + block, place, _LONG(LINE_NBYTES))
                tiles = [pairs.index((half, block)), _ROWS_AT + half, _TOKENS_AT + block]
                _call(builder, "tdpbf16ps", [_BYTE(tile) for tile in tiles])
        with builder.if_then(builder.icmp_unsigned("!=", places.wanted_rows, _LONG(0))):
            first = builder.add(places.wanted, builder.mul(step, _LONG(LINE_NBYTES)))
            repeated(builder, builder.udiv(places.wanted_rows, _LONG(ASKED_ROWS)), [first], ask_for_rows)
        return []

    def ask_for_rows(_: Any, carried: Sequence[Any]) -> list[Any]:
        line = carried[0]
        for _ in range(ASKED_ROWS):
            ask_for(builder, line, into=2)
            line = builder.add(line, places.wanted_stride)
        return [line]

    repeated(builder, builder.udiv(places.columns, _LONG(LINE_COLUMNS)), [], add_columns)
    for number, address in enumerate(sums):
        _call(builder, "tilestored64", [_BYTE(number), builder.inttoptr(address, _POINTER), _LONG(LINE_NBYTES)])


def _load(builder: Any, tile: int, address: Any, stride: Any) -> None:
    _call(builder, "tileloadd64", [_BYTE(tile), builder.inttoptr(address, _POINTER), stride])


def _call(builder: Any, name: str, arguments: Sequence[Any]) -> None:
    kind = ir.FunctionType(_NOTHING, [argument.type for argument in arguments])
    builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", [], kind), list(arguments))
