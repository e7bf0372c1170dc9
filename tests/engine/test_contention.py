"""What lanes leave of one another's rates, and the closed form of it against the virtual clock."""

from __future__ import annotations

import pytest

from flexflow_engine.abc.hardware import Beside, HardwareProfile, Link
from flexflow_engine.abc.prediction import StepShape
from flexflow_engine.graph.task import ATTENTION_LANE, COMPUTE_LANE
from flexflow_engine.placement.pages import paged_tensors
from flexflow_engine.planning.clock import VirtualDataflow
from flexflow_engine.planning.contention import Contention
from flexflow_engine.planning.cost import Work
from flexflow_engine.planning.plan import describe_tiers
from flexflow_engine.planning.step_costs import StepCostModel
from flexflow_plugins.codecs.none import NoneCodec
from layouts import DEVICE_FAR_DISK, opt
from profiles import link, profile
from small_graphs import graph, task

TIERS = describe_tiers(DEVICE_FAR_DISK, dict.fromkeys(DEVICE_FAR_DISK, 2**30))
BESIDE = Beside(reverse=0.5, links=0.8, processors=0.9)
CROWDED = Link(bytes_per_s=1e6, latency_s=0.0, beside=BESIDE, leaves_processors=0.6)


def machine(disk: Link = CROWDED, far: Link = CROWDED) -> HardwareProfile:
    return profile(links={"zarr": disk, "throttled": far})


@pytest.mark.parametrize(
    ("lane", "working", "left"),
    [
        ("disk.read", {"disk.read", "tokens"}, 1.0),
        ("disk.read", {"disk.write"}, 0.5),
        ("disk.read", {"far.write"}, 0.8),
        ("disk.read", {"compute"}, 0.9),
        ("disk.read", {"disk.write", "far.read", "far.write", "compute", "attention"}, 0.5 * 0.8 * 0.9),
        ("compute", {"tokens"}, 1.0),
        ("compute", {"disk.read"}, 0.6),
        ("compute", {"disk.read", "far.write"}, 0.36),
        ("compute", {"attention"}, 0.5),
    ],
)
def test_each_kind_of_neighbour_takes_its_part(lane: str, working: set[str], left: float) -> None:
    assert Contention(TIERS, machine()).left(lane, frozenset(working)) == pytest.approx(left)


@pytest.mark.parametrize(("compute_s", "read_s"), [(4.0, 1.0), (1.0, 4.0), (3.0, 3.0), (2.0, 3.0), (3.0, 2.0)])
def test_two_lanes_take_what_the_clock_says(compute_s: float, read_s: float) -> None:
    """Beside each other compute keeps 0.6 of its rate and the disk 0.9."""
    contention = Contention(TIERS, machine())
    works = {COMPUTE_LANE: compute_s, "disk.read": read_s}
    tasks = {lane: task(lane, lane) for lane in works}
    executor = VirtualDataflow(
        dict.fromkeys(works, 1), lambda t: Work(0, works[t.key.rpartition("/")[2]]), contention.left
    )
    executor.submit(graph(list(tasks.values()), []), at=0.0)
    executor.wait(0)
    assert max(contention.burdened(works, frozenset(works)).values()) == pytest.approx(executor.now)


def test_an_idle_lane_is_never_given_more_than_the_other_ones_seconds() -> None:
    """Two that keep a tenth beside each other could take turns."""
    tight = Link(bytes_per_s=1e6, latency_s=0.0, beside=Beside(processors=0.1), leaves_processors=0.1)
    burdened = Contention(TIERS, machine(disk=tight)).burdened({"disk.read": 5.0}, frozenset({COMPUTE_LANE}))
    assert burdened == {"disk.read": 5.0, COMPUTE_LANE: 5.0}


def test_processors_lose_to_links_and_not_to_each_other() -> None:
    works = {COMPUTE_LANE: 1.0, ATTENTION_LANE: 2.0, "turns": 3.0}
    contention = Contention(TIERS, machine())
    assert contention.burdened(works, frozenset(works)) == works
    beside = contention.burdened({"disk.read": 9.0}, frozenset(works))
    assert {lane: beside[lane] for lane in works} == pytest.approx(dict.fromkeys(works, 9.0 * 0.4 / 0.9))
    loses = contention.burdened(works, frozenset({"disk.read"}))["disk.read"]
    assert loses == pytest.approx((1.0 + 2.0) * 0.1 / 0.6)


def test_a_machine_whose_lanes_leave_each_other_alone_has_nothing_added() -> None:
    works = {COMPUTE_LANE: 1.0, "disk.read": 2.0, "far.write": 3.0}
    lanes = frozenset({*works, "disk.write"})
    assert Contention(TIERS, machine(link(), link())).burdened(works, lanes) == works


def test_weights_on_a_tier_cost_compute_what_reading_them_takes() -> None:
    def costs(of: HardwareProfile) -> StepCostModel:
        tensors = paged_tensors(opt(), NoneCodec(), NoneCodec())
        return StepCostModel(model=opt(), tensors=tensors, kv_codec=NoneCodec(), tiers=TIERS, profile=of)

    step = StepShape(
        phase="decode", gpu_batch_size=2, num_gpu_batches=2, context=8, attention="device", kv_page_tokens=4
    )
    crowded, alone = costs(machine()).costs(step), costs(machine(link(), link())).costs(step)
    read_s = alone.placed["weights", "disk"]["disk.read"]
    placed = crowded.placed["weights", "disk"]
    assert placed["compute"] == pytest.approx(read_s * 0.4 / 0.9)
    assert placed["disk.write"] == pytest.approx(read_s * 0.5 / 0.5)
    assert crowded.always["disk.read"] == pytest.approx(alone.always["compute"] * 0.1 / 0.6)
    assert "compute" not in alone.placed["weights", "disk"]
