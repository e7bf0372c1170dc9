"""Products of bfloat16 by tiles (Intel AMX): registers of 16 lines of 64 bytes, and an instruction that multiplies two.

A tile of the matrix is 16 of its rows, 32 columns of each, loaded as they lie in memory. A tile of tokens is 16 lines
of a pair of columns each, and in a line that pair of 16 tokens. Their product, 16 rows by 16 tokens, is added to a tile
of float32.

Tiles have a configuration, a thread's own, and libraries that use them too may count on what they configured last: so
a kernel puts back what it found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.bfloats import TILE_TOKENS
from flexflow_engine.cpu.jit import intrinsic
from flexflow_engine.cpu.vectors import at, bfloat_bits, filled, repeated, riffled

LINES, LINE_NBYTES = 16, 64
TILE_NBYTES = LINES * LINE_NBYTES
_NUM_TILES = 8
_COLUMNS = LINE_NBYTES // 2
"""Of bfloat16 in a line."""
_BYTE, _WORD, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_POINTER, _NOTHING = _BYTE.as_pointer(), ir.VoidType()
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), LINES), ir.VectorType(_WORD, LINES)
_SHORTS = ir.VectorType(ir.IntType(16), LINES)
_ROWS_AT, _TOKENS_AT = 4, 6
"""The first of the tiles of the matrix, and of tokens; those before are sums."""


def configuration() -> bytes:
    """Of all tiles: palette 1, bytes of a line from byte 16 on, lines from byte 48 on."""
    line = LINE_NBYTES.to_bytes(2, "little")
    return bytes([1]) + bytes(15) + line * _NUM_TILES + bytes(16) + bytes([LINES] * _NUM_TILES) + bytes(8)


@intrinsic
def lay_out(_: Any, source: Any, target: Any) -> Any:
    """In a kernel: a tile of tokens. source: address of 32 columns of the first token, bytes from token to token, and
    how many tokens there are, of which the last is taken for those that are lacking. target: address of the tile.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, stride, count = (builder.extract_value(arguments[0], i) for i in range(3))
        last = builder.sub(count, _LONG(1))
        tokens = []
        for token in range(LINES):
            lane = _LONG(token)
            there = builder.select(builder.icmp_signed("<", lane, last), lane, last)
            place = at(builder, first, builder.mul(there, stride), _WORDS)
            tokens.append(builder.load(place, align=2))
        for line, pairs in enumerate(_transposed(builder, tokens)):
            builder.store(pairs, at(builder, arguments[1], _LONG(line * LINE_NBYTES), _WORDS), align=LINE_NBYTES)
        return context.get_dummy_value()

    numbers = types.UniTuple(types.int64, 3)  # type: ignore[no-untyped-call]  # numba says no types
    return types.void(numbers, types.int64), generate


class _Places(NamedTuple):
    """Of what is multiplied, as addresses; integers of 64 bits, as all of it."""

    rows: Any
    """bfloat16, 32 of the matrix."""
    stride: Any
    """Bytes from row to row."""
    ahead: Any
    """How many bytes behind each row lies one that will be wanted soon."""
    tokens: Any
    """bfloat16 [blocks, columns / 32, 16 pairs of columns, 16 tokens, 2]."""
    columns: Any
    sums: Any
    """float32 [2, blocks, 16 rows, 16 tokens], to be written."""


