"""A layer's weights as the model sees them: matrices over pages that are resident or in a slot, and small tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.model import LayerWeights, Matrix
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.pages import PagedTensor
from flexflow_engine.placement.span import Span
from flexflow_engine.placement.weights import PlacedLayer, Run
from flexflow_engine.runtime.memory import Memory


class PagedMatrix:
    """A matrix [out_features, in_features] in parts of adjoining rows, each contiguous in one tier's memory."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        """parts: [rows of the part, in_features] each, in order."""
        self._parts = tuple(parts)
        self._rows = [part.shape[0] for part in parts]

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, in_features] -> [N, out_features]; bias [out_features]."""
        if len(self._parts) == 1:
            return F.linear(x, self._parts[0], bias)
        biases = [None] * len(self._parts) if bias is None else torch.split(bias, self._rows)
        outputs = [F.linear(x, part, piece) for part, piece in zip(self._parts, biases, strict=True)]
        return torch.cat(outputs, dim=1)


class Weights:
    """Views of all weights, made once for each layer and slot and kept."""

    def __init__(self, layout: Layout, memory: Memory, codec: Codec, dtype: torch.dtype) -> None:
        self._layout, self._memory, self._codec, self._dtype = layout, memory, codec, dtype
        self._views: dict[tuple[int, int | None], LayerWeights] = {}

    def layer(self, index: int, slot: int | None) -> LayerWeights:
        """The weights of a layer whose loaded pages, if any, are in weight slot `slot`."""
        key = index, slot
        if key not in self._views:
            self._views[key] = self._make(self._layout.weights.layers[index], slot)
        return self._views[key]

    def table_parts(self) -> list[tuple[int, torch.Tensor]]:
        """The embedding table's parts that are computed on in place: (first token id, rows [n, width])."""
        runs = [run for run in self._layout.weights.table if run.tier in self._layout.direct]
        return [(run.first_row, self._resident(run)) for run in runs]

    def decode_rows(self, tensor: PagedTensor, encoded: torch.Tensor, rows: int) -> torch.Tensor:
        """Whole units of a tensor, uint8, as their first `rows` rows."""
        units = encoded.numel() // tensor.unit_nbytes
        shape = (units * tensor.unit_rows, tensor.columns)
        assert self._codec.keeps_bytes
        return encoded.view(self._dtype).view(shape)[:rows]

    def _make(self, layer: PlacedLayer, slot: int | None) -> LayerWeights:
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in layer.spec.matrices.values()}
        order = self._layout.weights.page_order(layer, self._layout.direct)
        offsets = {run.region: offset for run, _, offset in reversed(order)}  # of each run's first page
        for group in _adjoining(layer.runs, self._layout.direct):
            if group[0].tier in self._layout.direct:
                parts[group[0].tensor.name].append(self._resident(group[0]))
            else:
                parts[group[0].tensor.name].append(self._slotted(group, slot, offsets[group[0].region]))
        matrices: Mapping[str, Matrix] = {
            short: PagedMatrix(parts[name]) for short, name in layer.spec.matrices.items()
        }
        small = {short: self._small(name) for short, name in layer.spec.small.items()}
        return LayerWeights(matrices, small)

    def _resident(self, run: Run) -> torch.Tensor:
        encoded = self._memory.region_tensor(run.tier, run.region)
        return self.decode_rows(run.tensor, encoded, run.stop_row - run.first_row)

    def _slotted(self, group: Sequence[Run], slot: int | None, offset: int) -> torch.Tensor:
        nbytes = sum(run.nbytes for run in group)
        encoded = self._memory.tensor(Span(self._layout.device.name, f"weights.slot.{slot}", offset, nbytes))
        return self.decode_rows(group[0].tensor, encoded, group[-1].stop_row - group[0].first_row)

    def _small(self, name: str) -> torch.Tensor:
        tensor = next(t for t in self._layout.weights.small if t.name == name)
        offset = self._layout.small_offsets[name]
        encoded = self._memory.tensor(Span(self._layout.device.name, "small", offset, tensor.nbytes))
        return encoded.view(self._dtype).view(tensor.shape)


def _adjoining(runs: Sequence[Run], direct: frozenset[str]) -> list[list[Run]]:
    """Runs grouped so that those of one tensor that lie side by side in a slot are one matrix."""
    groups: list[list[Run]] = []
    for run in runs:
        last = groups[-1][-1] if groups else None
        if last and last.tensor is run.tensor and last.tier not in direct and run.tier not in direct:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups
