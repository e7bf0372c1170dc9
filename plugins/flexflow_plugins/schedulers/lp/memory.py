"""The runtime's memory formula as a linear function of the shares, for every batch shape.

The formula itself lays a policy out, which takes a few tenths of a second for the largest models. It is asked about
corners only, where every tensor class lies whole on one tier, and for few shapes; with r = gpu_batch_size and
b = num_gpu_batches,

    all on the slowest tier      f(r) + r * (b - 1) * g     f asked at some r: chords of a convex function, never below
    weights moved to a tier      plus a constant
    kv_cache, activations        plus r * (b * x + y)       x residents and tails, y slots

A mixed placement differs from the line between corners by rounding to pages, or rows; a policy is checked with the
formula itself before it is handed out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexflow_engine.abc.policy import TENSOR_CLASSES, Placement, Policy, TensorClass
from flexflow_engine.abc.scheduler import PlanRequest
from flexflow_plugins.schedulers.lp.shapes import KV_PAGE_TOKENS, BatchShape

KNOT_FACTOR = 8
"""Between GPU batch sizes that are asked about."""

Share = tuple[TensorClass, str]
Bytes = Mapping[str, float]
"""By tier."""


@dataclass(frozen=True, slots=True)
class MemoryNeeds:
    """Peak bytes of each tier: `always`, plus each share's fraction times its entry in `placed`."""

    always: Bytes
    placed: Mapping[Share, Bytes]

    def peak_bytes(self, tier: str, fractions: Mapping[Share, float]) -> float:
        moved = sum(fractions.get(share, 0.0) * nbytes.get(tier, 0.0) for share, nbytes in self.placed.items())
        return self.always[tier] + moved


class MemoryModel:
    """For one request. Changing: `_asked`, answers of the formula by what was asked."""

    def __init__(self, request: PlanRequest, largest_gpu_batch: int) -> None:
        self._request = request
        self._tiers = tuple(tier.name for tier in request.tiers)
        self._placeable = placeable(request)
        self._knots = _knots(largest_gpu_batch)
        self._asked: dict[tuple[BatchShape, Share | None], Bytes] = {}

    def needs(self, shape: BatchShape) -> MemoryNeeds:
        placed = {
            (tensor_class, tier): self._moved(shape, tensor_class, tier)
            for tensor_class in TENSOR_CLASSES
            for tier in self._placeable[:-1]
            if (tensor_class, tier) not in forbidden(shape, self._placeable)
        }
        return MemoryNeeds(self._on_slowest(shape), placed)

    def _on_slowest(self, shape: BatchShape) -> Bytes:
        size = shape.gpu_batch_size
        index = bisect_left(self._knots, size)
        right = self._knots[index]
        left = right if right == size else self._knots[index - 1]
        along = (size - left) / (right - left) if right > left else 0.0
        a, b = self._ask(_with(shape, left, 1)), self._ask(_with(shape, right, 1))
        one, two = self._ask(_with(shape, 1, 1)), self._ask(self._two_batches(shape))
        further = size * (shape.num_gpu_batches - 1)
        return {t: a[t] + along * (b[t] - a[t]) + further * (two[t] - one[t]) for t in self._tiers}

    def _moved(self, shape: BatchShape, tensor_class: TensorClass, tier: str) -> Bytes:
        """What changes when a whole class moves from the slowest tier to this one."""
        if tensor_class != "kv_cache":  # the others know neither pages nor attention
            shape = replace(shape, kv_page_tokens=KV_PAGE_TOKENS[0], attention="device")
        one = self._change(_with(shape, 1, 1), (tensor_class, tier))
        if tensor_class == "weights":
            return one
        two = self._change(self._two_batches(shape), (tensor_class, tier))
        size, further = shape.gpu_batch_size, shape.num_gpu_batches - 1
        return {t: size * (one[t] + further * (two[t] - one[t])) for t in self._tiers}

    def _change(self, shape: BatchShape, share: Share) -> Bytes:
        before, after = self._ask(shape), self._ask(shape, share)
        return {tier: after[tier] - before[tier] for tier in self._tiers}

    def _two_batches(self, shape: BatchShape) -> BatchShape:
        """A second batch adds what it adds; a job of one prompt has none."""
        return _with(shape, 1, min(2, len(self._request.workload.prompt_tokens)))

    def _ask(self, shape: BatchShape, moved: Share | None = None) -> Bytes:
        if (shape, moved) not in self._asked:
            shares = dict.fromkeys(TENSOR_CLASSES, self._placeable[-1])
            shares.update([moved] if moved else [])
            whole = dict.fromkeys(shares.items(), 100.0)
            table = self._request.memory_table(make_policy(shape, whole, self._tiers))
            self._asked[shape, moved] = {tier: table.peak_bytes(tier) for tier in self._tiers}
        return self._asked[shape, moved]


def placeable(request: PlanRequest) -> tuple[str, ...]:
    """The tiers that tensors may lie on, fastest first."""
    return tuple(tier.name for tier in request.tiers if tier.placeable)


def forbidden(shape: BatchShape, tiers: tuple[str, ...]) -> frozenset[Share]:
    """Attention on the host leaves no cache on the first tier."""
    return frozenset({("kv_cache", tiers[0])} if shape.attention == "host" and len(tiers) > 1 else ())


def make_policy(shape: BatchShape, percent: Mapping[Share, float], tiers: tuple[str, ...]) -> Policy:
    """A shape with its placements."""

    def placement(tensor_class: TensorClass) -> Placement:
        return Placement(tuple((tier, float(percent.get((tensor_class, tier), 0.0))) for tier in tiers))

    return Policy(
        gpu_batch_size=shape.gpu_batch_size,
        num_gpu_batches=shape.num_gpu_batches,
        weights=placement("weights"),
        kv_cache=placement("kv_cache"),
        activations=placement("activations"),
        attention=shape.attention,
        kv_page_tokens=shape.kv_page_tokens,
    )


def _with(shape: BatchShape, gpu_batch_size: int, num_gpu_batches: int) -> BatchShape:
    return replace(shape, gpu_batch_size=gpu_batch_size, num_gpu_batches=num_gpu_batches)


def _knots(largest: int) -> list[int]:
    knots = [1]
    while knots[-1] < largest:
        knots.append(min(knots[-1] * KNOT_FACTOR, largest))
    return knots
