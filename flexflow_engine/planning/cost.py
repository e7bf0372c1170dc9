"""The cost model: seconds of each task of a compiled graph, on a machine that a hardware profile describes.

A task's time has two parts. `fixed_s` passes whatever else goes on: latencies, calls. `shared_s` is what the task
takes of its link or processor while it has that for itself; tasks of a lane take turns.

    transfer      fixed = contiguous moves * latency     shared = bytes / rate of the link
    gather rows   fixed = looked-up units * host's time for a row     shared = units * unit_s + bytes / rate
                  without unit_s where the host picks rows from its own memory
    decode        fixed = task_s    shared = numbers / decode rate
    compute       fixed = task_s    shared = matmuls + vectors + attention (planning.arithmetic)
                  fixed = task_s + layer_s for a decoder layer
    attend        the same of attention on the host's processor; inputs and output of it: their part of the layer
    full pages    fixed + layer_s where attention's new tokens fill pages that lie elsewhere, or encoded: keys and
                  values leave their tails by about as many calls as a layer has; shared + their numbers, so handled

Left out, because no profile knows them: file system caches, the two directions of a link that get in each other's way
by more than `Beside` says, clocks that fall when a processor gets hot.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import HardwareProfile
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.step import BatchStep
from flexflow_engine.abc.tier import HOST
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
from flexflow_engine.placement.weights import PlacedLayer
from flexflow_engine.planning.arithmetic import Arithmetic
from flexflow_engine.planning.contention import Contention

_Computation = DecodeWeights | FetchTokens | AttentionInputs | AttentionOutput | Compute


@dataclass(frozen=True, slots=True)
class Work:
    """What one task takes."""

    fixed_s: float
    shared_s: float

    @property
    def seconds(self) -> float:
        """With its link or processor for itself."""
        return self.fixed_s + self.shared_s


class CostModel:
    """For the graphs of one layout."""

    def __init__(self, layout: Layout, model: Model, kv_codec: Codec, profile: HardwareProfile) -> None:
        """Raises HardwareError where the profile lacks a link, a processor or a rate that the layout needs."""
        self._layout, self._profile = layout, profile
        self._link = Contention(layout.tiers, profile).link
        processor = profile.processor(layout.device.memory)
        products = processor.torch_team.get(model.dtype) if layout.only_computes else None
        self._arithmetic = Arithmetic(processor, model.config, model.dtype, kv_codec, products)
        attending = profile.processor(HOST) if layout.attention.on_host else processor
        self._attention = Arithmetic(attending, model.config, model.dtype, kv_codec)
        self._matrices = [layer.matrices for layer in layout.weights.layers]
        self._has_tails = layout.kv.tail_units > 0
        self._known_filled: dict[int, tuple[BatchStep, int]] = {}

    def work(self, task: Task) -> Work:
        """Prices by type of operation: the only place that tells them apart."""
        operation = task.operation
        if isinstance(operation, Copy):
            return self._copy(operation, task)
        if isinstance(operation, GatherRows):
            return self._gather(operation, task)
        if isinstance(operation, Attend):
            fixed_s = self._attention.task_s + self._calls(operation.batch) * self._attention.layer_s
            return Work(fixed_s, self._token_attention(self._attention, operation.batch))
        layer_s = self._arithmetic.layer_s if self._ends_layer(operation) else 0.0
        calls = self._calls(operation.batch) if isinstance(operation, Compute) else 1
        return Work(self._arithmetic.task_s + calls * layer_s, self._computed(operation))

    def _copy(self, copy: Copy, task: Task) -> Work:
        link = self._link(task.lane)
        return Work(len(copy.moves) * link.latency_s, task.nbytes / link.bytes_per_s)

    def _gather(self, gather: GatherRows, task: Task) -> Work:
        """The units of the far part of the table that hold the batch's tokens. Where the host doesn't pick them itself,
        each is read once, one after another. Beside pages their time grows as that of bytes does: these small reads
        queue behind what the pages asked for.
        """
        link, picked = self._link(task.lane), self._layout.tier(gather.far).read_by_host
        units = sum(
            distinct(run.num_units, gather.batch.new_tokens * run.rows / run.tensor.rows)
            for run in self._layout.weights.table
            if run.tier == gather.far
        )
        shared_s = task.nbytes / link.bytes_per_s + (0.0 if picked else units * link.gathered_unit_s)
        return Work(units * self._profile.host.gather_row_s, shared_s)

    def _computed(self, operation: _Computation) -> float:
        """What the compute tier's processor is given."""
        if isinstance(operation, DecodeWeights):
            numbers = sum(rows * columns for rows, columns in self._matrices[operation.layer])
            return self._arithmetic.decoded(numbers, self._layout.weights.layers[operation.layer].codec)
        if isinstance(operation, FetchTokens):
            return 0.0
        if isinstance(operation, AttentionInputs):
            return self._attention_inputs(self._layout.weights.layers[operation.layer], operation.batch)
        if isinstance(operation, AttentionOutput):
            layer, batch = self._layout.weights.layers[operation.layer], operation.batch
            return self._layer(layer, batch.new_tokens) - self._attention_inputs(layer, batch)
        return self._compute(operation)

    def _ends_layer(self, operation: _Computation) -> bool:
        """Whether it is a decoder layer, or what is left of one after its attention."""
        layers = self._layout.weights.layers
        whole = isinstance(operation, Compute) and layers[operation.layer].spec.kind == "decoder"
        return whole or isinstance(operation, AttentionOutput)

    def _calls(self, batch: BatchStep) -> int:
        """How many times `layer_s` a layer's calls take that attends: once more where tokens fill pages."""
        return 2 if self._filled(batch) else 1

    def _filled(self, batch: BatchStep) -> int:
        """How many rows' tokens of a decode step fill a page that leaves its tail."""
        known = self._known_filled.get(batch.gpu_batch)
        if known is None or known[0] is not batch:  # asked for every layer, and a batch has hundreds of rows
            page_tokens, decodes = self._layout.kv.page_tokens, self._has_tails and batch.phase == "decode"
            filled = sum((row.context + 1) % page_tokens == 0 for row in batch.rows) if decodes else 0
            known = self._known_filled[batch.gpu_batch] = batch, filled
        return known[1]

    def _compute(self, compute: Compute) -> float:
        layer, batch = self._layout.weights.layers[compute.layer], compute.batch
        return {
            "embed": self._embed,
            "decoder": self._decoder,
            "final": self._last_tokens,
            "head": self._last_tokens,
        }[layer.spec.kind](layer, batch)

    def _embed(self, layer: PlacedLayer, batch: BatchStep) -> float:
        return self._layer(layer, batch.new_tokens)

    def _decoder(self, layer: PlacedLayer, batch: BatchStep) -> float:
        rows = batch.rows
        prompts = batch.phase == "prefill"
        arithmetic = self._arithmetic
        attention = arithmetic.prompt_attention(rows) if prompts else self._token_attention(arithmetic, batch)
        return self._layer(layer, batch.new_tokens) + attention

    def _token_attention(self, arithmetic: Arithmetic, batch: BatchStep) -> float:
        """Pages that it fills are encoded, or moved, out of their tails."""
        filled = self._filled(batch)
        kept = arithmetic.kept(filled * self._layout.kv.page_tokens) if filled else 0.0
        return arithmetic.token_attention(batch.rows) + kept

    def _attention_inputs(self, layer: PlacedLayer, batch: BatchStep) -> float:
        """The part of a decoder layer that makes queries, keys and values."""
        width, hidden_size = self._layout.inputs_width, self._layout.hidden_size
        vectors = self._arithmetic.memory(batch.new_tokens * 2 * width)
        return self._matmul(layer, hidden_size * width, batch.new_tokens, products=3) + vectors

    def _last_tokens(self, layer: PlacedLayer, batch: BatchStep) -> float:
        return self._layer(layer, len(batch.rows))

    def _layer(self, layer: PlacedLayer, tokens: int) -> float:
        matrices = self._matrices[layer.index]
        vectors = self._arithmetic.vectors(sum(rows for rows, _ in matrices), tokens)
        numbers = sum(rows * columns for rows, columns in matrices)
        return self._matmul(layer, numbers, tokens, len(matrices)) + vectors

    def _matmul(self, layer: PlacedLayer, numbers: int, tokens: int, products: int) -> float:
        if numbers and self._layout.multiplies_encoded:
            return self._arithmetic.encoded_matmul(numbers, tokens, products, layer.codec)
        return self._arithmetic.matmul(numbers, tokens, products)


def distinct(units: int, draws: float) -> float:
    """How many of so many units are met by that many random draws: units * (1 - (1 - 1 / units) ^ draws)."""
    return units * (1 - (1 - 1 / units) ** draws) if units else 0.0
