"""One new token a row on pages in a GPU's memory: what the compiled kernels are told, and whether there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from types import ModuleType

import numpy as np
import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import DTYPES
from flexflow_engine.abc.step import RowStep
from flexflow_engine.gpu.trying import working
from flexflow_engine.placement.kv import Rectangle
from flexflow_engine.runtime.indices import indices
from flexflow_engine.runtime.token_places import TileCut, TokenPlaces


@dataclass(frozen=True, slots=True)
class DevicePages:
    """One rectangle's pages, uint8 [pages, rows, page_nbytes]."""

    rectangle: Rectangle
    keys: torch.Tensor
    values: torch.Tensor
    takes_tokens: bool

    def line(self, page_tokens: int) -> tuple[int, ...]:
        """The kernels' line of the rectangle."""
        r = self.rectangle
        tokens = r.first_page * page_tokens, r.stop_page * page_tokens
        return self.keys.data_ptr(), self.values.data_ptr(), r.first_row, r.stop_row, *tokens, self.takes_tokens


class DeviceTile:
    """One tile's pages as the kernels see them. Made once for each tile and slot."""

    def __init__(
        self,
        kernels: ModuleType,
        pages: Sequence[DevicePages],
        *,
        tail_rows: range,
        tails: tuple[torch.Tensor, torch.Tensor] | None,
        num_heads: int,
        page: tuple[int, int, int],
        codec: Codec,
    ) -> None:
        """kernels: of `device_kernels`. tails: keys and values [tail rows, *page]. page: num_kv_heads, page_tokens,
        head_dim.
        """
        lines = np.array([part.line(page[1]) for part in pages], np.int64)
        self._kernels = kernels.TileKernels(
            indices(lines.reshape(-1), pages[0].keys.device).view(len(pages), kernels.LINE.value),
            [int(address) for address in lines[:, :2].flat],
            num_heads=num_heads,
            page=page,
            page_nbytes=pages[0].keys.shape[2],
            decoder=None if codec.keeps_bytes else codec.device_decoder(page),
            tails=tails,
            first_tail_row=tail_rows.start,
        )
        self._memory = tuple(pages)

    def append(self, places: TokenPlaces, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store one new token of each row, made finite: keys and values [rows, num_kv_heads, head_dim]."""
        self._kernels.append(keys.contiguous(), values.contiguous(), places.counts)

    def attend(self, places: TokenPlaces, q: torch.Tensor, scale: float) -> torch.Tensor:
        """q [rows, num_heads, head_dim] -> [rows, num_heads * head_dim], in the memory of q if it is contiguous."""
        query = q.contiguous()
        self._kernels.attend(query, query, places.counts, scale)
        return query.flatten(1)


@cache
def device_kernels(
    device: torch.device, dtype: torch.dtype, num_heads: int, page: tuple[int, int, int], codec: Codec
) -> ModuleType | None:
    """`runtime.device_kernels`, compiled for such pages [num_kv_heads, page_tokens, head_dim]; None where Triton does
    not work or the codec has nothing for it. Asked once: compiling takes seconds.
    """

    def compiled() -> ModuleType | None:
        from flexflow_engine.runtime import device_kernels as kernels  # noqa: PLC0415  # Triton takes long to import

        if not codec.keeps_bytes and codec.device_decoder(page) is None:
            return None
        for rows in (1, ceil(kernels.FULL_GPU / num_heads)):  # few and many: two kernels each
            query = torch.zeros((rows, num_heads, page[2]), dtype=dtype, device=device)
            for tailed in (True, False) if codec.keeps_bytes else (True,):
                _call_once(kernels, query, page, codec, tailed=tailed)
        return kernels

    return working(device, compiled, without="attention runs slower on the GPU")


def _call_once(
    kernels: ModuleType, query: torch.Tensor, page: tuple[int, int, int], codec: Codec, *, tailed: bool
) -> None:
    """Cache a token of one row in its first page, or in its tail, as often as there are queries, and attend to it.
    Twice: the second call of a compiled kernel is another one. query: zeros.
    """
    count, device = query.shape[0], query.device
    dtype = next(name for name in DTYPES if getattr(torch, name) == query.dtype)
    stored = torch.zeros((1, 1, codec.encoded_nbytes(page, dtype)), dtype=torch.uint8, device=device)
    part = DevicePages(Rectangle("", "", 0, 1, 0, 1), stored, stored, takes_tokens=not tailed)
    zeros, tail_rows = query.new_zeros((1, *page)), range(1 if tailed else 0)
    tails = (zeros, zeros) if tailed else None
    tile = DeviceTile(
        kernels, [part], tail_rows=tail_rows, tails=tails, num_heads=query.shape[1], page=page, codec=codec
    )
    cut = TileCut.of(
        num_kv_heads=page[0],
        page_tokens=page[1],
        parts=[(part.rectangle, part.takes_tokens)],
        tail_rows=tail_rows,
    )
    rows = [RowStep(row=0, sequence=0, new_tokens=1, context=0)] * count
    places, new = TokenPlaces(rows, cut, device), query.new_zeros((count, page[0], page[2]))
    for _ in range(2):
        tile.append(places, new, new)
        tile.attend(places, query, 1.0)
