"""Which weight page lies on which tier, and where it goes when it is loaded.

    layer 3, 16 pages:   |0 1 2|3 4 5 6 7|8 ... 15|
                         device   host     disk
    slot of layer 3:           |3 4 5 6 7 8 ... 15|      pages of one tensor are contiguous in a slot,
                                                         whatever tier they come from

A tier whose memory the compute tier's processor reads directly needs no slot: its pages are computed on in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.model import LayerSpec, Model
from flexflow_engine.abc.policy import Placement
from flexflow_engine.placement.diffusion import Cut, cut_groups
from flexflow_engine.placement.pages import PagedTensor

ALIGNMENT = 512
"""Bytes; a disk's sector, so that direct I/O fills a slot without a copy, and enough for every vector instruction."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page of one tensor."""

    tensor: PagedTensor
    index: int

    @property
    def first_unit(self) -> int:
        return self.tensor.page_units(self.index).start

    @property
    def num_units(self) -> int:
        return len(self.tensor.page_units(self.index))

    @property
    def nbytes(self) -> int:
        return self.num_units * self.tensor.unit_nbytes


@dataclass(frozen=True, slots=True)
class Run:
    """Adjoining pages of one tensor on one tier."""

    tier: str
    pages: tuple[Page, ...]

    @property
    def tensor(self) -> PagedTensor:
        return self.pages[0].tensor

    @property
    def first_unit(self) -> int:
        return self.pages[0].first_unit

    @property
    def num_units(self) -> int:
        return self.tensor.page_units(self.pages[-1].index).stop - self.first_unit

    @property
    def nbytes(self) -> int:
        return self.num_units * self.tensor.unit_nbytes

    @property
    def first_row(self) -> int:
        return self.pages[0].index * self.tensor.page_rows

    @property
    def stop_row(self) -> int:
        return min((self.pages[-1].index + 1) * self.tensor.page_rows, self.tensor.rows)

    @property
    def rows(self) -> int:
        return self.stop_row - self.first_row

    @property
    def region(self) -> str:
        """Name of the region that holds the run on a tier in memory."""
        return f"weights.{self.tensor.name}.{self.first_unit}"


@dataclass(frozen=True, slots=True)
class PlacedLayer:
    """One layer as the engine runs it: the head is cut into layers no larger than a decoder layer."""

    index: int
    spec: LayerSpec
    runs: tuple[Run, ...]
    """In order of tensors and rows; a tensor may have several."""
    first_row: int
    """For a part of the head: the token id of its first row."""

    @property
    def codec(self) -> Codec:
        """Of its matrices, of which it has at least one."""
        return self.runs[0].tensor.codec

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of each, however many runs it lies in."""
        columns = {run.tensor.name: run.tensor.columns for run in self.runs}
        rows = Counter[str]()
        for run in self.runs:
            rows[run.tensor.name] += run.rows
        return [(rows[name], columns[name]) for name in columns]


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """Every layer's pages, placed."""

    layers: tuple[PlacedLayer, ...]
    table: tuple[Run, ...]
    """The embedding table's runs, in order of rows; shared with the head's layers when it is tied."""
    small: tuple[PagedTensor, ...]

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """Of the large tensors, each once."""
        runs = (run for layer in self.layers for run in layer.runs)
        return tuple(dict.fromkeys(run.tensor.codec for run in (*self.table, *runs)))

    def placed(self, tier: str) -> tuple[Run, ...]:
        """Every run on `tier`, each once."""
        runs = {run.region: run for layer in self.layers for run in layer.runs if run.tier == tier}
        runs.update({run.region: run for run in self.table if run.tier == tier})
        return tuple(runs.values())

    def table_share(self, tier: str) -> float:
        """Of the table's rows, those that lie on `tier`."""
        return sum(run.rows for run in self.table if run.tier == tier) / self.table[0].tensor.rows

    def page_order(self, layer: PlacedLayer, direct: frozenset[str]) -> list[tuple[Run, Page, int]]:
        """The pages to load for a layer, each with its byte offset in the layer's slot."""
        order, offset, tensor = [], 0, None
        for run in layer.runs:
            if run.tier in direct:
                continue
            if run.tensor is not tensor:
                offset += -offset % ALIGNMENT
                tensor = run.tensor
            for page in run.pages:
                order.append((run, page, offset))
                offset += page.nbytes
        return order

    def decoded_offsets(self, layer: PlacedLayer, item_nbytes: int) -> tuple[dict[str, int], int]:
        """Where each matrix of a layer lies once it is decoded, by tensor name, and the bytes of all of them."""
        offsets, end = {}, 0
        for tensor in {run.tensor.name: run.tensor for run in layer.runs}.values():
            units = sum(run.num_units for run in layer.runs if run.tensor is tensor)
            nbytes = units * tensor.unit_rows * tensor.columns * item_nbytes
            offsets[tensor.name] = end
            end += nbytes + -nbytes % ALIGNMENT
        return offsets, end

    def slot_nbytes(self, direct: frozenset[str]) -> int:
        """Bytes that the largest layer needs in a slot."""
        return max((self._slot_end(layer, direct) for layer in self.layers), default=0)

    def _slot_end(self, layer: PlacedLayer, direct: frozenset[str]) -> int:
        """Where the last page of `page_order` ends, run by run: it is asked of every policy that is weighed."""
        offset, tensor = 0, None
        for run in layer.runs:
            if run.tier not in direct:
                offset += -offset % ALIGNMENT if run.tensor is not tensor else 0
                offset, tensor = offset + run.nbytes, run.tensor
        return offset


