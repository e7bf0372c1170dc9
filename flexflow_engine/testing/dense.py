"""Weights that are simply there: one torch tensor a matrix, no page and no codec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from flexflow_engine.abc.model import LayerSpec, LayerWeights, Model


@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A `Matrix` [out_features, in_features] that lies in one tensor."""

    weight: torch.Tensor

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return functional.linear(x, self.weight, bias)


def random_parameters(model: Model, *, seed: int, scale: float = 0.05) -> dict[str, torch.Tensor]:
    """Every parameter of the manifest, by checkpoint name, drawn from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, model.dtype)
    return {spec.name: (torch.randn(spec.shape, generator=generator) * scale).to(dtype) for spec in model.tensors()}


def layer_weights(layer: LayerSpec, parameters: Mapping[str, torch.Tensor]) -> LayerWeights:
    """The layer's weights under its short names."""
    return LayerWeights(
        matrices={short: DenseMatrix(parameters[name]) for short, name in layer.matrices.items()},
        small={short: parameters[name] for short, name in layer.small.items()},
    )
