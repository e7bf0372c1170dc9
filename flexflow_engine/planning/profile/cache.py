"""This machine's profile in the user's cache folder: measured once a dtype, completed when more is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flexflow_engine.abc.hardware import HardwareProfile
from flexflow_engine.errors import ProblemsError, StorageError
from flexflow_engine.planning.hardware import read_profile, write_profile
from flexflow_engine.planning.profile.extent import Extent
from flexflow_engine.planning.profile.machine import Machine
from flexflow_engine.planning.profile.measure import complete
from flexflow_engine.planning.profile.needs import Needs
from flexflow_engine.user_cache import user_cache


def this_machine(needs: Needs, *, extent: Extent, notice: Callable[[str], None]) -> HardwareProfile:
    """The profile of this machine with everything that is needed, links under the names of the needs' tiers.

    What was measured before is read, what is missing is measured and kept, even if something else can't be. Raises
    HardwareError where a tier can't be measured here.
    """
    machine = Machine.here()
    path = profile_path(machine, needs)
    profile = known = _read(path, notice)
    try:
        for completed in complete(known, needs, name=str(machine), extent=extent, notice=notice):
            profile = completed
    finally:
        if profile is not None and profile is not known:
            _keep(profile, path, notice)
    assert profile is not None, "whatever is needed has a processor"
    return needs.choose(profile)


def measured_again(needs: Needs, *, extent: Extent, notice: Callable[[str], None]) -> HardwareProfile:
    """The same, with everything that is needed measured anew; what was known is replaced once all of it is measured."""
    machine = Machine.here()
    *_, profile = complete(None, needs, name=str(machine), extent=extent, notice=notice)
    _keep(profile, profile_path(machine, needs), notice)
    return needs.choose(profile)


def profile_path(machine: Machine, needs: Needs) -> Path:
    """A new one for another machine, other versions of what computes, and another dtype."""
    return user_cache() / "hardware" / f"{machine.digest}-{needs.model.dtype}.yaml"


def _read(path: Path, notice: Callable[[str], None]) -> HardwareProfile | None:
    """A cache that can't be read costs the time to measure, and nothing else."""
    if not path.is_file():
        return None
    try:
        return read_profile(path)
    except ProblemsError as error:
        notice(f"{path} is not used: {error.problems[0].what}")
        return None


def _keep(profile: HardwareProfile, path: Path, notice: Callable[[str], None]) -> None:
    try:
        write_profile(profile, path)
    except StorageError as error:
        notice(f"the measurements are not kept: {error}")
