"""How much of a product is widened to float32 at a time (`cpu.matmul`), and the memory that takes."""

from __future__ import annotations

WIDENED_FROM = 16
"""Tokens from which on it pays."""
WIDENED_TOKENS = 512
"""Tokens that are multiplied at a time."""
WIDENED_NUMBERS = 2**20
"""Of the matrix, that are widened at a time: what a processor's cache holds."""
WIDENED_ROWS = 1024
"""Of the matrix, at most."""
_WIDE_NBYTES = 4


def widened_rows(columns: int) -> int:
    """Rows of a matrix with so many columns that are widened at a time."""
    return max(1, min(WIDENED_ROWS, WIDENED_NUMBERS // columns))


def widened_nbytes(tokens: int, columns: int) -> int:
    """Bytes of float32 numbers in the product of `tokens` tokens and a matrix of so many columns, at most."""
    if tokens < WIDENED_FROM:
        return 0
    count, rows = min(tokens, WIDENED_TOKENS), widened_rows(columns)
    return _WIDE_NBYTES * (count * columns + rows * columns + count * rows)
