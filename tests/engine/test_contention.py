"""What lanes leave of one another's rates, and the closed form of it against the virtual clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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


def on_the_clock(contention: Contention, works: Mapping[str, float]) -> float:
    """Seconds until lanes that begin together have done their work."""
    tasks = [task(lane, lane) for lane in works]
    executor = VirtualDataflow(
        dict.fromkeys(works, 1), lambda one: Work(0, works[one.key.rpartition("/")[2]]), contention.left
    )
    executor.submit(graph(tasks, []), at=0.0)
    executor.wait(0)
    return executor.now


def closed_form(contention: Contention, works: Mapping[str, float], lanes: Iterable[str] = ()) -> float:
    """lanes: further ones, which have work under other placements."""
    return max(contention.bounds(works, frozenset({*works, *lanes})).values())


@pytest.mark.parametrize(("compute_s", "read_s"), [(4.0, 1.0), (1.0, 4.0), (3.0, 3.0), (2.0, 3.0), (3.0, 2.0)])
def test_two_lanes_take_what_the_clock_says(compute_s: float, read_s: float) -> None:
    """Beside each other compute keeps 0.6 of its rate and the disk 0.9."""
    contention, works = Contention(TIERS, machine()), {COMPUTE_LANE: compute_s, "disk.read": read_s}
    assert closed_form(contention, works, ["disk.write", "far.read"]) == pytest.approx(on_the_clock(contention, works))


@pytest.mark.parametrize("compute_s", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("read_s", [(10.0, 1.0), (4.0, 4.0)])
def test_more_lanes_take_about_what_the_clock_says(compute_s: float, read_s: tuple[float, float]) -> None:
    contention = Contention(TIERS, machine())
    works = {COMPUTE_LANE: compute_s, "disk.read": read_s[0], "far.read": read_s[1]}
    ratio = closed_form(contention, works) / on_the_clock(contention, works)
    assert 0.75 < ratio < 1.1


def test_an_idle_lane_bounds_nothing_however_much_others_take_from_it() -> None:
    """What keeps a tenth beside others could take turns with each of them."""
    tight = Link(
        bytes_per_s=1e6, latency_s=0.0, beside=Beside(reverse=0.1, links=0.1, processors=0.1), leaves_processors=0.9
    )
    contention, works = Contention(TIERS, machine(disk=tight)), {COMPUTE_LANE: 10.0, "disk.read": 5.0, "far.read": 10.0}
    alone = contention.bounds(works, frozenset(works))
    with_idle = contention.bounds(works, frozenset({*works, "disk.write"}))
    assert max(with_idle.values()) == max(alone.values())
    assert contention.bounds({"disk.read": 5.0}, frozenset({"disk.read", COMPUTE_LANE}))[COMPUTE_LANE] <= 5.0


def test_processors_lose_to_links_and_not_to_each_other() -> None:
    works = {COMPUTE_LANE: 1.0, ATTENTION_LANE: 2.0, "turns": 3.0}
    contention = Contention(TIERS, machine())
    assert contention.bounds(works, frozenset(works)) == works
    beside = contention.bounds({"disk.read": 9.0}, frozenset({*works, "disk.read"}))
    assert {lane: beside[lane] for lane in works} == pytest.approx(dict.fromkeys(works, 9.0 * 0.4 / 0.9))
    loses = contention.bounds(works, frozenset({*works, "disk.read"}))
    assert loses["disk.read beside compute"] == pytest.approx(1.0 * 0.1 / 0.6)
    assert loses["disk.read beside attention"] == pytest.approx(2.0 * 0.1 / 0.6)
    assert "disk.read beside turns" not in loses


def test_a_machine_whose_lanes_leave_each_other_alone_has_nothing_added() -> None:
    works = {COMPUTE_LANE: 1.0, "disk.read": 2.0, "far.write": 3.0}
    lanes = frozenset({*works, "disk.write"})
    assert Contention(TIERS, machine(link(), link())).bounds(works, lanes) == works


def test_bounds_of_shares_add_up_to_those_of_the_whole() -> None:
    """What linear programs rest on."""
    contention, lanes = Contention(TIERS, machine()), frozenset({COMPUTE_LANE, "disk.read", "far.read", "far.write"})
    one, other = {COMPUTE_LANE: 3.0, "far.write": 1.0}, {"disk.read": 2.0, "far.read": 1.0}
    parts = [contention.bounds(works, lanes) for works in (one, other)]
    summed = {lane: sum(part.get(lane, 0.0) for part in parts) for part in parts for lane in part}
    assert summed == pytest.approx(contention.bounds({**one, **other}, lanes))


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
    assert placed["disk.read"] == placed["disk.read beside compute"] == pytest.approx(read_s)
    assert crowded.always["disk.read beside compute"] == pytest.approx(alone.always["compute"] * 0.1 / 0.6)
    assert "compute" not in alone.placed["weights", "disk"]
