"""The lanes of a run: one in-order queue for each resource."""

from __future__ import annotations

from collections.abc import Mapping

from flexflow_engine.graph.task import ATTENTION_LANE, COMPUTE_LANE, TOKENS_LANE
from flexflow_engine.placement.layout import Layout


def read_lane(tier: str) -> str:
    """The link from `tier` towards the compute tier."""
    return f"{tier}.read"


def write_lane(tier: str) -> str:
    """The link towards `tier`."""
    return f"{tier}.write"


def lane_widths(layout: Layout) -> Mapping[str, int]:
    """Every lane with the number of tasks that it runs at once, in a fixed order."""
    widths = {COMPUTE_LANE: 1, TOKENS_LANE: 1}
    if layout.attention.on_host:
        widths[ATTENTION_LANE] = 1
    for tier in layout.tiers[1:]:
        widths[read_lane(tier.name)] = tier.read_concurrency
        widths[write_lane(tier.name)] = tier.write_concurrency
    return widths
