"""Products of 8-bit integers, compiled: tokens rounded to integers, and rows of a matrix that are decoded to integers
some at a time and multiplied while they are in the processor's cache. See flexflow_engine.products.integer_tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_engine.cpu.jit import kernel
from flexflow_engine.cpu.numbers import round_to, widen
from flexflow_engine.cpu.pointers import call_integer_decoder, offset, pointer
from flexflow_engine.products.drawing import next_part, next_to_make
from flexflow_engine.products.integer_tiles import LANES, QUAD, TILE_ROWS, TILE_TOKENS, VECTORS, multiply_tile
from flexflow_engine.products.product_table import BIAS, DECODER, ENCODED, OUT, OUT_STRIDE, ROWS, SETTINGS, STRIDE, UNIT

_MOST = np.float32(127)
_ROUNDER = np.float32(1.5 * 2**23)
"""Added to a number between -128 and 127 it leaves the nearest integer in the lowest byte of a float32."""
_ROUNDER_BITS, _BYTE = np.uint32(0x4B400000), np.uint32(0xFF)
_MAGNITUDE, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_WORDS, _FLOATS = np.empty(0, np.uint32), np.empty(0, np.float32)
_SMALLEST = np.float32(1e-37)
"""Of scales whose inverse is finite; numbers of smaller ones are taken for zeros."""


@kernel
def multiply(tokens: Any, rounded: Any, table: Any, room: Any, drawn: Any) -> None:
    """All products of some tokens, together with other threads that call it with the same.

    tokens: array of one of the number formats, of which only the type counts, address of the first token, numbers from
    token to token; tokens, columns, group size. rounded: addresses of all tokens' integers and scales, as
    `multiply_tile` takes them, which are made first. table: int64, a `Product` a line. room: addresses of what this
    thread alone uses (`_Room` of `integer_products`), and how many rows it has room for. drawn: see `drawing`.
    """
    (_, _, _), (count, _, _) = tokens
    tiles = (count + TILE_TOKENS - 1) // TILE_TOKENS
    tile = next_to_make(drawn, -1, tiles)
    while tile < tiles:
        _round_tile(tokens, tile, rounded)
        tile = next_to_make(drawn, tile, tiles)
    product, first = next_part(drawn, table, room[1])
    while product < len(table):
        _multiply_part(tokens, rounded, table[product], room, first)
        product, first = next_part(drawn, table, room[1])


@kernel
def _round_tile(tokens: Any, tile: Any, rounded: Any) -> None:
    """Round TILE_TOKENS tokens; behind the last scales are zeros. A group that isn't finite has NaN as its scale."""
    ((like, address, stride), (count, columns, group_size)), (integers, scales) = tokens, rounded
    groups, quads = columns // group_size, np.empty(group_size, np.int8)
    numbers, source = pointer(address, like), pointer(quads.ctypes.data, _WORDS)
    for vector in range(tile * VECTORS, (tile + 1) * VECTORS):
        for group in range(groups):
            target = pointer(integers + (vector * columns + group * group_size) * LANES, _WORDS)
            found = pointer(scales + 4 * (vector * 2 * groups + group) * LANES, _FLOATS)
            for lane in range(LANES):
                token, scale, total = vector * LANES + lane, np.float32(0), np.int32(0)
                if token < count:
                    scale, total = _round_group(offset(numbers, token * stride + group * group_size), quads)
                found[lane] = scale
                found[groups * LANES + lane] = scale * np.float32(total)
                for i in range(group_size // QUAD):
                    target[i * LANES + lane] = source[i]


@kernel
def _round_group(numbers: Any, integers: Any) -> Any:
    """Integers from -127 to 127 to int8 [group size]; their scale and their sum."""
    largest = np.uint32(0)
    for i in range(len(integers)):
        largest = max(largest, np.uint32(np.float32(widen(numbers[i])).view(np.uint32) & _MAGNITUDE))
    if largest >= _INFINITE:
        integers[:] = 0
        return np.float32(np.nan), np.int32(0)
    scale = np.uint32(largest).view(np.float32) / _MOST
    inverse = np.float32(1) / scale if scale > _SMALLEST else np.float32(0)
    total = np.int32(0)
    for i in range(len(integers)):
        bits = np.float32(np.float32(widen(numbers[i])) * inverse + _ROUNDER).view(np.uint32)
        integers[i] = np.int8(bits & _BYTE)
        total += np.int32(bits - _ROUNDER_BITS)
    return scale, total


@kernel
def _multiply_part(tokens: Any, rounded: Any, product: Any, room: Any, first: Any) -> None:
    """As many rows of a matrix from `first` on as there is room for, times all tokens; rounded once, bias included."""
    ((like, _, _), (count, columns, group_size)), (integers, scales) = tokens, rounded
    (rows, row_scales, row_lows, sums, results), most = room  # rows behind the last are multiplied, whatever they are
    groups, some = columns // group_size, min(most, product[ROWS] - first)
    padded = (some + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    _decode_rows(product, (first * columns, (first + some) * columns), group_size, (rows, row_scales, row_lows))
    for token in range(0, count, TILE_TOKENS):
        vector = token // LANES
        for row in range(0, padded, TILE_ROWS):
            skipped = 4 * row * groups
            multiply_tile(
                groups,
                group_size // QUAD,
                (
                    integers + vector * columns * LANES,
                    scales + 4 * vector * 2 * groups * LANES,
                    rows + row * columns,
                    row_scales + skipped,
                    row_lows + skipped,
                    sums,
                    results + 4 * row,
                    padded,
                ),
            )
        _put(like, product, (token, min(TILE_TOKENS, count - token)), (first, some), (results, padded))


@kernel
def _put(like: Any, product: Any, tokens: Any, rows: Any, results: Any) -> None:
    """Some tokens' sums, plus bias, to their places. tokens and rows: the first, and how many. results: address, and
    numbers from token to token.
    """
    (first, count), (first_row, some), (sums, stride) = tokens, rows, results
    biases, found = offset(pointer(product[BIAS], like), first_row), pointer(sums, _FLOATS)
    for token in range(count):
        out = offset(pointer(product[OUT], like), (first + token) * product[OUT_STRIDE] + first_row)
        result = offset(found, token * stride)
        if product[BIAS] == 0:
            for row in range(some):
                out[row] = round_to(result[row], out)
        else:
            for row in range(some):
                out[row] = round_to(result[row] + widen(biases[row]), out)


@kernel
def _decode_rows(product: Any, span: Any, group_size: Any, room: Any) -> None:
    """Numbers [start, stop), counted through all units, to the addresses of integers, scales and lows."""
    (start, stop), (integers, scales, lows), done = span, room, 0
    while start < stop:
        first = start % product[UNIT]
        count = min(product[UNIT] - first, stop - start)
        skipped = 4 * (done // group_size)
        encoded = product[ENCODED] + start // product[UNIT] * product[STRIDE]
        places = integers + done, scales + skipped, lows + skipped
        call_integer_decoder(product[DECODER], encoded, product[SETTINGS], (first, count), places)
        start += count
        done += count
