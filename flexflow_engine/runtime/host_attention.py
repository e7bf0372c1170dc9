"""Attention of one new token a row on pages in host memory: what the compiled kernel is told, and who runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.abc.codec import KernelDecoder
from flexflow_engine.abc.step import RowStep
from flexflow_engine.cpu.arrays import ARRAY_TYPES
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.placement.workspace import heads_decoded_at_once, most_threads


@dataclass(frozen=True, slots=True)
class HostPages:
    """One rectangle's pages, uint8 [pages, rows, page_nbytes], and how to read them."""

    rectangle: Rectangle
    keys: torch.Tensor
    values: torch.Tensor
    takes_tokens: bool
    decoder: KernelDecoder | None
    """None where pages are plain."""

    def line(self) -> tuple[int, ...]:
        """The kernel's line of the rectangle."""
        r = self.rectangle
        where = r.first_row, r.stop_row, r.first_page, r.stop_page
        page_nbytes, encoded = self.keys.shape[2], self.decoder is not None
        return self.keys.data_ptr(), self.values.data_ptr(), *where, page_nbytes, self.takes_tokens, encoded


class HostTile:
    """One tile's pages as the kernel sees them. Made once for each tile and slot."""

    def __init__(
        self,
        pages: Sequence[HostPages],
        *,
        tail_rows: range,
        tails: tuple[torch.Tensor, torch.Tensor] | None,
        page: tuple[int, int, int],
        dtype: torch.dtype,
        workers: Workers,
    ) -> None:
        """tails: keys and values [tail rows, *page]. page: num_kv_heads, page_tokens, head_dim. dtype: of plain pages
        and tails.
        """
        self._parts = np.array([part.line() for part in pages], np.int64).reshape(len(pages), -1)
        keys, values = (0, 0) if tails is None else (tails[0].data_ptr(), tails[1].data_ptr())
        self._tails = keys, values, tail_rows.start, tail_rows.stop
        decoders = [part.decoder for part in pages if part.decoder is not None]
        self._settings = np.array(decoders[0].settings if decoders else (), np.int64)
        self._decoder = decoders[0].addresses["float32"] if decoders else 0, self._settings.ctypes.data
        self._memory = tuple(pages), tails
        self._page, self._dtype, self._workers = page, dtype, workers
        self._numbers: NDArray[np.generic] = np.empty(0, ARRAY_TYPES[dtype])

    def attend(self, rows: Sequence[RowStep], q: torch.Tensor, scale: float) -> torch.Tensor:
        """q [len(rows), num_heads, head_dim] -> [len(rows), num_heads * head_dim], in the memory of q if it is
        contiguous: fresh memory is slow to touch.
        """
        from flexflow_engine.runtime import host_kernels  # noqa: PLC0415  # Numba takes half a second to import

        query, (num_kv_heads, page_tokens, head_dim) = q.contiguous(), self._page
        table = np.array([(row.row, row.context) for row in rows], np.int64)
        cached = table[:, 1] + 1
        nbytes = 2 * int(cached.sum()) * num_kv_heads * head_dim * q.itemsize
        parts = min(self._workers.threads, most_threads(nbytes, len(rows), num_kv_heads))
        bounds = _equal_shares(cached, num_kv_heads, parts)
        columns = q.shape[1] * (int(cached.max()) + 2 * head_dim)
        scratch = q.new_empty((min(parts, len(rows)), columns), dtype=torch.float32)
        own = parts <= len(rows)  # else threads share rows, and each takes its heads' columns
        chunk_heads = heads_decoded_at_once(self._page)
        chunks = q.new_empty((parts, chunk_heads * page_tokens * head_dim), dtype=torch.float32)
        shape = q.shape[1], num_kv_heads, page_tokens, head_dim

        def work(part: int) -> None:
            room = (scratch[part].data_ptr(), 0) if own else (scratch.data_ptr(), columns)
            buffers = query.data_ptr(), *room, chunks[part].data_ptr(), chunk_heads
            span = bounds[part], bounds[part + 1]
            tile = self._numbers, buffers, self._parts, self._tails
            host_kernels.attend(*tile, table, shape, self._decoder, np.float32(scale), span)

        self._workers.share(work, parts)
        return query.flatten(1)


def _equal_shares(cached: NDArray[np.int64], heads: int, parts: int) -> list[int]:
    """Bounds of `parts` runs of (row, head), row by row, of about equally many cached tokens."""
    ends = np.cumsum(cached)
    targets = np.arange(1, parts) * ends[-1] / parts
    rows = np.searchsorted(ends, targets)
    within = heads * (targets - (ends[rows] - cached[rows])) / cached[rows]
    return [0, *(int(x) for x in rows * heads + within), len(cached) * heads]
