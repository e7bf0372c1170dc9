"""Matrices that the host multiplies in bfloat16 by kernels of its own; see `products.bfloat_products`."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

import torch

from flexflow_engine.abc.codec import KernelDecoder
from flexflow_engine.cpu.instructions import has_amx, has_bfloat_instructions
from flexflow_engine.products.bfloat_layout import LINE_COLUMNS, LINE_NBYTES, LINES
from flexflow_engine.products.product_table import Matrix
from flexflow_engine.products.widening import WIDENED_TOKENS, Cut

TILE_ROWS, TILE_TOKENS = 2 * LINES, LINES
"""Of a matrix, that are multiplied at once, and tokens, to a multiple of which they are filled up."""
TILE_COLUMNS = LINE_COLUMNS
"""Columns of a matrix are a multiple of it."""
COLUMNS_AT_ONCE = 2048
"""That are multiplied of a part's rows, at most, before the next ones."""
CONFIGURATION_NBYTES = LINE_NBYTES
"""Of how a thread's AMX was configured before."""
_PART_NUMBERS = 2**18
"""Of a matrix, that a thread multiplies at a time, at most: its second cache holds them beside as many of tokens."""
_PARTS_A_THREAD = 4
"""Of the largest matrix, as far as there are tiles: who is kept from working takes fewer."""
_HELD_NUMBERS = 2**23
"""That all threads hold at a time, at most."""
_NUMBER_NBYTES, _SUM_NBYTES = 2, 4
_SUMS_NBYTES = _SUM_NBYTES * TILE_ROWS * 2 * TILE_TOKENS
"""Of a thread's sums with two blocks of tokens."""


def plain_matrix(weight: torch.Tensor) -> Matrix | None:
    """weight: [rows, columns] in host memory. None where torch multiplies it."""
    if weight.stride(1) != 1 or not _has_shape(*weight.shape) or not multiplies_plain(weight.dtype):
        return None
    return Matrix(weight, (1, weight.shape[1]), rows=len(weight))


def encoded_matrix(
    decoder: KernelDecoder, encoded: torch.Tensor, unit_shape: tuple[int, int], *, rows: int
) -> Matrix | None:
    """encoded: uint8 [units, unit_nbytes] in host memory. None where its numbers are made for torch."""
    if not (_has_shape(rows, unit_shape[1]) and has_bfloat_instructions()):
        return None
    address = decoder.addresses["bfloat16"]
    return Matrix(encoded, unit_shape, rows=rows, decoder=address, settings=decoder.settings, owner=decoder.owner)


def _has_shape(rows: int, columns: int) -> bool:
    """Of what kernels multiply."""
    return rows >= TILE_ROWS and columns % TILE_COLUMNS == 0


def cut_bfloats(rows: int, columns: int, threads: int) -> Cut:
    """Of matrices of which the largest has so many rows, among at most so many threads."""
    most_threads, most_tiles = _most(rows, columns)
    threads = min(threads, most_threads)
    held = min(most_tiles // threads, max(1, _PART_NUMBERS // (TILE_ROWS * min(columns, COLUMNS_AT_ONCE))))
    return Cut(threads, TILE_ROWS * min(held, ceil(rows / (TILE_ROWS * _PARTS_A_THREAD * threads))))


def bfloat_nbytes(tokens: int, matrices: Iterable[tuple[int, int]]) -> int:
    """Bytes that products of `tokens` tokens and matrices [rows, columns] take beside their results, at most, whatever
    the number of threads; they are kept for the next product.
    """

    def nbytes(rows: int, columns: int) -> int:
        threads, tiles = _most(rows, columns)
        room = sum(room_nbytes(tiles * TILE_ROWS, columns, tokens)) + (threads - 1) * _SUMS_NBYTES
        return tokens_nbytes(tokens, columns) + room + threads * CONFIGURATION_NBYTES

    return max((nbytes(rows, columns) for rows, columns in matrices if _has_shape(rows, columns)), default=0)


def tokens_nbytes(tokens: int, columns: int) -> int:
    """Of tokens in tiles."""
    return _padded(tokens) * columns * _NUMBER_NBYTES


def room_nbytes(rows: int, columns: int, tokens: int) -> tuple[int, int]:
    """Of so many rows as they are decoded, some columns at a time, and of their sums; a tile's are enough where all
    columns are multiplied at once.
    """
    decoded = rows * decoded_stride(min(columns, COLUMNS_AT_ONCE))
    sums = _SUM_NBYTES * rows * _padded(tokens) if columns > COLUMNS_AT_ONCE else 0
    return decoded, max(_SUMS_NBYTES, sums)


def decoded_stride(columns: int) -> int:
    """Bytes from row to row of decoded rows: an odd number of lines, so that a tile's lie all over a cache."""
    return (columns // LINE_COLUMNS | 1) * LINE_NBYTES


def _padded(tokens: int) -> int:
    return ceil(min(tokens, WIDENED_TOKENS) / TILE_TOKENS) * TILE_TOKENS


def _most(rows: int, columns: int) -> tuple[int, int]:
    """Threads that share a matrix, and tiles of its rows that they hold at a time, at most; whole ones for each thread,
    and no more for any number of them.
    """
    parts = ceil(rows / (TILE_ROWS * _PARTS_A_THREAD))
    tiles = min(2 * parts, max(1, _HELD_NUMBERS // (TILE_ROWS * min(columns, COLUMNS_AT_ONCE))))
    return min(parts, tiles), tiles


def multiplies_plain(dtype: torch.dtype) -> bool:
    """Whether kernels multiply such numbers faster than torch where nothing need be decoded: by vectors they don't."""
    return dtype == torch.bfloat16 and has_bfloat_instructions() and has_amx()
