"""What shares of a tensor class must be, for a recipe that gives them and for a scheduler that chooses them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import isfinite

from flexflow_engine.abc.near_miss import near_miss

TOLERANCE = 1e-6
"""How far from 100 a sum of shares may be."""


def wrong_shares(tensor_class: str, shares: Mapping[str, float], tiers: Collection[str]) -> Iterator[str]:
    """What is wrong with percentages by tier. tiers: those that a share may be on."""
    for tier, share in shares.items():
        if tier not in tiers:
            yield f"`{tensor_class}` has a share on `{tier}`, which is no tier of the recipe; {near_miss(tier, tiers)}"
        if not isfinite(share) or share < 0:
            yield f"`{tensor_class}.{tier}` must be a percentage, not {share:g}"
    total = sum(shares.values())
    if not abs(total - 100) <= TOLERANCE:
        yield f"the shares of `{tensor_class}` add up to {total:g} and not to 100"
