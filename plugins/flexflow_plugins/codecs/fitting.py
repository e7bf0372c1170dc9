"""The grid that covers a group of numbers: low + code * scale, code 0 ... levels; low and scale in float16.

From the smallest to the largest number: no number is further than half a step from it. Numbers and codes come by
pointers, and are worked on FITTED_AT_ONCE at a time: there is room for a multiple of these, and numbers fill it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba import types

from flexflow_engine.cpu.jit import intrinsic, kernel
from flexflow_engine.cpu.numbers import MAX_HALF, half_at_least, half_at_most, half_to_float
from flexflow_engine.cpu.vectors import everywhere, repeated, shuffled, vector_at
from flexflow_plugins.codecs.rounding import codes_at

FITTED_AT_ONCE = 16
"""Numbers that are compared, or coded, by one instruction."""
_BYTES = ir.VectorType(ir.IntType(8), FITTED_AT_ONCE)
_FLOATS = ir.VectorType(ir.FloatType(), FITTED_AT_ONCE)
_LONG = ir.IntType(64)


@kernel
def cover(numbers: Any, count: Any, levels: Any) -> Any:
    """The covering grid of so many finite numbers, float32: bits of low and of scale.

    low is rounded down and scale up, so that the grid covers the numbers. Beyond float16 both stop at its largest.
    """
    smallest, largest = _extremes(numbers, count)
    low = half_at_most(max(smallest, -MAX_HALF))
    largest = min(largest, half_to_float(low) + levels * MAX_HALF)
    span = np.float32(largest - half_to_float(low))
    return low, half_at_least(max(np.float32(0), np.float32(span / levels)))


@kernel
def quantise(numbers: Any, count: Any, grid: Any, levels: Any, codes: Any) -> None:
    """The code of the grid's place next to each number into `codes`, uint8. grid: low and scale."""
    low, scale = grid
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    _quantise(numbers, count, (low, inverse, levels), codes)


@intrinsic
def _extremes(_: Any, numbers: Any, count: Any) -> Any:
    """In a kernel: the smallest and the largest number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, count = arguments

        def compare(step: Any, found: Sequence[Any]) -> list[Any]:
            some = vector_at(builder, _FLOATS, numbers, builder.mul(step, _LONG(FITTED_AT_ONCE)))
            return _further(builder, found, (some, some))

        first = vector_at(builder, _FLOATS, numbers, _LONG(0))
        found = repeated(builder, _steps(builder, count), [first, first], compare)
        for half in (8, 4, 2, 1):
            others = [
                shuffled(builder, vector, vector, [lane ^ half for lane in range(FITTED_AT_ONCE)]) for vector in found
            ]
            found = _further(builder, found, others)
        ends = [builder.extract_element(vector, _LONG(0)) for vector in found]
        return context.make_tuple(builder, signature.return_type, ends)

    return types.UniTuple(types.float32, 2)(numbers, types.int64), generate  # type: ignore[no-untyped-call]  # numba says no types


@intrinsic
def _quantise(_: Any, numbers: Any, count: Any, grid: Any, codes: Any) -> Any:
    """In a kernel: see `quantise`. grid: low, inverse scale, levels."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, count, grid, codes = arguments
        low, inverse, most = (everywhere(builder, builder.extract_value(grid, i), FITTED_AT_ONCE) for i in range(3))

        def quantise_some(step: Any, _: Sequence[Any]) -> list[Any]:
            place = builder.mul(step, _LONG(FITTED_AT_ONCE))
            above = builder.fsub(vector_at(builder, _FLOATS, numbers, place), low)
            found = builder.fptoui(codes_at(builder, builder.fmul(above, inverse), most), _BYTES)
            builder.store(found, builder.bitcast(builder.gep(codes, [place]), _BYTES.as_pointer()), align=1)
            return []

        repeated(builder, _steps(builder, count), [], quantise_some)
        return context.get_dummy_value()

    three = types.UniTuple(types.float32, 3)  # type: ignore[no-untyped-call]  # numba says no types
    return types.void(numbers, types.int64, three, codes), generate


def _steps(builder: Any, count: Any) -> Any:
    return builder.udiv(builder.add(count, _LONG(FITTED_AT_ONCE - 1)), _LONG(FITTED_AT_ONCE))


def _further(builder: Any, ends: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The smaller ones of the first two, and the larger ones of the second."""
    return [
        builder.select(builder.fcmp_ordered(sign, other, end), other, end)
        for sign, end, other in zip("<>", ends, others, strict=True)
    ]