@intrinsic
def exchange_configuration(_: Any, before: Any, wanted: Any) -> Any:
    """In a kernel: write this thread's configuration of tiles to one address, and take over that at another."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for name, place in zip(("sttilecfg", "ldtilecfg"), arguments, strict=True):
            _call(builder, name, [builder.inttoptr(place, _POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def configure(_: Any, wanted: Any) -> Any:
    """In a kernel: take over the configuration at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _call(builder, "ldtilecfg", [builder.inttoptr(arguments[0], _POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _multiplication(blocks: int) -> Callable[..., Any]:
    """In a kernel: 32 rows of a matrix times so many blocks of 16 tokens. places: see `_Places`, a tuple of int64."""

    def multiply(_: Any, places: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            fields = range(len(_Places._fields))
            _multiply(builder, _Places(*(builder.extract_value(arguments[0], i) for i in fields)), blocks)
            return context.get_dummy_value()

        numbers = types.UniTuple(types.int64, len(_Places._fields))  # type: ignore[no-untyped-call]  # numba says no types
        return types.void(numbers), generate

    return intrinsic(multiply)


multiply_one_block, multiply_two_blocks = _multiplication(1), _multiplication(2)


def _multiply(builder: Any, places: _Places, blocks: int) -> None:
    pairs = [(half, block) for half in range(2) for block in range(blocks)]
    for number in range(len(pairs)):
        _call(builder, "tilezero", [_BYTE(number)])
    steps = builder.udiv(places.columns, _LONG(_COLUMNS))
    block_nbytes = builder.mul(steps, _LONG(TILE_NBYTES))
    half_nbytes = builder.mul(places.stride, _LONG(LINES))

    def add_columns(step: Any, _: Sequence[Any]) -> list[Any]:
        tokens = builder.add(places.tokens, builder.mul(step, _LONG(TILE_NBYTES)))
        rows = builder.add(places.rows, builder.mul(step, _LONG(LINE_NBYTES)))
        for block in range(blocks):
            _load(
                builder,
                _TOKENS_AT + block,
                at(builder, tokens, builder.mul(block_nbytes, _LONG(block))),
                _LONG(LINE_NBYTES),
            )
        for half in range(2):
            first = builder.add(rows, builder.mul(half_nbytes, _LONG(half)))
            _load(builder, _ROWS_AT + half, builder.inttoptr(first, _POINTER), places.stride)
            for block in range(blocks):
                tiles = [pairs.index((half, block)), _ROWS_AT + half, _TOKENS_AT + block]
                _call(builder, "tdpbf16ps", [_BYTE(tile) for tile in tiles])
            _ask_for(builder, builder.add(first, places.ahead), places.stride)
        return []

    repeated(builder, steps, [], add_columns)
    for number in range(len(pairs)):
        target = at(builder, places.sums, _LONG(number * TILE_NBYTES))
        _call(builder, "tilestored64", [_BYTE(number), target, _LONG(LINE_NBYTES)])


def _load(builder: Any, tile: int, place: Any, stride: Any) -> None:
    _call(builder, "tileloadd64", [_BYTE(tile), place, stride])


def _ask_for(builder: Any, first: Any, stride: Any) -> None:
    """Prefetch a line of 16 rows each, into the second cache."""
    kind = ir.FunctionType(_NOTHING, [_POINTER, _WORD, _WORD, _WORD])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [_POINTER], kind)
    for row in range(LINES):
        place = at(builder, first, builder.mul(stride, _LONG(row)))
        builder.call(prefetch, [place, _WORD(0), _WORD(2), _WORD(1)])


class _Target(NamedTuple):
    """Where the products of a tile go; integers of 64 bits."""

    sums: Any
    """Address: float32 [16 rows, 16 tokens]."""
    bias: Any
    """Address of the rows' bfloat16, or 0."""
    out: Any
    """Address of the first token's first product, bfloat16."""
    out_nbytes: Any
    """From token to token."""
    tokens: Any
    """That exist."""


@intrinsic
def put_tile(_: Any, target: Any) -> Any:
    """In a kernel: a tile's sums, plus bias, token by token. target: see `_Target`, a tuple of int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = _Target(*(builder.extract_value(arguments[0], i) for i in range(len(_Target._fields))))
        sums = [
            builder.load(at(builder, target.sums, _LONG(row * LINE_NBYTES), _FLOATS), align=LINE_NBYTES)
            for row in range(LINES)
        ]
        sums = _transposed(builder, sums)
        bias = _bias(builder, target.bias)
        for token in range(TILE_TOKENS):
            with builder.if_then(builder.icmp_signed("<", _LONG(token), target.tokens)):
                place = at(builder, target.out, builder.mul(target.out_nbytes, _LONG(token)), _SHORTS)
                builder.store(bfloat_bits(builder, builder.fadd(sums[token], bias)), place, align=2)
        return context.get_dummy_value()

    numbers = types.UniTuple(types.int64, len(_Target._fields))  # type: ignore[no-untyped-call]  # numba says no types
    return types.void(numbers), generate


def _transposed(builder: Any, lines: list[Any]) -> list[Any]:
    for _ in range(LINES.bit_length() - 1):
        lines = riffled(builder, lines)
    return lines


def _bias(builder: Any, address: Any) -> Any:
    """Of 16 rows, float32; negative zeros, which change no sum, where there is none."""
    before = builder.block
    with builder.if_then(builder.icmp_unsigned("!=", address, _LONG(0))):
        bits = builder.load(builder.inttoptr(address, _SHORTS.as_pointer()), align=2)
        words = builder.shl(builder.zext(bits, _WORDS), filled(_WORDS, 16))
        found, there = builder.bitcast(words, _FLOATS), builder.block
    bias = builder.phi(_FLOATS)
    bias.add_incoming(filled(_FLOATS, -0.0), before)
    bias.add_incoming(found, there)
    return bias


def _call(builder: Any, name: str, arguments: Sequence[Any]) -> None:
    kind = ir.FunctionType(_NOTHING, [argument.type for argument in arguments])
    builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", [], kind), list(arguments))
