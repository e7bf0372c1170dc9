"""A group of 64 numbers in four parts, decoded to numbers or integers by vector instructions; see `parts`.

All numbers of a group are small whole multiples of an eighth of its step, since scale = step (c + 1) / 8 and
low = -step * 10 l / 8:

    low + code * scale = step / 8 * (code (c + 1) - 10 l)

So codes become numbers in 16-bit arithmetic, 64 at a time, or are looked up (`part_lookups`). The compiler vectorises a
loop over codes only where it has many rounds; sixteen between one grid and the next are too few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.jit import has_feature, intrinsic
from flexflow_engine.cpu.vectors import ask_for, everywhere, filled, repeated
from flexflow_plugins.codecs.byte_vectors import AHEAD_NBYTES
from flexflow_plugins.codecs.part_format import (
    FIRST_EXPONENT,
    GROUP_SIZE,
    LEAST,
    LOW_EIGHTHS,
    NO_NUMBER,
    NUM_PARTS,
)
from flexflow_plugins.codecs.part_lookups import bfloats_looked_up, integers_looked_up, multiples_looked_up
from flexflow_plugins.codecs.rounding import rounded

_PART = GROUP_SIZE // NUM_PARTS
_BYTES, _SPREAD = ir.VectorType(ir.IntType(8), GROUP_SIZE // 2), ir.VectorType(ir.IntType(32), GROUP_SIZE // 2)
_INTEGERS = ir.VectorType(ir.IntType(8), GROUP_SIZE)
_SHORTS, _GRIDS = ir.VectorType(ir.IntType(16), GROUP_SIZE), ir.VectorType(ir.IntType(32), NUM_PARTS)
_WORDS, _FLOATS = ir.VectorType(ir.IntType(32), GROUP_SIZE), ir.VectorType(ir.FloatType(), GROUP_SIZE)
_WORD, _LONG = ir.IntType(32), ir.IntType(64)
FIRST_OF_EIGHTHS = FIRST_EXPONENT - 3 * 8
"""What is to be added to a step's eight bits to have the upper bits of its eighth."""


@intrinsic
def decode_groups(_: Any, pairs: Any, words: Any, count: Any, numbers: Any) -> Any:
    """In a kernel: so many groups, one at least, whose codes and words begin at `pairs` and `words`, to `numbers`,
    rounded as `narrow` rounds; pointers, those of bytes at any address. Returns whether any group has no grids
    (`part_grids.has_grids`): what is written for such a one means nothing.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pairs, words, count, target = arguments
        words = builder.bitcast(words, _WORD.as_pointer())

        def decode(group: Any, carried: Sequence[Any]) -> list[Any]:
            word = builder.load(builder.gep(words, [group]), align=1)
            source, place = (
                builder.gep(start, [builder.mul(group, _LONG(size))])
                for start, size in ((pairs, GROUP_SIZE // 2), (target, GROUP_SIZE))
            )
            for number, result in enumerate(_decoded(builder, source, word, signature.args[3].dtype)):
                where = builder.gep(place, [_LONG(number * result.type.count)])
                builder.store(result, builder.bitcast(where, result.type.as_pointer()), align=2)
            ask_for(builder, builder.ptrtoint(builder.gep(source, [_LONG(AHEAD_NBYTES)]), _LONG), into=3)
            exponent = builder.and_(word, _WORD(0xFF))
            none = (builder.icmp_unsigned("==", exponent, _WORD(other)) for other in (0, NO_NUMBER))
            return [reduce(builder.or_, none, carried[0])]

        return repeated(builder, count, [ir.IntType(1)(0)], decode)[0]

    return types.boolean(pairs, words, types.int64, numbers), generate


def _decoded(builder: Any, source: Any, word: Any, number: Any) -> Iterator[Any]:
    """Vectors of a group's numbers. number: their type."""
    grids, exponent = builder.lshr(word, _WORD(8)), builder.and_(word, _WORD(0xFF))
    looks_up = has_feature("avx512bw")
    if looks_up and number == numba.uint16:
        return bfloats_looked_up(builder, source, grids, exponent)
    several: Iterable[Any]
    if looks_up:
        several = multiples_looked_up(builder, source, grids)
    else:
        several = [builder.sitofp(builder.sext(_multiples(builder, source, grids), _WORDS), _FLOATS)]
    eighth = builder.bitcast(builder.shl(builder.add(exponent, _WORD(FIRST_OF_EIGHTHS)), _WORD(20)), ir.FloatType())
    floats = (builder.fmul(some, everywhere(builder, eighth, some.type.count)) for some in several)
    return (rounded(builder, some, number) for some in floats)


@intrinsic
def decode_group_integers(_: Any, pairs: Any, grids: Any, integers: Any) -> Any:
    """In a kernel: the multiples of an eighth of the group's step whose codes are in the 32 bytes at `pairs`, less
    LEAST, to `integers`. Pointers; grids: uint32, six bits a part, c and l, the first part's lowest.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, grids, target = arguments
        if has_feature("avx512bw"):
            result = integers_looked_up(builder, source, grids)
        else:
            above = builder.sub(_multiples(builder, source, grids), filled(_SHORTS, LEAST))
            result = builder.trunc(above, _INTEGERS)
        builder.store(result, builder.bitcast(target, _INTEGERS.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(pairs, types.uint32, integers), generate


def _multiples(builder: Any, source: Any, grids: Any) -> Any:
    """code (c + 1) - 10 l, 16 bits each."""
    codes = _codes(builder, builder.load(builder.bitcast(source, _BYTES.as_pointer()), align=1))
    scales, lows = _grids(builder, grids)
    return builder.sub(builder.mul(codes, scales), lows)


def _codes(builder: Any, packed: Any) -> Any:
    """Of each byte its low half and then its high one, 16 bits each: for a byte b in 32 bits, b | b << 12."""
    spread = builder.zext(packed, _SPREAD)
    both = builder.or_(spread, builder.shl(spread, filled(_SPREAD, 12)))
    return builder.and_(builder.bitcast(both, _SHORTS), filled(_SHORTS, 15))


def _grids(builder: Any, grids: Any) -> tuple[Any, Any]:
    """c + 1 and 10 l of each number's part."""
    words = builder.lshr(
        everywhere(builder, grids, NUM_PARTS), ir.Constant(_GRIDS, [6 * part for part in range(NUM_PARTS)])
    )
    scales = builder.add(builder.and_(words, filled(_GRIDS, 7)), filled(_GRIDS, 1))
    places = builder.and_(builder.lshr(words, filled(_GRIDS, 3)), filled(_GRIDS, 7))
    return _of_parts(builder, scales), _of_parts(builder, builder.mul(places, filled(_GRIDS, LOW_EIGHTHS)))


def _of_parts(builder: Any, values: Any) -> Any:
    """Each part's value at all its numbers."""
    mask = ir.Constant(_WORDS, [number // _PART for number in range(GROUP_SIZE)])
    short = builder.trunc(values, ir.VectorType(ir.IntType(16), NUM_PARTS))
    return builder.shuffle_vector(short, ir.Constant(short.type, ir.Undefined), mask)
