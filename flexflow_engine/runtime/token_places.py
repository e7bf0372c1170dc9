"""Where one new token of each row goes in a tile's cache, and which cached tokens each row sees.

That is the same in every layer for the tiles of a GPU batch that are cut alike, and is made once a step: to a GPU every
index is a copy, and every comparison a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from flexflow_engine.abc.step import RowStep
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.runtime.indices import indices
from flexflow_engine.runtime.row_runs import adjoining, rows_from
from flexflow_engine.runtime.rows import RowMoves


@dataclass(frozen=True, slots=True)
class TileCut:
    """How a tile's cache lies in parts, on whatever tiers."""

    num_kv_heads: int
    page_tokens: int
    parts: tuple[Rectangle, ...]
    """Without tier and name, which differ from layer to layer."""
    takes_tokens: tuple[bool, ...]
    """Of each part, whether new tokens are written into its pages."""
    tail_rows: range

    @classmethod
    def of(
        cls, *, num_kv_heads: int, page_tokens: int, parts: Sequence[tuple[Rectangle, bool]], tail_rows: range
    ) -> TileCut:
        """parts: each with whether it takes tokens."""
        rectangles = tuple(replace(rectangle, tier="", name="") for rectangle, _ in parts)
        return cls(num_kv_heads, page_tokens, rectangles, tuple(takes for _, takes in parts), tail_rows)

    def part_of(self, row: int, page: int) -> int:
        """The number of the part that holds a row's page."""
        return next(number for number, part in enumerate(self.parts) if part.holds(row, page))

    def tail_tokens(self, row: int, cached: int) -> int:
        """How many of a row's `cached` tokens, the last one among them, are in its tail page; 0 when it is written
        in place.
        """
        page, offset = divmod(cached - 1, self.page_tokens)
        if row not in self.tail_rows or self.takes_tokens[self.part_of(row, page)]:
            return 0
        return offset + 1


