"""The disk tier: regions and weights in Zarr v3 files, every unit verified when it is read.

Scratch regions live in a folder of the run and are removed with it. Weights are served from the weight store's own
files, without a copy. I/O goes past the system's page cache where the file system allows it, straight from and to the
engine's slots where they are aligned as direct I/O asks, else through buffers: one of 4 MiB for each lane's thread.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from flexflow_engine.abc.sizes import rounded_down, rounded_up
from flexflow_engine.abc.tier import HostBytes, Region, RegionSpec, StoredTensor, Tier
from flexflow_engine.errors import StorageError
from flexflow_engine.files import free_nbytes, nearest_existing
from flexflow_engine.store.access import READS_AT_ONCE, Access
from flexflow_engine.store.run_folder import RunFolder
from flexflow_engine.store.scratch import ScratchArray, scratch_nbytes
from flexflow_engine.store.weights import StoredUnits


@dataclass(frozen=True, slots=True)
class ZarrOptions:
    path: Path
    """Folder of the tier's files; made when it does not exist."""


@dataclass(frozen=True, slots=True)
class _Handle:
    units: ScratchArray | StoredUnits
    counted_nbytes: int
    """What the region takes from the budget."""


class ZarrTier(Tier):
    """Storage that is read and written in whole units.

    Changing state: `_unwritten_nbytes`, by how much the regions' files may still grow; guarded by `_lock`.
    """

    name: ClassVar[str] = "zarr"
    Options: ClassVar[type[Any]] = ZarrOptions
    reads_store: ClassVar[bool] = True
    read_concurrency: ClassVar[int] = READS_AT_ONCE + 1  # one checks what it has read
    write_concurrency: ClassVar[int] = 2

    def __init__(self, *, label: str, budget_bytes: int, options: ZarrOptions) -> None:
        """Removes what dead runs left in the folder. Raises StorageError when it can't be written."""
        super().__init__(label=label, budget_bytes=budget_bytes, options=options)
        self._run = RunFolder(Path(options.path))
        self._access = Access.tried_on(self._run.sample)
        self._unwritten_nbytes = 0
        self._lock = Lock()

    @property
    def notices(self) -> tuple[str, ...]:
        return self._access.notices(Path(self.options.path))

    @classmethod
    def store_root(cls, options: Any) -> Path:
        return Path(options.path)

    @classmethod
    def check_available(cls, options: Any) -> None:
        """Raise StorageError when the folder can be neither used nor made. Makes nothing."""
        path = Path(options.path)
        existing = nearest_existing(path)
        if not existing.is_dir():
            raise StorageError(f"{existing} is not a folder", where=str(path), fix="choose another path for the tier")
        if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
            raise StorageError(
                f"{existing} can't be written", where=str(path), fix="choose a path for the tier that you may write to"
            )

    @classmethod
    def free_bytes(cls, options: Any) -> int:
        return free_nbytes(Path(options.path))

    def attach(self, tensor: StoredTensor, *, placed_units: int) -> Region:
        units = StoredUnits.open(tensor, self._access)
        units.check_pages()
        counted = placed_units * tensor.unit_nbytes
        self.reserve(counted, what=tensor.name)
        spec = RegionSpec(name=tensor.name, num_units=tensor.num_units, unit_nbytes=tensor.unit_nbytes)
        return Region(spec=spec, handle=_Handle(units, counted))

    def free(self, region: Region) -> None:
        self._live.pop(region.spec.name, None)  # an attached region is not ours
        self._free(region)
        self.used_bytes -= region.handle.counted_nbytes

    def read(self, region: Region, first: int, count: int, out: HostBytes) -> None:
        region.handle.units.read(first, count, out)

    def gather(self, region: Region, units: NDArray[np.int64], out: HostBytes) -> None:
        stored = region.handle.units
        if isinstance(stored, StoredUnits):
            stored.gather(units, out)
        else:
            super().gather(region, units, out)

    def write(self, region: Region, first: int, count: int, data: HostBytes) -> None:
        units = region.handle.units
        assert isinstance(units, ScratchArray), f"{region.spec.name} is attached, and read only"
        fresh = units.write(first, count, data)
        with self._lock:
            self._unwritten_nbytes -= fresh * region.spec.unit_nbytes

    def flush(self, region: Region) -> None:
        """Bring the region's files to where any Zarr reader sees the units written so far."""
        units = region.handle.units
        assert isinstance(units, ScratchArray), f"{region.spec.name} is attached, and read only"
        units.flush()

    def close(self) -> None:
        self._access.close()
        self._unwritten_nbytes = 0
        self.used_bytes = 0
        self._run.close()

    def _allocate(self, spec: RegionSpec) -> _Handle:
        self._check_space(spec)
        units = ScratchArray(self._run.path, spec, self._access)
        self._unwritten_nbytes += units.unwritten_nbytes
        return _Handle(units, spec.nbytes)

    def _free(self, region: Region) -> None:
        units = region.handle.units
        if isinstance(units, ScratchArray):
            self._unwritten_nbytes -= units.unwritten_nbytes
        units.close()

    def _check_space(self, spec: RegionSpec) -> None:
        """Files are sparse: what other regions have not written yet is promised, though the disk does not show it."""
        needed = scratch_nbytes(spec)
        left = max(0, free_nbytes(self._run.path) - self._unwritten_nbytes)
        if needed > left:
            raise StorageError(
                f"{spec.name} needs {rounded_up(needed)}, and {rounded_down(left)} are free",
                where=str(self._run.path.parent.parent),
                fix=f"free some space there, or choose a path for tiers.{self.label} on a larger disk",
            )
