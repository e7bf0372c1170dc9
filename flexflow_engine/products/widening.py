"""How much of a matrix is widened or decoded, and multiplied, at a time (`matmul`), and the memory that takes."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, isqrt
from typing import NamedTuple

WIDENED_FROM = 4
"""Tokens from which on it pays to widen numbers that a processor has no instructions for; where it was not measured."""
WIDENED_TOKENS = 512
"""Tokens that are multiplied at a time."""
_NUMBERS = 2**21
"""Of the matrix, that all threads hold at a time: what a processor's cache holds."""
_ROWS = 1024
"""Of the matrix, that all threads hold at a time, at most."""
_ROWS_A_THREAD = 512
"""At most. Each part is a call of torch, which packs its rows anew for the processor."""
_WIDE_NBYTES = 4


class Cut(NamedTuple):
    """How a matrix's rows are cut into parts."""

    threads: int
    rows: int
    """That a thread takes at a time."""


def cut_rows(rows: int, columns: int, threads: int) -> Cut:
    """Of a matrix [rows, columns] among at most so many threads: as many parts for each of them."""
    most = rows_at_once(columns)
    threads = min(threads, most, rows)
    rounds = ceil(rows / (threads * min(_ROWS_A_THREAD, most // threads)))
    part = ceil(rows / (threads * rounds))
    return Cut(min(threads, ceil(rows / part)), part)


def widened_times(tokens: int) -> int:
    """How often every row is widened, or decoded, in a product of so many tokens."""
    return ceil(tokens / WIDENED_TOKENS)


def product_nbytes(tokens: int, matrices: Iterable[tuple[int, int]], *, makes_rows: bool) -> int:
    """Bytes that products of `tokens` tokens and matrices [rows, columns] take beside their results, at most, whatever
    the number of threads; those that are drawn together take no more than the largest. makes_rows: whether rows are
    widened or decoded, to float32 at the widest; what that takes for a matrix is kept for the next one.
    """
    count = min(tokens, WIDENED_TOKENS)
    held = [(min(rows + isqrt(rows), rows_at_once(columns)), columns) for rows, columns in matrices]  # the last is cut
    made = max(rows * columns for rows, columns in held) if makes_rows else 0
    products = ((count * columns if makes_rows else 0) + (count + 1) * rows for rows, columns in held)  # and a bias
    return _WIDE_NBYTES * (made + max(products))


def rows_at_once(columns: int) -> int:
    """Of a matrix, that all threads hold at a time, at most."""
    return max(1, min(_ROWS, _NUMBERS // columns))
