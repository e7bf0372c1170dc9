"""The batch shapes that are tried: what of a policy is no share, so that a linear program can't choose it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexflow_engine.abc.policy import AttentionPlace

GPU_BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
NUM_GPU_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16)
EVEN_PARTS = 4
"""Sizes that cut all prompts into so many equal GPU batches, or fewer, are tried as well."""
KV_PAGE_TOKENS = (16, 4, 1)
"""Long pages are better I/O; short ones leave more of the first tier, where every sequence's last page lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """A policy without its placements."""

    gpu_batch_size: int
    num_gpu_batches: int
    kv_page_tokens: int
    attention: AttentionPlace

    @property
    def rows(self) -> int:
        return self.gpu_batch_size * self.num_gpu_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The values of each part of a shape that may be chosen, ascending; `num_gpu_batches` depends on the size."""

    num_prompts: int
    attention: tuple[AttentionPlace, ...]
    gpu_batch_size: int | None = None
    num_gpu_batches: int | None = None
    """None: any."""

    def shapes(self) -> Iterator[BatchShape]:
        """Every shape, none with more GPU batches than the prompts fill."""
        for place in self.attention:
            for tokens in KV_PAGE_TOKENS:
                for size in self.sizes():
                    for batches in self._batches(size):
                        yield BatchShape(
                            gpu_batch_size=size, num_gpu_batches=batches, kv_page_tokens=tokens, attention=place
                        )

    def sizes(self) -> list[int]:
        if self.gpu_batch_size is not None:
            return [min(self.gpu_batch_size, self.num_prompts)]
        even = {-(-self.num_prompts // parts) for parts in range(1, EVEN_PARTS + 1)}
        even = {size for size in even if size <= GPU_BATCH_SIZES[-1]}
        return sorted({size for size in GPU_BATCH_SIZES if size <= self.num_prompts} | even)

    def _batches(self, size: int) -> list[int]:
        filled = -(-self.num_prompts // size)
        if self.num_gpu_batches is not None:
            return [min(self.num_gpu_batches, filled)]
        all_at_once = {filled} if filled <= NUM_GPU_BATCHES[-1] else set()
        return sorted({batches for batches in NUM_GPU_BATCHES if batches <= filled} | all_at_once)

    def smallest(self) -> Iterator[BatchShape]:
        """The shapes that need the least memory: the fewest rows, with pages of every length."""
        size = self.sizes()[0]
        for place in self.attention:
            for tokens in KV_PAGE_TOKENS:
                yield BatchShape(
                    gpu_batch_size=size,
                    num_gpu_batches=self._batches(size)[0],
                    kv_page_tokens=tokens,
                    attention=place,
                )
