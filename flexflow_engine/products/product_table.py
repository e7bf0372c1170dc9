"""Products with several matrices, told to a kernel as a table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_ALIGNMENT = 64
"""Of what kernels load and store as whole vectors, in bytes."""


class Product(NamedTuple):
    """What a kernel knows of a product with one matrix: a line of its table, integers of 64 bits."""

    decoder: int
    """Address of the function that decodes it; 0 where there is nothing to decode."""
    settings: int
    """Address of what that is handed."""
    encoded: int
    """Address of the matrix's first unit."""
    stride: int
    """Bytes from unit to unit."""
    unit: int
    """Numbers of a unit."""
    rows: int
    """Of the matrix."""
    bias: int
    """Address, in the products' format; 0 for none."""
    out: int
    """Address of the first token's first product."""
    out_stride: int
    """Numbers from token to token."""


DECODER, SETTINGS, ENCODED, STRIDE, UNIT, ROWS, BIAS, OUT, OUT_STRIDE = range(len(Product._fields))


class Matrix:
    """Adjoining rows of one matrix in host memory, as kernels find them."""

    def __init__(
        self,
        units: torch.Tensor,
        unit_shape: tuple[int, int],
        *,
        rows: int,
        decoder: int = 0,
        settings: Sequence[int] = (),
        group_size: int = 1,
        owner: object = None,
    ) -> None:
        """units: [units, ...], each contiguous, encoded or not; unit_shape: (rows, columns). rows: that exist, as the
        last unit may be padded. decoder: address of the function that decodes them; settings: handed to each call;
        owner: whatever keeps the function in memory. group_size: of numbers that have a scale and a low in common,
        where they are decoded to integers.
        """
        self.rows, self.columns = rows, unit_shape[1]
        self.group_size, self.is_encoded = group_size, decoder != 0
        self._settings = np.array(settings, np.int64)
        self._held = units, owner
        stride = units.stride(0) * units.itemsize
        self.line = decoder, self._settings.ctypes.data, units.data_ptr(), stride, prod(unit_shape), rows
        """What a `Product` begins with."""


class MatrixProduct(NamedTuple):
    """With one matrix; `output` [N, rows] is written."""

    matrix: Matrix
    bias: torch.Tensor | None
    output: torch.Tensor


class ProductTable:
    """Of some products: `lines`, int64, a `Product` each, and what their addresses point to."""

    def __init__(self, products: Sequence[MatrixProduct], dtype: torch.dtype) -> None:
        """dtype: of tokens and products; biases are told in it."""
        self._products, self._biases = products, list[torch.Tensor]()
        self.lines: NDArray[np.int64] = np.array([self._line(*product, dtype) for product in products], np.int64)

    def _line(self, matrix: Matrix, bias: torch.Tensor | None, output: torch.Tensor, dtype: torch.dtype) -> Product:
        address = 0
        if bias is not None:
            self._biases.append(bias.to(dtype).contiguous())
            address = self._biases[-1].data_ptr()
        return Product(*matrix.line, address, output.data_ptr(), output.stride(0))


def places(sizes: Sequence[int]) -> list[int]:
    """Where things of so many bytes begin, one behind the other, and where the last ends."""
    return [0, *accumulate(size + -size % _ALIGNMENT for size in sizes)]
