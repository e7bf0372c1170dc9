"""Runs tasks: what each operation of the graph means on the layout's memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.model import LayerKind, LayerWeights, Model
from flexflow_engine.abc.step import BatchStep, NextTokens
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.declared.results import check_result
from flexflow_engine.graph.task import (
    Attend,
    AttentionInputs,
    AttentionOutput,
    Compute,
    Copy,
    DecodeWeights,
    FetchTokens,
    GatherRows,
    Task,
)
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.span import Span
from flexflow_engine.placement.weights import PlacedLayer
from flexflow_engine.products.matmul import HostProducts
from flexflow_engine.runtime.decoder import Decoder
from flexflow_engine.runtime.hidden import HiddenStates
from flexflow_engine.runtime.indices import indices
from flexflow_engine.runtime.kv_cache import KVCache
from flexflow_engine.runtime.memory import Memory
from flexflow_engine.runtime.next_tokens import ROW_DTYPES, Fetched, TokenArray, TokenSource
from flexflow_engine.runtime.weights import Weights


class TileRunner:
    """The function that an executor calls for each task, from its lanes' threads.

    constant state    the layout, its memory, the model, the prompts, the source of the tokens that follow them
    changing state    fetched   (step, gpu_batch) -> the rows' next tokens; filled by the tokens lane, emptied by `take`
                      newest    gpu_batch -> place of each row, and their last tokens, in the latest of its steps
                      kind      of the layer that was computed last
    """

    def __init__(
        self,
        *,
        layout: Layout,
        memory: Memory,
        model: Model,
        kv_codec: Codec,
        device: str,
        prompts: Sequence[TokenArray],
        workers: Workers,
        products: HostProducts,
        source: TokenSource,
    ) -> None:
        self._layout, self._memory, self._model, self._prompts = layout, memory, model, prompts
        self._dtype: torch.dtype = getattr(torch, model.dtype)
        self._device = torch.device(device)
        self._products = products
        self._weights = Weights(layout, memory, self._dtype, products)
        self._hidden = HiddenStates(layout, memory, self._dtype)
        cache = KVCache(layout, memory, model.config, kv_codec, self._dtype, workers=workers)
        self._decoder = Decoder(
            layout=layout, memory=memory, model=model, cache=cache, hidden=self._hidden, workers=workers
        )
        self._source = source
        self._fetched: dict[tuple[int, int], Fetched] = {}
        self._newest: dict[int, tuple[dict[int, int], TokenArray]] = {}
        self._kind: LayerKind | None = None

    def __call__(self, task: Task) -> None:
        operation = task.operation
        if isinstance(operation, Copy):
            self._memory.copy(operation)
        elif isinstance(operation, GatherRows):
            self._gather(operation)
        elif isinstance(operation, DecodeWeights):
            self._weights.decode(operation.layer, operation.weight_slot)
        elif isinstance(operation, FetchTokens):
            self._fetch(operation, task.tile.step)
        elif isinstance(operation, AttentionInputs):
            self._decoder.attention_inputs(operation, self._weights.layer(operation.layer, operation.weight_slot))
        elif isinstance(operation, Attend):
            self._decoder.attend(operation)
        elif isinstance(operation, AttentionOutput):
            self._decoder.attention_output(operation, self._weights.layer(operation.layer, operation.weight_slot))
        else:
            self._compute(operation)

    def take(self, step: int, gpu_batch: int) -> NextTokens:
        """The next tokens of a batch's rows in a step that has ended; once."""
        return self._fetched.pop((step, gpu_batch)).next_tokens()

    def _compute(self, compute: Compute) -> None:
        layer = self._layout.weights.layers[compute.layer]
        weights = self._weights.layer(layer.index, compute.weight_slot)
        if layer.spec.kind != self._kind:
            self._products.forget_results()  # the workspace counts those of one kind
            self._kind = layer.spec.kind
        {
            "embed": self._embed,
            "decoder": self._decode_layer,
            "final": self._final,
            "head": self._head,
        }[layer.spec.kind](layer, weights, compute)

    def _embed(self, layer: PlacedLayer, weights: LayerWeights, compute: Compute) -> None:
        ids = self._token_ids(compute.batch)
        rows = self._rows(f"embed.slot.{compute.embed_slot}", len(ids), self._layout.embed_row_nbytes)
        self._weights.look_up(ids, rows, self._layout.direct)
        hidden = self._model.embed(weights, rows, indices(_positions(compute.batch), self._device))
        check_result(hidden, (len(ids), self._layout.hidden_size), self._dtype, of=f"embed of {self._model.name}")
        self._hidden.write(compute.batch, compute.hidden_slot, hidden)

    def _decode_layer(self, layer: PlacedLayer, weights: LayerWeights, compute: Compute) -> None:
        self._decoder.compute(compute, weights)

    def _final(self, layer: PlacedLayer, weights: LayerWeights, compute: Compute) -> None:
        hidden = self._hidden.gather(compute.batch, compute.hidden_slot)
        last = np.cumsum([row.new_tokens for row in compute.batch.rows]) - 1
        given = self._model.final(weights, hidden[indices(last, self._device)])
        features = self._features(compute.batch)
        features.copy_(check_result(given, features.shape, self._dtype, of=f"final of {self._model.name}"))

    def _head(self, layer: PlacedLayer, weights: LayerWeights, compute: Compute) -> None:
        """One part of the vocabulary."""
        batch = compute.batch
        logits = self._model.logits(weights, self._features(batch))
        shape = len(batch.rows), sum(rows for rows, _ in layer.matrices)
        check_result(logits, shape, self._dtype, of=f"logits of {self._model.name}")
        self._source.reduce(logits, layer.first_row, batch, partial(self._candidates, batch))

    def _gather(self, gather: GatherRows) -> None:
        ids = self._token_ids(gather.batch)
        target = self._memory.tensor(gather.target).view(self._dtype).view(len(ids), -1)
        self._weights.look_up(ids, target, {gather.far})

    def _fetch(self, fetch: FetchTokens, step: int) -> None:
        """Start the copy; the tokens are looked at once the task counts as issued, when the copy is done."""
        batch = fetch.batch
        fetched = self._source.fetch(batch, partial(self._read_candidates, batch))
        self._fetched[step, batch.gpu_batch] = fetched
        self._newest[batch.gpu_batch] = {row.row: place for place, row in enumerate(batch.rows)}, fetched.token_ids

    def _token_ids(self, batch: BatchStep) -> TokenArray:
        """The new tokens of all rows, one row after another."""
        if batch.phase == "prefill":
            return np.concatenate([self._prompts[row.sequence] for row in batch.rows])
        places, tokens = self._newest[batch.gpu_batch]
        return tokens[[places[row.row] for row in batch.rows]]

    def _features(self, batch: BatchStep) -> torch.Tensor:
        """[rows, head_width]"""
        return self._rows(f"features.{batch.gpu_batch}", len(batch.rows), self._layout.features_nbytes)

    def _candidates(self, batch: BatchStep, name: str) -> torch.Tensor:
        """[rows]"""
        return self._memory.tensor(self._candidates_span(batch, name)).view(ROW_DTYPES[name])

    def _read_candidates(self, batch: BatchStep, name: str, into: NDArray[Any]) -> None:
        self._memory.read(self._candidates_span(batch, name), into.view(np.uint8))

    def _candidates_span(self, batch: BatchStep, name: str) -> Span:
        return Span(self._layout.device.name, f"candidates.{batch.gpu_batch}.{name}", 0, len(batch.rows))

    def _rows(self, region: str, count: int, nbytes: int) -> torch.Tensor:
        tensor = self._memory.tensor(Span(self._layout.device.name, region, 0, count))
        return tensor.view(self._dtype).view(count, nbytes // self._dtype.itemsize)


def _positions(batch: BatchStep) -> NDArray[np.int64]:
    """Of the new tokens of all rows, one row after another."""
    tokens = np.array([row.new_tokens for row in batch.rows], np.int64)
    contexts = np.array([row.context for row in batch.rows], np.int64)
    before = np.cumsum(tokens) - tokens
    positions: NDArray[np.int64] = np.arange(batch.new_tokens) + np.repeat(contexts - before, tokens)
    return positions
