"""Encoding and decoding of groups, compiled.

A kernel works on the groups `span` = (first, stop) of many tensors, counted through all of them, so that threads share
the work by ranges. Arrays come as (1-D array, elements from one tensor to the next): `encoded` of uint8, `values` of
float32, uint16 or int16 (see numbers.py). `shape` is (numbers a tensor, group size, bits a code).

    encoded   | codes: group_nbytes a group, the last cut short | scale, float16, a group | low, float16, a group |
    number    low + code * scale; the product is exact in float32, so every processor gets the same number

4-bit codes: number 2 i of a group in the low half of byte i, number 2 i + 1 in the high half.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_plugins.codecs.fitting import cover, quantise, search
from flexflow_plugins.codecs.jit import kernel
from flexflow_plugins.codecs.numbers import NAN_HALF, half_to_float, narrow, widen

_NIBBLE = np.uint8(15)


@kernel
def decode(encoded: Any, values: Any, shape: Any, span: Any) -> None:
    """Fill the groups' places in `values`."""
    (data, data_stride), (numbers, stride), (size, group_size, bits), (first, stop) = encoded, values, shape, span
    num_groups = (size + group_size - 1) // group_size
    scales = (size * bits + 7) // 8
    tensor, group = first // num_groups, first % num_groups
    for _ in range(first, stop):
        start, base = group * group_size, tensor * data_stride
        scale = half_to_float(_half_bits(data, base + scales + 2 * group))
        low = half_to_float(_half_bits(data, base + scales + 2 * (num_groups + group)))
        count = min(group_size, size - start)
        codes = data[base + start * bits // 8 : base + ((start + count) * bits + 7) // 8]
        out = numbers[tensor * stride + start : tensor * stride + start + count]
        if bits == 4:  # in place: calling a function with the slices counts references: a fifth slower
            pairs = codes[: count // 2]
            for i in range(len(pairs)):
                out[2 * i] = narrow(np.float32(pairs[i] & _NIBBLE) * scale + low, out)
                out[2 * i + 1] = narrow(np.float32(pairs[i] >> np.uint8(4)) * scale + low, out)
            if count % 2:
                out[count - 1] = narrow(np.float32(codes[count // 2] & _NIBBLE) * scale + low, out)
        else:
            for i in range(len(codes)):
                out[i] = narrow(np.float32(codes[i]) * scale + low, out)
        group += 1
        if group == num_groups:
            tensor, group = tensor + 1, 0


@kernel
def encode(values: Any, encoded: Any, shape: Any, span: Any, searches: Any) -> None:
    """Fill the groups' places in `encoded`; searches: whether `search` looks for a better grid than `cover`'s."""
    (data, data_stride), (source, stride), (size, group_size, bits), (first, stop) = encoded, values, shape, span
    num_groups = (size + group_size - 1) // group_size
    scales = (size * bits + 7) // 8
    levels = np.float32(2**bits - 1)
    numbers, centred = np.empty(group_size, np.float32), np.empty(group_size, np.float32)
    codes = np.empty(group_size, np.uint8)
    tensor, group = first // num_groups, first % num_groups
    for _ in range(first, stop):
        start, base = group * group_size, tensor * data_stride
        count = min(group_size, size - start)
        scale, low = np.uint32(0), NAN_HALF
        codes[:] = 0
        if _load(source[tensor * stride + start : tensor * stride + start + count], numbers):
            low, scale = cover(numbers[:count], levels)
            if searches:
                low, scale = search(numbers[:count], centred[:count], levels, low, scale)
            quantise(numbers[:count], half_to_float(low), half_to_float(scale), levels, codes)
        _store_codes(codes, bits, data[base + start * bits // 8 : base + ((start + count) * bits + 7) // 8])
        _store_half(data, base + scales + 2 * group, scale)
        _store_half(data, base + scales + 2 * (num_groups + group), low)
        group += 1
        if group == num_groups:
            tensor, group = tensor + 1, 0


@kernel
def _load(values: Any, numbers: Any) -> Any:
    """`values` into `numbers`; whether all of them are finite."""
    infinite = False
    for i in range(len(values)):
        number = np.float32(widen(values[i]))
        numbers[i] = number
        infinite |= (number.view(np.uint32) & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return not infinite


@kernel
def _store_codes(codes: Any, bits: Any, out: Any) -> None:
    if bits == 4:
        for i in range(len(out)):
            out[i] = codes[2 * i] | (codes[2 * i + 1] << np.uint8(4))
    else:
        for i in range(len(out)):
            out[i] = codes[i]


@kernel
def _half_bits(encoded: Any, place: Any) -> Any:
    """Little-endian, and at any place: a tensor's bytes need not start at an even one."""
    return np.uint32(encoded[place]) | (np.uint32(encoded[place + 1]) << np.uint32(8))


@kernel
def _store_half(encoded: Any, place: Any, bits: Any) -> None:
    encoded[place] = np.uint8(bits & np.uint32(0xFF))
    encoded[place + 1] = np.uint8(bits >> np.uint32(8))