@dataclass(frozen=True, slots=True)
class Scatter:
    """Some rows' tokens, and their places in pages: a token is as many rows of head_dim numbers as there are heads."""

    moves: RowMoves
    """From [rows, num_kv_heads, head_dim] to pages [..., num_kv_heads, page_tokens, head_dim]."""

    def write(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """source [rows, num_kv_heads, head_dim] into the pages of `target`, whole, as they lie in memory."""
        head_dim = target.shape[-1]
        self.moves.put(source.contiguous().view(-1, head_dim), target.view(-1, head_dim))


@dataclass(frozen=True, slots=True)
class FullTails:
    """Adjoining rows whose tail pages are full, and the pages of one number that they become."""

    part: int
    """Its number among the parts."""
    page: int
    """Counted from the part's first."""
    rows: slice
    """Counted from the part's first."""
    tails: slice
    """The same rows among the tail pages."""


class TokenPlaces:
    """The places of one step's rows, of which each has one new token.

    changing state    _hidden    the last one made
                      _filled    the full tails asked for last, and how many together at most
    """

    def __init__(self, rows: Sequence[RowStep], cut: TileCut, device: torch.device) -> None:
        self._steps, self._cut, self._device = rows, cut, device
        self._tails = [cut.tail_tokens(row.row, row.context + 1) for row in rows]
        self._hidden: torch.Tensor | None = None
        self._filled: tuple[int, list[FullTails]] | None = None

    @cached_property
    def rows(self) -> torch.Tensor:
        """Their places in the GPU batch, int64 [rows]."""
        return indices([row.row for row in self._steps], self._device)

    @cached_property
    def paged_counts(self) -> torch.Tensor:
        """Tokens that each row sees in pages, int64 [rows]."""
        counts = [row.context + 1 - tail for row, tail in zip(self._steps, self._tails, strict=True)]
        return indices(counts, self._device)

    @cached_property
    def tail_counts(self) -> torch.Tensor:
        """Tokens that each row sees in its tail page, int64 [rows]."""
        return indices(self._tails, self._device)

    @cached_property
    def in_parts(self) -> tuple[Scatter | None, ...]:
        """What is written to the pages of each part; None where nothing is."""
        tokens, found = self._cut.page_tokens, list[Scatter | None]()
        for part, takes_tokens in zip(self._cut.parts, self._cut.takes_tokens, strict=True):
            chosen = [n for n, row in enumerate(self._steps) if part.holds(row.row, row.context // tokens)]
            pages = [part.unit(self._steps[n].row, self._steps[n].context // tokens) for n in chosen]
            found.append(self._scatter(chosen, pages) if takes_tokens and chosen else None)
        return tuple(found)

    @cached_property
    def in_tails(self) -> Scatter | None:
        """What is written to tail pages."""
        chosen = [n for n, tail in enumerate(self._tails) if tail]
        pages = [self._steps[n].row - self._cut.tail_rows.start for n in chosen]
        return self._scatter(chosen, pages) if chosen else None

    @cached_property
    def num_full_tails(self) -> int:
        """Rows whose tail page the new token fills."""
        return self._tails.count(self._cut.page_tokens)

    def full_tails(self, most: int) -> list[FullTails]:
        """Those rows, at most so many together."""
        if self._filled is None or self._filled[0] != most:
            self._filled = most, self._find_full_tails(most)
        return self._filled[1]

    @cached_property
    def pages_seen(self) -> tuple[int, ...]:
        """How many first pages of each part any row sees."""
        tokens, found = self._cut.page_tokens, list[int]()
        for part, takes_tokens in zip(self._cut.parts, self._cut.takes_tokens, strict=True):
            contexts = (row.context for row in self._steps if part.first_row <= row.row < part.stop_row)
            longest = max(contexts, default=-1)
            pages = longest // tokens + 1 if takes_tokens else max(longest, 0) // tokens
            found.append(max(0, min(part.stop_page, pages) - part.first_page))
        return tuple(found)

    @cached_property
    def tail_start(self) -> int:
        """The column of scores where those of tail pages begin, after all pages'."""
        return (max(row.context for row in self._steps) // self._cut.page_tokens + 1) * self._cut.page_tokens

    def hidden(self, gpu_batch_size: int, columns: int) -> torch.Tensor:
        """Which columns each row of the GPU batch does not attend to: bool [gpu_batch_size, 1, 1, columns].

        A row without a sequence sees column 0, so that its softmax, which nobody reads, stays finite.
        """
        if self._hidden is None or (self._hidden.shape[0], self._hidden.shape[3]) != (gpu_batch_size, columns):
            self._hidden = self._make_hidden(gpu_batch_size, columns)
        return self._hidden

    def _make_hidden(self, gpu_batch_size: int, columns: int) -> torch.Tensor:
        paged, tails = [1] * gpu_batch_size, [0] * gpu_batch_size
        for row, tail in zip(self._steps, self._tails, strict=True):
            paged[row.row], tails[row.row] = row.context + 1 - tail, tail
        column = torch.arange(columns, device=self._device)
        paged_end, tail_end = (indices(x, self._device)[:, None] for x in (paged, [self.tail_start + x for x in tails]))
        hidden = (column >= paged_end) & ((column < self.tail_start) | (column >= tail_end))
        return hidden[:, None, None, :]

    def _find_full_tails(self, most: int) -> list[FullTails]:
        tokens, cut = self._cut.page_tokens, self._cut
        full = [row for row, tail in zip(self._steps, self._tails, strict=True) if tail == tokens]

        def page(row: RowStep) -> tuple[int, int]:
            """Its number, and that of its part."""
            number = row.context // tokens
            return number, cut.part_of(row.row, number)

        found = []
        for run in adjoining(full, page, lambda _: most):
            number, part = page(run[0])
            r = cut.parts[part]
            place, tails = (rows_from(start, run) for start in (r.first_row, cut.tail_rows.start))
            found.append(FullTails(part, number - r.first_page, place, tails))
        return found

    def _scatter(self, chosen: list[int], pages: list[int]) -> Scatter:
        """The tokens of the chosen rows, each into one page of a part, or of the tails."""
        heads, tokens = np.arange(self._cut.num_kv_heads), self._cut.page_tokens
        offsets = np.array([self._steps[n].context % tokens for n in chosen])
        which = np.array(chosen)[:, None] * len(heads) + heads
        places = (np.array(pages)[:, None] * len(heads) + heads) * tokens + offsets[:, None]
        return Scatter(RowMoves(which.reshape(-1), places.reshape(-1), self._device))


class LatestPlaces:
    """Of one GPU batch's latest step, by how a tile is cut. Used from one thread."""

    def __init__(self) -> None:
        self._rows: Sequence[RowStep] = ()
        self._found: dict[tuple[TileCut, torch.device], TokenPlaces] = {}

    def of(self, rows: Sequence[RowStep], cut: TileCut, device: torch.device) -> TokenPlaces:
        """rows: a step's own, never changed; another object is another step."""
        if rows is not self._rows:
            self._rows, self._found = rows, {}
        key = cut, device
        if key not in self._found:
            self._found[key] = TokenPlaces(rows, cut, device)
        return self._found[key]
