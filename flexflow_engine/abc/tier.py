"""Contract of a tier: a place where bytes live.

A tier hands out *regions*: runs of equally sized *units*. All traffic is in whole units, so that a tier with
checksums can verify exactly what it delivers. Which units hold what is the engine's business; a tier knows neither
tensors nor layers.

Tiers are synchronous. The engine calls `read` and `write` from the lanes' threads, several at once but never two on
the same units; `allocate`, `attach`, `free` and `close` from one thread, while no lane runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from flexflow_engine.abc.sizes import rounded_down, rounded_up
from flexflow_engine.errors import TierError

if TYPE_CHECKING:
    import torch

    from flexflow_engine.abc.compressor import Compressor

API_VERSION = 1
HOST = "cpu"
"""The `memory` label of tiers whose bytes the host can address."""

HostBytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionSpec:
    """What the engine asks a tier to hold."""

    name: str
    """Unique within the tier, a legal file name: `kv.3.0.k.1`."""
    num_units: int
    unit_nbytes: int

    @property
    def nbytes(self) -> int:
        return self.num_units * self.unit_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """An array of the weight store, as a tier that can read it in place sees it."""

    name: str
    """The checkpoint's name of the tensor."""
    path: Path
    """Folder of the Zarr v3 array."""
    num_units: int
    unit_nbytes: int
    """One unit is one inner chunk, some rows of the array; the last is stored whole, padded with zeros."""
    units_per_page: int
    """One page is one shard file."""
    compressor: Compressor | None = None
    """Of the units in the files, where they are compressed: sizes then differ from unit to unit, and the shard's index
    tells where each lies. A tier delivers decompressed units of `unit_nbytes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A run of units on one tier; `handle` belongs to the tier and is opaque to everyone else."""

    spec: RegionSpec
    handle: Any


@dataclass(frozen=True, slots=True)
class NoOptions:
    """For tiers that take nothing but a budget."""


class Completion(ABC):
    """When the work that a lane issued is done."""

    @abstractmethod
    def wait(self) -> None:
        """Block the calling host thread until the work is done. Raises what the work failed with."""

    def finished_at(self) -> float | None:
        """When the work was done, in seconds of `time.perf_counter`; valid after `wait`. None: as the call returned."""
        return None


class Done(Completion):
    """The completion of work that ended before the call returned."""

    def wait(self) -> None:
        return


class LaneContext(ABC):
    """What one lane needs to issue work in order: nothing on the host, a side stream on CUDA.

    Made by `Tier.lane_context`, closed by the executor. A lane's thread enters it for as long as it works, and calls
    `after` and `record` inside, for many tasks: what was recorded is to be reached without it being left.
    """

    @abstractmethod
    def __enter__(self) -> LaneContext: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...

    @abstractmethod
    def after(self, completion: Completion) -> None:
        """Make what is issued from now on start only when `completion` is done; may block the host or not."""

    @abstractmethod
    def record(self) -> Completion:
        """The completion of everything issued so far."""

    @abstractmethod
    def close(self) -> None: ...


class HostContext(LaneContext):
    """Work on the host is done when the call returns."""

    def __enter__(self) -> HostContext:
        return self

    def __exit__(self, *exc: object) -> None:
        return

    def after(self, completion: Completion) -> None:
        completion.wait()

    def record(self) -> Completion:
        return Done()

    def close(self) -> None:
        return


