"""Sixteen 4-bit codes at once, as vector instructions.

The compiler vectorises a loop over codes only where it has many rounds; with sixteen codes between one grid and the
next it is three times slower than these are.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.jit import intrinsic

_LANES = 8
_BYTES = ir.VectorType(ir.IntType(8), _LANES)
_WORDS = ir.VectorType(ir.IntType(32), _LANES)
_FLOATS = ir.VectorType(ir.FloatType(), _LANES)
_HALVES = ir.VectorType(ir.HalfType(), _LANES)
_SHORTS = ir.VectorType(ir.IntType(16), _LANES)
_MAX_HALF = 65504.0


@intrinsic
def decode_sixteen(_: Any, pairs: Any, scale: Any, low: Any, numbers: Any) -> Any:
    """In a kernel: low + code * scale for the codes in the eight bytes at `pairs`, low nibble first, to `numbers`.

    Both are pointers, at any address; scale and low float32. Sums are rounded once, and then as `narrow` rounds.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, each_scale, each_low, target = arguments
        packed = builder.load(builder.bitcast(source, _BYTES.as_pointer()), align=1)
        words = builder.zext(packed, _WORDS)
        codes = builder.and_(words, _all(_WORDS, 15)), builder.lshr(words, _all(_WORDS, 4))
        grid = _broadcast(builder, each_scale), _broadcast(builder, each_low)
        even, odd = (builder.fadd(builder.fmul(builder.sitofp(c, _FLOATS), grid[0]), grid[1]) for c in codes)
        result = _together(builder, even, odd, signature.args[3].dtype)
        builder.store(result, builder.bitcast(target, result.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(pairs, types.float32, types.float32, numbers), generate


def _together(builder: Any, even: Any, odd: Any, number: Any) -> Any:
    """Two vectors of numbers as one of their type, by turns."""
    if number == numba.float32:
        places = [place for lane in range(_LANES) for place in (lane, lane + _LANES)]
        return builder.shuffle_vector(even, odd, ir.Constant(ir.VectorType(ir.IntType(32), 2 * _LANES), places))
    bits = _bfloat_bits if number == numba.uint16 else _half_bits
    return builder.or_(bits(builder, even), builder.shl(bits(builder, odd), _all(_WORDS, 16)))


def _bfloat_bits(builder: Any, numbers: Any) -> Any:
    """Of the bfloat16 next to each number, ties to even, in words."""
    bits = builder.bitcast(numbers, _WORDS)
    odd = builder.and_(builder.lshr(bits, _all(_WORDS, 16)), _all(_WORDS, 1))
    rounded = builder.add(builder.add(bits, _all(_WORDS, 0x7FFF)), odd)
    return builder.lshr(rounded, _all(_WORDS, 16))


def _half_bits(builder: Any, numbers: Any) -> Any:
    """Of the finite float16 next to each number, in words; NaN stays NaN."""
    most, least = _all(_FLOATS, _MAX_HALF), _all(_FLOATS, -_MAX_HALF)
    numbers = builder.select(builder.fcmp_ordered(">", numbers, most), most, numbers)
    numbers = builder.select(builder.fcmp_ordered("<", numbers, least), least, numbers)
    return builder.zext(builder.bitcast(builder.fptrunc(numbers, _HALVES), _SHORTS), _WORDS)


def _all(kind: Any, value: Any) -> Any:
    return ir.Constant(kind, [value] * _LANES)


def _broadcast(builder: Any, number: Any) -> Any:
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), _all(_WORDS, 0))
