"""OPT (Zhang et al. 2022, arXiv 2205.01068), every published size, pre-norm and post-norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.dtypes import ITEM_NBYTES
from flexflow_engine.abc.model import LayerKind, LayerSpec, LayerWeights, Model, ModelConfig, TensorSpec
from flexflow_engine.errors import CheckpointError
from flexflow_plugins.models.opt_sizes import PUBLISHED

POSITION_OFFSET = 2
"""OPT's position table starts with two rows that no position uses."""

MLP_TOKENS = 1024
"""The feed-forward part runs on this many tokens at a time: full matmul speed, bounded intermediates."""

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu_,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
}


class OPTModel(Model):
    """Decoder layers of attention and feed-forward, learned positions, embedding tied to the head or not."""

    name = "opt"
    model_types = ("opt",)

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> ModelConfig:
        activation = config.get("activation_function", "relu")
        if activation not in ACTIVATIONS:
            raise CheckpointError(
                f"activation function {activation!r} is not known",
                where="config.json: activation_function",
                fix=f"one of {', '.join(ACTIVATIONS)} would do",
            )
        hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
        if hidden % heads:
            raise CheckpointError(f"hidden_size {hidden} is not a multiple of {heads} heads", where="config.json")
        return ModelConfig(
            model_type="opt",
            num_layers=_positive(config, "num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            vocab_size=_positive(config, "vocab_size"),
            max_positions=_positive(config, "max_position_embeddings"),
            attention_scale=(hidden // heads) ** -0.5,
            eos_token_ids=_token_ids(config, "eos_token_id", 2),
            details={
                "ffn_dim": _positive(config, "ffn_dim"),
                "embed_dim": _positive(config, "word_embed_proj_dim") if config.get("word_embed_proj_dim") else hidden,
                "pre_norm": _flag(config, "do_layer_norm_before", True),
                "final_norm": _flag(config, "do_layer_norm_before", True)
                and not _flag(config, "_remove_final_layer_norm", False),
                "bias": _flag(config, "enable_bias", True),
                "norm_weights": _flag(config, "layer_norm_elementwise_affine", True),
                "activation": activation,
                "tied": _flag(config, "tie_word_embeddings", True),
            },
        )

    @classmethod
    def published(cls) -> Mapping[str, Mapping[str, Any]]:
        return PUBLISHED

    def tensors(self) -> tuple[TensorSpec, ...]:
        config, hidden, embed_dim = self.config, self.config.hidden_size, self._embed_dim
        specs = [
            TensorSpec("model.decoder.embed_tokens.weight", (config.vocab_size, embed_dim), "table"),
            TensorSpec(
                "model.decoder.embed_positions.weight", (config.max_positions + POSITION_OFFSET, hidden), "small"
            ),
        ]
        if embed_dim != hidden:
            specs.append(TensorSpec("model.decoder.project_in.weight", (hidden, embed_dim), "matrix"))
        for layer in range(config.num_layers):
            specs += self._decoder_tensors(f"model.decoder.layers.{layer}")
        if config.details["final_norm"]:
            specs += self._norm_tensors("model.decoder.final_layer_norm")
        if embed_dim != hidden:
            specs.append(TensorSpec("model.decoder.project_out.weight", (embed_dim, hidden), "matrix"))
        if not config.details["tied"]:
            specs.append(TensorSpec("lm_head.weight", (config.vocab_size, embed_dim), "matrix"))
        return tuple(specs)

    def layers(self) -> tuple[LayerSpec, ...]:
        tied, projected = self.config.details["tied"], self._embed_dim != self.config.hidden_size
        return (
            LayerSpec(
                name="embed",
                kind="embed",
                table="model.decoder.embed_tokens.weight",
                small={"positions": "model.decoder.embed_positions.weight"},
                matrices={"project_in": "model.decoder.project_in.weight"} if projected else {},
            ),
            *(self._decoder_layer(layer) for layer in range(self.config.num_layers)),
            LayerSpec(
                name="final",
                kind="final",
                small=self._norm_names("norm", "model.decoder.final_layer_norm")
                if self.config.details["final_norm"]
                else {},
                matrices={"project_out": "model.decoder.project_out.weight"} if projected else {},
            ),
            LayerSpec(
                name="head",
                kind="head",
                matrices={"head": "model.decoder.embed_tokens.weight" if tied else "lm_head.weight"},
            ),
        )

    def spellings(self, name: str) -> tuple[str, ...]:
        return (name, name.removeprefix("model.")) if name.startswith("model.") else (name,)

    def embed(self, weights: LayerWeights, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if "project_in" in weights.matrices:
            rows = weights.matrices["project_in"].linear(rows)
        return rows + weights.small["positions"][positions + POSITION_OFFSET]

    def attention_inputs(
        self, weights: LayerWeights, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self._norm(weights, "attention_norm", hidden) if self._pre_norm else hidden
        shape = (hidden.shape[0], self.config.num_heads, self.config.head_dim)
        q, k, v = weights.linear_each(x, [(name, weights.small.get(f"{name}_bias")) for name in ("q", "k", "v")])
        return q.view(shape), k.view(shape), v.view(shape)

    def attention_output(self, weights: LayerWeights, hidden: torch.Tensor, attended: torch.Tensor) -> None:
        hidden += weights.matrices["out"].linear(attended, weights.small.get("out_bias"))
        if not self._pre_norm:
            hidden.copy_(self._norm(weights, "attention_norm", hidden))
        for first in range(0, hidden.shape[0], MLP_TOKENS):
            self._feed_forward(weights, hidden[first : first + MLP_TOKENS])

    def final(self, weights: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        if self.config.details["final_norm"]:
            hidden = self._norm(weights, "norm", hidden)
        return weights.matrices["project_out"].linear(hidden) if "project_out" in weights.matrices else hidden

    def logits(self, weights: LayerWeights, features: torch.Tensor) -> torch.Tensor:
        return weights.matrices["head"].linear(features)

    def workspace_nbytes(self, kind: LayerKind, tokens: int) -> int:
        """Counted in rows of the hidden size; on a GPU a linear over several pages holds its parts and their
        concatenation.
        """
        hidden, embed_dim, ffn_dim = self.config.hidden_size, self._embed_dim, self.config.details["ffn_dim"]
        mlp_tokens = min(tokens, MLP_TOKENS)
        numbers = {
            "embed": 4 * tokens * hidden,
            "decoder": max(5 * tokens * hidden, 2 * tokens * hidden + mlp_tokens * (2 * ffn_dim + 3 * hidden)),
            "final": tokens * (hidden + 2 * embed_dim),
            "head": 0,
        }[kind]
        return int(numbers) * ITEM_NBYTES[self.dtype] + (tokens * 8 if kind == "embed" else 0)

    def _feed_forward(self, weights: LayerWeights, hidden: torch.Tensor) -> None:
        x = self._norm(weights, "mlp_norm", hidden) if self._pre_norm else hidden
        x = weights.matrices["fc1"].linear(x, weights.small.get("fc1_bias"))
        x = ACTIVATIONS[self.config.details["activation"]](x)
        hidden += weights.matrices["fc2"].linear(x, weights.small.get("fc2_bias"))
        if not self._pre_norm:
            hidden.copy_(self._norm(weights, "mlp_norm", hidden))

    def _norm(self, weights: LayerWeights, name: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = weights.small.get(f"{name}.weight"), weights.small.get(f"{name}.bias")
        return F.layer_norm(x, (x.shape[-1],), weight, bias)

    @property
    def _pre_norm(self) -> bool:
        return bool(self.config.details["pre_norm"])

    @property
    def _embed_dim(self) -> int:
        return int(self.config.details["embed_dim"])

    def _decoder_layer(self, layer: int) -> LayerSpec:
        prefix = f"model.decoder.layers.{layer}"
        linears = {name: f"{prefix}.{path}" for name, path in _LINEARS.items()}
        biases = {f"{name}_bias": f"{path}.bias" for name, path in linears.items()}
        return LayerSpec(
            name=f"decoder.{layer}",
            kind="decoder",
            matrices={name: f"{path}.weight" for name, path in linears.items()},
            small={
                **(biases if self.config.details["bias"] else {}),
                **self._norm_names("attention_norm", f"{prefix}.self_attn_layer_norm"),
                **self._norm_names("mlp_norm", f"{prefix}.final_layer_norm"),
            },
        )

    def _decoder_tensors(self, prefix: str) -> list[TensorSpec]:
        hidden, ffn_dim = self.config.hidden_size, int(self.config.details["ffn_dim"])
        widths = {"fc1": (ffn_dim, hidden), "fc2": (hidden, ffn_dim)}
        specs = []
        for name, path in _LINEARS.items():
            shape = widths.get(name, (hidden, hidden))
            specs.append(TensorSpec(f"{prefix}.{path}.weight", shape, "matrix"))
            if self.config.details["bias"]:
                specs.append(TensorSpec(f"{prefix}.{path}.bias", shape[:1], "small"))
        specs += self._norm_tensors(f"{prefix}.self_attn_layer_norm")
        specs += self._norm_tensors(f"{prefix}.final_layer_norm")
        return specs

    def _norm_tensors(self, path: str) -> list[TensorSpec]:
        return [TensorSpec(name, (self.config.hidden_size,), "small") for name in self._norm_names("", path).values()]

    def _norm_names(self, name: str, path: str) -> dict[str, str]:
        if not self.config.details["norm_weights"]:
            return {}
        return {f"{name}.weight": f"{path}.weight", f"{name}.bias": f"{path}.bias"}


_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "fc1": "fc1",
    "fc2": "fc2",
}


def _positive(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        what = f"{key} is missing" if value is None else f"{key} is {value!r}"
        raise CheckpointError(what, where="config.json", fix="a positive integer would do")
    return value


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{key} is {value!r}", where="config.json", fix="true or false would do")
    return value


def _token_ids(config: Mapping[str, Any], key: str, default: int) -> tuple[int, ...]:
    """One id, several, or none at all where the config says null."""
    value = config.get(key, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise CheckpointError(f"{key} is {value!r}", where="config.json", fix="a token id or a list of them would do")
    return tuple(ids)
