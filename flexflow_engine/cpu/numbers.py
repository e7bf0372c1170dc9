"""Number formats inside kernels, which know float32 only.

A kernel tells the formats apart by the array's type, so that one kernel is compiled for each:

    float32 [n]   the numbers
    uint16 [n]    the bits of bfloat16
    int16 [n]     the bits of float16
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]  # it ships no types
from numba.extending import overload

from flexflow_engine.cpu.jit import intrinsic, kernel
from flexflow_engine.cpu.pointers import store_pair

MAX_HALF = np.float32(65504.0)
NAN_HALF = np.uint32(0x7E00)
_MAGNITUDE, _SIGN = np.uint32(0x7FFF), np.uint32(0x8000)
_HIGH = np.uint32(0xFFFF0000)


@kernel
def half_to_float(bits: Any) -> Any:
    """The number that the 16 bits of a float16 are, float32; exact."""
    return _widen_half(np.uint16(bits))


@kernel
def float_to_half(value: Any) -> Any:
    """The bits of the float16 next to `value`, uint32; beyond float16 the largest, NaN stays NaN."""
    number = np.float32(value)
    number = MAX_HALF if number > MAX_HALF else number
    number = -MAX_HALF if number < -MAX_HALF else number
    return np.uint32(_narrow_half(number))


@kernel
def half_at_most(value: Any) -> Any:
    """The bits of the largest float16 that is not above `value`; the smallest finite one for what is below all."""
    bits = float_to_half(value)
    if half_to_float(bits) <= value or bits == _SIGN | np.uint32(0x7BFF):
        return bits
    if bits & _MAGNITUDE == 0:
        return _SIGN | np.uint32(1)
    return bits + np.uint32(1) if bits & _SIGN else bits - np.uint32(1)


@kernel
def half_at_least(value: Any) -> Any:
    """The bits of the smallest float16 that is not below `value`, which is not negative; at most the largest one."""
    bits = float_to_half(value)
    return bits if half_to_float(bits) >= value or bits == np.uint32(0x7BFF) else bits + np.uint32(1)


@intrinsic
def _widen_half(_: Any, bits: Any) -> Any:
    """One instruction where processors have it, and it vectorises."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return numba.float32(numba.uint16), generate


@intrinsic
def _narrow_half(_: Any, number: Any) -> Any:
    """To nearest, ties to even; infinite beyond float16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return numba.uint16(numba.float32), generate


def widen(number: Any) -> Any:
    """In a kernel: an element of an array of numbers as float32."""
    raise NotImplementedError


def narrow(value: Any, array: Any) -> Any:
    """In a kernel: float32 as an element of `array`, or of what a pointer points to, rounded to nearest."""
    raise NotImplementedError


def round_to(value: Any, array: Any) -> Any:
    """The same, infinite where that is beyond float16."""
    raise NotImplementedError


def put_pair(values: Any, index: Any, first: Any, second: Any) -> Any:
    """In a kernel: two float32 as elements 2 index and 2 index + 1 of what a pointer points to, rounded to nearest."""
    raise NotImplementedError


@overload(widen, strict=False)  # strict compares annotations too, and lambdas have none
def _widen(number: Any) -> Callable[[Any], Any]:
    if number == numba.float32:
        return lambda number: number
    if number == numba.uint16:
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    assert number == numba.int16, number
    return lambda number: half_to_float(np.uint32(np.uint16(number)))


@overload(narrow, strict=False)
def _narrow(value: Any, array: Any) -> Callable[[Any, Any], Any]:
    if array.dtype == numba.float32:
        return lambda value, array: value
    if array.dtype == numba.uint16:
        return lambda value, array: _float_to_bfloat(value)
    assert array.dtype == numba.int16, array
    return lambda value, array: np.int16(float_to_half(value))


@overload(round_to, strict=False)
def _round_to(value: Any, array: Any) -> Callable[[Any, Any], Any]:
    if array.dtype == numba.int16:
        return lambda value, array: np.int16(_narrow_half(value))
    return _narrow(value, array)


@overload(put_pair, strict=False)
def _put_pair(values: Any, index: Any, first: Any, second: Any) -> Callable[[Any, Any, Any, Any], Any]:
    if values.dtype == numba.float32:
        return _put_floats
    if values.dtype == numba.uint16:
        return lambda values, index, first, second: store_pair(
            values, index, (_rounded_to_bfloat(first) >> np.uint32(16)) | (_rounded_to_bfloat(second) & _HIGH)
        )
    assert values.dtype == numba.int16, values
    return lambda values, index, first, second: store_pair(
        values, index, float_to_half(first) | (float_to_half(second) << np.uint32(16))
    )


def _put_floats(values: Any, index: Any, first: Any, second: Any) -> None:
    values[2 * index] = first
    values[2 * index + 1] = second


@kernel
def _float_to_bfloat(value: Any) -> Any:
    return np.uint16(_rounded_to_bfloat(value) >> np.uint32(16))


@kernel
def _rounded_to_bfloat(value: Any) -> Any:
    """The upper half are the bits of the bfloat16 next to `value`, ties to even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
