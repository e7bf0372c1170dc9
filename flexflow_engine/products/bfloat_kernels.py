"""Products of bfloat16, compiled: tokens laid out in tiles, and rows of a matrix, multiplied where they lie, or where
they were decoded to, some at a time, in the processor's cache. See flexflow_engine.products.bfloat_layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexflow_engine.cpu.decoding import decode_span
from flexflow_engine.cpu.jit import kernel
from flexflow_engine.products.bfloat_layout import ASKED_ROWS, TILE_NBYTES
from flexflow_engine.products.bfloat_tiles import begin, end, lay_out, multiply_one_block, multiply_two_blocks, put
from flexflow_engine.products.bfloats import COLUMNS_AT_ONCE, TILE_COLUMNS, TILE_ROWS, TILE_TOKENS, decoded_stride
from flexflow_engine.products.drawing import next_part, next_to_make
from flexflow_engine.products.product_table import BIAS, DECODER, ENCODED, OUT, OUT_STRIDE, ROWS, SETTINGS, STRIDE, UNIT

_ITEM, _SUM = 2, 4
_COLUMNS = 2 * TILE_COLUMNS
"""Pieces but a row's last have a multiple of it, so that codecs' groups are seldom cut."""
_NEAR_BLOCKS = 8
"""Of tokens, whose numbers a processor's second cache holds beside those of a part of the matrix."""

_decoded_stride = kernel(decoded_stride)


@kernel
def multiply(tokens: Any, laid_out: Any, table: Any, room: Any, drawn: Any) -> None:
    """All products of some tokens, together with other threads that call it with the same.

    tokens: address of the first token, bytes from token to token; tokens, columns. laid_out: address of all tokens in
    tiles, which are made first. table: int64, a `Product` a line. room: addresses of what this thread alone uses
    (`_Room` of `bfloat_products`), and how many rows it takes at a time. drawn: see `drawing`.
    """
    _, (count, columns) = tokens
    blocks = (count + TILE_TOKENS - 1) // TILE_TOKENS
    block = next_to_make(drawn, -1, blocks)
    while block < blocks:
        _lay_out(tokens, block, laid_out)
        block = next_to_make(drawn, block, blocks)
    (rows, sums, before, wanted), most = room
    begin(before, wanted)
    piece = _next_piece(drawn, table, most, columns, (len(table), 0, 0, columns, 0))
    while piece[0] < len(table):
        following = _next_piece(drawn, table, most, columns, piece)
        _multiply_piece(tokens, laid_out, table, (piece, following), (rows, sums))
        piece = following
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
def _next_piece(drawn: Any, table: Any, most: Any, columns: Any, piece: Any) -> Any:
    """The piece after `piece`, drawn if no columns of its rows are left.

    A piece is what a thread multiplies at a time, some columns of some rows of a matrix, TILE_ROWS at least, which a
    processor's second cache holds beside those of some tokens: line of the table, or as many as there are when none is
    left; first row, how many; first column, how many.
    """
    product, first, some, column, width = piece
    if column + width < columns:
        column += width
    else:
        product, first = next_part(drawn, table, most)
        column = 0
        if product < len(table):
            first = min(first, table[product, ROWS] - TILE_ROWS)
            some = min(most, table[product, ROWS] - first)
    return product, first, some, column, min(_columns_at_once(columns), columns - column)


@kernel
def _columns_at_once(columns: Any) -> Any:
    """COLUMNS_AT_ONCE at most, as many in each piece as far as may be."""
    pieces = (columns + COLUMNS_AT_ONCE - 1) // COLUMNS_AT_ONCE
    return (columns + pieces * _COLUMNS - 1) // (pieces * _COLUMNS) * _COLUMNS


