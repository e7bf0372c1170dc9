"""The pages of one rectangle of the KV cache, keys or values, plain or encoded."""

from __future__ import annotations

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.placement.kv import Rectangle


class Pages:
    """Pages [num_kv_heads, page_tokens, head_dim] of a rectangle, in the order (page, row)."""

    def __init__(
        self,
        rectangle: Rectangle,
        stored: torch.Tensor,
        *,
        page: tuple[int, int, int],
        codec: Codec,
        scratch: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """stored: uint8, every unit of the rectangle, resident or in a slot. scratch: uint8, where encoded pages are
        decoded; None for a codec that keeps bytes.
        """
        self._shape = (rectangle.rows, *page)
        self.stored = stored.view(rectangle.pages, rectangle.rows, -1)
        """[pages, rows, page_nbytes]"""
        self._codec, self._scratch, self._dtype = codec, scratch, dtype
        self.plain = self.stored.view(dtype).view(-1, *self._shape) if codec.keeps_bytes else None
        """[pages, rows, num_kv_heads, page_tokens, head_dim] where single tokens can be read and written."""

    def read(self, count: int) -> torch.Tensor:
        """The first pages of all rows: [count, rows, num_kv_heads, page_tokens, head_dim]. Valid until the next read of
        encoded pages.
        """
        if self.plain is not None:
            return self.plain[:count]
        assert self._scratch is not None
        numbers = count * self._shape[0] * self._shape[1] * self._shape[2] * self._shape[3]
        decoded = self._scratch.view(self._dtype)[:numbers].view(-1, *self._shape[1:])
        self._codec.decode(self.stored[:count].flatten(0, 1), decoded)
        return decoded.view(count, *self._shape)

    def write(self, rows: slice, first: int, pages: torch.Tensor) -> None:
        """Put whole pages [rows, n, num_kv_heads, page_tokens, head_dim] of adjoining rows from page `first` on.

        Rows and pages are counted from the rectangle's own first.
        """
        count = pages.shape[1]
        if self.plain is not None:
            self.plain[first : first + count, rows].copy_(pages.transpose(0, 1))
            return
        encoded = torch.empty((len(pages) * count, self.stored.shape[2]), dtype=torch.uint8, device=pages.device)
        self._codec.encode(pages.flatten(0, 1), encoded)
        self.stored[first : first + count, rows].copy_(encoded.view(len(pages), count, -1).transpose(0, 1))

    def write_page(self, rows: slice, page: int, numbers: torch.Tensor) -> None:
        """The same for one page of each row, in one step: numbers [rows, num_kv_heads, page_tokens, head_dim]."""
        if self.plain is not None:
            self.plain[page, rows].copy_(numbers)
        else:
            self._codec.encode(numbers, self.stored[page, rows])
