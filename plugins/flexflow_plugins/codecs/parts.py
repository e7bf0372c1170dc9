"""Groups of four parts with grids of their own, compiled: the format of `group-int4`.

One group has 32 bits for its grids, as much as a scale and a low in float16 take. They say a step that its parts share,
and for each part, a quarter of the group's numbers, how much of it the part's scale and low are:

    bits of the word   0 ... 7   e             step = 2^(e // 8 - 18) * (1 + e % 8 / 8), but for
                                               e = 0: all numbers are one, whose float32 has the word's other bits
                                               e = 255: not a number, and so are the group's numbers
                       8 + 6 q   3 bits  c     scale = step * (c + 1) / 8, of part q
                      11 + 6 q   3 bits  l     low = -step * l * 5 / 4

    encoded            | codes, low nibble first | one word a group, little-endian |
    number             low + code * scale; the product is exact in float32, so every processor gets the same number

A part is of an even number of numbers, the least that lets four cover a group: 16 of 64. Arguments are those of
flexflow_plugins.codecs.kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.cpu.jit import c_function, kernel
from flexflow_engine.cpu.numbers import narrow, widen
from flexflow_engine.cpu.pointers import offset, pointer
from flexflow_plugins.codecs.kernels import HALF_BYTE, INTEGER_DECODER, NIBBLE, decode_nibbles, is_finite, next_group
from flexflow_plugins.codecs.part_format import GROUP_SIZE, LEAST, LOW_EIGHTHS, NUM_PARTS
from flexflow_plugins.codecs.part_grids import HUGE, NO_NUMBER, constant_of, grid_of, has_grids, part_size, step_of
from flexflow_plugins.codecs.part_lanes import CODES_A_WORD, GROUPS_AT_ONCE, LANES, WORD_NBYTES, padded, spread
from flexflow_plugins.codecs.part_search import find_grids, make_room, quantise
from flexflow_plugins.codecs.part_vectors import decode_group_integers, decode_groups


def decode(encoded: Any, settings: Any, first: Any, count: Any, out: Any) -> None:
    """Numbers [first, first + count) of one tensor, by pointers; settings: shape. See `KernelDecoder`."""
    size, group_size = settings[0], settings[1]
    words, stop = (size + 1) // 2, first + count
    group, begin = first // group_size, first
    while begin < stop:
        word, numbers, several = offset(encoded, words + 4 * group), offset(out, begin - first), 1
        start, end = group * group_size, min(stop, (group + 1) * group_size)
        if end - begin == GROUP_SIZE == group_size:
            several = (stop - begin) // GROUP_SIZE
            end = begin + several * GROUP_SIZE
            if decode_groups(offset(encoded, begin // 2), word, several, numbers):
                _decode_others(encoded, word, (begin, several), numbers)
        else:
            _decode_group(encoded, word_at(word, 0), (start, begin, end), group_size, numbers)
        group += several
        begin = end


@kernel
def _decode_others(encoded: Any, words: Any, groups: Any, numbers: Any) -> None:
    """Of whole groups of GROUP_SIZE, those that `decode_groups` does not decode. words: pointer to the first one's.
    groups: the first one's first number in the tensor, and how many.
    """
    first, count = groups
    for group in range(count):
        word, start = word_at(words, 4 * group), first + group * GROUP_SIZE
        if not has_grids(word):
            span = start, start, start + GROUP_SIZE
            _decode_group(encoded, word, span, GROUP_SIZE, offset(numbers, group * GROUP_SIZE))


@kernel
def _decode_group(encoded: Any, word: Any, span: Any, group_size: Any, numbers: Any) -> None:
    """The numbers [first, end) of the group that begins at `start`, all counted through the tensor. span: start, first
    and end. numbers: pointer to the place of number `first`.
    """
    step = step_of(word)
    if step == 0:
        _fill(numbers, span[2] - span[1], constant_of(word))
    else:
        _decode_parts(encoded, (step, np.uint32(word >> np.uint32(8))), span, group_size, numbers)


@kernel
def _fill(numbers: Any, count: Any, number: Any) -> None:
    for i in range(count):
        numbers[i] = narrow(number, numbers)


@kernel
def _decode_parts(encoded: Any, grids: Any, span: Any, group_size: Any, numbers: Any) -> None:
    """The same of a group whose numbers differ. grids: its step, and the bits of its parts."""
    (step, bits), (start, first, end), part = grids, span, part_size(group_size)
    begin = start
    for _ in range(NUM_PARTS):
        scale, low = grid_of(step, bits)
        at, until = max(first, begin), min(end, begin + part)
        if at < until:
            decode_nibbles(encoded, at, until, scale, low, offset(numbers, at - first))
        bits = np.uint32(bits >> np.uint32(6))
        begin += part


def decode_integers(  # noqa: PLR0917  # a C function's
    encoded: Any, settings: Any, first: Any, count: Any, integers: Any, scales: Any, lows: Any
) -> None:
    """The same as multiples of an eighth of a group's step, less LEAST; constant groups as ones. `IntegerDecoder`'s."""
    size, group_size = settings[0], settings[1]
    words, begin = (size + 1) // 2, first // group_size
    for group in range(begin, (first + count) // group_size):
        word, numbers = word_at(encoded, words + 4 * group), offset(integers, (group - begin) * group_size)
        step, grids = step_of(word), np.uint32(word >> np.uint32(8))
        scale = constant_of(word) if step == 0 else step * np.float32(0.125)
        scales[group - begin] = scale
        lows[group - begin] = np.float32(0) if step == 0 else scale * np.float32(LEAST)
        if step == 0:
            for i in range(group_size):
                numbers[i] = np.uint8(1)
        elif group_size == GROUP_SIZE:
            decode_group_integers(offset(encoded, group * GROUP_SIZE // 2), grids, numbers)
        else:
            _decode_multiples(offset(encoded, group * group_size // 2), grids, group_size, numbers)


@kernel
def _decode_multiples(pairs: Any, bits: Any, group_size: Any, numbers: Any) -> None:
    """Of a whole group, whose codes are at `pairs`."""
    part = part_size(group_size)
    for q in range(NUM_PARTS):
        scale = np.uint8((bits & np.uint32(7)) + np.uint32(1))
        low = np.uint8(-LEAST - LOW_EIGHTHS * np.int32((bits >> np.uint32(3)) & np.uint32(7)))
        codes, out = offset(pairs, q * part // 2), offset(numbers, q * part)
        for i in range(min(part, group_size - q * part) // 2):
            pair = codes[i]
            out[2 * i] = np.uint8((pair & NIBBLE) * scale + low)
            out[2 * i + 1] = np.uint8((pair >> HALF_BYTE) * scale + low)
        bits = np.uint32(bits >> np.uint32(6))


@kernel
def encode(values: Any, encoded: Any, shape: Any, span: Any, reach: Any) -> None:
    """Fill the groups' places in `encoded`; reach: of flexflow_plugins.codecs.part_search."""
    (data, data_stride), (source, stride), (size, group_size, _), (first, stop) = encoded, values, shape, span
    num_groups = (size + group_size - 1) // group_size
    words, part = (size + 1) // 2, part_size(group_size)
    width = padded(part)
    numbers = np.zeros((GROUPS_AT_ONCE, NUM_PARTS * width), np.float32)
    lanes, grids = np.empty((width, LANES), np.float32), np.empty(GROUPS_AT_ONCE, np.uint32)
    room, finite = make_room(), np.empty(GROUPS_AT_ONCE, np.bool_)
    codes = np.empty(((part + CODES_A_WORD - 1) // CODES_A_WORD, LANES), np.uint32)
    inputs, outputs = pointer(source.ctypes.data, source), pointer(data.ctypes.data, data)
    rows, columns = pointer(numbers.ctypes.data, numbers), pointer(codes.ctypes.data, codes)
    for start in range(first, stop, GROUPS_AT_ONCE):
        count = min(GROUPS_AT_ONCE, stop - start)
        tensor, group = start // num_groups, start % num_groups
        for k in range(count):
            begin, row = group * group_size, offset(rows, k * NUM_PARTS * width)
            several = min(group_size, size - begin)
            finite[k] = _take(offset(inputs, tensor * stride + begin), several, NUM_PARTS * part, row)
            if part < width:
                _move_apart(row, part, width)
            tensor, group = next_group(tensor, group, num_groups)
        spread(numbers, lanes)
        find_grids(lanes, part, grids, room, reach)
        for k in range(count):
            grids[k] = grids[k] if finite[k] else NO_NUMBER
        quantise(lanes, part, grids, room, codes)
        tensor, group = start // num_groups, start % num_groups
        for k in range(count):
            begin, out = group * group_size, offset(outputs, tensor * data_stride)
            _put(offset(columns, k), part, offset(out, begin // 2), (min(group_size, size - begin) + 1) // 2)
            _store_word(offset(out, words + 4 * group), grids[k])
            tensor, group = next_group(tensor, group, num_groups)


@kernel
def _take(values: Any, count: Any, room: Any, numbers: Any) -> Any:
    """A group's `count` numbers, clipped, and the last one again until there are `room`; zeros if any is not finite.

    Whether all are. By pointers, as what follows.
    """
    infinite = False
    for i in range(count):
        number = np.float32(widen(values[i]))
        numbers[i] = min(max(number, -HUGE), HUGE)
        infinite |= not is_finite(number)
    last = np.float32(0) if infinite else numbers[count - 1]
    for i in range(0 if infinite else count, room):
        numbers[i] = last
    return not infinite


@kernel
def _move_apart(numbers: Any, part: Any, width: Any) -> None:
    """Parts that lie one behind the other, so that each has room for `width` numbers."""
    for q in range(NUM_PARTS - 1, 0, -1):
        for i in range(part - 1, -1, -1):
            numbers[q * width + i] = numbers[q * part + i]


@kernel
def _put(codes: Any, part: Any, out: Any, nbytes: Any) -> None:
    """The codes of a group, two a byte, as many as there is room for. codes: from the group's column on."""
    half = part // 2
    for q in range(NUM_PARTS):
        words, place = offset(codes, q * GROUPS_AT_ONCE), offset(out, q * half)
        several = max(0, min(half, nbytes - q * half))
        whole, rest = several // WORD_NBYTES, several % WORD_NBYTES
        for word in range(whole):
            _store_word(offset(place, WORD_NBYTES * word), words[word * LANES])
        for byte in range(rest):
            bits = words[whole * LANES] >> np.uint32(8 * byte)
            place[WORD_NBYTES * whole + byte] = np.uint8(bits & np.uint32(0xFF))


@kernel
def _store_word(place: Any, word: Any) -> None:
    for byte in range(WORD_NBYTES):
        place[byte] = np.uint8((word >> np.uint32(8 * byte)) & np.uint32(0xFF))


@kernel
def word_at(encoded: Any, place: Any) -> Any:
    """Little-endian, and at any place: a tensor's bytes need not start at a multiple of four."""
    low = np.uint32(encoded[place]) | (np.uint32(encoded[place + 1]) << np.uint32(8))
    return np.uint32(
        low | (np.uint32(encoded[place + 2]) << np.uint32(16)) | (np.uint32(encoded[place + 3]) << np.uint32(24))
    )


def _decoder(number: str) -> Any:
    """`decode` into numbers of one type, as a C function."""
    return c_function(f"void(CPointer(uint8), CPointer(int64), int64, int64, CPointer({number}))")(decode)


DECODERS: Mapping[DType, Any] = {  # last: compiled as soon as it is read
    "float32": _decoder("float32"),
    "bfloat16": _decoder("uint16"),
    "float16": _decoder("int16"),
}


@cache
def integer_decoder() -> Any:
    """`decode_integers` as a C function; few runs need it."""
    return c_function(INTEGER_DECODER)(decode_integers)
