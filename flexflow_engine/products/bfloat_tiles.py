"""What kernels that multiply bfloat16 are made of, by the instructions that this processor has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.instructions import has_amx
from flexflow_engine.cpu.jit import intrinsic
from flexflow_engine.cpu.vectors import at, bfloat_bits, filled, transposed
from flexflow_engine.products import bfloat_amx, bfloat_vectors
from flexflow_engine.products.bfloat_layout import LINE_NBYTES, LINES, Places, Target

_WORD, _LONG = ir.IntType(32), ir.IntType(64)
_FLOATS, _WORDS = ir.VectorType(ir.FloatType(), LINES), ir.VectorType(_WORD, LINES)
_SHORTS = ir.VectorType(ir.IntType(16), LINES)
_AMX = has_amx()


def _tuple_of(count: int) -> Any:
    """Numba's type of so many integers of 64 bits."""
    return types.UniTuple(types.int64, count)  # type: ignore[no-untyped-call]  # numba says no types


@intrinsic
def begin(_: Any, before: Any, wanted: Any) -> Any:
    """In a kernel, before anything is multiplied: what `end` needs is written to the address `before`, 64 bytes.
    wanted: the address of `bfloat_amx.configuration`.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _AMX:
            bfloat_amx.write_configuration(builder, arguments[0])
            bfloat_amx.take_over_configuration(builder, arguments[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def end(_: Any, before: Any) -> Any:
    """In a kernel: what `begin` changed is as before again."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _AMX:
            bfloat_amx.take_over_configuration(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


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
            tokens.append(builder.load(at(builder, first, builder.mul(there, stride), _WORDS), align=2))
        for line, pairs in enumerate(transposed(builder, tokens)):
            builder.store(pairs, at(builder, arguments[1], _LONG(line * LINE_NBYTES), _WORDS), align=LINE_NBYTES)
        return context.get_dummy_value()

    return types.void(_tuple_of(3), types.int64), generate


def _multiplication(blocks: int) -> Callable[..., Any]:
    """In a kernel: 32 rows of a matrix times so many blocks of 16 tokens. places: see `Places`, a tuple of int64."""

    def multiply(_: Any, places: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            by = bfloat_amx if _AMX else bfloat_vectors
            by.multiply(builder, Places(*_unpacked(builder, arguments[0], Places._fields)), blocks)
            return context.get_dummy_value()

        return types.void(_tuple_of(len(Places._fields))), generate

    return intrinsic(multiply)


multiply_one_block, multiply_two_blocks = _multiplication(1), _multiplication(2)


@intrinsic
def put(_: Any, target: Any) -> Any:
    """In a kernel: sums, plus bias, token by token. target: see `Target`, a tuple of int64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target = Target(*_unpacked(builder, arguments[0], Target._fields))
        places = [at(builder, target.sums, _LONG(row * LINE_NBYTES), _FLOATS) for row in range(LINES)]
        sums = transposed(builder, [builder.load(place, align=LINE_NBYTES) for place in places])
        bias = _bias(builder, target.bias)
        for token in range(LINES):
            with builder.if_then(builder.icmp_signed("<", _LONG(token), target.tokens)):
                place = at(builder, target.out, builder.mul(target.out_nbytes, _LONG(token)), _SHORTS)
                builder.store(bfloat_bits(builder, builder.fadd(sums[token], bias)), place, align=2)
        return context.get_dummy_value()

    return types.void(_tuple_of(len(Target._fields))), generate


def _unpacked(builder: Any, numbers: Any, names: tuple[str, ...]) -> list[Any]:
    return [builder.extract_value(numbers, i) for i in range(len(names))]


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
