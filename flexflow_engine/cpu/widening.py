"""How much of a matrix is widened or decoded, and multiplied, at a time (`cpu.matmul`), and the memory that takes."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

WIDENED_FROM = 4
"""Tokens from which on it pays to widen numbers."""
WIDENED_TOKENS = 512
"""Tokens that are multiplied at a time."""
_NUMBERS = 2**21
"""Of the matrix, that all threads hold at a time: what a processor's cache holds."""
_ROWS = 1024
"""Of the matrix, that all threads hold at a time, at most."""
_ROWS_A_THREAD = 256
_WIDE_NBYTES = 4


def widened_rows(columns: int, threads: int) -> int:
    """Rows of a matrix with so many columns that a thread widens at a time."""
    return max(1, min(_ROWS_A_THREAD, _all_rows(columns) // threads))


def widened_times(tokens: int) -> int:
    """How often every row is widened, or decoded, in a product of so many tokens."""
    return ceil(tokens / WIDENED_TOKENS)


def widened_nbytes(tokens: int, matrices: Iterable[tuple[int, int]]) -> int:
    """Bytes of numbers, float32 at the widest, in products of `tokens` tokens and matrices [rows, columns], one at a
    time, at most, whatever the number of threads. What threads hold of a matrix is kept for the next one.
    """
    count = min(tokens, WIDENED_TOKENS)
    held = [(min(rows, _all_rows(columns)), columns) for rows, columns in matrices]
    rooms = max(rows * columns for rows, columns in held)
    return _WIDE_NBYTES * (rooms + max(count * columns + (count + 1) * rows for rows, columns in held))  # and a bias


def _all_rows(columns: int) -> int:
    return max(1, min(_ROWS, _NUMBERS // columns))
