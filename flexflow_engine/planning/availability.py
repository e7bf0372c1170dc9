"""Whether this machine has the tiers that a recipe names, and the room that a plan takes on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flexflow_engine.abc.policy import MemoryTable
from flexflow_engine.abc.sizes import rounded_down, rounded_up
from flexflow_engine.abc.tier import HOST
from flexflow_engine.errors import FlexFlowError, TierError
from flexflow_engine.planning.profile.needs import TierChoice


def unavailable(tiers: Iterable[TierChoice]) -> Iterator[FlexFlowError]:
    """What hinders each tier that this machine can't offer."""
    for tier in tiers:
        try:
            tier.tier_class.check_available(tier.options)
        except FlexFlowError as error:
            yield _of_tier(tier.name, error)


def without_room(tiers: Iterable[TierChoice], memory: MemoryTable) -> Iterator[FlexFlowError]:
    """What each device has too little free memory for; every tier is available. Not asked of the host's memory, which
    may be swapped, nor of a disk, where a part of the weights may lie already.
    """
    for tier in tiers:
        if tier.tier_class.memory in {None, HOST}:
            continue
        try:
            free, peak = tier.tier_class.free_bytes(tier.options), memory.peak_bytes(tier.name)
        except FlexFlowError as error:
            yield _of_tier(tier.name, error)
            continue
        if free is not None and free < peak:
            yield TierError(
                f"the plan takes {rounded_up(peak)} of the device's memory, {rounded_down(free)} are free",
                where=f"tiers.{tier.name}.budget",
                fix=f"a policy that takes {rounded_down(free)} at most would do, which a scheduler chooses by such a "
                "budget, or fewer other programs on the device",
            )


def _of_tier(name: str, error: FlexFlowError) -> FlexFlowError:
    """The same error, with the tier's place before its own."""
    place = f"tiers.{name}"
    return error if error.where.startswith(place) else error.within(place)
