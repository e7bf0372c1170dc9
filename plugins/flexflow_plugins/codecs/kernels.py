"""Groups of one grid each, compiled: the format of `group-int8`, and what min/max writes for `group-int4`.

`encode` works on the groups `span` = (first, stop) of many tensors, counted through all of them, so that threads share
the work by ranges. Arrays come as (1-D array, elements from one tensor to the next): `encoded` of uint8, `values` of
float32, uint16 or int16 (see flexflow_engine.cpu.numbers). `shape` is (numbers a tensor, group size, bits a code).

    encoded   | codes: group_nbytes a group, the last cut short | scale, float16, a group | low, float16, a group |
    number    low + code * scale; the product is exact in float32, so every processor gets the same number

4-bit codes: number 2 i of a group in the low half of byte i, number 2 i + 1 in the high half.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.cpu.jit import c_function, kernel
from flexflow_engine.cpu.numbers import NAN_HALF, half_to_float, narrow, put_pair, widen
from flexflow_engine.cpu.pieces import copy_bytes
from flexflow_engine.cpu.pointers import offset, pointer
from flexflow_plugins.codecs.byte_vectors import LANES, decode_bytes
from flexflow_plugins.codecs.fitting import FITTED_AT_ONCE, cover, quantise

NIBBLE, HALF_BYTE = np.uint8(15), np.uint8(4)


def decode(encoded: Any, settings: Any, first: Any, count: Any, out: Any) -> None:
    """Numbers [first, first + count) of one tensor, by pointers; settings: shape. See `KernelDecoder`."""
    size, group_size, bits = settings[0], settings[1], settings[2]
    stop, places = first + count, _grid_places(size, group_size, bits)
    group, begin = first // group_size, first
    while begin < stop:
        end = min(stop, (group + 1) * group_size)
        scale, low = _grid_of(encoded, places, group)
        numbers = offset(out, begin - first)
        if bits == 4:
            decode_nibbles(encoded, begin, end, scale, low, numbers)
        else:
            codes, several = offset(encoded, begin), (end - begin) // LANES * LANES
            if several:
                decode_bytes(codes, several, scale, low, numbers)
            for i in range(several, end - begin):
                numbers[i] = narrow(np.float32(np.int32(codes[i])) * scale + low, numbers)
        group += 1
        begin = end


def decode_integers(encoded: Any, settings: Any, first: Any, count: Any, integers: Any, scales: Any, lows: Any) -> None:
    """The same as codes. See `IntegerDecoder`."""
    size, group_size, bits = settings[0], settings[1], settings[2]
    begin, places = first // group_size, _grid_places(size, group_size, bits)
    for group in range(begin, (first + count) // group_size):
        numbers = offset(integers, (group - begin) * group_size)
        codes = offset(encoded, group * group_size * bits // 8)
        if bits == 4:
            for i in range(group_size // 2):
                numbers[2 * i] = codes[i] & NIBBLE
                numbers[2 * i + 1] = codes[i] >> HALF_BYTE
        else:
            for i in range(group_size):
                numbers[i] = codes[i]
        scales[group - begin], lows[group - begin] = _grid_of(encoded, places, group)


@kernel
def _grid_places(size: Any, group_size: Any, bits: Any) -> Any:
    """Where the scales begin, and the lows."""
    scales = (size * bits + 7) // 8
    return scales, scales + 2 * ((size + group_size - 1) // group_size)


@kernel
def _grid_of(encoded: Any, places: Any, group: Any) -> Any:
    """Scale and low of a group, float32."""
    scales, lows = places
    return half_to_float(_half_bits(encoded, scales + 2 * group)), half_to_float(_half_bits(encoded, lows + 2 * group))


@kernel
def decode_nibbles(encoded: Any, start: Any, end: Any, scale: Any, low: Any, numbers: Any) -> None:
    """Codes [start, end) of one group."""
    odd = start % 2
    if odd:
        numbers[0] = narrow(np.float32(np.int32(encoded[start // 2] >> HALF_BYTE)) * scale + low, numbers)
    pairs, rest = offset(encoded, (start + odd) // 2), offset(numbers, odd)
    count = (end - start - odd) // 2
    for i in range(count):
        pair = np.uint32(pairs[i])
        first = np.float32(np.int32(pair & np.uint32(15))) * scale + low
        put_pair(rest, i, first, np.float32(np.int32(pair >> np.uint32(4))) * scale + low)
    if (end - start - odd) % 2:
        rest[2 * count] = narrow(np.float32(np.int32(pairs[count] & NIBBLE)) * scale + low, rest)


@kernel
def encode(values: Any, encoded: Any, shape: Any, span: Any) -> None:
    """Fill the groups' places in `encoded`."""
    room = (shape[1] + FITTED_AT_ONCE - 1) // FITTED_AT_ONCE * FITTED_AT_ONCE
    _encode(values, encoded, shape, span, (np.empty(room, np.float32), np.empty(room, np.uint8)))


