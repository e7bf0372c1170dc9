"""A layer's weights as the model sees them: matrices over pages that are resident or in a slot, and small tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name
from numpy.typing import NDArray

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.model import LayerWeights
from flexflow_engine.abc.tier import HOST
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.pages import PagedTensor
from flexflow_engine.placement.span import Span
from flexflow_engine.placement.weights import PlacedLayer, Run
from flexflow_engine.placement.workspace import FAR_LOOK_UP_ROWS, LOOK_UP_ROWS
from flexflow_engine.products.matmul import HostProducts, PlainRows, Rows, biases_of
from flexflow_engine.runtime.encoded_rows import EncodedRows
from flexflow_engine.runtime.indices import indices
from flexflow_engine.runtime.memory import Memory
from flexflow_engine.runtime.rows import RowMoves


class DeviceMatrix:
    """A matrix [out_features, in_features] in parts of adjoining rows, each where a device computes."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        """parts: in order, [rows, in_features] each."""
        self._parts, self._sizes = parts, [len(part) for part in parts]

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, in_features] -> [N, out_features]; bias [out_features]."""
        if len(self._parts) == 1:
            return F.linear(x, self._parts[0], bias)
        biases = biases_of(self._sizes, bias)
        return torch.cat([F.linear(x, part, some) for part, some in zip(self._parts, biases, strict=True)], dim=1)


class HostMatrix:
    """The same in host memory, encoded or not."""

    def __init__(self, parts: Sequence[Rows], products: HostProducts) -> None:
        """parts: in order."""
        self.parts, self._products = parts, products

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [N, in_features] -> [N, out_features]; bias [out_features]."""
        return self._products.linear_each(x, [(self.parts, bias)])[0]


@dataclass(frozen=True, slots=True)
class HostWeights(LayerWeights):
    """A layer's weights where the host computes."""

    matrices: Mapping[str, HostMatrix]
    products: HostProducts

    def linear_each(self, x: torch.Tensor, matrices: Sequence[tuple[str, torch.Tensor | None]]) -> list[torch.Tensor]:
        """All products as one."""
        return self.products.linear_each(x, [(self.matrices[name].parts, bias) for name, bias in matrices])


@dataclass(frozen=True, slots=True)
class _Block:
    """Adjoining rows of one tensor as they lie in memory: uint8 [units, unit_nbytes]."""

    tensor: PagedTensor
    first_row: int
    """Counted from the layer's first row of the tensor."""
    rows: int
    """Rows that exist; the last unit may be padded."""
    encoded: torch.Tensor


