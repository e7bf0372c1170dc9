"""Products by kernels of the engine's own, each call of which makes all of some tokens with several matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from flexflow_engine.cpu.workers import Workers
from flexflow_engine.products.product_table import MatrixProduct
from flexflow_engine.products.widening import WIDENED_TOKENS


class KernelProducts(ABC):
    """Such products by some threads of the engine's, one at a time.

    Changing state: `_memory`, for what threads make, kept from product to product: fresh memory is slow to touch.
    """

    item_nbytes: ClassVar[int]
    """Of the numbers that are multiplied."""
    plain_speed: ClassVar[int] = 1
    """A thread alone multiplies so many times as many numbers that are not encoded, before another is woken to help."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._memory = torch.empty(0, dtype=torch.uint8)

    def multiply(self, x: torch.Tensor, products: Sequence[MatrixProduct], *, threads: int) -> None:
        """x [N, columns] times each matrix's transpose, plus bias [rows], rounded once.

        The matrices have a group size in common. threads: how many share the work, at most. Raises ValueError where
        shapes don't fit: kernels would read what lies beside.
        """
        for matrix, bias, _ in products:
            if x.shape[1] != matrix.columns or (bias is not None and len(bias) != matrix.rows):
                shapes = tuple(x.shape), (matrix.rows, matrix.columns), None if bias is None else tuple(bias.shape)
                raise ValueError("x {}, a matrix {} and a bias {} don't fit".format(*shapes))
        if x.stride(1) != 1:
            x = x.contiguous()
        if len(x) <= WIDENED_TOKENS:
            self._multiply_some(x, products, threads)
            return
        for start in range(0, len(x), WIDENED_TOKENS):
            place = slice(start, start + WIDENED_TOKENS)
            some = [product._replace(output=product.output[place]) for product in products]
            self._multiply_some(x[place], some, threads)

    @abstractmethod
    def _multiply_some(self, x: torch.Tensor, products: Sequence[MatrixProduct], threads: int) -> None:
        """Of WIDENED_TOKENS tokens at most."""

    def _memory_of(self, nbytes: int) -> int:
        """The address of so much memory, of which nothing is known."""
        if len(self._memory) < nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # the old one ends before the larger one begins
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory.data_ptr()
