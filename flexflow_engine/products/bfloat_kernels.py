"""Products of bfloat16, compiled: tokens laid out in tiles, and rows of a matrix, multiplied where they lie, or where
they were decoded to, some at a time, in the processor's cache. See flexflow_engine.products.bfloat_layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_engine.cpu.decoding import decode_span
from flexflow_engine.cpu.jit import kernel
from flexflow_engine.products.bfloat_layout import TILE_NBYTES
from flexflow_engine.products.bfloat_tiles import begin, end, lay_out, multiply_one_block, multiply_two_blocks, put
from flexflow_engine.products.bfloats import COLUMNS_AT_ONCE, TILE_COLUMNS, TILE_ROWS, TILE_TOKENS
from flexflow_engine.products.drawing import next_part, next_to_make
from flexflow_engine.products.product_table import BIAS, DECODER, ENCODED, OUT, OUT_STRIDE, ROWS, SETTINGS, STRIDE, UNIT

_ITEM, _SUM = 2, 4
_NEAR_BLOCKS = 8
"""Of tokens, whose numbers a processor's second cache holds beside those of a part of the matrix."""


@kernel
def multiply(tokens: Any, laid_out: Any, table: Any, room: Any, drawn: Any) -> None:
    """All products of some tokens, together with other threads that call it with the same.

    tokens: address of the first token, bytes from token to token; tokens, columns. laid_out: address of all tokens in
    tiles, which are made first. table: int64, a `Product` a line. room: addresses of what this thread alone uses
    (`_Room` of `bfloat_products`), and how many rows it takes at a time. drawn: see `drawing`.
    """
    _, (count, _) = tokens
    blocks = (count + TILE_TOKENS - 1) // TILE_TOKENS
    block = next_to_make(drawn, -1, blocks)
    while block < blocks:
        _lay_out(tokens, block, laid_out)
        block = next_to_make(drawn, block, blocks)
    (rows, sums, before, wanted), most = room
    begin(before, wanted)
    product, first = next_part(drawn, table, most)
    while product < len(table):
        _multiply_part(tokens, laid_out, table[product], (rows, sums), (first, most))
        product, first = next_part(drawn, table, most)
    end(before)


@kernel
def _lay_out(tokens: Any, block: Any, laid_out: Any) -> None:
    """TILE_TOKENS tokens."""
    (address, stride), (count, columns) = tokens
    first, target = block * TILE_TOKENS, laid_out + block * TILE_TOKENS * columns * _ITEM
    for tile in range(columns // TILE_COLUMNS):
        source = address + first * stride + tile * TILE_COLUMNS * _ITEM, stride, count - first
        lay_out(source, target + tile * TILE_NBYTES)


@kernel
def _multiply_part(tokens: Any, laid_out: Any, product: Any, room: Any, span: Any) -> None:
    """Some rows of a matrix from the first on, times all tokens; fewer than TILE_ROWS with some before.

    Some columns of all these rows at a time, which a processor's second cache holds beside those of some tokens.
    """
    (_, (count, columns)), (rows, sums), (first, most) = tokens, room, span
    first = min(first, product[ROWS] - TILE_ROWS)
    some, blocks = min(most, product[ROWS] - first), (count + TILE_TOKENS - 1) // TILE_TOKENS
    for column in range(0, columns, COLUMNS_AT_ONCE):
        width = min(COLUMNS_AT_ONCE, columns - column)
        source, stride, ahead = _rows_at(product, (first, some), (columns, column, width), rows)
        for near in range(0, blocks, _NEAR_BLOCKS):
            for first_row in range(0, some, TILE_ROWS):
                row = min(first_row, some - TILE_ROWS)
                for block in range(near, min(near + _NEAR_BLOCKS, blocks), 2):
                    several = min(2, blocks - block)
                    kept = first_row * blocks + block * TILE_ROWS if columns > COLUMNS_AT_ONCE else 0
                    place = sums + kept * TILE_TOKENS * _SUM
                    _multiply_tile(
                        laid_out + (block * columns + column) * TILE_TOKENS * _ITEM,
                        (columns, width),
                        (source + row * stride, stride, ahead if block == 0 else 0),
                        (place, several, column != 0),
                    )
                    if column + width == columns:
                        for tile in range(2 * several):
                            chosen = first + row + tile // several * (TILE_ROWS // 2)
                            _put(product, (block + tile % several, count), chosen, place + tile * TILE_NBYTES)


@kernel
def _rows_at(product: Any, span: Any, columns: Any, room: Any) -> Any:
    """Where some columns of some rows are, decoded if they need be: address, bytes from row to row, and from a row to
    one that will be wanted soon. span: first row, how many; columns: of a row, first, how many.
    """
    (first, some), (all_columns, column, width) = span, columns
    if product[DECODER] == 0:
        stride = product[STRIDE]
        return product[ENCODED] + first * stride + column * _ITEM, stride, TILE_ROWS * stride
    encoded = product[ENCODED], product[STRIDE], product[UNIT]
    for row in range(some):
        start = (first + row) * all_columns + column
        target = room + (row * width - start) * _ITEM, product[UNIT] * _ITEM, _ITEM
        decode_span(product[DECODER], product[SETTINGS], encoded, target, (start, start + width))
    return room, width * _ITEM, np.int64(0)


@kernel
def _multiply_tile(tokens: Any, columns: Any, rows: Any, sums: Any) -> None:
    """TILE_ROWS rows times one or two blocks of tokens. tokens: address of the first tile. columns: of a token, and how
    many are multiplied. rows: as `Places` has them. sums: address, blocks, and whether products are added.
    """
    (all_columns, width), (source, stride, ahead), (place, blocks, adds) = columns, rows, sums
    block_nbytes = all_columns * TILE_TOKENS * _ITEM
    places = source, stride, ahead, tokens, block_nbytes, width, place, np.int64(adds)
    if blocks == 2:
        multiply_two_blocks(places)
    else:
        multiply_one_block(places)


@kernel
def _put(product: Any, tokens: Any, row: Any, sums: Any) -> None:
    """A tile's sums, plus bias, to their places. tokens: which block of how many."""
    (block, count), bias = tokens, product[BIAS]
    nbytes = product[OUT_STRIDE] * _ITEM
    out = product[OUT] + block * TILE_TOKENS * nbytes + row * _ITEM
    put((sums, bias + row * _ITEM if bias != 0 else 0, out, nbytes, count - block * TILE_TOKENS))
