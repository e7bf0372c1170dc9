"""Attention of one new token a row on pages in host memory: what the compiled kernel is told, and who runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.abc.codec import KernelDecoder
from flexflow_engine.cpu.arrays import ARRAY_TYPES
from flexflow_engine.cpu.workers import Workers
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.placement.workspace import heads_decoded_at_once, most_threads
from flexflow_engine.runtime.token_places import TokenPlaces


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

    def attend(self, places: TokenPlaces, q: torch.Tensor, scale: float) -> torch.Tensor:
        """q [rows, num_heads, head_dim], one new token a row -> [rows, num_heads * head_dim], in the memory of q if it
        is contiguous: fresh memory is slow to touch.
        """
        from flexflow_engine.runtime import host_kernels  # noqa: PLC0415  # Numba takes half a second to import

        query, num_heads, (num_kv_heads, page_tokens, head_dim) = q.contiguous(), q.shape[1], self._page
        rows, seen = len(places.table), places.tokens_seen
        nbytes = 2 * int(seen.sum()) * num_kv_heads * head_dim * q.itemsize
        parts = min(self._workers.threads, most_threads(nbytes, rows, num_kv_heads))
        bounds, own = places.shares(parts), parts <= rows  # else threads share rows, and each takes its heads' columns
        columns, chunk_heads = num_heads * (int(seen.max()) + 2 * head_dim), heads_decoded_at_once(self._page)
        chunk, before = chunk_heads * page_tokens * head_dim, min(parts, rows) * columns
        room = torch.empty(before + parts * chunk, dtype=torch.float32)
        address, item = room.data_ptr(), room.itemsize
        shape = num_heads, num_kv_heads, page_tokens, head_dim

        def buffers(part: int) -> tuple[int, ...]:
            scratch = (address + part * columns * item, 0) if own else (address, columns)
            return query.data_ptr(), *scratch, address + (before + part * chunk) * item, chunk_heads

        tile = self._parts, self._tails, places.table, shape, self._decoder, np.float32(scale)
        calls = [
            partial(host_kernels.attend, self._numbers, buffers(part), *tile, (bounds[part], bounds[part + 1]))
            for part in range(parts)
        ]  # whole before a thread wakes: it would wait for Python's lock, and so would this one
        self._workers.share(lambda part: calls[part](), parts)
        return query.flatten(1)
