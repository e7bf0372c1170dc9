"""Where the attention of decode steps runs, and which memory it uses there.

    attention: device      | attention: host
    slots, tails, scratch  | on the fastest tier that the host computes on in place
    of the compute tier    | kv_cache: nothing on the compute tier

With attention on the host, a decode tile sends one query, key and value of each row there and gets the attended values
back. Prompts attend on the compute tier; their keys and values are stored to the tiers from there.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexflow_engine.abc.policy import AttentionPlace, Policy, TierDescription
from flexflow_engine.abc.tier import HOST
from flexflow_engine.errors import PolicyError
from flexflow_engine.placement.reach import direct_tiers

ATTENTION_SLOTS = 2
"""One GPU batch is attended to while the next one's queries are computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSite:
    """The memory of decode attention."""

    tier: str
    """Where its slots and tails lie."""
    in_place: frozenset[str]
    """Tiers whose pages of the KV cache it reads where they lie."""
    on_host: bool
    """Whether it is a task of its own, beside the computations of the compute tier."""
    across_link: bool
    """Whether it is, and the host can't address the compute tier: what goes in and out is copied."""

    near_tier: str
    """Where the compute tier finds the attention slots."""

    def host_slot(self, index: int) -> str:
        """Location of an attention slot in the host's memory: a region of `tier`."""
        return f"attention.host.{index}"

    def near_slot(self, index: int) -> str:
        """Location of the same slot for the compute tier: a region of `near_tier`."""
        return f"attention.device.{index}" if self.across_link else self.host_slot(index)


def attention_site(policy: Policy, tiers: tuple[TierDescription, ...]) -> AttentionSite:
    """Raises PolicyError when the policy asks for attention where it can't run."""
    device = tiers[0]
    if policy.attention == "host" and policy.kv_cache.fraction(device.name):
        raise PolicyError(
            f"attention on the host can't read the part of the KV cache that lies on {device.name}",
            where="scheduler.kv_cache",
            fix=f"a share of 0 on {device.name} would do, or attention: device",
        )
    return site_of(policy.attention, tiers)


def site_of(place: AttentionPlace, tiers: tuple[TierDescription, ...]) -> AttentionSite:
    """The same, wherever the cache lies. Raises PolicyError where the host can't attend."""
    device = tiers[0]
    if place == "device":
        return AttentionSite(
            tier=device.name,
            in_place=direct_tiers(tiers),
            on_host=False,
            across_link=False,
            near_tier=device.name,
        )
    read = _read_by_host(tiers)
    if not read:
        raise PolicyError(
            "attention on the host needs a tier in host memory",
            where="scheduler.attention",
            fix="a `pinned` tier would do, or attention: device",
        )
    across_link = device.memory != HOST
    return AttentionSite(
        tier=read[0],
        in_place=frozenset(read),
        on_host=True,
        across_link=across_link,
        near_tier=device.name if across_link else read[0],
    )


def attention_places(tiers: tuple[TierDescription, ...]) -> tuple[AttentionPlace, ...]:
    """Where attention can run. On the host nothing of the cache lies on the first tier, so there must be another one
    for it.
    """
    elsewhere = any(tier.placeable for tier in tiers[1:])
    return ("device", "host") if elsewhere and _read_by_host(tiers) else ("device",)


def _read_by_host(tiers: tuple[TierDescription, ...]) -> list[str]:
    """The tiers that the host computes on in place, the compute tier last."""
    return [tier.name for tier in (*tiers[1:], tiers[0]) if tier.read_by_host]
