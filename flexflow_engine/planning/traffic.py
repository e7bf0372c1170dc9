"""Seconds that a step's transfers give the lanes of the tiers' links, in closed form.

A lane of width w that carries N transfers of b bytes, each with latency l, takes N * max(b / rate, (l + b / rate) / w)
seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from flexflow_engine.abc.hardware import Direction, HardwareProfile
from flexflow_engine.abc.policy import TierDescription
from flexflow_engine.graph.lanes import read_lane, write_lane
from flexflow_engine.placement.reach import is_staged, staging_tier

Lanes = Mapping[str, float]
"""Lane -> seconds."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Transfers of one size in a step."""

    count: float
    nbytes: float


@dataclass(frozen=True, slots=True)
class LaneWork:
    """Adds up what transfers give lanes. `tiers` are the recipe's, fastest first. Changing: `lanes`."""

    tiers: tuple[TierDescription, ...]
    profile: HardwareProfile
    lanes: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def carry(self, tier: TierDescription, direction: Direction, traffic: Traffic, *, near: str | None) -> None:
        """Transfers between a tier and the tier where their bytes are used, whose memory is `near`: where neither is
        in host memory they pass through the staging tier's lane as well.
        """
        staging = staging_tier(self.tiers) if is_staged(tier.memory, near) else None
        for passed in (tier, staging) if staging else (tier,):
            link = self.profile.link(passed, direction)
            reads = direction == "read"
            width = passed.read_concurrency if reads else passed.write_concurrency
            seconds = traffic.nbytes / link.bytes_per_s
            lane = read_lane(passed.name) if reads else write_lane(passed.name)
            self.lanes[lane] += traffic.count * max(seconds, (link.latency_s + seconds) / width)
