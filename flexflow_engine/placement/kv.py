"""Which page of the KV cache lies on which tier.

A page holds `page_tokens` tokens of one row in one decoder layer, as [num_kv_heads, page_tokens, head_dim]; keys and
values are separate. A tile (layer, gpu_batch) has rows x pages of them. They are dealt to the tiers row by row, so
that a whole row mostly lies on one tier, always in large GPU batches, and cut into rectangles:

    row 0   d d d d d        d device: rectangle rows 0-2, all pages
    row 1   d d d d d        h host:   row 2's pages 2-4, rows 3-4 all pages
    row 2   d d h h h
    row 3   h h h h h        inside a rectangle's region pages lie in the order (page, row): what a step
    row 4   h h h h h        needs of it, the first pages of all its rows, is one contiguous read

Tokens are written in place where attention computes in place. Elsewhere, on a tier that attention can't read in place
or where pages are encoded, tokens collect in a *tail* page on the tier of attention, exact, and the page moves once,
when it is full.

Where prompts are computed in another memory than the tokens after them attend in, a prompt's pages and tails are
written into a slot on the compute tier, which holds the first pages of every rectangle, and are stored from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, TypeVar

from flexflow_engine.abc.policy import Placement
from flexflow_engine.placement.diffusion import Cut, cut_groups

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Integers = TypeVar("Integers", int, "NDArray[np.int64]")

WHOLE_ROWS = 256
"""From so many in a GPU batch on, no row is cut: a tile has fewer parts, and of its cache a row more or less than its
share on a tier, four thousandths at most, which the next tile makes up for.
"""


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Rows [first_row, stop_row) x pages [first_page, stop_page) of one tile's cache, on one tier."""

    tier: str
    name: str
    first_row: int
    stop_row: int
    first_page: int
    stop_page: int

    @property
    def rows(self) -> int:
        return self.stop_row - self.first_row

    @property
    def pages(self) -> int:
        return self.stop_page - self.first_page

    @property
    def num_units(self) -> int:
        return self.rows * self.pages

    def unit(self, row: Integers, page: Integers) -> Integers:
        """Index of a page in the rectangle's region; of several pages, from arrays of rows and pages."""
        return (page - self.first_page) * self.rows + row - self.first_row

    def until(self, page: int) -> Rectangle:
        """Its pages before `page`: the first units of its region."""
        return replace(self, stop_page=min(self.stop_page, page))

    def holds(self, row: int, page: int) -> bool:
        return self.first_row <= row < self.stop_row and self.first_page <= page < self.stop_page


@dataclass(frozen=True, slots=True, kw_only=True)
class KVTile:
    """The cache of one (decoder layer, gpu_batch)."""

    rectangles: tuple[Rectangle, ...]
    slotted: tuple[tuple[Rectangle, int], ...]
    """Rectangles that pass through a slot, each with the slot's unit where its keys start; its values follow."""
    tail_rows: range
    """Rows that have a tail page."""
    prompts: tuple[tuple[Rectangle, int], ...] = ()
    """What a prompt may fill of each rectangle, where prompts are computed in another memory: with the unit of the
    prompts' slot where its keys start; its values follow.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The whole cache, placed."""

    page_tokens: int
    page_nbytes: int
    """Encoded size of a page of keys, or of values."""
    tail_page_nbytes: int
    """Size of a tail page: the same tokens, exact."""
    takes_tokens: frozenset[str]
    """Tiers whose pages take single tokens."""
    tiles: tuple[tuple[KVTile, ...], ...]
    """[decoder layer][gpu_batch]"""

    @property
    def slot_units(self) -> int:
        """Units of the largest tile's slotted rectangles, keys and values."""
        return max(_units(tile.slotted) for row in self.tiles for tile in row)

    @property
    def prompt_units(self) -> int:
        """The same of the largest tile's prompts, where they are computed in another memory."""
        return max(_units(tile.prompts) for row in self.tiles for tile in row)

    @property
    def tail_units(self) -> int:
        """Tail pages of the tile that has most, keys and values."""
        return max(2 * len(tile.tail_rows) for row in self.tiles for tile in row)


