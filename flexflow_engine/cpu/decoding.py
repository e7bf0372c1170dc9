"""Decoding with a codec's compiled decoder: any range of the numbers of many tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flexflow_engine.abc.codec import KernelDecoder
from flexflow_engine.abc.dtypes import DTYPES
from flexflow_engine.cpu.jit import kernel
from flexflow_engine.cpu.pointers import call_decoder

_NAMES = {getattr(torch, name): name for name in DTYPES}


class Target(NamedTuple):
    """Where decoded numbers go, in host memory."""

    address: int
    """Of the first number of the first tensor, whether or not it is decoded."""
    stride_nbytes: int
    """From tensor to tensor."""
    dtype: torch.dtype


def decode_numbers(decoder: KernelDecoder, encoded: torch.Tensor, size: int, span: range, target: Target) -> None:
    """Decode the numbers `span` of tensors of `size` numbers each, counted through all of them.

    encoded: uint8 [n, nbytes], each tensor contiguous. Several threads may decode to one target.
    """
    settings = np.array(decoder.settings, np.int64)
    decode_span(
        decoder.addresses[_NAMES[target.dtype]],
        settings.ctypes.data,
        (encoded.data_ptr(), encoded.stride(0), size),
        (target.address, target.stride_nbytes, target.dtype.itemsize),
        (span.start, span.stop),
    )


@kernel
def decode_span(function: Any, settings: Any, source: Any, target: Any, span: Any) -> None:
    """Numbers [start, stop), counted through several tensors. function, settings: addresses, of a `KernelDecoder`.
    source: address, bytes from tensor to tensor, numbers of one; target: address, bytes from tensor to tensor, and of a
    number.
    """
    (data, data_stride, size), (numbers, stride, item), (start, stop) = source, target, span
    while start < stop:
        tensor, first = start // size, start % size
        count = min(size - first, stop - start)
        place = numbers + tensor * stride + first * item
        call_decoder(function, data + tensor * data_stride, settings, first, count, place)
        start += count