@kernel
def _encode(values: Any, encoded: Any, shape: Any, span: Any, room: Any) -> None:
    """room: for the numbers of a group and their codes; the caller's, as only pointers to it are used here."""
    (data, data_stride), (source, stride), (size, group_size, bits), (first, stop) = encoded, values, shape, span
    num_groups, places = (size + group_size - 1) // group_size, _grid_places(size, group_size, bits)
    inputs, outputs = pointer(source.ctypes.data, source), pointer(data.ctypes.data, data)
    numbers, codes = pointer(room[0].ctypes.data, room[0]), pointer(room[1].ctypes.data, room[1])
    levels = np.float32(2**bits - 1)
    tensor, group = first // num_groups, first % num_groups
    for _ in range(first, stop):
        start, out = group * group_size, offset(outputs, tensor * data_stride)
        count = min(group_size, size - start)
        if load(offset(inputs, tensor * stride + start), count, numbers):
            low, scale = cover(numbers, count, levels)
            quantise(numbers, count, (half_to_float(low), half_to_float(scale)), levels, codes)
        else:
            low, scale = NAN_HALF, np.uint32(0)
            for i in range(count):
                codes[i] = 0
        if bits == 4:
            _store_pairs(codes, count, offset(out, start // 2))
        else:
            copy_bytes(codes, offset(out, start), count)
        _store_half(offset(out, places[0] + 2 * group), scale)
        _store_half(offset(out, places[1] + 2 * group), low)
        tensor, group = next_group(tensor, group, num_groups)


@kernel
def next_group(tensor: Any, group: Any, num_groups: Any) -> Any:
    """Which tensor's, and which of its groups, follows."""
    return (tensor, group + 1) if group + 1 < num_groups else (tensor + 1, 0)


@kernel
def is_finite(number: Any) -> Any:
    """Of a float32, in a loop that is vectorised."""
    return (np.float32(number).view(np.uint32) & np.uint32(0x7F800000)) != np.uint32(0x7F800000)


@kernel
def load(values: Any, count: Any, numbers: Any) -> Any:
    """So many `values` into `numbers`, filled up with the last one for `fitting`; whether all are finite."""
    infinite = False
    for i in range(count):
        number = np.float32(widen(values[i]))
        numbers[i] = number
        infinite |= not is_finite(number)
    for i in range(count, (count + FITTED_AT_ONCE - 1) // FITTED_AT_ONCE * FITTED_AT_ONCE):
        numbers[i] = numbers[count - 1]
    return not infinite


@kernel
def _store_pairs(codes: Any, count: Any, out: Any) -> None:
    for i in range(count // 2):
        out[i] = codes[2 * i] | (codes[2 * i + 1] << HALF_BYTE)
    if count % 2:
        out[count // 2] = codes[count - 1]


@kernel
def _half_bits(encoded: Any, place: Any) -> Any:
    """Little-endian, and at any place: a tensor's bytes need not start at an even one."""
    return np.uint32(encoded[place]) | (np.uint32(encoded[place + 1]) << np.uint32(8))


@kernel
def _store_half(place: Any, bits: Any) -> None:
    place[0] = np.uint8(bits & np.uint32(0xFF))
    place[1] = np.uint8(bits >> np.uint32(8))


def _decoder(number: str) -> Any:
    """`decode` into numbers of one type, as a C function."""
    return c_function(f"void(CPointer(uint8), CPointer(int64), int64, int64, CPointer({number}))")(decode)


DECODERS: Mapping[DType, Any] = {  # last: compiled as soon as it is read
    "float32": _decoder("float32"),
    "bfloat16": _decoder("uint16"),
    "float16": _decoder("int16"),
}


INTEGER_DECODER = (
    "void(CPointer(uint8), CPointer(int64), int64, int64, CPointer(uint8), CPointer(float32), CPointer(float32))"
)
"""Type of a decoder to integers, as a C function."""


@cache
def integer_decoder() -> Any:
    """`decode_integers` as a C function; few runs need it."""
    return c_function(INTEGER_DECODER)(decode_integers)