def place_kv(
    *,
    num_layers: int,
    gpu_batch_size: int,
    num_gpu_batches: int,
    cached_tokens: int,
    page_tokens: int,
    page_nbytes: int,
    tail_page_nbytes: int,
    placement: Placement,
    direct: frozenset[str],
    takes_tokens: frozenset[str],
    prompt_tokens: int = 0,
) -> KVLayout:
    """Deal the pages that `cached_tokens` tokens a row may need among the tiers.

    direct: tiers whose pages need no slot. takes_tokens: those of them whose pages also take single tokens.
    prompt_tokens: the most that a row may have of its prompt in a slot for prompts; 0 where there is none.
    """
    pages, num_tiles = ceil(cached_tokens / page_tokens), num_layers * num_gpu_batches
    together = pages if gpu_batch_size >= WHOLE_ROWS else 1
    cuts = cut_groups([[1] * (gpu_batch_size * pages // together)] * num_tiles, placement)
    tiers, prompt_pages = (direct, takes_tokens), ceil(prompt_tokens / page_tokens)
    tiles = [
        [
            _tile(_rectangles(f"{j}.{k}", cuts[j * num_gpu_batches + k], pages, together), tiers, prompt_pages)
            for k in range(num_gpu_batches)
        ]
        for j in range(num_layers)
    ]
    return KVLayout(
        page_tokens=page_tokens,
        page_nbytes=page_nbytes,
        tail_page_nbytes=tail_page_nbytes,
        takes_tokens=takes_tokens,
        tiles=tuple(tuple(row) for row in tiles),
    )


def _rectangles(name: str, cuts: tuple[Cut, ...], pages: int, together: int) -> list[Rectangle]:
    """pages: of a row. together: pages that an item of the cuts stands for."""
    rectangles: list[Rectangle] = []
    for cut in cuts:
        for rows, columns in _parts(cut.start * together, cut.stop * together, pages):
            label = f"kv.{name}.{len(rectangles)}"
            rectangles.append(Rectangle(cut.tier, label, rows.start, rows.stop, columns.start, columns.stop))
    return rectangles


def _tile(rectangles: list[Rectangle], tiers: tuple[frozenset[str], frozenset[str]], prompt_pages: int) -> KVTile:
    """tiers: those whose pages need no slot, and those whose pages take single tokens."""
    direct, takes_tokens = tiers
    tailed = [r for r in rectangles if r.tier not in takes_tokens]
    first = min((r.first_row for r in tailed), default=0)
    stop = max((r.stop_row for r in tailed), default=0)
    return KVTile(
        rectangles=tuple(rectangles),
        slotted=_in_slot([r for r in rectangles if r.tier not in direct]),
        tail_rows=range(first, stop),
        prompts=_in_slot([r.until(prompt_pages) for r in rectangles if r.first_page < prompt_pages]),
    )


def _in_slot(rectangles: list[Rectangle]) -> tuple[tuple[Rectangle, int], ...]:
    """One after another, each with its first unit: keys, then values."""
    placed, offset = [], 0
    for rectangle in rectangles:
        placed.append((rectangle, offset))
        offset += 2 * rectangle.num_units
    return tuple(placed)


def _units(in_slot: tuple[tuple[Rectangle, int], ...]) -> int:
    return sum(2 * rectangle.num_units for rectangle, _ in in_slot)


def _parts(start: int, stop: int, pages: int) -> list[tuple[range, range]]:
    """Units [start, stop), counted row by row, as (rows, pages): at most a row's end, whole rows, a row's start."""
    parts: list[tuple[range, range]] = []
    while start < stop:
        row, page = divmod(start, pages)
        whole = (stop - start) // pages if page == 0 else 0
        if whole:
            parts.append((range(row, row + whole), range(pages)))
            start += whole * pages
        else:
            length = min(pages - page, stop - start)
            parts.append((range(row, row + 1), range(page, page + length)))
            start += length
    return parts
