"""What every tier promises, as tests to inherit.

    class TestMyTier(TierTests):
        def make_tier(self, tmp_path, budget_bytes):
            return MyTier(label="fast", budget_bytes=budget_bytes, options=MyOptions(path=tmp_path))

pytest collects the inherited tests under the subclass's name. `tmp_path` is a folder of the tier's own; each call of
`make_tier` makes a new tier, and the suite closes it. All traffic goes through a lane's context, as in the engine, so
that an asynchronous tier is tested as it is used. For assertions that show their values, put
`pytest.register_assert_rewrite("flexflow_engine.testing")` at the top of your conftest.py.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.tier import LaneContext, Region, RegionSpec, Tier
from flexflow_engine.errors import TierError
from flexflow_engine.testing.traffic import lane, random_bytes, read_units, write_units

AMPLE_BYTES = 64 * 2**20
"""A budget that no test here reaches."""
UNIT_NBYTES = (1, 7, 4096, 100_003)
"""Sizes of a unit: the smallest, an odd one, a disk's block, and one that no block divides."""
NUM_THREADS = 4
NUM_UNITS = 6
"""Units of the region that the generated sequences work on."""

Step = tuple[str, int, int, int]
"""write or read, first unit, number of units, seed of the data."""


class TierTests:
    """Inherit it and define `make_tier`."""

    def make_tier(self, tmp_path: Path, budget_bytes: int) -> Tier:
        """A new tier with this budget; files, if it has any, go under `tmp_path`."""
        raise NotImplementedError

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        with _open(self.make_tier(tmp_path, AMPLE_BYTES)) as tier:
            yield tier

    @pytest.mark.parametrize("unit_nbytes", UNIT_NBYTES)
    def test_a_region_starts_as_zeros(self, tier: Tier, unit_nbytes: int) -> None:
        region = tier.allocate(_spec("zeros", 5, unit_nbytes))
        assert not read_units(tier, region, 0, 5).any()

    @pytest.mark.parametrize("unit_nbytes", UNIT_NBYTES)
    def test_what_was_written_is_read_back(self, tier: Tier, unit_nbytes: int) -> None:
        region = tier.allocate(_spec("kept", 5, unit_nbytes))
        data = random_bytes(5 * unit_nbytes)
        write_units(tier, region, 0, data)
        assert np.array_equal(read_units(tier, region, 0, 5), data)

    @pytest.mark.parametrize("unit_nbytes", UNIT_NBYTES)
    def test_a_range_of_units_leaves_the_others_alone(self, tier: Tier, unit_nbytes: int) -> None:
        region = tier.allocate(_spec("ranges", 5, unit_nbytes))
        expected = random_bytes(5 * unit_nbytes)
        write_units(tier, region, 0, expected)
        middle = random_bytes(2 * unit_nbytes, seed=1)
        write_units(tier, region, 2, middle)
        expected[2 * unit_nbytes : 4 * unit_nbytes] = middle
        assert np.array_equal(read_units(tier, region, 0, 5), expected)
        assert np.array_equal(read_units(tier, region, 3, 1), expected[3 * unit_nbytes : 4 * unit_nbytes])

    def test_a_read_fills_its_slice_and_nothing_beside_it(self, tier: Tier) -> None:
        region = tier.allocate(_spec("slice", 3, 100))
        data = random_bytes(300)
        write_units(tier, region, 0, data)
        buffer = np.full(500, 0xEE, dtype=np.uint8)
        with lane(tier) as context:
            tier.read(region, 1, 2, buffer[150:350])
            context.record().wait()
        assert np.array_equal(buffer[150:350], data[100:])
        assert (buffer[:150] == 0xEE).all()
        assert (buffer[350:] == 0xEE).all()

    @pytest.mark.parametrize("unit_nbytes", UNIT_NBYTES)
    def test_single_units_are_gathered_to_adjoining_places(self, tier: Tier, unit_nbytes: int) -> None:
        region = tier.allocate(_spec("gathered", 5, unit_nbytes))
        data = random_bytes(4 * unit_nbytes)
        write_units(tier, region, 0, data)
        buffer = np.full(3 * unit_nbytes + 200, 0xEE, dtype=np.uint8)
        with lane(tier):
            tier.gather(region, np.array([1, 3, 4]), buffer[100:-100])
            gathered = buffer.copy()
        expected = [data[unit_nbytes : 2 * unit_nbytes], data[3 * unit_nbytes :], np.zeros(unit_nbytes, np.uint8)]
        assert np.array_equal(gathered[100:-100], np.concatenate(expected))
        assert (gathered[:100] == 0xEE).all()
        assert (gathered[-100:] == 0xEE).all()

    def test_a_written_buffer_may_be_used_again(self, tier: Tier) -> None:
        region = tier.allocate(_spec("reuse", 1, 4096))
        buffer = random_bytes(4096)
        written = buffer.copy()
        write_units(tier, region, 0, buffer)
        buffer[:] = 0
        assert np.array_equal(read_units(tier, region, 0, 1), written)

    def test_regions_do_not_share_bytes(self, tier: Tier) -> None:
        regions = [tier.allocate(_spec(f"region.{i}", 3, 1001)) for i in range(3)]
        for seed, region in enumerate(regions):
            write_units(tier, region, 0, random_bytes(3003, seed=seed))
        tier.free(regions[1])
        for seed in (0, 2):
            assert np.array_equal(read_units(tier, regions[seed], 0, 3), random_bytes(3003, seed=seed))

    def test_a_name_can_be_given_to_a_new_region_of_zeros(self, tier: Tier) -> None:
        region = tier.allocate(_spec("again", 2, 4096))
        write_units(tier, region, 0, random_bytes(8192))
        tier.free(region)
        assert not read_units(tier, tier.allocate(_spec("again", 2, 4096)), 0, 2).any()

    def test_threads_work_on_different_units_at_once(self, tier: Tier) -> None:
        unit_nbytes, rounds = 4097, 8
        region = tier.allocate(_spec("threads", NUM_THREADS * rounds, unit_nbytes))
        contexts = [tier.lane_context() for _ in range(NUM_THREADS)]
        barrier = threading.Barrier(NUM_THREADS, timeout=60)

        def work(thread: int) -> None:
            barrier.wait()
            with contexts[thread]:  # once for all its work, as a lane's thread does
                for unit in range(thread, region.spec.num_units, NUM_THREADS):
                    _round_trip(tier, region, contexts[thread], unit)

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(work, range(NUM_THREADS)))
        for context in contexts:
            context.close()
        expected = np.concatenate([random_bytes(unit_nbytes, seed=unit) for unit in range(region.spec.num_units)])
        assert np.array_equal(read_units(tier, region, 0, region.spec.num_units), expected)

    def test_the_budget_is_never_exceeded(self, tmp_path: Path) -> None:
        with _open(self.make_tier(tmp_path, 10_000)) as tier:
            tier.allocate(_spec("most", 3, 3000))
            with pytest.raises(TierError) as refused:
                tier.allocate(_spec("toomuch", 1, 1001))
            assert tier.label in str(refused.value)
            assert "10001" in str(refused.value), "the message tells the budget that would do"
            assert (tier.used_bytes, tier.peak_bytes) == (9000, 9000)
            tier.allocate(_spec("rest", 1, 1000))
            assert tier.used_bytes == tier.budget_bytes

    def test_bytes_in_use_are_counted(self, tier: Tier) -> None:
        first = tier.allocate(_spec("first", 3, 1000))
        second = tier.allocate(_spec("second", 2, 500))
        assert (tier.used_bytes, tier.peak_bytes) == (4000, 4000)
        tier.free(first)
        assert (tier.used_bytes, tier.peak_bytes) == (1000, 4000)
        tier.reserve(500, what="workspace")
        assert (tier.used_bytes, tier.peak_bytes) == (1500, 4000)
        tier.free(second)
        assert (tier.used_bytes, tier.peak_bytes) == (500, 4000)

    def test_a_reservation_counts_against_the_budget(self, tmp_path: Path) -> None:
        with _open(self.make_tier(tmp_path, 1000)) as tier:
            tier.reserve(600, what="workspace")
            with pytest.raises(TierError, match="1001"):
                tier.allocate(_spec("toomuch", 1, 401))
            with pytest.raises(TierError, match="workspace"):
                tier.reserve(401, what="workspace")
            assert tier.used_bytes == 600

    def test_what_the_machine_has_for_the_tier_is_a_number_of_bytes_or_not_known(self, tier: Tier) -> None:
        free = tier.free_bytes(tier.options)
        assert free is None or free > 0

    def test_closing_frees_everything_and_may_be_repeated(self, tmp_path: Path) -> None:
        with _open(self.make_tier(tmp_path, AMPLE_BYTES)) as tier:
            for i in range(3):
                write_units(tier, tier.allocate(_spec(f"left.{i}", 2, 4096)), 0, random_bytes(8192))
            tier.reserve(1000, what="workspace")
            tier.close()
            assert tier.used_bytes == 0
            tier.close()
            assert tier.used_bytes == 0

    def test_closing_leaves_no_file_handle_or_thread(self, tmp_path: Path) -> None:
        self._live_and_die(tmp_path / "first")  # what a library opens once and for all is open after this
        threads, handles = threading.active_count(), _open_handles()
        self._live_and_die(tmp_path / "second")
        assert threading.active_count() == threads
        assert _open_handles() == handles
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_a_tensor_shares_memory_with_reads_and_writes(self, tier: Tier) -> None:
        if tier.memory is None:
            pytest.skip("this tier's bytes can only be read and written")
        region = tier.allocate(_spec("tensor", 4, 333))
        data = random_bytes(4 * 333)
        write_units(tier, region, 0, data)
        tensor = tier.tensor(region, 1, 2)
        assert tensor.device.type == tier.torch_device.split(":")[0]
        assert np.array_equal(tensor.cpu().numpy(), data[333:999])
        with lane(tier) as context:
            tensor.fill_(7)
            context.record().wait()
        data[333:999] = 7
        assert np.array_equal(read_units(tier, region, 0, 4), data)

    @settings(
        max_examples=25,
        deadline=None,  # the first example of a tier may start a device
        # the folder is only a parent, each example makes its own; and the test is inherited on purpose
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(data=st.data())
    def test_any_sequence_of_reads_and_writes_behaves_like_an_array(self, tmp_path: Path, data: st.DataObject) -> None:
        unit_nbytes = data.draw(st.sampled_from(UNIT_NBYTES))
        steps = data.draw(st.lists(_steps(), max_size=12))
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        expected = np.zeros(NUM_UNITS * unit_nbytes, dtype=np.uint8)
        with _open(self.make_tier(folder, AMPLE_BYTES)) as tier:
            region = tier.allocate(_spec("model", NUM_UNITS, unit_nbytes))
            for action, first, count, seed in steps:
                window = expected[first * unit_nbytes : (first + count) * unit_nbytes]
                if action == "write":
                    window[:] = random_bytes(window.size, seed=seed)
                    write_units(tier, region, first, window.copy())
                assert np.array_equal(read_units(tier, region, first, count), window)
            assert np.array_equal(read_units(tier, region, 0, NUM_UNITS), expected)

    def _live_and_die(self, folder: Path) -> None:
        folder.mkdir()
        with _open(self.make_tier(folder, AMPLE_BYTES)) as tier:
            region = tier.allocate(_spec("short.lived", 4, 4096))
            write_units(tier, region, 0, random_bytes(4 * 4096))
            read_units(tier, region, 0, 4)


def _round_trip(tier: Tier, region: Region, context: LaneContext, unit: int) -> None:
    """context: entered."""
    data = random_bytes(region.spec.unit_nbytes, seed=unit)
    out = np.empty_like(data)
    tier.write(region, unit, 1, data)
    context.record().wait()
    tier.read(region, unit, 1, out)
    context.record().wait()
    assert np.array_equal(out, data)


def _spec(name: str, num_units: int, unit_nbytes: int) -> RegionSpec:
    return RegionSpec(name=name, num_units=num_units, unit_nbytes=unit_nbytes)


@contextmanager
def _open(tier: Tier) -> Iterator[Tier]:
    try:
        yield tier
    finally:
        tier.close()


def _open_handles() -> int:
    """Open file descriptors of this process; constant where the system does not tell."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@st.composite
def _steps(draw: st.DrawFn) -> Step:
    first = draw(st.integers(0, NUM_UNITS - 1))
    count = draw(st.integers(1, NUM_UNITS - first))
    return draw(st.sampled_from(("write", "read"))), first, count, draw(st.integers(0, 1000))
