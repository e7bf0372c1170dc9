"""One tile's KV cache as torch views: where new keys and values go, and which parts attention reads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from math import ceil

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.model import ModelConfig
from flexflow_engine.abc.step import RowStep
from flexflow_engine.abc.tier import HOST
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.placement.kv import KVTile, Rectangle
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.span import Span
from flexflow_engine.placement.workspace import pages_encoded_at_once
from flexflow_engine.runtime.device_attention import DevicePages, DeviceTile, device_kernels
from flexflow_engine.runtime.host_attention import HostPages, HostTile
from flexflow_engine.runtime.kv_pages import Pages
from flexflow_engine.runtime.memory import Memory
from flexflow_engine.runtime.row_runs import adjoining, rows_from
from flexflow_engine.runtime.token_places import FullTails, LatestPlaces, TileCut, TokenPlaces


@dataclass(frozen=True, slots=True)
class KVPart:
    """A rectangle of pages."""

    rectangle: Rectangle
    takes_tokens: bool
    """Whether new tokens are written into its pages; else only whole pages come and go."""
    keys: Pages
    values: Pages


@dataclass(frozen=True, slots=True)
class TileCache:
    """The parts of one tile (layer, gpu_batch), and its tail pages."""

    page_tokens: int
    num_kv_heads: int
    parts: tuple[KVPart, ...]
    tail_rows: range
    tail_keys: torch.Tensor | None
    """[tail rows, num_kv_heads, page_tokens, head_dim]"""
    tail_values: torch.Tensor | None
    host: HostTile | None
    """The same for the host's kernel; None on other devices, and where pages are decoded first."""
    workers: Workers | None = None
    """Threads that write rows, each its own, in host memory."""
    pages_at_once: int | None = None
    """That all threads encode at a time; None where nothing is encoded."""
    latest: LatestPlaces = field(default_factory=LatestPlaces)
    """Shared by the tiles of a GPU batch."""
    device: DeviceTile | None = None
    """Like `host`, for a GPU's kernels; where there is neither, torch attends."""
    cut: TileCut = field(init=False)

    def __post_init__(self) -> None:
        parts = [(part.rectangle, part.takes_tokens) for part in self.parts]
        cut = TileCut.of(
            num_kv_heads=self.num_kv_heads, page_tokens=self.page_tokens, parts=parts, tail_rows=self.tail_rows
        )
        object.__setattr__(self, "cut", self.latest.shared(cut))

    @property
    def tails(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of the tail pages; None where no row has one."""
        if self.tail_keys is None or self.tail_values is None:
            return None
        return self.tail_keys, self.tail_values

    def write_prompts(self, rows: Sequence[RowStep], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the keys and values [N, num_kv_heads, head_dim] of prompts that follow one another."""
        runs = adjoining(rows, lambda row: row.new_tokens, self._prompts_together)
        starts = [0, *accumulate(len(run) * run[0].new_tokens for run in runs)]

        def write(n: int) -> None:
            tokens = slice(starts[n], starts[n + 1])
            self._write_alike(runs[n], keys[tokens], values[tokens])

        self._each(write, len(runs))

    def append(self, rows: Sequence[RowStep], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store one new token of each row: keys and values [rows, num_kv_heads, head_dim]."""
        places = self.places(rows, keys.device)
        if self.device is not None:
            self.device.append(places, keys, values)
        else:
            self._scatter(places, keys, values)
        self._flush_tails(places)

    def _scatter(self, places: TokenPlaces, keys: torch.Tensor, values: torch.Tensor) -> None:
        """To the pages of parts that take tokens, and to tail pages."""
        for part, place in zip(self.parts, places.in_parts, strict=True):
            if place is not None:
                assert part.keys.plain is not None
                assert part.values.plain is not None
                place.write(part.keys.plain, keys)
                place.write(part.values.plain, values)
        if places.in_tails is not None:
            assert self.tails is not None
            for target, new in zip(self.tails, (keys, values), strict=True):
                places.in_tails.write(target, new)

    def places(self, rows: Sequence[RowStep], device: torch.device) -> TokenPlaces:
        """Of one new token of each row."""
        return self.latest.of(rows, self.cut, device)

    def _each(self, work: Callable[[int], None], count: int) -> None:
        """Call `work` with 0 ... count - 1."""
        if self.workers is not None:
            self.workers.draw(lambda _, n: work(n), count, threads=self.pages_at_once)
            return
        for n in range(count):
            work(n)

    def _part(self, row: int, page: int) -> KVPart:
        return self.parts[self.cut.part_of(row, page)]

    def _flush_tails(self, places: TokenPlaces) -> None:
        """Full tails become pages, from which they are stored if they must be; attention still reads the tails."""
        step = self._pages_a_thread
        if self.workers is not None:
            step = max(1, min(step, ceil(places.num_full_tails / self.workers.threads)))
        full = places.full_tails(step)
        self._each(lambda n: self._flush(full[n]), len(full))

    def _flush(self, full: FullTails) -> None:
        assert self.tails is not None
        part = self.parts[full.part]
        for target, tails in zip((part.keys, part.values), self.tails, strict=True):
            target.write_page(full.rows, full.page, tails[full.tails])

    @property
    def _pages_a_thread(self) -> int:
        """That one encodes at a time."""
        threads = 1 if self.workers is None else self.workers.threads
        return sys.maxsize if self.pages_at_once is None else max(1, self.pages_at_once // threads)

    def _prompts_together(self, row: RowStep) -> int:
        """How many prompts as long as this row's are written in one call: one where threads share them."""
        if self.workers is not None:
            return 1
        return max(1, self._pages_a_thread // max(1, row.new_tokens // self.page_tokens))

    def _write_alike(self, rows: Sequence[RowStep], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adjoining rows' prompts of one length. Full pages go where their rectangle is, in place or in its slot; the
        rest to a page that grows.
        """
        full, rest = divmod(rows[0].new_tokens, self.page_tokens)
        sources = [x.view(len(rows), rows[0].new_tokens, *x.shape[1:]) for x in (keys, values)]
        for part in self.parts:
            r = part.rectangle
            some = [row for row in rows if r.first_row <= row.row < r.stop_row]
            stop = min(r.stop_page, full)
            if some and stop > r.first_page:
                chosen, place = rows_from(rows[0].row, some), rows_from(r.first_row, some)
                for target, source in zip((part.keys, part.values), sources, strict=True):
                    whole = source[chosen, r.first_page * self.page_tokens : stop * self.page_tokens]
                    self._write_pages(target, place, whole.unflatten(1, (-1, self.page_tokens)).transpose(2, 3))
        if rest:
            for part, group in groupby(rows, lambda row: self._part(row.row, full)):
                some = list(group)
                for pages, source in zip(self._growing_pages(part, some, full), sources, strict=True):
                    tokens = source[rows_from(rows[0].row, some), full * self.page_tokens :]
                    pages[:, :, :rest].copy_(tokens.transpose(1, 2))

    def _write_pages(self, target: Pages, rows: slice, pages: torch.Tensor) -> None:
        """The first pages of some rows, of which a thread encodes no more than its share at a time."""
        step = self._pages_a_thread
        for first in range(0, pages.shape[1], step):
            target.write(rows, first, pages[:, first : first + step])

    def _growing_pages(self, part: KVPart, rows: Sequence[RowStep], page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [rows, num_kv_heads, page_tokens, head_dim] of adjoining rows' pages that aren't full yet."""
        if part.takes_tokens:
            assert part.keys.plain is not None
            assert part.values.plain is not None
            index = page - part.rectangle.first_page, rows_from(part.rectangle.first_row, rows)
            return part.keys.plain[index], part.values.plain[index]
        assert self.tails is not None
        keys, values = self.tails
        place = rows_from(self.tail_rows.start, rows)
        return keys[place], values[place]


class KVCache:
    """Views of the whole cache, made once for each tile and slot and kept."""

    def __init__(
        self,
        layout: Layout,
        memory: Memory,
        config: ModelConfig,
        codec: Codec,
        dtype: torch.dtype,
        *,
        workers: Workers,
    ) -> None:
        self._layout, self._memory, self._codec, self._dtype, self._workers = layout, memory, codec, dtype, workers
        self._page = (config.num_kv_heads, layout.kv.page_tokens, config.head_dim)
        self._num_heads = config.num_heads
        self._near = layout.attention.tier
        self._scratch = memory.region_tensor(self._near, "kv.decoded") if layout.decodes_kv else None
        self._latest = [LatestPlaces() for _ in range(layout.policy.num_gpu_batches)]
        self._views: dict[tuple[int, int, int | None], TileCache] = {}
        self._prompt_views: dict[tuple[int, int, int], TileCache] = {}

    def tile(self, layer: int, gpu_batch: int, slot: int | None) -> TileCache:
        """The cache of a tile whose slotted rectangles, if any, are in KV slot `slot`."""
        key = layer, gpu_batch, slot
        if key not in self._views:
            self._views[key] = self._make(layer, gpu_batch, slot)
        return self._views[key]

    def prompts(self, layer: int, gpu_batch: int, slot: int) -> TileCache:
        """What prompts fill of a tile's cache, in a slot on the compute tier; to be written only."""
        key = layer, gpu_batch, slot
        if key not in self._prompt_views:
            tile, region = self._layout.kv_tile(layer, gpu_batch), f"kv.prompt.{slot}"
            span = Span(self._layout.device.name, f"{region}.tails", 0, 2 * len(tile.tail_rows))
            parts = [self._slotted(r, Span(span.tier, f"{region}.pages", offset, 0)) for r, offset in tile.prompts]
            self._prompt_views[key] = self._tile_cache(gpu_batch, tile, parts, span)
        return self._prompt_views[key]

    def _make(self, layer: int, gpu_batch: int, slot: int | None) -> TileCache:
        tile, location = self._layout.kv_tile(layer, gpu_batch), f"kv.slot.{slot}"
        offsets = {rectangle.name: offset for rectangle, offset in tile.slotted}
        parts = [
            self._slotted(r, Span(self._near, location, offsets[r.name], 0)) if r.name in offsets else self._resident(r)
            for r in tile.rectangles
        ]
        region = f"kv.{self._layout.decoder(layer)}.{gpu_batch}.tail"
        cache = self._tile_cache(gpu_batch, tile, parts, Span(self._near, region, 0, 2 * len(tile.tail_rows)))
        if self._layout.attends_in_kernel:
            return attending_in_kernel(cache, self._codec, page=self._page, dtype=self._dtype, workers=self._workers)
        return attending_on_device(cache, self._codec, num_heads=self._num_heads, page=self._page, dtype=self._dtype)

    def _resident(self, r: Rectangle) -> KVPart:
        return self._part(r, *(self._memory.region_tensor(r.tier, f"{r.name}.{part}") for part in "kv"))

    def _slotted(self, r: Rectangle, first: Span) -> KVPart:
        """A rectangle whose keys begin at `first`'s first unit; its values follow."""
        starts = first.first, first.first + r.num_units
        return self._part(r, *(self._memory.tensor(Span(first.tier, first.region, x, r.num_units)) for x in starts))

    def _part(self, r: Rectangle, keys: torch.Tensor, values: torch.Tensor) -> KVPart:
        return KVPart(r, r.tier in self._layout.kv.takes_tokens, self._pages(r, keys), self._pages(r, values))

    def _pages(self, r: Rectangle, stored: torch.Tensor) -> Pages:
        return Pages(r, stored, page=self._page, codec=self._codec, scratch=self._scratch, dtype=self._dtype)

    def _tile_cache(self, gpu_batch: int, tile: KVTile, parts: Sequence[KVPart], tails: Span) -> TileCache:
        """tails: the tail pages, keys and then values; none where no row has one."""
        keys, values = None, None
        if tails.count:
            keys, values = self._memory.tensor(tails).view(self._dtype).view(2, len(tile.tail_rows), *self._page)
        memory, plain_nbytes = self._layout.tier(tails.tier).memory, self._layout.kv.tail_page_nbytes
        return TileCache(
            self._layout.kv.page_tokens,
            self._page[0],
            tuple(parts),
            tile.tail_rows,
            keys,
            values,
            host=None,
            workers=self._workers if memory == HOST else None,
            pages_at_once=None if self._codec.keeps_bytes else pages_encoded_at_once(plain_nbytes, memory),
            latest=self._latest[gpu_batch],
        )


def attending_in_kernel(
    cache: TileCache, codec: Codec, *, page: tuple[int, int, int], dtype: torch.dtype, workers: Workers
) -> TileCache:
    """The same tile, to be attended to by the host's kernel. page: num_kv_heads, page_tokens, head_dim."""
    decoder = None if codec.keeps_bytes else codec.kernel_decoder(page)
    host = HostTile(
        [HostPages(p.rectangle, p.keys.stored, p.values.stored, p.takes_tokens, decoder) for p in cache.parts],
        tail_rows=cache.tail_rows,
        tails=cache.tails,
        page=page,
        dtype=dtype,
        workers=workers,
    )
    return replace(cache, host=host)


def attending_on_device(
    cache: TileCache, codec: Codec, *, num_heads: int, page: tuple[int, int, int], dtype: torch.dtype
) -> TileCache:
    """The same tile, to be attended to by a GPU's kernels if there are some for it."""
    kernels = device_kernels(cache.parts[0].keys.stored.device, dtype, num_heads, page, codec)
    if kernels is None:
        return cache
    device = DeviceTile(
        kernels,
        [DevicePages(p.rectangle, p.keys.stored, p.values.stored, p.takes_tokens) for p in cache.parts],
        tail_rows=cache.tail_rows,
        tails=cache.tails,
        num_heads=num_heads,
        page=page,
        codec=codec,
    )
    return replace(cache, device=device)
