"""What lanes leave of one another's rates: one rule for the virtual clock and for the closed form.

r(i | J) is what is left of lane i's rate while the lanes J work, as the profile's `Beside` and `leaves_processors` say.
The clock asks for it whenever a task starts or ends. The closed form counts what a lane loses as work of its own: lane
j works for w_j / r(j | i) seconds beside i, and takes 1 - r(i | j) of i's rate meanwhile. With works w, linear in them:

    lost(i, j)     = w_j * min(1, (1 - r(i | j)) / r(j | i))
    a link i       w_i + lost(i, j), for every other lane j: a bound each, as if the two had the step for themselves
    a processor i  w_i + sum over links j of lost(i, j): what several take adds up where they work one after another;
                   where they overlap it is a little less for the clock, which multiplies what they leave

For two lanes that always have work the larger bound is exact. More than j's own seconds are never counted: the two
could as well take turns. So a lane without work bounds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from flexflow_engine.abc.hardware import Direction, HardwareProfile, Link
from flexflow_engine.abc.policy import TierDescription
from flexflow_engine.abc.tier import HOST
from flexflow_engine.graph.lanes import read_lane, write_lane
from flexflow_engine.graph.task import ATTENTION_LANE, COMPUTE_LANE, TOKENS_LANE


class Contention:
    """Among the lanes of a recipe's tiers on one machine; a lane that is no link's works for a processor."""

    def __init__(self, tiers: tuple[TierDescription, ...], profile: HardwareProfile) -> None:
        """tiers: fastest first; the model computes on the first."""
        self._one_processor = tiers[0].memory == HOST
        self._profile = profile
        self._ends: dict[str, tuple[TierDescription, Direction]] = {}
        for tier in tiers[1:]:
            self._ends |= {read_lane(tier.name): (tier, "read"), write_lane(tier.name): (tier, "write")}
        self._links: dict[str, Link] = {}

    def link(self, lane: str) -> Link:
        """The link that a lane stands for. Raises HardwareError where the profile doesn't know it."""
        if lane not in self._links:
            self._links[lane] = self._profile.link(*self._ends[lane])
        return self._links[lane]

    def left(self, lane: str, working: frozenset[str]) -> float:
        """The fraction of a lane's rate beside others; sampled tokens are too few to count. The host's processor, where
        it computes and attends at once, is half each one's.
        """
        others = working - {lane, TOKENS_LANE}
        links, processors = sorted(others & self._ends.keys()), others - self._ends.keys()
        if lane not in self._ends:
            left = prod(self.link(other).leaves_processors for other in links)
            return left / 2 if processors and self._one_processor else left
        (tier, _), beside = self._ends[lane], self.link(lane).beside
        same = [self._ends[other][0] is tier for other in links]
        left = 1.0
        if any(same):
            left *= beside.reverse
        if not all(same):
            left *= beside.links
        return left * beside.processors if processors else left

    def bounds(self, works: Mapping[str, float], lanes: frozenset[str]) -> dict[str, float]:
        """Seconds of work by lane, a processor's with what `works` of links take from it; and for each pair of `lanes`
        of which a link loses to the other one, its work and what it loses, under the names of both. lanes: all that
        have work wherever tensors lie, so that the bounds of different placements add up.

        What two processors cost each other is the caller's business, who may have lanes for that: they lose like a
        processor's, and take from nobody.
        """
        links = sorted(lanes & self._ends.keys())
        total = dict(works)
        for lane in sorted(lanes - self._ends.keys()):
            lost = sum(works.get(link, 0.0) * self._cost(lane, link) for link in links)
            if lost:
                total[lane] = works.get(lane, 0.0) + lost
        for link in links:
            for other in sorted(lanes & {*links, COMPUTE_LANE, ATTENTION_LANE} - {link}):
                cost = self._cost(link, other)
                bound = works.get(link, 0.0) + cost * works.get(other, 0.0)
                if cost and bound:
                    total[f"{link} beside {other}"] = bound
        return total

    def _cost(self, lane: str, other: str) -> float:
        """What lane loses for each second of the other's work."""
        loses, leaves = 1 - self.left(lane, frozenset({other})), self.left(other, frozenset({lane}))
        return min(1.0, loses / leaves) if leaves else 1.0
