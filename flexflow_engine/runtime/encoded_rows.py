"""Rows of a matrix that are multiplied as they are encoded: decoded some at a time, in the host's cache."""

from __future__ import annotations

from math import prod

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.products.bfloats import encoded_matrix
from flexflow_engine.products.integers import integer_matrix


class EncodedRows:
    """Adjoining rows of one matrix in host memory, for codecs that decode in kernels: `Rows` of `products.matmul`.

    Decoded numbers are rounded to 16 bits only where such numbers are multiplied as they are.
    """

    dtype = None

    def __init__(self, codec: Codec, encoded: torch.Tensor, unit_shape: tuple[int, int], *, rows: int) -> None:
        """encoded: uint8 [units, unit_nbytes]; unit_shape: (rows, columns) of a unit; rows: that exist, as the last
        unit may be padded.
        """
        self.out_features = rows
        self._encoded, self._columns, self._size = encoded, unit_shape[1], prod(unit_shape)
        self._decoder = codec.kernel_decoder(unit_shape)
        self.bfloats = encoded_matrix(self._decoder, encoded, unit_shape, rows=rows)
        self.integers = integer_matrix(codec, encoded, unit_shape, rows=rows)

    def part(self, first: int, stop: int, room: torch.Tensor | None) -> torch.Tensor:
        from flexflow_engine.cpu.decoding import Target, decode_numbers  # noqa: PLC0415  # Numba takes half a second to import

        assert room is not None
        start = first * self._columns
        target = Target(room.data_ptr() - start * room.itemsize, self._size * room.itemsize, room.dtype)
        decode_numbers(self._decoder, self._encoded, self._size, range(start, stop * self._columns), target)
        return room
