"""A model's functions, run on random weights: what the conformance suite of models looks at."""

from __future__ import annotations

import torch

from flexflow_engine.abc.model import LayerKind, LayerWeights, Model
from flexflow_engine.testing.allocations import PeakAllocations
from flexflow_engine.testing.dense import layer_weights, random_parameters


class LayerRun:
    """A model with random weights, and inputs to run it on: row i of every input is the same in any batch."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.parameters = random_parameters(model, seed=0)
        self._layers = {layer.kind: layer for layer in reversed(model.layers())}

    def weights(self, kind: LayerKind, *, rows: int | None = None) -> LayerWeights:
        """Of the first layer of that kind; `rows` cuts its matrices."""
        layer = self._layers[kind]
        cut = {name: self.parameters[name][:rows] for name in layer.matrices.values()}
        return layer_weights(layer, self.parameters | cut)

    def table_rows(self, num_tokens: int) -> torch.Tensor:
        """[N, table_width]."""
        name = self._layers["embed"].table
        assert name is not None
        table = self.parameters[name]
        return table[torch.arange(num_tokens) * 5 % len(table)]

    def positions(self, num_tokens: int) -> torch.Tensor:
        """[N], int64."""
        return torch.arange(num_tokens) % self.model.config.max_positions

    def attended(self, num_tokens: int) -> torch.Tensor:
        """[N, num_heads * head_dim]."""
        config = self.model.config
        values = torch.arange(num_tokens * config.num_heads * config.head_dim, dtype=torch.float32)
        return values.sin().view(num_tokens, -1).to(next(iter(self.parameters.values())).dtype)

    def embed(self, num_tokens: int) -> torch.Tensor:
        """hidden [N, hidden_size]."""
        return self.model.embed(self.weights("embed"), self.table_rows(num_tokens), self.positions(num_tokens))

    def through(self, rows: slice) -> tuple[torch.Tensor, ...]:
        """q, k, v, hidden and logits of these rows, computed in one batch."""
        num_tokens = rows.stop
        embedded = self.table_rows(num_tokens)[rows], self.positions(num_tokens)[rows]
        hidden = self.model.embed(self.weights("embed"), *embedded)
        q, k, v = self.model.attention_inputs(self.weights("decoder"), hidden)
        self.model.attention_output(self.weights("decoder"), hidden, self.attended(num_tokens)[rows])
        logits = self.model.logits(self.weights("head"), self.model.final(self.weights("final"), hidden))
        return q, k, v, hidden, logits

    def peak_nbytes(self, num_tokens: int) -> dict[str, int]:
        """The most bytes that each kind's functions hold at once, results included; for the head without them."""
        model, weights = self.model, self.weights("decoder")
        rows, positions, attended = self.table_rows(num_tokens), self.positions(num_tokens), self.attended(num_tokens)
        with torch.inference_mode():
            with PeakAllocations() as embed:
                hidden = model.embed(self.weights("embed"), rows, positions)
            with PeakAllocations() as inputs:
                model.attention_inputs(weights, hidden)
            with PeakAllocations() as output:
                model.attention_output(weights, hidden, attended)
            with PeakAllocations() as final:
                features = model.final(self.weights("final"), hidden)
            with PeakAllocations() as head:
                logits = model.logits(self.weights("head"), features)
        return {
            "embed": embed.peak_bytes,
            "decoder": max(inputs.peak_bytes, output.peak_bytes),
            "final": final.peak_bytes,
            "head": head.peak_bytes - logits.nbytes,
        }
