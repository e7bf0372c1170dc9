"""A GPU's memory, and the streams on which its copies and kernels run.

What the caching allocator adds: torch hands out a region from blocks of its own, so the device may hold up to 2 MiB
more than a region asks for. The budget counts what regions ask for, as on every tier, because the memory table that a
user is shown before the run is made of the same numbers.

Why no tensor here needs `record_stream`: regions are made and freed while no lane runs (the contract of a tier), and a
lane's context waits for its own stream when it is closed, so a region's memory is never handed out again under a
copy. What a kernel allocates for itself is allocated on the compute lane's stream and used on no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexflow_engine.abc.sizes import rounded_down, rounded_up
from flexflow_engine.abc.tier import HostBytes, Region, RegionSpec, Tier
from flexflow_engine.errors import TierError

# ruff: noqa: PLC0415 - torch is loaded when a tier is used: listing plugins, and refusing a bad recipe, need none of it.

if TYPE_CHECKING:
    import torch

    from flexflow_tiers.cuda_lane import CudaContext, DeviceClock


@dataclass(frozen=True, slots=True)
class CudaOptions:
    """Which GPU."""

    device: int = 0
    """Its number among the GPUs that CUDA_VISIBLE_DEVICES leaves visible."""


class DeviceMemory:
    """The memory of one region."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """tensor: uint8 [num_units * unit_nbytes] on the device."""
        self.tensor = tensor

    def close(self) -> None:
        """Let go of the tensor, whoever still holds the region. Views that are out keep the memory alive."""
        self.tensor = self.tensor.new_empty(0)


class CudaTier(Tier):
    """The memory of one GPU; the model computes there.

    `read` and `write` issue a copy on the calling thread's current stream, which inside a lane's context is the lane's
    own, and return. The host buffer belongs to the copy until a completion recorded after it is done. From pinned
    memory the copy runs beside everything else; from plain memory it is correct, but holds up the caller.
    """

    name = "cuda"
    Options = CudaOptions
    memory = "cuda"
    computes = True

    def __init__(self, *, label: str, budget_bytes: int, options: CudaOptions) -> None:
        super().__init__(label=label, budget_bytes=budget_bytes, options=options)
        self._clock: DeviceClock | None = None

    @classmethod
    def check_available(cls, options: CudaOptions) -> None:
        import torch

        fix = "plugin: cpu computes on this machine's processor instead"
        if not torch.cuda.is_available():
            raise TierError("the plugin cuda needs an NVIDIA GPU, and torch sees none", fix=fix)
        count = torch.cuda.device_count()
        if not 0 <= options.device < count:
            fix = f"device: 0 to {count - 1} would do" if count > 1 else "device: 0 would do"
            raise TierError(f"device {options.device} asked for, {count} GPU(s) visible", fix=fix)

    @classmethod
    def free_bytes(cls, options: CudaOptions) -> int:
        import torch

        try:
            free, _ = torch.cuda.mem_get_info(options.device)
        except RuntimeError as error:  # the first call that works on the GPU: another program may have it
            raise TierError(f"GPU {options.device} can't be used: {error}", fix="end what else uses it") from error
        return free

    @property
    def torch_device(self) -> str:
        return f"cuda:{self.options.device}"

    def read(self, region: Region, first: int, count: int, out: HostBytes) -> None:
        import torch

        torch.from_numpy(out).copy_(self.tensor(region, first, count), non_blocking=True)

    def write(self, region: Region, first: int, count: int, data: HostBytes) -> None:
        import torch

        self.tensor(region, first, count).copy_(torch.from_numpy(data), non_blocking=True)

    def tensor(self, region: Region, first: int, count: int) -> torch.Tensor:
        assert 0 <= first <= first + count <= region.spec.num_units, (region.spec, first, count)
        unit_nbytes = region.spec.unit_nbytes
        memory: DeviceMemory = region.handle
        return memory.tensor[first * unit_nbytes : (first + count) * unit_nbytes]

    def lane_context(self) -> CudaContext:
        from flexflow_tiers.cuda_lane import CudaContext, DeviceClock

        if self._clock is None:
            self._clock = DeviceClock(self.torch_device)
        return CudaContext(self.torch_device, self._clock)

    def close(self) -> None:
        """Free every region and give the memory back to the driver, for other programs."""
        import torch

        super().close()
        torch.cuda.empty_cache()  # nothing to do, and no device started, where torch never allocated

    def _allocate(self, spec: RegionSpec) -> DeviceMemory:
        import torch

        try:
            tensor = torch.zeros(spec.nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            raise self._does_not_fit(spec) from error
        torch.cuda.current_stream(self.torch_device).synchronize()  # other streams must find the zeros
        return DeviceMemory(tensor)

    def _free(self, region: Region) -> None:
        region.handle.close()

    def _does_not_fit(self, spec: RegionSpec) -> TierError:
        import torch

        free, total = torch.cuda.mem_get_info(self.torch_device)
        budget = rounded_down(self.used_bytes - spec.nbytes + free)
        return TierError(
            f"{spec.name} needs {rounded_up(spec.nbytes)}, {rounded_down(free)} of the GPU's {rounded_down(total)} are"
            " free",
            where=f"tiers.{self.label}",
            fix=f"a budget of {budget} at most, or fewer other programs on the GPU, would do",
        )
