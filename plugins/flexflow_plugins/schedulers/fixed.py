"""The scheduler that does as it is told: the recipe gives the whole policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from flexflow_engine.abc.policy import (
    TENSOR_CLASSES,
    AttentionPlace,
    MemoryTable,
    Placement,
    Policy,
    TierDescription,
)
from flexflow_engine.abc.scheduler import PlanRequest, Scheduler
from flexflow_engine.abc.shares import wrong_shares
from flexflow_engine.abc.tier import HOST

KV_PAGE_TOKENS = (16, 8, 4, 2, 1)
"""Candidates for the tokens of a KV page, the preferred first.

A sequence's last page stays where attention runs until it is full, so a policy pays for one page per sequence and layer
there: long pages are better I/O, short ones need less of the smallest memory.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedOptions:
    """The recipe's keys; the shares are percentages by tier name."""

    gpu_batch_size: int
    num_gpu_batches: int
    weights: dict[str, float]
    kv_cache: dict[str, float]
    activations: dict[str, float]
    attention: Literal["device", "host", "auto"] = "auto"
    """Where decode attention runs; `auto` is the host where all of the cache lies beyond a device's link, and the
    recipe has a tier in host memory."""
    kv_page_tokens: int | None = None
    """None takes the longest page that fits."""


class FixedScheduler(Scheduler):
    """Whether the policy fits the budgets is checked by the engine, as for any scheduler's."""

    name = "fixed"
    Options = FixedOptions

    def __init__(self, options: FixedOptions) -> None:
        super().__init__(options)
        self._options = options

    def problems(self, tiers: tuple[str, ...]) -> list[str]:
        found = [*self._wrong_sizes()]
        for tensor_class in TENSOR_CLASSES:
            found += wrong_shares(tensor_class, getattr(self._options, tensor_class), tiers)
        if self._options.attention == "host" and self._options.kv_cache.get(tiers[0]):
            found.append(f"with `attention: host`, `kv_cache.{tiers[0]}` must be 0: the host can't read it there")
        return found

    def choose(self, request: PlanRequest) -> Policy:
        tiers = tuple(tier.name for tier in request.tiers)
        policy = Policy(
            gpu_batch_size=self._options.gpu_batch_size,
            num_gpu_batches=self._options.num_gpu_batches,
            weights=_placement(self._options.weights, tiers),
            kv_cache=_placement(self._options.kv_cache, tiers),
            activations=_placement(self._options.activations, tiers),
            attention=self._attention(request.tiers),
            kv_page_tokens=self._options.kv_page_tokens or KV_PAGE_TOKENS[0],
        )
        return policy if self._options.kv_page_tokens else _with_longest_pages(policy, request)

    def _wrong_sizes(self) -> Iterator[str]:
        for key in ("gpu_batch_size", "num_gpu_batches", "kv_page_tokens"):
            value = getattr(self._options, key)
            if value is not None and value <= 0:
                yield f"`{key}` must be more than 0, not {value}"

    def _attention(self, tiers: tuple[TierDescription, ...]) -> AttentionPlace:
        """`auto`: on the host where a device would else load all keys and values instead of sending one query."""
        if self._options.attention != "auto":
            return self._options.attention
        device, beside = tiers[0], any(tier.placeable and tier.read_by_host for tier in tiers[1:])
        return "host" if device.memory != HOST and beside and not self._options.kv_cache.get(device.name) else "device"


def _placement(shares: Mapping[str, float], tiers: tuple[str, ...]) -> Placement:
    return Placement(tuple((tier, float(shares.get(tier, 0))) for tier in tiers))


def _with_longest_pages(policy: Policy, request: PlanRequest) -> Policy:
    """The longest pages that fit; where none do, those that lack the fewest bytes, so that the refusal tells no more.

    Short pages do not always need less: attention keeps one partial sum a page.
    """
    lacking: dict[Policy, int] = {}
    for tokens in KV_PAGE_TOKENS:
        candidate = replace(policy, kv_page_tokens=tokens)
        lacking[candidate] = _lacking_bytes(request.memory_table(candidate))
        if not lacking[candidate]:
            return candidate
    return min(lacking, key=lambda candidate: lacking[candidate])


def _lacking_bytes(memory: MemoryTable) -> int:
    return sum(memory.peak_bytes(tier) - memory.budgets[tier] for tier in memory.exceeded)