@kernel
def _multiply_piece(tokens: Any, laid_out: Any, table: Any, pieces: Any, room: Any) -> None:
    """A piece times all tokens. pieces: that one, and the one that follows, which is asked for."""
    (_, (count, columns)), (piece, following), (rows, sums) = tokens, pieces, room
    line, first, some, column, width = piece
    product, blocks = table[line], (count + TILE_TOKENS - 1) // TILE_TOKENS
    source, stride = _rows_at(product, piece, columns, rows)
    for near in range(0, blocks, _NEAR_BLOCKS):
        for first_row in range(0, some, TILE_ROWS):
            row = min(first_row, some - TILE_ROWS)
            wanted = _wanted_after(table, piece, following, first_row)
            for block in range(near, min(near + _NEAR_BLOCKS, blocks), 2):
                several = min(2, blocks - block)
                kept = first_row * blocks + block * TILE_ROWS if columns > COLUMNS_AT_ONCE else 0
                place = sums + kept * TILE_TOKENS * _SUM
                _multiply_tile(
                    laid_out + (block * columns + column) * TILE_TOKENS * _ITEM,
                    (columns, width),
                    (source + row * stride, stride, _share_of(wanted, block, blocks)),
                    (place, several, column != 0),
                )
                if column + width == columns:
                    for tile in range(2 * several):
                        chosen = first + row + tile // several * (TILE_ROWS // 2)
                        _put(product, (block + tile % several, count), chosen, place + tile * TILE_NBYTES)


@kernel
def _rows_at(product: Any, piece: Any, columns: Any, room: Any) -> Any:
    """Where the rows of a piece are, decoded if they need be: address, and bytes from row to row. columns: of a whole
    row. room: address, for decoded ones.
    """
    _, first, some, column, width = piece
    if product[DECODER] == 0:
        return _plain_row(product, first, column), product[STRIDE]
    stride, encoded = _decoded_stride(width), (product[ENCODED], product[STRIDE], product[UNIT])
    for row in range(some):
        start = (first + row) * columns + column
        target = room + row * stride - start * _ITEM, product[UNIT] * _ITEM, _ITEM
        decode_span(product[DECODER], product[SETTINGS], encoded, target, (start, start + width))
    return room, stride


@kernel
def _wanted_after(table: Any, piece: Any, following: Any, row: Any) -> Any:
    """Address of the rows that are multiplied after those from `row` of a piece on, of this one or of the following,
    and bytes from row to row; 0 where they are decoded, or none are left.
    """
    line, first, some, column, _ = piece
    if row + TILE_ROWS < some:
        first += min(row + TILE_ROWS, some - TILE_ROWS)
    else:
        line, first, _, column, _ = following
    if line == len(table) or table[line, DECODER] != 0:
        return 0, 0
    return _plain_row(table[line], first, column), table[line, STRIDE]


@kernel
def _share_of(wanted: Any, block: Any, blocks: Any) -> Any:
    """Of TILE_ROWS wanted rows, those that are asked for beside two blocks of tokens: address, bytes from row to row,
    and how many. All are when the near blocks have been multiplied.
    """
    (address, stride), pairs = wanted, (min(_NEAR_BLOCKS, blocks) + 1) // 2
    share = (TILE_ROWS + pairs * ASKED_ROWS - 1) // (pairs * ASKED_ROWS) * ASKED_ROWS
    first = block // 2 * share
    if address == 0 or first >= TILE_ROWS:
        return 0, 0, 0
    return address + first * stride, stride, share


@kernel
def _plain_row(product: Any, row: Any, column: Any) -> Any:
    return product[ENCODED] + row * product[STRIDE] + column * _ITEM


@kernel
def _multiply_tile(tokens: Any, columns: Any, rows: Any, sums: Any) -> None:
    """TILE_ROWS rows times one or two blocks of tokens. tokens: address of the first tile. columns: of a token, and how
    many are multiplied. rows: as `Places` has them. sums: address, blocks, and whether products are added.
    """
    (all_columns, width), (source, stride, wanted), (place, blocks, adds) = columns, rows, sums
    block_nbytes = all_columns * TILE_TOKENS * _ITEM
    places = source, stride, *wanted, tokens, block_nbytes, width, place, np.int64(adds)
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
