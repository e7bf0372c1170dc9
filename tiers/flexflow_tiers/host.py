"""Tiers in host memory: one anonymous mapping a region, so that a region takes its own bytes and nothing else.

`malloc` would keep freed memory for later, and torch's pinned allocator rounds up to a power of two; a mapping goes
back to the machine when the region is freed. Regions are backed by huge pages where the kernel has them: copies run as
fast without; memory itself was read 6 to 28 % faster in most runs, attention between 8 % slower and 35 % faster. All
pages are there when the region is: a machine that cannot keep its promise fails before the job begins, and the job does
not wait for memory, which virtual machines may hand out at one or two gigabytes a second.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from flexflow_engine.abc.sizes import rounded_up
from flexflow_engine.abc.tier import HOST, HostBytes, Region, RegionSpec, Tier
from flexflow_engine.cpu.mapping import populated
from flexflow_engine.errors import TierError

if TYPE_CHECKING:
    import torch


_MEMINFO = Path("/proc/meminfo")
"""Of Linux (proc(5))."""


class HostMemory:
    """The memory of one region: page-aligned, zero-filled, exactly as long as asked.

    `view` is the memory's own view. Others derive theirs from it (a slice, a torch tensor) and own them: a view that
    outlives `close` keeps the mapping alive, and the last one to go unmaps it. Nothing ever points at unmapped memory.
    """

    def __init__(self, nbytes: int) -> None:
        """Raises OSError when the machine has no room for the mapping."""
        self._mapping = populated(nbytes)
        self.view: HostBytes = np.frombuffer(self._mapping, dtype=np.uint8, count=nbytes)

    def close(self) -> None:
        """Unmap now, or with the last view that somebody still holds. Idempotent."""
        self.view = np.empty(0, dtype=np.uint8)
        with suppress(BufferError):  # raised while a view is out; that view's end unmaps
            self._mapping.close()


class HostTier(Tier):
    """Base of the tiers whose bytes the host can address. Reads and writes copy; `tensor` shares."""

    memory = HOST
    more_room: ClassVar[str] = "a smaller budget for this tier, or fewer other programs, would do"
    """What would work when the machine refuses."""

    @classmethod
    def free_bytes(cls, options: Any) -> int | None:
        """As the kernel tells it, what its caches would give back included; a limit of a container is not in it."""
        lines = _MEMINFO.read_text(encoding="utf-8").splitlines() if _MEMINFO.exists() else []
        found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return int(found[0]) * 2**10 if found else None

    def read(self, region: Region, first: int, count: int, out: HostBytes) -> None:
        np.copyto(out, _units(region, first, count))

    def write(self, region: Region, first: int, count: int, data: HostBytes) -> None:
        np.copyto(_units(region, first, count), data)

    def tensor(self, region: Region, first: int, count: int) -> torch.Tensor:
        import torch  # noqa: PLC0415 - listing plugins must not load it

        return torch.from_numpy(_units(region, first, count))

    def _allocate(self, spec: RegionSpec) -> HostMemory:
        try:
            return self._memory(spec.nbytes)
        except OSError as error:
            raise TierError(
                f"the machine has no room for the {rounded_up(spec.nbytes)} of {spec.name} ({error.strerror})",
                where=f"tiers.{self.label}",
                fix=self.more_room,
            ) from error

    def _free(self, region: Region) -> None:
        region.handle.close()

    def _memory(self, nbytes: int) -> HostMemory:
        """What backs a region of `nbytes`; a subclass may prepare it for a device. Raises OSError."""
        return HostMemory(nbytes)


def _units(region: Region, first: int, count: int) -> HostBytes:
    """uint8 [count * unit_nbytes], sharing memory with the region."""
    assert 0 <= first <= first + count <= region.spec.num_units, (region.spec, first, count)
    unit_nbytes = region.spec.unit_nbytes
    view: HostBytes = region.handle.view
    return view[first * unit_nbytes : (first + count) * unit_nbytes]
