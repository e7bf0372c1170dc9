"""Error diffusion: cut a run of groups so that each tier's total stays within half an item of its share.

FlexGen rounds each tensor on its own, so that 20 % of OPT-30B really puts 8.3 % on the GPU (arXiv 2303.06865, public
code); here what one group rounds away the next one makes up for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexflow_engine.abc.policy import Placement


@dataclass(frozen=True, slots=True)
class Cut:
    """Items [start, stop) of one group that lie on `tier`."""

    tier: str
    start: int
    stop: int


def cut_groups(groups: Sequence[Sequence[int]], placement: Placement) -> list[tuple[Cut, ...]]:
    """For each group of items, given by their sizes, the cuts in the placement's order of tiers; empty cuts left out.

    Every prefix of the tiers holds, after every group, its share of all sizes so far within half the largest item.
    """
    seen = 0
    placed = [0] * len(placement.shares)
    cuts: list[tuple[Cut, ...]] = []
    for sizes in groups:
        seen += sum(sizes)
        edges = [0]
        share = 0.0
        for index, (_, percent) in enumerate(placement.shares):
            share += percent
            edge = _nearest_edge(sizes, edges[-1], seen * share / 100 - placed[index])
            placed[index] += sum(sizes[:edge])
            edges.append(edge)
        tiers = [tier for tier, _ in placement.shares]
        cuts.append(tuple(Cut(t, a, b) for t, a, b in zip(tiers, edges, edges[1:], strict=False) if b > a))
    return cuts


def _nearest_edge(sizes: Sequence[int], first: int, target: float) -> int:
    """The edge at or after `first` whose prefix sum is nearest to `target`."""
    prefix = sum(sizes[:first])
    edge, best = first, abs(prefix - target)
    for index in range(first, len(sizes)):
        prefix += sizes[index]
        if abs(prefix - target) >= best:
            break
        edge, best = index + 1, abs(prefix - target)
    return edge
