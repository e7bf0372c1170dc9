"""Products of bfloat16 on the host, by instructions for them: rows of a matrix are multiplied where they lie, or where
they have just been decoded to. torch lays every row out anew in each call, which for few tokens takes longer than to
multiply it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil

import numpy as np
import torch

from flexflow_engine.products.bfloat_amx import configuration
from flexflow_engine.products.bfloat_kernels import multiply
from flexflow_engine.products.bfloats import CONFIGURATION_NBYTES, TILE_TOKENS, cut_bfloats, room_nbytes, tokens_nbytes
from flexflow_engine.products.kernel_products import KernelProducts
from flexflow_engine.products.product_table import MatrixProduct, ProductTable, places
from flexflow_engine.products.widening import Cut

_CONFIGURATION = np.frombuffer(configuration(), np.uint8)


class BFloatProducts(KernelProducts):
    """Such products, of matrices that `products.bfloats` makes."""

    item_nbytes = 2
    plain_speed = 8  # AMX multiplies 32 tokens by what a thread reads meanwhile

    def _multiply_some(self, x: torch.Tensor, products: Sequence[MatrixProduct], threads: int) -> None:
        count, columns = x.shape
        rows, decodes = max(p.matrix.rows for p in products), any(p.matrix.is_encoded for p in products)
        room = _cut_room(rows, columns, count, threads, decodes)
        tokens = (x.data_ptr(), x.stride(0) * x.itemsize), (count, columns)
        table = ProductTable(products, x.dtype)
        drawn = np.zeros(2 + ceil(count / TILE_TOKENS), np.int64)
        address = self._memory_of(room.nbytes)

        def work(thread: int, _: int) -> None:
            multiply(tokens, address, table.lines, (room.of_thread(address, thread), room.cut.rows), drawn)

        self._workers.draw(work, room.cut.threads)


class _Room:
    """Where what threads make lies in memory: all tokens, laid out in tiles, and for each thread the rows that it
    decodes, sums, and how AMX was configured before.
    """

    def __init__(self, cut: Cut, *, tokens: int, columns: int, decodes: bool) -> None:
        self.cut = cut
        _, self._tokens_nbytes = places([tokens_nbytes(tokens, columns)])
        decoded, sums = room_nbytes(cut.rows, columns, tokens)
        self._places = places([decoded if decodes else 0, sums, CONFIGURATION_NBYTES])
        self.nbytes = self._tokens_nbytes + cut.threads * self._places[-1]

    def of_thread(self, address: int, thread: int) -> tuple[int, ...]:
        """Addresses of rows, sums, the configuration before, and the one that is wanted."""
        begin = address + self._tokens_nbytes + thread * self._places[-1]
        return *(begin + place for place in self._places[:-1]), _CONFIGURATION.ctypes.data


@lru_cache(maxsize=64)
def _cut_room(rows: int, columns: int, tokens: int, threads: int, decodes: bool) -> _Room:
    """Cut once, not for every layer."""
    return _Room(cut_bfloats(rows, columns, threads), tokens=tokens, columns=columns, decodes=decodes)
