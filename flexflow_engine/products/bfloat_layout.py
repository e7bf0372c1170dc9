"""What kernels that multiply bfloat16 have in memory, and how it is laid out.

Tokens lie in tiles of 16 lines of 64 bytes: a line has a pair of columns of 16 tokens, so that one vector has the
same pair of each, and 16 lines have 32 columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

LINES, LINE_NBYTES = 16, 64
TILE_NBYTES = LINES * LINE_NBYTES
LINE_COLUMNS = LINE_NBYTES // 2
"""Of a row of the matrix that lie in a line."""
ASKED_ROWS = 8
"""Rows that are asked for one after the other."""


class Places(NamedTuple):
    """Of 32 rows of a matrix and of blocks of 16 tokens that are multiplied, as addresses; integers of 64 bits, as all
    of it.
    """

    rows: Any
    """bfloat16, 32 of the matrix, and of each the columns that are multiplied."""
    stride: Any
    """Bytes from row to row."""
    wanted: Any
    """Address of rows that are multiplied next."""
    wanted_stride: Any
    """Bytes from row to row of these."""
    wanted_rows: Any
    """How many of them are asked for, as many columns of each; a multiple of ASKED_ROWS."""
    tokens: Any
    """bfloat16 [columns / 32, 16 pairs of columns, 16 tokens, 2], of the first block."""
    block_nbytes: Any
    """From block to block of tokens."""
    columns: Any
    sums: Any
    """float32 [2, blocks, 16 rows, 16 tokens], to be written."""
    adds: Any
    """Whether the products are added to what the sums are; 0 or 1."""


class Target(NamedTuple):
    """Where the products of 16 rows and 16 tokens go; integers of 64 bits."""

    sums: Any
    """Address: float32 [16 rows, 16 tokens]."""
    bias: Any
    """Address of the rows' bfloat16, or 0."""
    out: Any
    """Address of the first token's first product, bfloat16."""
    out_nbytes: Any
    """From token to token."""
    tokens: Any
    """That exist."""
