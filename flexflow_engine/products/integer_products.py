"""Products of 8-bit integers on the host: a matrix's as its codec decodes them, and activations rounded to as many.

An instruction multiplies twice as many of them as numbers of 16 bits. A token's activations have a scale for each group
of columns that has one in the matrix, so that one large number costs its group alone its precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch

from flexflow_engine.cpu.arrays import ARRAY_TYPES
from flexflow_engine.products.integer_kernels import multiply
from flexflow_engine.products.integer_tiles import TILE_TOKENS
from flexflow_engine.products.integers import PADDED_ROWS, PADDED_TOKENS, cut_integers
from flexflow_engine.products.kernel_products import KernelProducts
from flexflow_engine.products.product_table import MatrixProduct, ProductTable, places
from flexflow_engine.products.widening import Cut


class IntegerProducts(KernelProducts):
    """Such products, of tokens in float32 or 16 bits."""

    item_nbytes = 1

    def _multiply_some(self, x: torch.Tensor, products: Sequence[MatrixProduct], threads: int) -> None:
        count, columns = x.shape
        group_size = products[0].matrix.group_size
        cut = cut_integers(max(product.matrix.rows for product in products), columns, threads)
        room = _Room(cut, tokens=count, columns=columns, group_size=group_size)
        like = np.empty(0, ARRAY_TYPES[x.dtype])
        tokens = (like, x.data_ptr(), x.stride(0)), (count, columns, group_size)
        table = ProductTable(products, x.dtype)
        drawn = np.zeros(2 + ceil(count / TILE_TOKENS), np.int64)
        address = self._memory_of(room.nbytes)

        def work(thread: int, _: int) -> None:
            multiply(tokens, room.tokens(address), table.lines, (room.of_thread(address, thread), cut.rows), drawn)

        self._workers.draw(work, cut.threads)


class _Room:
    """Where what threads make lies in memory: all tokens as integers and their scales, and for each thread the rows
    that it decodes and sums.
    """

    def __init__(self, cut: Cut, *, tokens: int, columns: int, group_size: int) -> None:
        padded, groups = ceil(tokens / PADDED_TOKENS) * PADDED_TOKENS, columns // group_size
        self._tokens = places([padded * columns, 8 * padded * groups])
        scales, sums, results = 4 * cut.rows * groups, 4 * PADDED_TOKENS * PADDED_ROWS, 4 * PADDED_TOKENS * cut.rows
        self._room = places([cut.rows * columns, scales, scales, sums, results])
        self.nbytes = self._tokens[-1] + cut.threads * self._room[-1]

    def tokens(self, address: int) -> tuple[int, ...]:
        """Addresses of integers, int8 [padded tokens * columns], and scales, float32 [padded tokens * 2 * groups]."""
        return tuple(address + place for place in self._tokens[:-1])

    def of_thread(self, address: int, thread: int) -> tuple[int, ...]:
        """Addresses of integers [rows, columns]; scales and lows [rows, groups]; a tile's sums and results."""
        begin = address + self._tokens[-1] + thread * self._room[-1]
        return tuple(begin + place for place in self._room[:-1])
