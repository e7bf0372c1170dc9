"""Two tiers for tests, both real ones: they hold bytes, count them, and keep the contract of `Tier`.

`ThrottledTier` makes a transfer last, so that overlap can be seen. `IslandTier` behaves like an accelerator: the model
computes there, and every byte must be copied over, because the host can't address it.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flexflow_engine.abc.tier import HOST, HostBytes, Region, RegionSpec, Tier

if TYPE_CHECKING:
    import torch


class ArrayTier(Tier):
    """Base of both: a numpy array a region."""

    def read(self, region: Region, first: int, count: int, out: HostBytes) -> None:
        np.copyto(out, _units(region, first, count))

    def write(self, region: Region, first: int, count: int, data: HostBytes) -> None:
        np.copyto(_units(region, first, count), data)

    def tensor(self, region: Region, first: int, count: int) -> torch.Tensor:
        import torch  # noqa: PLC0415 - only a tier that is computed on needs it

        return torch.from_numpy(_units(region, first, count))

    def _allocate(self, spec: RegionSpec) -> HostBytes:
        return np.zeros(spec.nbytes, dtype=np.uint8)

    def _free(self, region: Region) -> None:
        """numpy frees the array with its last view."""


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """The link in front of a `ThrottledTier`."""

    bytes_per_second: float = 1e9
    latency_s: float = 0.0
    """What every transfer waits before its first byte; the latencies of concurrent transfers overlap."""


class ThrottledTier(ArrayTier):
    """Host memory behind one slow link, which all reads and writes share: two at once take turns.

    Not `direct`: though the host can address the bytes, nothing computes on them in place.
    """

    name = "throttled"
    Options = LinkOptions
    memory = HOST
    direct = False
    read_concurrency = 2
    write_concurrency = 2

    def __init__(self, *, label: str, budget_bytes: int, options: LinkOptions) -> None:
        super().__init__(label=label, budget_bytes=budget_bytes, options=options)
        self._turn = threading.Lock()
        self._idle_at = 0.0
        """`time.monotonic()` at which the link has carried everything that was asked so far."""

    def read(self, region: Region, first: int, count: int, out: HostBytes) -> None:
        self._carry(out.nbytes)
        super().read(region, first, count, out)

    def write(self, region: Region, first: int, count: int, data: HostBytes) -> None:
        self._carry(data.nbytes)
        super().write(region, first, count, data)

    def _carry(self, nbytes: int) -> None:
        """Sleep until the link, after what others asked of it before, has carried `nbytes`."""
        with self._turn:
            start = max(time.monotonic() + self.options.latency_s, self._idle_at)
            self._idle_at = start + nbytes / self.options.bytes_per_second
            arrival = self._idle_at
        time.sleep(max(0.0, arrival - time.monotonic()))


class IslandTier(ArrayTier):
    """An accelerator without the accelerator: a memory of its own, in which the model computes.

    Its label is not the host's, so whatever must go through host memory on a GPU goes through host memory here. The
    kernels are the CPU's.
    """

    name = "island"
    memory = "island"
    computes = True

    @property
    def torch_device(self) -> str:
        return "cpu"


def _units(region: Region, first: int, count: int) -> HostBytes:
    """uint8 [count * unit_nbytes], sharing memory with the region."""
    assert 0 <= first <= first + count <= region.spec.num_units, (region.spec, first, count)
    unit_nbytes = region.spec.unit_nbytes
    view: HostBytes = region.handle[first * unit_nbytes : (first + count) * unit_nbytes]
    return view
