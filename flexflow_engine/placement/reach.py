"""Which memory reaches which: what is computed on in place, and what passes through host memory on its way."""

from __future__ import annotations

from flexflow_engine.abc.policy import TierDescription
from flexflow_engine.abc.tier import HOST, Tier

AnyTier = TierDescription | type[Tier]
"""A tier of a recipe, or its class."""


def direct_tiers(tiers: tuple[TierDescription, ...]) -> frozenset[str]:
    """The compute tier, which is the first, and every other that is computed on in place."""
    return frozenset(tier.name for tier in tiers if tier is tiers[0] or is_direct(tier, tiers[0]))


def is_direct(tier: AnyTier, device: AnyTier) -> bool:
    """Whether a tier beside the compute tier is computed on in place: in host memory, where that one is, too.

    Two tiers of one kind of device memory may be two devices.
    """
    return device.memory == tier.memory == HOST and tier.direct


def is_staged(one: str | None, other: str | None) -> bool:
    """Whether bytes between two kinds of memory pass through host memory."""
    return HOST not in {one, other}


def staging_tier(tiers: tuple[TierDescription, ...]) -> TierDescription | None:
    """Where they pass: the fastest tier beside the first that the host can address; None without one."""
    return next((tier for tier in tiers[1:] if tier.memory == HOST), None)
