"""Contract of a model: its shape, its weights by checkpoint name, and pure compute on one layer.

A model knows no tier and no schedule. The engine loads what a layer lists, calls the layer's functions on torch
tensors of whatever device it computes on, and runs attention itself, between `attention_inputs` and
`attention_output`, so that attention can run where the KV cache lives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from flexflow_engine.abc.dtypes import DType

if TYPE_CHECKING:
    import torch

API_VERSION = 1

Role = Literal["matrix", "table", "small"]
"""matrix: [out_features, in_features], loaded in pages of rows and multiplied. table: rows are looked up by token id
(a tied head multiplies by it too). small: norms, biases, positions; always on the compute tier."""

LayerKind = Literal["embed", "decoder", "final", "head"]
"""The order of a model: one embed, the decoders, one final (last token only), one head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A network's shape, as plain data."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    """A divisor of `num_heads`: each key head serves as many query heads."""
    head_dim: int
    vocab_size: int
    """Token ids, from 0: as many rows as the head has, and no more than the table has."""
    max_positions: int
    """Largest number of tokens of one sequence, prompt and generated together."""
    attention_scale: float
    """Factor of the scores before softmax, usually head_dim ** -0.5."""
    eos_token_ids: tuple[int, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    """The plugin's own keys of config.json."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter of the checkpoint."""

    name: str
    """As `save_pretrained` of transformers writes it today; older spellings come from `Model.spellings`."""
    shape: tuple[int, ...]
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What is loaded together. The mappings go from the layer's own short names to checkpoint names."""

    name: str
    kind: LayerKind
    matrices: Mapping[str, str] = field(default_factory=dict)
    small: Mapping[str, str] = field(default_factory=dict)
    table: str | None = None
    """The embed layer's table of token rows."""


class Matrix(Protocol):
    """A loaded weight matrix [out_features, in_features], wherever its pages lie and however they are encoded."""

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, in_features] times the transpose, plus bias [out_features]; [N, out_features] in x's dtype."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer's loaded weights under its short names."""

    matrices: Mapping[str, Matrix]
    small: Mapping[str, torch.Tensor]

    def linear_each(self, x: torch.Tensor, matrices: Sequence[tuple[str, torch.Tensor | None]]) -> list[torch.Tensor]:
        """The products of x [N, in_features] with some matrices, each plus its bias, in their order.

        The same as `Matrix.linear` one by one, and faster where threads share all of them as one product.
        matrices: short names and biases.
        """
        return [self.matrices[name].linear(x, bias) for name, bias in matrices]


class Model(ABC):
    """One architecture. Compute methods are called from the compute lane only, under `torch.inference_mode`."""

    api_version: ClassVar[int] = API_VERSION
    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    """Values of `model_type` in config.json that this plugin reads."""

    def __init__(self, config: ModelConfig, dtype: DType) -> None:
        self.config = config
        self.dtype = dtype

    @classmethod
    @abstractmethod
    def read_config(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Parse a checkpoint's config.json, with the `eos_token_id` of its generation_config.json where that has one.

        Raises CheckpointError on a missing key or an unsupported option.
        """

    @classmethod
    @abstractmethod
    def published(cls) -> Mapping[str, Mapping[str, Any]]:
        """config.json contents of the published checkpoints, by hub id; known offline."""

    @abstractmethod
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Every parameter, in the order of the layers that first use it."""

    @abstractmethod
    def layers(self) -> tuple[LayerSpec, ...]:
        """embed, decoders, final, head, in the order they run."""

    def spellings(self, name: str) -> tuple[str, ...]:
        """Names under which checkpoints may hold the tensor `name`, the usual one first."""
        return (name,)

    @abstractmethod
    def embed(self, weights: LayerWeights, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """rows [N, table_width] of the table and positions [N] (int64, from 0) -> hidden [N, hidden_size]."""

    @abstractmethod
    def attention_inputs(
        self, weights: LayerWeights, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [N, hidden_size] -> q [N, num_heads, head_dim], k and v [N, num_kv_heads, head_dim], in its dtype.

        hidden must not be changed. The engine may write over what it gets.
        """

    @abstractmethod
    def attention_output(self, weights: LayerWeights, hidden: torch.Tensor, attended: torch.Tensor) -> None:
        """The rest of a decoder layer, in place on hidden [N, hidden_size]; attended is [N, num_heads * head_dim]."""

    @abstractmethod
    def final(self, weights: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        """Last tokens [R, hidden_size] -> features [R, head_width] that the head multiplies."""

    @abstractmethod
    def logits(self, weights: LayerWeights, features: torch.Tensor) -> torch.Tensor:
        """features [R, head_width] -> logits [R, rows of the head's matrix that are loaded]."""

    @abstractmethod
    def workspace_nbytes(self, kind: LayerKind, tokens: int) -> int:
        """Upper bound in bytes of what the methods above allocate for `tokens` tokens, results included.

        For kind "head" it is asked per row of logits computed elsewhere: only temporaries besides the result count.
        """
