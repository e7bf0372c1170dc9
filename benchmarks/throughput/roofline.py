"""The shortest time in which a job can be done: each phase at the speed of its slowest resource.

    prefill_s = max(flops / matmul rate of many rows, bytes read / read rate, bytes written / write rate)
    decode_s  = max(flops / matmul rate of a GPU batch's rows + cached bytes / memory rate, bytes read / …, …)

Bytes are read from the far tier, a disk or a GPU's host, and written to it. One processor does both the matmuls and the
attention of a decode step, so their times add up; the far tier's two directions and the processor work side by side.
Williams, Waterman, Patterson 2009, "Roofline: an insightful visual performance model", with more than two roofs. Norms,
codecs, checksums and the start of each phase are not in the bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ITEM_NBYTES = 2
"""Of a bfloat16 number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured in the same run as what they bound."""

    far_read: float
    """Bytes a second: of a disk with direct I/O, as many reads at once as the disk tier has, or of page-locked memory
    that a GPU reads. So are writes.
    """
    far_write: float
    prefill_matmul: float
    """Flop a second, many rows, in the processor's fastest way: see `throughput.rates`."""
    decode_matmul: float
    """The same with as many rows as a GPU batch has."""
    memory_read: float
    """Bytes a second, of the processor that computes."""

    def between(self, after: Rates) -> Rates:
        """At which work takes the mean of what it takes at these and at those measured later."""
        return Rates(
            **{name: 2 / (1 / getattr(self, name) + 1 / getattr(after, name)) for name in self.__dataclass_fields__}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a decoder's work follows from; `hidden` is the hidden size, the feed-forward part is 4 times as wide."""

    layers: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseWork:
    """What the resources have to do in a phase."""

    flops: float
    cached_nbytes: float
    """Keys and values that attention reads."""
    far_read_nbytes: float
    far_write_nbytes: float


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds that a phase takes at least, by resource."""

    seconds: Mapping[str, float]

    @property
    def slowest(self) -> str:
        return max(self.seconds, key=lambda resource: self.seconds[resource])

    @property
    def total_s(self) -> float:
        return self.seconds[self.slowest]


def prefill_work(
    shape: Shape, *, sequences: int, prompt_tokens: int, far_read_nbytes: float, far_write_nbytes: float
) -> PhaseWork:
    """Every prompt once through the layers; attention is causal, and the head sees one token of each."""
    layer = 24 * shape.hidden**2 * prompt_tokens + 2 * shape.hidden * prompt_tokens * (prompt_tokens + 1)
    flops = sequences * (shape.layers * layer + 2 * shape.hidden * shape.vocabulary)
    return PhaseWork(flops=flops, cached_nbytes=0, far_read_nbytes=far_read_nbytes, far_write_nbytes=far_write_nbytes)


def decode_work(
    shape: Shape,
    *,
    sequences: int,
    prompt_tokens: int,
    new_tokens: int,
    cache_bits: float,
    far_read_nbytes: float,
    far_write_nbytes: float,
) -> PhaseWork:
    """new_tokens - 1 steps of one token a sequence; step i reads prompt_tokens + i cached tokens, its own included.

    cache_bits: of a number of the cache as it is stored.
    """
    steps = new_tokens - 1
    flops = sequences * steps * (24 * shape.layers * shape.hidden**2 + 2 * shape.hidden * shape.vocabulary)
    positions = steps * prompt_tokens + steps * (steps + 1) / 2
    cached = sequences * positions * 2 * shape.layers * shape.hidden * cache_bits / 8
    return PhaseWork(
        flops=flops, cached_nbytes=cached, far_read_nbytes=far_read_nbytes, far_write_nbytes=far_write_nbytes
    )


def prefill_bound(work: PhaseWork, rates: Rates) -> Bound:
    return _bound(work, rates, rates.prefill_matmul)


def decode_bound(work: PhaseWork, rates: Rates) -> Bound:
    return _bound(work, rates, rates.decode_matmul)


def _bound(work: PhaseWork, rates: Rates, matmul: float) -> Bound:
    return Bound(
        {
            "compute": work.flops / matmul + work.cached_nbytes / rates.memory_read,
            "read": work.far_read_nbytes / rates.far_read,
            "write": work.far_write_nbytes / rates.far_write,
        }
    )
