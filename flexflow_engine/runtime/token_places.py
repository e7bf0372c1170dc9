"""Where one new token of each row goes in a tile's cache, and which cached tokens each row sees.

That is the same in every layer for the tiles of a GPU batch that are cut alike, and is made once a step: to a GPU every
index is a copy, and every comparison a kernel. On the host it is Python's time, and numpy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.abc.step import RowStep
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.runtime.indices import indices
from flexflow_engine.runtime.rows import RowMoves

Integers = NDArray[np.int64]


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

    def parts_of(self, rows: Integers, pages: Integers) -> Integers:
        """The numbers of the parts that hold pages, each a row's."""
        found = np.full_like(rows, -1)
        for number, part in enumerate(self.parts):
            held = (rows >= part.first_row) & (rows < part.stop_row)
            found[held & (pages >= part.first_page) & (pages < part.stop_page)] = number
        assert not np.any(found < 0), (rows, pages, self.parts)
        return found


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
                      _shared    the shares asked for last, and how many
    """

    def __init__(self, rows: Sequence[RowStep], cut: TileCut, device: torch.device) -> None:
        self._cut, self._device = cut, device
        self._rows = np.array([row.row for row in rows], np.int64)
        self._contexts = np.array([row.context for row in rows], np.int64)
        self._pages, self._offsets = np.divmod(self._contexts, cut.page_tokens)
        """Where the new token goes, among a row's pages and within its page."""
        self._parts = cut.parts_of(self._rows, self._pages)
        in_place = np.array(cut.takes_tokens)[self._parts]
        tailed = (self._rows >= cut.tail_rows.start) & (self._rows < cut.tail_rows.stop) & ~in_place
        self._tails = np.where(tailed, self._offsets + 1, 0)
        self._hidden: torch.Tensor | None = None
        self._filled: tuple[int, list[FullTails]] | None = None
        self._shared: tuple[int, list[int]] | None = None

    @cached_property
    def rows(self) -> torch.Tensor:
        """Their places in the GPU batch, int64 [rows]."""
        return indices(self._rows, self._device)

    @cached_property
    def counts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For a GPU's kernels, int64 [rows] each: the rows' places, and the tokens that each sees in pages and in its
        tail page.
        """
        return self.rows, indices(self._contexts + 1 - self._tails, self._device), indices(self._tails, self._device)

    @cached_property
    def table(self) -> Integers:
        """For the host's kernel, [rows, 2]: each row's place in the GPU batch, and its tokens before this one."""
        return np.stack((self._rows, self._contexts), axis=1)

    @cached_property
    def tokens_seen(self) -> int:
        """By all rows together, the new ones included."""
        return int(self._contexts.sum()) + len(self._contexts)

    @cached_property
    def longest_seen(self) -> int:
        """Tokens that the longest row sees."""
        return int(self._contexts.max()) + 1

    def shares(self, count: int) -> list[int]:
        """Bounds of so many runs of (row, key head), row by row, that see about equally many tokens."""
        if self._shared is None or self._shared[0] != count:
            self._shared = count, self._find_shares(count)
        return self._shared[1]

    @cached_property
    def in_parts(self) -> tuple[Scatter | None, ...]:
        """What is written to the pages of each part; None where nothing is."""
        found = list[Scatter | None]()
        for number, (part, takes_tokens) in enumerate(zip(self._cut.parts, self._cut.takes_tokens, strict=True)):
            chosen = np.flatnonzero(self._parts == number)
            pages = part.unit(self._rows[chosen], self._pages[chosen])
            found.append(self._scatter(chosen, pages) if takes_tokens and len(chosen) else None)
        return tuple(found)

    @cached_property
    def in_tails(self) -> Scatter | None:
        """What is written to tail pages."""
        chosen = np.flatnonzero(self._tails)
        return self._scatter(chosen, self._rows[chosen] - self._cut.tail_rows.start) if len(chosen) else None

    @cached_property
    def num_full_tails(self) -> int:
        """Rows whose tail page the new token fills."""
        return int(np.count_nonzero(self._tails == self._cut.page_tokens))

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
            contexts = self._contexts[(self._rows >= part.first_row) & (self._rows < part.stop_row)]
            longest = int(contexts.max(initial=-1))
            pages = longest // tokens + 1 if takes_tokens else max(longest, 0) // tokens
            found.append(max(0, min(part.stop_page, pages) - part.first_page))
        return tuple(found)

    @cached_property
    def tail_start(self) -> int:
        """The column of scores where those of tail pages begin, after all pages'."""
        return int(self._pages.max() + 1) * self._cut.page_tokens

    def hidden(self, gpu_batch_size: int, columns: int) -> torch.Tensor:
        """Which columns each row of the GPU batch does not attend to: bool [gpu_batch_size, 1, 1, columns].

        A row without a sequence sees column 0, so that its softmax, which nobody reads, stays finite.
        """
        if self._hidden is None or (self._hidden.shape[0], self._hidden.shape[3]) != (gpu_batch_size, columns):
            self._hidden = self._make_hidden(gpu_batch_size, columns)
        return self._hidden

    def _make_hidden(self, gpu_batch_size: int, columns: int) -> torch.Tensor:
        paged, tails = np.ones(gpu_batch_size, np.int64), np.zeros(gpu_batch_size, np.int64)
        paged[self._rows], tails[self._rows] = self._contexts + 1 - self._tails, self._tails
        column = torch.arange(columns, device=self._device)
        paged_end, tail_end = (indices(x, self._device)[:, None] for x in (paged, self.tail_start + tails))
        hidden = (column >= paged_end) & ((column < self.tail_start) | (column >= tail_end))
        return hidden[:, None, None, :]

    def _find_shares(self, count: int) -> list[int]:
        seen, heads = self._contexts + 1, self._cut.num_kv_heads
        ends = np.cumsum(seen)
        targets = np.arange(1, count) * ends[-1] / count
        rows = np.searchsorted(ends, targets)
        within = heads * (targets - (ends[rows] - seen[rows])) / seen[rows]
        return [0, *(int(x) for x in rows * heads + within), len(seen) * heads]

    def _find_full_tails(self, most: int) -> list[FullTails]:
        full, found = np.flatnonzero(self._tails == self._cut.page_tokens), list[FullTails]()
        rows, pages, parts = self._rows[full], self._pages[full], self._parts[full]
        ends = np.flatnonzero((np.diff(rows) != 1) | (np.diff(pages) != 0) | (np.diff(parts) != 0)) + 1
        for run in np.split(np.arange(len(full)), ends) if len(full) else ():
            part = self._cut.parts[parts[run[0]]]
            for first in range(int(rows[run[0]]), int(rows[run[-1]]) + 1, most):
                stop = min(first + most, int(rows[run[-1]]) + 1)
                place, tails = (slice(first - r, stop - r) for r in (part.first_row, self._cut.tail_rows.start))
                found.append(FullTails(int(parts[run[0]]), int(pages[run[0]]) - part.first_page, place, tails))
        return found

    def _scatter(self, chosen: Integers, pages: Integers) -> Scatter:
        """The tokens of the chosen rows, each into one page of a part, or of the tails."""
        heads, tokens = np.arange(self._cut.num_kv_heads), self._cut.page_tokens
        which = chosen[:, None] * len(heads) + heads
        places = (pages[:, None] * len(heads) + heads) * tokens + self._offsets[chosen][:, None]
        return Scatter(RowMoves(which.reshape(-1), places.reshape(-1), self._device))


class LatestPlaces:
    """Of one GPU batch's latest step, by how a tile is cut. Used from one thread."""

    def __init__(self) -> None:
        self._rows: Sequence[RowStep] = ()
        self._cuts: dict[TileCut, TileCut] = {}
        self._found: dict[tuple[int, torch.device], TokenPlaces] = {}

    def shared(self, cut: TileCut) -> TileCut:
        """The same for equal cuts, which take long to compare."""
        return self._cuts.setdefault(cut, cut)

    def of(self, rows: Sequence[RowStep], cut: TileCut, device: torch.device) -> TokenPlaces:
        """rows: a step's own, never changed; another object is another step. cut: as `shared` gave it."""
        if rows is not self._rows:
            self._rows, self._found = rows, {}
        key = id(cut), device  # its own as long as there are places, which keep the cut
        if key not in self._found:
            self._found[key] = TokenPlaces(rows, cut, device)
        return self._found[key]