class Tier(ABC):
    """A place where bytes live, with a budget that it never exceeds and counts truthfully.

    Subclasses implement `_allocate`, `_free`, `read`, `write`, and `tensor` where `memory` is set.
    """

    api_version: ClassVar[int] = API_VERSION
    name: ClassVar[str]
    Options: ClassVar[type[Any]] = NoOptions
    """A frozen dataclass: the recipe's further keys of this tier, with their types and defaults."""
    memory: ClassVar[str | None] = None
    """Whose instructions can address the bytes: "cpu", "cuda", or None for storage that must be read and written."""
    direct: ClassVar[bool] = True
    """Whether kernels of a processor that can address the memory may compute on it in place."""
    computes: ClassVar[bool] = False
    """Whether it can be a recipe's first tier, the one where the model computes."""
    reads_store: ClassVar[bool] = False
    """Whether `attach` serves weights from the store's own files, without a copy."""
    read_concurrency: ClassVar[int] = 1
    write_concurrency: ClassVar[int] = 1

    def __init__(self, *, label: str, budget_bytes: int, options: Any) -> None:
        """label: the recipe's name for this tier, for messages. options: an instance of `Options`."""
        self.label = label
        self.budget_bytes = budget_bytes
        self.options = options
        self.used_bytes = 0
        self.peak_bytes = 0
        self._live: dict[str, Region] = {}

    @classmethod  # noqa: B027  # most tiers are available everywhere
    def check_available(cls, options: Any) -> None:
        """Raise TierError (or StorageError) when this machine can't offer the tier. Called before anything is read."""

    @classmethod
    def store_root(cls, options: Any) -> Path | None:
        """The folder under which weight stores are to lie; None for tiers without `reads_store`."""
        return None

    @classmethod
    def free_bytes(cls, options: Any) -> int | None:
        """Bytes that the machine has for the tier at this moment; None where that is not known. Called after
        `check_available`, by `doctor`, and before a run whose device it is. Raises like it.
        """
        return None

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of this tier on this machine, a line each. Asked once, when it is open."""
        return ()

    @property
    def torch_device(self) -> str:
        """The torch device whose kernels read this memory; only for tiers with `memory`."""
        assert self.memory is not None
        return self.memory

    def allocate(self, spec: RegionSpec) -> Region:
        """A zero-filled region. Raises TierError when the budget, or the machine, does not hold it."""
        assert spec.name not in self._live, spec.name
        self.reserve(spec.nbytes, what=spec.name)
        try:
            region = self._live[spec.name] = Region(spec=spec, handle=self._allocate(spec))
        except BaseException:
            self.used_bytes -= spec.nbytes
            raise
        return region

    def free(self, region: Region) -> None:
        """Give a region's memory or files back; its views are invalid from now on."""
        del self._live[region.spec.name]
        self._free(region)
        self.used_bytes -= region.spec.nbytes

    def reserve(self, nbytes: int, *, what: str) -> None:
        """Count `nbytes` that are used without a region, such as a kernel's workspace."""
        used = self.used_bytes + nbytes
        if used > self.budget_bytes:
            free = rounded_down(self.budget_bytes - self.used_bytes)
            raise TierError(
                f"{what} needs {rounded_up(nbytes)}, {free} of {rounded_down(self.budget_bytes)} are free",
                where=f"tiers.{self.label}",
                fix=f"a budget of {rounded_up(used)} would do",
            )
        self.used_bytes = used
        self.peak_bytes = max(self.peak_bytes, used)

    def release(self, nbytes: int) -> None:
        """Give back what `reserve` counted."""
        self.used_bytes -= nbytes

    def attach(self, tensor: StoredTensor, *, placed_units: int) -> Region:
        """A read-only region over a stored tensor; `placed_units` of it count against the budget.

        Only for tiers with `reads_store`. Raises CorruptDataError when the files are not what `tensor` says.
        """
        raise AssertionError(f"{type(self).__name__} does not read the store")

    @abstractmethod
    def _allocate(self, spec: RegionSpec) -> Any:
        """Make the zero-filled memory or files; the budget has been checked."""

    @abstractmethod
    def _free(self, region: Region) -> None:
        """Release what `_allocate` or `attach` made, files included."""

    @abstractmethod
    def read(self, region: Region, first: int, count: int, out: HostBytes) -> None:
        """Copy units [first, first + count) into `out`: uint8 [count * unit_nbytes], host memory, contiguous.

        Called from a lane. Units never written read as zeros. Raises CorruptDataError on a checksum mismatch,
        StorageError on an I/O error. On an asynchronous device the copy is issued on the lane's stream.
        """

    def gather(self, region: Region, units: NDArray[np.int64], out: HostBytes) -> None:
        """Copy single units to adjoining places: `out`, uint8 [n * unit_nbytes], the caller's, contiguous host memory.

        units: int64 [n], strictly ascending, within the region; the work that wrote them is done. Rows of an embedding
        table are looked up so. When it returns the bytes are there, on an asynchronous device too. Called and raises
        like `read`, which the default calls for each, in a context of its own; tiers that need fewer calls override it.
        """
        nbytes = region.spec.unit_nbytes
        with closing(self.lane_context()) as context, context:
            for place, unit in enumerate(units.tolist()):
                self.read(region, unit, 1, out[place * nbytes : (place + 1) * nbytes])
            context.record().wait()

    @abstractmethod
    def write(self, region: Region, first: int, count: int, data: HostBytes) -> None:
        """Copy `data` into units [first, first + count). Called from a lane.

        `data` is not touched once a completion recorded after the call is done. Raises StorageError when the disk
        is full.
        """

    def tensor(self, region: Region, first: int, count: int) -> torch.Tensor:
        """The bytes of units [first, first + count) as a torch uint8 view that shares memory; no copy.

        Only for tiers with `memory`. Valid until the region is freed.
        """
        raise AssertionError(f"{type(self).__name__} has no addressable memory")

    def lane_context(self) -> LaneContext:
        """A new context for a lane whose work touches this tier; the caller closes it."""
        return HostContext()

    def close(self) -> None:
        """Free every region and leave no file, handle or thread behind. Idempotent."""
        for region in list(self._live.values()):
            self.free(region)
        self.used_bytes = 0
