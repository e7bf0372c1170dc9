"""Attention of one new token a row on pages in host memory: what the compiled kernel is told, and who runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

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
        self._decoder = _addresses(decoders[0] if decoders else None, self._settings)
        self._memory = tuple(pages), tails
        self._page, self._dtype, self._workers = page, dtype, workers
        self._numbers: NDArray[np.generic] = np.empty(0, ARRAY_TYPES[dtype])

    def attend(self, places: TokenPlaces, q: torch.Tensor, scale: float) -> torch.Tensor:
        """q [rows, num_heads, head_dim], one new token a row -> [rows, num_heads * head_dim], in the memory of q if it
        is contiguous: fresh memory is slow to touch.
        """
        from flexflow_engine.runtime import host_kernels  # noqa: PLC0415  # Numba takes half a second to import

        query, num_rows, num_kv_heads = q.contiguous(), len(places.table), self._page[0]
        assert num_rows == len(q), (num_rows, len(q))
        nbytes = 2 * places.tokens_seen * num_kv_heads * q.shape[2] * q.itemsize
        parts = min(self._workers.threads, most_threads(nbytes, num_rows, num_kv_heads))
        rooms = _Rooms(parts, num_rows, num_heads=q.shape[1], longest=places.longest_seen, page=self._page)
        tile = self._parts, self._tails, places.table, (q.shape[1], *self._page), self._decoder, np.float32(scale)
        # A call is whole before another thread wakes: both would want Python's lock.
        calls = [
            partial(host_kernels.attend, self._numbers, (query.data_ptr(), *rooms.of(part)), *tile, span)
            for part, span in enumerate(pairwise(places.shares(parts)))
        ]

        def work(part: int, _held: object = (query, rooms)) -> None:
            """The kernel knows their addresses only, and may run on when this thread is interrupted."""
            calls[part]()

        self._workers.share(work, parts)
        return query.flatten(1)


def _addresses(decoder: KernelDecoder | None, settings: NDArray[np.int64]) -> tuple[int, int, int, int]:
    """The kernel's, of what reads encoded pages."""
    products = None if decoder is None else decoder.products
    multiply, accumulate = (0, 0) if products is None else (products.multiply, products.accumulate)
    return 0 if decoder is None else decoder.addresses["float32"], settings.ctypes.data, multiply, accumulate


class _Rooms:
    """Memory for the threads that attend: what each decodes at a time, and scratch of rows."""

    def __init__(self, parts: int, num_rows: int, *, num_heads: int, longest: int, page: tuple[int, int, int]) -> None:
        """longest: tokens that a row sees, at most."""
        self._chunk_heads, self._shares_rows = heads_decoded_at_once(page), parts > num_rows
        self._chunk, self._columns = self._chunk_heads * page[1] * page[2], num_heads * (longest + 2 * page[2])
        self._scratch = parts * self._chunk  # behind the chunks, which begin where vectors do
        self._memory = torch.empty(self._scratch + min(parts, num_rows) * self._columns, dtype=torch.float32)

    def of(self, part: int) -> tuple[int, ...]:
        """The kernel's address of scratch, how many numbers further each row's lies, address of the chunk, its heads.

        Threads that share rows take the columns of their heads in the same scratch.
        """
        chunk = self._address(part * self._chunk)
        if self._shares_rows:
            return self._address(self._scratch), self._columns, chunk, self._chunk_heads
        return self._address(self._scratch + part * self._columns), 0, chunk, self._chunk_heads

    def _address(self, number: int) -> int:
        return self._memory.data_ptr() + number * self._memory.itemsize
