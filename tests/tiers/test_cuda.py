"""Streams and events of the cuda tier, and pinned memory; everything but the refusals needs a GPU.

compute  [ sleep ][ fill ]o            o: completion
|after
copy                       [ read ]o
"""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from flexflow_engine.abc.tier import Completion, Done, HostBytes, NoOptions, RegionSpec
from flexflow_engine.errors import TierError
from flexflow_tiers.cuda import CudaOptions, CudaTier
from flexflow_tiers.cuda_lane import CudaCompletion, CudaContext
from flexflow_tiers.pinned import PinnedTier

MIB = 2**20


@pytest.fixture(autouse=True)
def no_wait_for_the_whole_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: object = None) -> None:
        raise AssertionError("a device-wide synchronize")

    monkeypatch.setattr(torch.cuda, "synchronize", refuse)


@pytest.fixture
def gpu() -> Iterator[CudaTier]:
    tier = CudaTier(label="gpu", budget_bytes=2**60, options=CudaOptions())
    yield tier
    tier.close()


@pytest.fixture
def host() -> Iterator[PinnedTier]:
    tier = PinnedTier(label="host", budget_bytes=256 * MIB, options=NoOptions())
    yield tier
    tier.close()


@pytest.fixture
def buffer(host: PinnedTier) -> HostBytes:
    """uint8 [MIB], pinned, zeros."""
    region = host.allocate(RegionSpec(name="buffer", num_units=1, unit_nbytes=MIB))
    view: HostBytes = host.tensor(region, 0, 1).numpy()
    return view


@pytest.fixture
def compute(gpu: CudaTier) -> Iterator[CudaContext]:
    context = gpu.lane_context()
    yield context
    context.close()


@pytest.fixture
def copy(gpu: CudaTier) -> Iterator[CudaContext]:
    context = gpu.lane_context()
    yield context
    context.close()


def one_mib(name: str) -> RegionSpec:
    return RegionSpec(name=name, num_units=1, unit_nbytes=MIB)


def keep_busy() -> None:
    """Occupy the current stream for some tenths of a second."""
    torch.cuda._sleep(400_000_000)


def reached(completion: CudaCompletion) -> bool:
    return bool(completion.event.query())


def test_without_a_gpu_the_message_names_a_tier_that_works() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TierError, match=r"NVIDIA GPU.*plugin: cpu"):
        CudaTier.check_available(CudaOptions())


@pytest.mark.cuda
def test_a_device_that_does_not_exist_is_refused() -> None:
    CudaTier.check_available(CudaOptions(device=0))
    for device in (-1, torch.cuda.device_count()):
        with pytest.raises(TierError, match="would do"):
            CudaTier.check_available(CudaOptions(device=device))


@pytest.mark.cuda
def test_a_copy_waits_for_the_kernel_before_it_and_the_host_does_not(
    gpu: CudaTier, compute: CudaContext, copy: CudaContext, buffer: HostBytes
) -> None:
    region = gpu.allocate(one_mib("result"))
    with compute:
        gpu.tensor(region, 0, 1).fill_(0)  # CUDA loads a kernel when it is first used, and may wait for that
        compute.record().wait()
        keep_busy()
        gpu.tensor(region, 0, 1).fill_(7)
        computed = compute.record()
    with copy:
        copy.after(computed)
        gpu.read(region, 0, 1, buffer)
        copied = copy.record()
    assert not reached(computed), "issuing blocked the host"
    copied.wait()
    assert (buffer == 7).all()
    assert computed.finished_at() <= copied.finished_at()


@pytest.mark.cuda
def test_a_copy_passes_a_busy_compute_stream(
    gpu: CudaTier, compute: CudaContext, copy: CudaContext, buffer: HostBytes
) -> None:
    region = gpu.allocate(one_mib("next"))
    with compute:
        keep_busy()
        busy = compute.record()
    with copy:
        gpu.write(region, 0, 1, buffer)
        copied = copy.record()
    copied.wait()
    busy.wait()
    assert copied.finished_at() < busy.finished_at()


@pytest.mark.cuda
def test_a_copy_on_plain_memory_is_as_right(gpu: CudaTier, copy: CudaContext) -> None:
    region = gpu.allocate(one_mib("plain"))
    data = np.arange(MIB, dtype=np.uint8)
    out = np.zeros(MIB, dtype=np.uint8)
    with copy:
        gpu.write(region, 0, 1, data)
        gpu.read(region, 0, 1, out)
        copy.record().wait()
    assert np.array_equal(out, data)


@pytest.mark.cuda
def test_what_ended_on_the_host_is_waited_for_by_the_caller(copy: CudaContext) -> None:
    flag = threading.Event()

    class Flagged(Completion):
        def wait(self) -> None:
            assert flag.wait(timeout=60)

    threading.Timer(0.05, flag.set).start()
    copy.after(Done())
    copy.after(Flagged())
    assert flag.is_set()


@pytest.mark.cuda
def test_a_context_sets_the_stream_of_each_thread_and_restores_it(compute: CudaContext, copy: CudaContext) -> None:
    seen: list[bool] = []

    def visit() -> None:
        outside = torch.cuda.current_stream()
        with compute:
            seen.append(torch.cuda.current_stream() == compute.stream)
            with copy:
                seen.append(torch.cuda.current_stream() == copy.stream)
            seen.append(torch.cuda.current_stream() == compute.stream)
        seen.append(torch.cuda.current_stream() == outside)

    threads = [threading.Thread(target=visit) for _ in range(2)]
    for thread in threads:
        thread.start()
    visit()
    for thread in threads:
        thread.join()
    assert seen == [True] * 12
    assert torch.cuda.default_stream() not in (compute.stream, copy.stream)


@pytest.mark.cuda
def test_a_completion_tells_its_time_on_the_hosts_clock(compute: CudaContext) -> None:
    before = time.perf_counter()
    with compute:
        keep_busy()
        completion = compute.record()
    completion.wait()
    after = time.perf_counter()
    assert before - 0.005 < completion.finished_at() < after + 0.005


@pytest.mark.cuda
def test_closing_a_context_waits_for_its_own_work(compute: CudaContext) -> None:
    with compute:
        keep_busy()
        completion = compute.record()
    compute.close()
    assert reached(completion)


@pytest.mark.cuda
def test_the_allocators_rounding_is_known(gpu: CudaTier) -> None:
    before = torch.cuda.memory_allocated()
    region = gpu.allocate(RegionSpec(name="odd", num_units=1, unit_nbytes=11 * MIB + 1))
    assert gpu.used_bytes == 11 * MIB + 1
    assert gpu.used_bytes < torch.cuda.memory_allocated() - before <= gpu.used_bytes + 2 * MIB
    gpu.free(region)
    assert (gpu.used_bytes, torch.cuda.memory_allocated()) == (0, before)


@pytest.mark.cuda
def test_memory_that_the_device_lacks_is_refused_and_not_counted(gpu: CudaTier) -> None:
    with pytest.raises(TierError, match=r"tiers\.gpu.*toolarge.*budget"):
        gpu.allocate(RegionSpec(name="toolarge", num_units=1, unit_nbytes=2**45))
    assert gpu.used_bytes == 0


@pytest.mark.cuda
def test_a_region_is_pinned_exactly_as_long_as_it_lives(host: PinnedTier) -> None:
    region = host.allocate(RegionSpec(name="exact", num_units=1, unit_nbytes=5 * MIB + 3))
    view = host.tensor(region, 0, 1)
    assert view.is_pinned()
    assert view.untyped_storage().nbytes() == 5 * MIB + 3
    host.free(region)
    assert not view.is_pinned()
