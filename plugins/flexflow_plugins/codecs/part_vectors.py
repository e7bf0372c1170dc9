"""A group of 64 numbers in four parts, decoded to numbers or integers by vector instructions; see `parts`.

All numbers of a group are small whole multiples of an eighth of its step, since scale = step (c + 1) / 8 and
low = -step * 10 l / 8:

    low + code * scale = step / 8 * (code (c + 1) - 10 l)

So codes become numbers in 16-bit arithmetic, 64 at a time, or are looked up (`part_lookups`). The compiler vectorises a
loop over codes only where it has many rounds; sixteen between one grid and the next are too few.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.jit import has_feature, intrinsic
from flexflow_engine.cpu.vectors import bfloat_bits, everywhere, filled
from flexflow_plugins.codecs.part_format import GROUP_SIZE, LEAST, LOW_EIGHTHS, MAX_HALF, NUM_PARTS
from flexflow_plugins.codecs.part_lookups import integers_looked_up, multiples_looked_up

_PART = GROUP_SIZE // NUM_PARTS
_BYTES, _SPREAD = ir.VectorType(ir.IntType(8), GROUP_SIZE // 2), ir.VectorType(ir.IntType(32), GROUP_SIZE // 2)
_INTEGERS = ir.VectorType(ir.IntType(8), GROUP_SIZE)
_SHORTS, _GRIDS = ir.VectorType(ir.IntType(16), GROUP_SIZE), ir.VectorType(ir.IntType(32), NUM_PARTS)
_WORDS, _FLOATS = ir.VectorType(ir.IntType(32), GROUP_SIZE), ir.VectorType(ir.FloatType(), GROUP_SIZE)
_WORD, _LONG = ir.IntType(32), ir.IntType(64)


@intrinsic
def decode_group(_: Any, pairs: Any, eighth: Any, grids: Any, numbers: Any) -> Any:
    """In a kernel: the numbers whose codes are in the 32 bytes at `pairs`, to `numbers`, rounded as `narrow` rounds.

    Both are pointers, at any address. eighth: of the group's step, float32. grids: uint32, six bits a part, c and l,
    the first part's lowest.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, eighth, grids, target = arguments
        several: Iterable[Any]
        if has_feature("avx512f"):
            several = multiples_looked_up(builder, source, grids)
        else:
            several = [builder.sitofp(builder.sext(_multiples(builder, source, grids), _WORDS), _FLOATS)]
        for number, multiples in enumerate(several):
            floats = builder.fmul(multiples, everywhere(builder, eighth, multiples.type.count))
            result = _rounded(builder, floats, signature.args[3].dtype)
            place = builder.gep(target, [_LONG(number * multiples.type.count)])
            builder.store(result, builder.bitcast(place, result.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(pairs, types.float32, types.uint32, numbers), generate


@intrinsic
def decode_group_integers(_: Any, pairs: Any, grids: Any, integers: Any) -> Any:
    """In a kernel: the multiples of an eighth of the group's step whose codes are in the 32 bytes at `pairs`, less
    LEAST, to `integers`. Pointers and grids as `decode_group` has them.
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


def _rounded(builder: Any, numbers: Any, number: Any) -> Any:
    """As numbers of a type; those of 16 bits as their bits. None is so small that an instruction takes it for zero."""
    if number == numba.float32:
        return numbers
    return (bfloat_bits if number == numba.uint16 else _half_bits)(builder, numbers)


def _half_bits(builder: Any, numbers: Any) -> Any:
    """Of the finite float16 next to each number; NaN stays NaN."""
    most, least, count = filled(numbers.type, MAX_HALF), filled(numbers.type, -MAX_HALF), numbers.type.count
    numbers = builder.select(builder.fcmp_ordered(">", numbers, most), most, numbers)
    numbers = builder.select(builder.fcmp_ordered("<", numbers, least), least, numbers)
    halves = builder.fptrunc(numbers, ir.VectorType(ir.HalfType(), count))
    return builder.bitcast(halves, ir.VectorType(ir.IntType(16), count))
