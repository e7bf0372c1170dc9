"""Decoding many tensors with a codec's compiled decoder, in ranges that threads share."""

from __future__ import annotations

from math import ceil, prod
from typing import Any

import numpy as np
import torch

from flexflow_engine.abc.codec import KernelDecoder
from flexflow_engine.abc.dtypes import DTYPES
from flexflow_engine.cpu.jit import kernel
from flexflow_engine.cpu.pointers import call_decoder


class Decoding:
    """Tensors of one shape in host memory, encoded and not, and the blocks in which one becomes the other."""

    def __init__(self, decoder: KernelDecoder, encoded: torch.Tensor, out: torch.Tensor, *, block: int) -> None:
        """encoded uint8 [n, nbytes], out [n, *shape], of a dtype that the decoder knows; each tensor contiguous.

        block: numbers that are decoded at a time.
        """
        size = prod(out.shape[1:])
        dtype = next(name for name in DTYPES if getattr(torch, name) == out.dtype)
        self._function, self._settings = decoder.addresses[dtype], np.array(decoder.settings, np.int64)
        self._source = encoded.data_ptr(), encoded.stride(0)
        self._target = out.data_ptr(), out.stride(0) * out.itemsize, out.itemsize
        self._shape = size, block
        self._memory = encoded, out, decoder
        self.num_blocks = len(out) * ceil(size / block)
        self.num_numbers = out.numel()

    def run(self, first: int, stop: int) -> None:
        """Decode blocks [first, stop), counted through all tensors."""
        _decode_blocks(self._function, self._settings, self._source, self._target, self._shape, (first, stop))


@kernel
def _decode_blocks(function: Any, settings: Any, source: Any, target: Any, shape: Any, span: Any) -> None:
    """source: address and bytes from tensor to tensor; target: the same, and bytes of a number."""
    (data, data_stride), (numbers, stride, item), (size, block) = source, target, shape
    blocks = (size + block - 1) // block
    for index in range(span[0], span[1]):
        tensor, first = index // blocks, index % blocks * block
        place = numbers + tensor * stride + first * item
        count = min(block, size - first)
        call_decoder(function, data + tensor * data_stride, settings.ctypes.data, first, count, place)
