"""The codec of the identity: a tensor's own bytes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from flexflow_engine.abc.codec import Codec, NoCodecOptions
from flexflow_engine.abc.dtypes import ITEM_NBYTES, DType


class NoneCodec(Codec):
    """Keeps the bytes as they are."""

    name = "none"
    keeps_bytes = True

    def __init__(self, options: Any = NoCodecOptions()) -> None:  # noqa: B008  # frozen
        super().__init__(options)

    def configuration(self) -> Mapping[str, Any]:
        return {"name": self.name}

    def encoded_nbytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        return prod(shape) * ITEM_NBYTES[dtype]

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(values.contiguous().view(torch.uint8).view(out.shape))

    def decode(self, encoded: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(encoded.view(out.dtype).view(out.shape))

    def error_bound(self, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(values.shape, dtype=torch.float32)
