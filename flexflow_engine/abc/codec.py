"""Contract of a codec: tensor to encoded tensor and back, with a declared error.

`none` is the codec of the identity. The engine asks a codec only for what it declares here; encoded bytes are what
lies on the tiers and moves over the links.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from flexflow_engine.abc.dtypes import DType

if TYPE_CHECKING:
    import torch

API_VERSION = 1


class Codec(ABC):
    """Stateless and thread-safe; called from the import and from the compute lane."""

    api_version: ClassVar[int] = API_VERSION
    name: ClassVar[str]

    @abstractmethod
    def encoded_nbytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        """Exact size in bytes of a tensor of this shape once encoded."""

    @abstractmethod
    def encode(self, tensor: torch.Tensor, out: torch.Tensor) -> None:
        """Encode `tensor` (any float dtype) into `out`: uint8 [encoded_nbytes], the caller's buffer."""

    @abstractmethod
    def decode(self, encoded: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The tensor that `encoded` (uint8 [encoded_nbytes]) holds, with `out`'s shape and dtype.

        Either `out`, filled, or a view of `encoded` when the codec keeps the bytes as they are.
        """

    @abstractmethod
    def max_error(self, tensor: torch.Tensor) -> float:
        """Largest absolute difference that a round trip of `tensor` may show."""