def place_weights(model: Model, tensors: Sequence[PagedTensor], placement: Placement) -> WeightLayout:
    """Cut every layer's pages among the tiers, in the order in which the layers run."""
    by_name = {tensor.name: tensor for tensor in tensors}
    layers = _runtime_layers(model, by_name)
    groups = [_pages(layer, by_name) for layer in layers]
    table = by_name[next(layer.table for layer in model.layers() if layer.table)]
    separate = all(page.tensor is not table for group in groups for page in group)
    if separate:
        groups.insert(0, [Page(table, index) for index in range(table.num_pages)])
    cuts = cut_groups([[page.nbytes for page in group] for group in groups], placement)
    runs = [_runs(group, cut) for group, cut in zip(groups, cuts, strict=True)]
    table_runs = runs.pop(0) if separate else tuple(r for group in runs for r in group if r.tensor is table)
    placed = tuple(
        PlacedLayer(index, layer.spec, layer_runs, layer.first_page * layer.head_page_rows)
        for index, (layer, layer_runs) in enumerate(zip(layers, runs, strict=True))
    )
    return WeightLayout(placed, table_runs, tuple(tensor for tensor in tensors if tensor.role == "small"))


@dataclass(frozen=True, slots=True)
class _RuntimeLayer:
    spec: LayerSpec
    first_page: int = 0
    stop_page: int = 0
    head_page_rows: int = 0


def _runtime_layers(model: Model, tensors: Mapping[str, PagedTensor]) -> list[_RuntimeLayer]:
    layers: list[_RuntimeLayer] = []
    limit = 0
    for spec in model.layers():
        if spec.kind == "head":
            layers += _split_head(spec, tensors[spec.matrices["head"]], limit)
            continue
        layers.append(_RuntimeLayer(spec))
        limit = max(limit, sum(tensors[name].nbytes for name in spec.matrices.values()))
    return layers


def _split_head(spec: LayerSpec, head: PagedTensor, limit: int) -> list[_RuntimeLayer]:
    """The head as layers of whole pages of at most `limit` bytes, so that the weight slots need not grow for it."""
    pages = max(1, limit // (head.units_per_page * head.unit_nbytes))
    return [
        _RuntimeLayer(spec, first, min(first + pages, head.num_pages), head.page_rows)
        for first in range(0, head.num_pages, pages)
    ]


def _pages(layer: _RuntimeLayer, tensors: Mapping[str, PagedTensor]) -> list[Page]:
    if layer.spec.kind == "head":
        head = tensors[layer.spec.matrices["head"]]
        return [Page(head, index) for index in range(layer.first_page, layer.stop_page)]
    return [
        Page(t, index) for t in map(tensors.__getitem__, layer.spec.matrices.values()) for index in range(t.num_pages)
    ]


def _runs(pages: Sequence[Page], cuts: Sequence[Cut]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for cut in cuts:
        for page in pages[cut.start : cut.stop]:
            if runs and runs[-1].tier == cut.tier and runs[-1].tensor is page.tensor:
                runs[-1] = Run(cut.tier, (*runs[-1].pages, page))
            else:
                runs.append(Run(cut.tier, (page,)))
    return tuple(runs)
