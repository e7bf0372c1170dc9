"""An address: where in a tier something lies."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Units [first, first + count) of a region on a tier."""

    tier: str
    region: str
    first: int
    count: int
