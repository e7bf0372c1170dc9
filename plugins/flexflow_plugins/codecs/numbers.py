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
from numba.extending import overload

from flexflow_plugins.codecs.jit import kernel

MAX_HALF = np.float32(65504.0)
NAN_HALF = np.uint32(0x7E00)
_MAGNITUDE, _SIGN, _INFINITE = np.uint32(0x7FFF), np.uint32(0x8000), np.uint32(0x7C00)


@kernel
def half_to_float(bits: Any) -> Any:
    """The number that the 16 bits of a float16 are, float32; exact."""
    magnitude = np.uint32(bits) & _MAGNITUDE
    # moving the exponent by 112 as a product makes subnormal numbers come out right
    value = np.uint32(magnitude << np.uint32(13)).view(np.float32) * np.float32(2.0**112)
    special = np.uint32((magnitude << np.uint32(13)) | np.uint32(0x7F800000)).view(np.float32)
    value = value if magnitude < _INFINITE else special
    return -value if np.uint32(bits) & _SIGN else value


@kernel
def float_to_half(value: Any) -> Any:
    """The bits of the float16 next to `value`, uint32; beyond float16 the largest, NaN stays NaN."""
    bits = np.float32(value).view(np.uint32)
    size = np.float32(abs(np.float32(value)))
    small = np.float32(size if size < MAX_HALF else MAX_HALF)
    small_bits = small.view(np.uint32)
    # to nearest, ties to even: half an ulp less one bit, and the last bit that stays (the exponent moves by -112)
    normal = (small_bits - np.uint32(0x37FFF001) + ((small_bits >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
    # adding 0.5 leaves a multiple of float16's smallest number, 2^-24, in the last bits
    tiny = np.float32(small + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    rounded = tiny if small < np.float32(2.0**-14) else normal
    rounded = rounded if size == size else NAN_HALF  # noqa: PLR0124  # NaN is what differs from itself
    return rounded | ((bits >> np.uint32(16)) & _SIGN)


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


def widen(number: Any) -> Any:
    """In a kernel: an element of an array of numbers as float32."""
    raise NotImplementedError


def narrow(value: Any, array: Any) -> Any:
    """In a kernel: float32 as an element of `array`, rounded to nearest."""
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


@kernel
def _float_to_bfloat(value: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