class Weights:
    """Views of all weights, made once for each layer and slot and kept.

    Matrices are views of resident pages and slots, encoded or not. Where encoded ones can't be multiplied, `decode`
    fills the region `weights.decoded`, and matrices are views of that.
    """

    def __init__(self, layout: Layout, memory: Memory, dtype: torch.dtype, products: HostProducts) -> None:
        """products: for what is multiplied on the host."""
        self._layout, self._memory, self._dtype = layout, memory, dtype
        self._products = products if layout.device.memory == HOST else None
        self._views: dict[tuple[int, int | None], LayerWeights] = {}
        self._decodes: dict[tuple[int, int | None], list[Callable[[], None]]] = {}

    def layer(self, index: int, slot: int | None) -> LayerWeights:
        """The weights of a layer whose loaded pages, if any, are in weight slot `slot`, and decoded if they need be."""
        key = index, None if self._layout.decodes_weights else slot
        if key not in self._views:
            layer = self._layout.weights.layers[index]
            matrices = self._decoded(layer) if self._layout.decodes_weights else self._in_place(layer, slot)
            small = {short: self._small(name) for short, name in layer.spec.small.items()}
            parts = {short: matrices[name] for short, name in layer.spec.matrices.items()}
            self._views[key] = self._layer_weights(parts, small)
        return self._views[key]

    def _decoding(self, layer: PlacedLayer, slot: int | None) -> list[Callable[[], None]]:
        """What decodes all matrices: a call for each codec."""
        pairs: dict[Codec, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for blocks in self._blocks(layer, slot).values():
            for block in blocks:
                pairs.setdefault(block.tensor.codec, []).append((block.encoded, self._target(layer, block)))
        return [codec.decoding(some) for codec, some in pairs.items()]

    def _layer_weights(self, parts: Mapping[str, list[Rows]], small: Mapping[str, torch.Tensor]) -> LayerWeights:
        """parts: of each matrix."""
        if self._products is None:
            whole = {name: [part.part(0, part.out_features, None) for part in some] for name, some in parts.items()}
            return LayerWeights({name: DeviceMatrix(tensors) for name, tensors in whole.items()}, small)
        products = self._products
        return HostWeights({name: HostMatrix(some, products) for name, some in parts.items()}, small, products)

    def decode(self, index: int, slot: int | None) -> None:
        """Decode all matrices of a layer."""
        key = index, slot
        if key not in self._decodes:
            self._decodes[key] = self._decoding(self._layout.weights.layers[index], slot)
        for decode in self._decodes[key]:
            decode()

    def look_up(self, ids: NDArray[np.int64], target: torch.Tensor, tiers: Collection[str]) -> None:
        """Copy the embedding rows of those token ids that lie on `tiers` to their places in `target` [len(ids), table
        width], on the compute tier if it reads those tiers, else in host memory.
        """
        for run in self._layout.weights.table:
            if run.tier in tiers:
                places = np.flatnonzero((ids >= run.first_row) & (ids < run.stop_row))
                step = self._rows_at_once(run, target, len(places))
                for start in range(0, len(places), step):
                    self._look_up(run, ids, places[start : start + step], target)

    def _rows_at_once(self, run: Run, target: torch.Tensor, count: int) -> int:
        """Of `count` rows, those that are looked up together: all of them where they are copied from where they lie."""
        if target.device.type == HOST and self._is_copied_from(run):
            return max(1, count)
        return LOOK_UP_ROWS if run.tier in self._layout.direct else FAR_LOOK_UP_ROWS

    def _look_up(self, run: Run, ids: NDArray[np.int64], places: NDArray[np.int64], target: torch.Tensor) -> None:
        """Read and decode each unit that is wanted once, and copy its rows to every place that wants them."""
        table, device = run.tensor, target.device
        if self._is_copied_from(run):
            rows = self._resident(run).view(self._dtype).view(-1, table.columns)
            RowMoves(ids[places] - run.first_row, places, device).put(rows, target)
            return
        units, which = np.unique(ids[places] // table.unit_rows, return_inverse=True)
        rows = self._unit_rows(table, self._units(run, units, device))
        chosen = which * table.unit_rows + ids[places] % table.unit_rows
        RowMoves(chosen, places, device).put(rows, target)

    def _unit_rows(self, table: PagedTensor, encoded: torch.Tensor) -> torch.Tensor:
        """The rows of units, uint8 [n, unit_nbytes]: [n * unit_rows, columns]."""
        if table.codec.keeps_bytes:
            return encoded.view(self._dtype).view(-1, table.columns)
        shape = len(encoded), table.unit_rows, table.columns
        rows = torch.empty(shape, dtype=self._dtype, device=encoded.device)
        table.codec.decode(encoded, rows)
        return rows.view(-1, table.columns)

    def _units(self, run: Run, units: NDArray[np.int64], device: torch.device) -> torch.Tensor:
        """Some units of a run, counted from the tensor's start: uint8 [n, unit_nbytes], on the device or the host."""
        if self._is_in_memory(run):
            return self._resident(run)[indices(units - run.first_unit, device)]
        encoded = np.empty((len(units), run.tensor.unit_nbytes), np.uint8)
        first = self._layout.unit_span(run, run.first_unit)
        self._memory.gather(first.tier, first.region, units - run.first_unit + first.first, encoded.reshape(-1))
        return torch.from_numpy(encoded)

    def _is_copied_from(self, run: Run) -> bool:
        """Whether its rows are copied from where they lie, without being read or decoded first."""
        return run.tensor.codec.keeps_bytes and self._is_in_memory(run)

    def _is_in_memory(self, run: Run) -> bool:
        """Of whoever looks its rows up: the compute tier's processor, or the host."""
        return run.tier in self._layout.direct or self._layout.tier(run.tier).read_by_host

    def _in_place(self, layer: PlacedLayer, slot: int | None) -> dict[str, list[Rows]]:
        return {name: [self._rows(block) for block in blocks] for name, blocks in self._blocks(layer, slot).items()}

    def _rows(self, block: _Block) -> Rows:
        codec = block.tensor.codec
        if codec.keeps_bytes:
            return PlainRows(block.encoded.view(self._dtype).view(-1, block.tensor.columns)[: block.rows])
        return EncodedRows(codec, block.encoded, (block.tensor.unit_rows, block.tensor.columns), rows=block.rows)

    def _decoded(self, layer: PlacedLayer) -> dict[str, list[Rows]]:
        tensors = {run.tensor.name: run.tensor for run in layer.runs}
        rows = {name: sum(r.rows for r in layer.runs if r.tensor.name == name) for name in tensors}
        return {name: [PlainRows(self._dense(layer, tensor)[: rows[name]])] for name, tensor in tensors.items()}

    def _target(self, layer: PlacedLayer, block: _Block) -> torch.Tensor:
        """Where a block's units are decoded to: [units, unit_rows, columns]."""
        rows = len(block.encoded) * block.tensor.unit_rows
        out = self._dense(layer, block.tensor)[block.first_row : block.first_row + rows]
        return out.view(-1, block.tensor.unit_rows, block.tensor.columns)

    def _dense(self, layer: PlacedLayer, tensor: PagedTensor) -> torch.Tensor:
        """The decoded rows of a tensor, whole units: [rows, columns]."""
        offsets, _ = self._layout.weights.decoded_offsets(layer, self._layout.item_nbytes)
        rows = sum(run.num_units for run in layer.runs if run.tensor is tensor) * tensor.unit_rows
        nbytes = rows * tensor.columns * self._layout.item_nbytes
        span = Span(self._layout.device.name, "weights.decoded", offsets[tensor.name], nbytes)
        return self._memory.tensor(span).view(self._dtype).view(rows, tensor.columns)

    def _blocks(self, layer: PlacedLayer, slot: int | None) -> dict[str, list[_Block]]:
        """The blocks of each matrix, in order of rows."""
        blocks: dict[str, list[_Block]] = {name: [] for name in layer.spec.matrices.values()}
        order = self._layout.weights.page_order(layer, self._layout.direct)
        offsets = {run.region: offset for run, _, offset in reversed(order)}  # of each run's first page
        for group in _adjoining(layer.runs, self._layout.direct):
            run = group[0]
            encoded = self._resident(run) if run.tier in self._layout.direct else self._slotted(group, slot, offsets)
            first_row = run.first_row - layer.first_row
            blocks[run.tensor.name].append(_Block(run.tensor, first_row, group[-1].stop_row - run.first_row, encoded))
        return blocks

    def _resident(self, run: Run) -> torch.Tensor:
        return self._memory.region_tensor(run.tier, run.region).view(-1, run.tensor.unit_nbytes)

    def _slotted(self, group: Sequence[Run], slot: int | None, offsets: Mapping[str, int]) -> torch.Tensor:
        nbytes, location = sum(run.nbytes for run in group), f"weights.slot.{slot}"
        span = Span(self._layout.device.name, location, offsets[group[0].region], nbytes)
        return self._memory.tensor(span).view(-1, group[0].tensor.unit_nbytes)

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
