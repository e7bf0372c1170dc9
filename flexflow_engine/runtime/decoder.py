"""One decoder layer on one GPU batch: as a whole, or in two parts on the compute tier, with attention on the host
between them.
"""

from __future__ import annotations

import torch

from flexflow_engine.abc.model import LayerWeights, Model
from flexflow_engine.abc.tier import HOST
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.declared.results import check_results
from flexflow_engine.graph.task import Attend, AttentionInputs, AttentionOutput, Compute
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.span import Span
from flexflow_engine.runtime.attention import attend_prompts, attend_tokens
from flexflow_engine.runtime.hidden import HiddenStates
from flexflow_engine.runtime.kv_cache import KVCache, TileCache
from flexflow_engine.runtime.memory import Memory


class Decoder:
    """Carries out what the compute lane and the attention lane do to decoder layers."""

    def __init__(
        self,
        *,
        layout: Layout,
        memory: Memory,
        model: Model,
        cache: KVCache,
        hidden: HiddenStates,
        workers: Workers,
    ) -> None:
        self._workers = workers if layout.device.memory == HOST else None
        self._layout, self._memory, self._model, self._cache, self._hidden = layout, memory, model, cache, hidden
        self._dtype: torch.dtype = getattr(torch, model.dtype)

    def compute(self, compute: Compute, weights: LayerWeights) -> None:
        """The whole layer: prompts, or tokens whose cache the compute tier attends to."""
        batch, scale = compute.batch, self._model.config.attention_scale
        hidden = self._hidden.gather(batch, compute.hidden_slot)
        q, k, v = self._inputs(weights, hidden)
        if batch.phase == "prefill":
            _make_finite(k, v)
            self._prompts_cache(compute).write_prompts(batch.rows, k, v)
            attended = attend_prompts(batch.rows, q, k, v, scale, workers=self._workers)
        else:
            cache = self._cache.tile(compute.layer, batch.gpu_batch, compute.kv_slot)
            if cache.device is None:
                _make_finite(k, v)
            cache.append(batch.rows, k, v)
            attended = attend_tokens(batch.rows, q, cache, self._layout.policy.gpu_batch_size, scale)
        del q, k, v
        self._model.attention_output(weights, hidden, attended)
        self._hidden.put_back(batch, compute.hidden_slot, hidden)

    def attention_inputs(self, task: AttentionInputs, weights: LayerWeights) -> None:
        """Queries, keys and values into the attention slot."""
        q, k, v = self._inputs(weights, self._hidden.gather(task.batch, task.hidden_slot))
        _make_finite(k, v)
        for place, new in zip(self._near_slot(task), (q, k, v), strict=True):
            place.copy_(new)

    def attend(self, task: Attend) -> None:
        """On the host: cache the slot's keys and values, and put what its queries attend to into their place."""
        rows, attention = task.batch.rows, self._layout.attention
        q, k, v = self._slot(attention.tier, attention.host_slot(task.attention_slot), len(rows))
        cache = self._cache.tile(task.layer, task.batch.gpu_batch, task.kv_slot)
        cache.append(rows, k, v)
        scale = self._model.config.attention_scale
        attended = attend_tokens(rows, q, cache, self._layout.policy.gpu_batch_size, scale)
        if attended.data_ptr() != q.data_ptr():
            q.copy_(attended.view(q.shape))

    def attention_output(self, task: AttentionOutput, weights: LayerWeights) -> None:
        """The rest of the layer, from the attended values in the slot."""
        attended, _, _ = self._near_slot(task)
        hidden = self._hidden.gather(task.batch, task.hidden_slot)
        self._model.attention_output(weights, hidden, attended.flatten(1))
        self._hidden.put_back(task.batch, task.hidden_slot, hidden)

    def _inputs(self, weights: LayerWeights, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [N, num_heads, head_dim], k and v [N, num_kv_heads, head_dim]"""
        config, tokens = self._model.config, len(hidden)
        heads, kv_heads = (tokens, config.num_heads, config.head_dim), (tokens, config.num_kv_heads, config.head_dim)
        inputs = self._model.attention_inputs(weights, hidden)
        of = f"attention_inputs of {self._model.name}"
        q, k, v = check_results(inputs, (heads, kv_heads, kv_heads), self._dtype, of=of)
        return q, k, v

    def _prompts_cache(self, compute: Compute) -> TileCache:
        if compute.prompt_slot is None:
            return self._cache.tile(compute.layer, compute.batch.gpu_batch, compute.kv_slot)
        return self._cache.prompts(compute.layer, compute.batch.gpu_batch, compute.prompt_slot)

    def _near_slot(self, task: AttentionInputs | AttentionOutput) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attention = self._layout.attention
        return self._slot(attention.near_tier, attention.near_slot(task.attention_slot), len(task.batch.rows))

    def _slot(self, tier: str, region: str, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """An attention slot as q [rows, num_heads, head_dim], k and v [rows, num_kv_heads, head_dim]."""
        config = self._model.config
        numbers = self._memory.tensor(Span(tier, region, 0, self._layout.attention_nbytes(rows))).view(self._dtype)
        heads = numbers.view(-1, config.head_dim)
        q, k, v = heads.split([rows * config.num_heads, rows * config.num_kv_heads, rows * config.num_kv_heads])
        return q.view(rows, -1, config.head_dim), k.view(rows, -1, config.head_dim), v.view(rows, -1, config.head_dim)


def _make_finite(*cached: torch.Tensor) -> None:
    """What is masked still meets a weight of 0, and 0 x inf would reach the row's next sequence."""
    for new in cached:
        new.nan_to_num_()
