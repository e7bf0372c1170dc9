"""Products of 8-bit integers on the host: a matrix's as its codec decodes them, and activations rounded to as many.

An instruction multiplies twice as many of them as numbers of 16 bits. A token's activations have a scale for each group
of columns that has one in the matrix, so that one large number costs its group alone its precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.cpu.arrays import ARRAY_TYPES
from flexflow_engine.cpu.integer_kernels import Product, multiply
from flexflow_engine.cpu.integer_tiles import TILE_TOKENS
from flexflow_engine.cpu.integers import PADDED_ROWS, PADDED_TOKENS, IntegerCut, IntegerProduct, cut_integers
from flexflow_engine.cpu.widening import WIDENED_TOKENS
from flexflow_engine.cpu.workers import Workers

_ALIGNMENT = 64
"""Of sums, which kernels load and store as whole vectors."""


class IntegerProducts:
    """Such products by some threads of the engine's, one at a time.

    Changing state: `_memory`, for what threads make, kept from product to product: fresh memory is slow to touch.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._memory = torch.empty(0, dtype=torch.uint8)

    def multiply(self, x: torch.Tensor, products: Sequence[IntegerProduct], *, threads: int) -> None:
        """x [N, columns], of float32 or 16 bits, times each matrix's transpose, plus bias [rows], rounded once.

        The matrices have columns and group size in common. threads: how many share the work, at most.
        """
        assert x.stride(1) == 1
        for start in range(0, len(x), WIDENED_TOKENS):
            place = slice(start, start + WIDENED_TOKENS)
            some = [product._replace(output=product.output[place]) for product in products]
            self._multiply_some(x[place], some, threads)

    def _multiply_some(self, x: torch.Tensor, products: Sequence[IntegerProduct], threads: int) -> None:
        count, columns = x.shape
        group_size = products[0].matrix.decoder.group_size
        cut = cut_integers(max(product.matrix.rows for product in products), columns, threads)
        room = _Room(cut, tokens=count, columns=columns, group_size=group_size)
        if len(self._memory) < room.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one ends before the larger one begins
            self._memory = torch.empty(room.nbytes, dtype=torch.uint8)
        like = np.empty(0, ARRAY_TYPES[x.dtype])
        tokens = (like, x.data_ptr(), x.stride(0)), (count, columns, group_size)
        settings = [np.array(product.matrix.decoder.settings, np.int64) for product in products]
        biases = [None if bias is None else bias.to(x.dtype).contiguous() for _, bias, _ in products]
        table = np.array([_described(*about) for about in zip(products, settings, biases, strict=True)], np.int64)
        drawn = np.zeros(2 + ceil(count / TILE_TOKENS), np.int64)
        address = self._memory.data_ptr()

        def work(thread: int, _: int) -> None:
            multiply(tokens, room.tokens(address), table, (room.of_thread(address, thread), cut.rows), drawn)

        self._workers.draw(work, cut.threads)


def _described(product: IntegerProduct, settings: NDArray[np.int64], bias: torch.Tensor | None) -> Product:
    """For a kernel."""
    (decoder, encoded, (unit_rows, columns), rows), _, output = product
    return Product(
        decoder=decoder.address,
        settings=settings.ctypes.data,
        encoded=encoded.data_ptr(),
        stride=encoded.stride(0),
        unit=unit_rows * columns,
        rows=rows,
        bias=0 if bias is None else bias.data_ptr(),
        out=output.data_ptr(),
        out_stride=output.stride(0),
    )


class _Room:
    """Where what threads make lies in memory: all tokens as integers and their scales, and for each thread the rows
    that it decodes and sums.
    """

    def __init__(self, cut: IntegerCut, *, tokens: int, columns: int, group_size: int) -> None:
        padded, groups = ceil(tokens / PADDED_TOKENS) * PADDED_TOKENS, columns // group_size
        self._tokens = _places([padded * columns, 8 * padded * groups])
        scales, sums, results = 4 * cut.rows * groups, 4 * PADDED_TOKENS * PADDED_ROWS, 4 * PADDED_TOKENS * cut.rows
        self._room = _places([cut.rows * columns, scales, scales, sums, results])
        self.nbytes = self._tokens[-1] + cut.threads * self._room[-1]

    def tokens(self, address: int) -> tuple[int, ...]:
        """Addresses of integers, int8 [padded tokens * columns], and scales, float32 [padded tokens * 2 * groups]."""
        return tuple(address + place for place in self._tokens[:-1])

    def of_thread(self, address: int, thread: int) -> tuple[int, ...]:
        """Addresses of integers [rows, columns]; scales and lows [rows, groups]; a tile's sums and results."""
        begin = address + self._tokens[-1] + thread * self._room[-1]
        return tuple(begin + place for place in self._room[:-1])


def _places(sizes: Sequence[int]) -> list[int]:
    """Where things of so many bytes begin, one behind the other, and where the last ends."""
    return [0, *accumulate(size + -size % _ALIGNMENT for size in sizes)]
