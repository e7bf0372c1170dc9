"""The codec of the identity: a tensor's own bytes."""

from __future__ import annotations

from math import prod

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import ITEM_NBYTES, DType


class NoneCodec(Codec):
    """Keeps the bytes as they are."""

    name = "none"

    def encoded_nbytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        return prod(shape) * ITEM_NBYTES[dtype]

    def encode(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(tensor.contiguous().reshape(-1).view(torch.uint8))

    def decode(self, encoded: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return encoded.view(out.dtype).view(out.shape)

    def max_error(self, tensor: torch.Tensor) -> float:
        return 0.0
