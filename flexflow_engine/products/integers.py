"""Matrices that the host multiplies as 8-bit integers, as their codec decodes them; see `products.integer_products`."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

import torch

from flexflow_engine.abc.codec import INTEGER_GROUP_UNIT, Codec
from flexflow_engine.cpu.instructions import has_integer_instructions
from flexflow_engine.products.product_table import Matrix
from flexflow_engine.products.widening import WIDENED_TOKENS, Cut, rows_at_once

_LARGEST_GROUP = 2**16
"""Whose sums have room in 32 bits."""
PADDED_TOKENS, PADDED_ROWS = 32, 8
"""Tokens, and a matrix's rows, are filled up to multiples of them: whole tiles on every processor."""
_ROOM_NUMBERS = 2**18
"""Of a matrix, that a thread decodes at a time: its second cache holds them beside a tile's tokens."""
_NUMBER_NBYTES = 3
"""An integer, and at most what a group of four has: a scale and a low of a matrix's, a scale and a sum of tokens'."""
_ROW_NBYTES = 4 * PADDED_TOKENS + 4 * PADDED_TOKENS + 64
"""Of a row that a thread makes: its products with a tile of tokens, its sums in a tile, and what aligns the rest."""


def integer_matrix(codec: Codec, encoded: torch.Tensor, unit_shape: tuple[int, int], *, rows: int) -> Matrix | None:
    """None where the codec, this processor, or groups that don't divide a row leave numbers to be multiplied."""
    if not (codec.multiplies_integers and has_integer_instructions()):
        return None
    decoder = codec.integer_decoder(unit_shape)
    size = decoder.group_size
    if size % INTEGER_GROUP_UNIT or size > _LARGEST_GROUP or unit_shape[1] % size:
        return None
    return Matrix(
        encoded,
        unit_shape,
        rows=rows,
        decoder=decoder.address,
        settings=decoder.settings,
        group_size=size,
        owner=decoder.owner,
    )


def cut_integers(rows: int, columns: int, threads: int) -> Cut:
    """Of matrices of which the largest has so many rows, among at most so many threads; parts of whole PADDED_ROWS."""
    most = max(PADDED_ROWS, rows_at_once(columns) // PADDED_ROWS * PADDED_ROWS)
    threads = min(threads, most // PADDED_ROWS, ceil(rows / PADDED_ROWS))
    held = min(most // threads, max(PADDED_ROWS, _ROOM_NUMBERS // columns)) // PADDED_ROWS * PADDED_ROWS
    return Cut(threads, min(held, ceil(rows / threads / PADDED_ROWS) * PADDED_ROWS))


def integer_nbytes(tokens: int, matrices: Iterable[tuple[int, int]]) -> int:
    """Bytes that products of `tokens` tokens and matrices [rows, columns] take beside their results, at most, whatever
    the number of threads and the codec's groups; they are kept for the next product.
    """
    padded = ceil(min(tokens, WIDENED_TOKENS) / PADDED_TOKENS) * PADDED_TOKENS

    def nbytes(rows: int, columns: int) -> int:
        held = max(PADDED_ROWS, min(2 * rows + PADDED_ROWS, rows_at_once(columns)))
        return _NUMBER_NBYTES * columns * (padded + held) + _ROW_NBYTES * held

    return max(nbytes(rows, columns) for rows, columns in matrices)
