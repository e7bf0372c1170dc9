"""What tasks compute: floating point operations and bytes, for traces and for whoever predicts a run."""

from __future__ import annotations

from flexflow_engine.abc.step import BatchStep, Step
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.weights import PlacedLayer


def matmul_flops(layer: PlacedLayer, batch: BatchStep) -> float:
    """Two for each weight and token."""
    tokens = batch.new_tokens if layer.spec.kind in {"embed", "decoder"} else len(batch.rows)
    return 2.0 * tokens * sum(run.rows * run.tensor.columns for run in layer.runs)


def attention_inputs_flops(layout: Layout, batch: BatchStep) -> float:
    """The part of a decoder layer's matmuls that makes queries, keys and values."""
    return 2.0 * batch.new_tokens * layout.hidden_size * layout.inputs_width


class AttentionWork:
    """Of a step's GPU batches in one layer; every layer has the same. By gpu_batch."""

    def __init__(self, layout: Layout, step: Step) -> None:
        self.flops = {batch.gpu_batch: attention_flops(layout, batch) for batch in step.batches}
        self.nbytes = {batch.gpu_batch: attention_nbytes(layout, batch) for batch in step.batches}


def attention_flops(layout: Layout, batch: BatchStep) -> float:
    """Four for each new token, position that it attends to and number of its query."""
    positions = sum(row.new_tokens * (row.context + (row.new_tokens + 1) / 2) for row in batch.rows)
    return 4.0 * layout.attention_width * positions


def attention_nbytes(layout: Layout, batch: BatchStep) -> int:
    """Bytes of the keys and values, as they are stored, that a decode step of one layer attends to."""
    tokens = sum(row.context + 1 for row in batch.rows)
    return 2 * tokens * layout.kv.page_nbytes // layout.kv.page_tokens
