"""The `lp` scheduler: what it chooses on machines of round numbers, and that the runtime never refuses it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

import pulp
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.hardware import Beside, HardwareProfile, Link, Processor
from flexflow_engine.abc.policy import Policy, WorkloadShape
from flexflow_engine.abc.prediction import Prediction, StepCosts
from flexflow_engine.abc.scheduler import PlanRequest
from flexflow_engine.abc.sizes import parse_size
from flexflow_engine.abc.tier import Tier
from flexflow_engine.errors import PluginError, PolicyError
from flexflow_engine.planning.plan import Codecs, Plan, Planner, describe_tiers
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.schedulers.lp import LPOptions, LPScheduler
from flexflow_plugins.schedulers.lp import solver as lp_solver
from flexflow_plugins.schedulers.lp.bound import least_seconds
from flexflow_plugins.schedulers.lp.job import as_admitted, job_parts
from flexflow_plugins.schedulers.lp.memory import MemoryNeeds
from flexflow_plugins.schedulers.lp.program import PricedPart, Program
from flexflow_plugins.schedulers.lp.shapes import BatchShape
from harness import MIB
from layouts import DEVICE_FAR, DEVICE_FAR_DISK, DEVICE_HOST_DISK, ISLAND_HOST_DISK, opt
from profiles import constant, link, processor, profile

WORKLOAD = WorkloadShape((8,) * 12, (5,) * 12)
SOLVERS = [name for name in lp_solver.SOLVERS if name in lp_solver.available()]


def planner(
    classes: Mapping[str, type[Tier]],
    budgets: Mapping[str, int],
    *,
    machine: HardwareProfile | None = None,
    workload: WorkloadShape = WORKLOAD,
) -> Planner:
    codec = NoneCodec()
    return Planner(
        model=opt(),
        codecs=Codecs(codec, codec, codec),
        workload=workload,
        tiers=describe_tiers(classes, budgets),
        hardware=lambda: machine or profile(),
    )


def choose(of: Planner, **options: object) -> Plan:
    return of.plan(LPScheduler(LPOptions(**options)))  # type: ignore[arg-type]  # as a recipe would


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("category", ["Continuous", "Integer"])
def test_two_links_end_together_and_the_budget_is_used_up(solver: str, category: str) -> None:
    """Weights take 10 s on each link alone, 30 % fit beside the processor: 35 % on either link, 3.5 s."""
    costs = StepCosts(
        always={"compute": 1.0},
        placed={("weights", "host"): {"host.read": 10.0}, ("weights", "disk"): {"disk.read": 10.0}},
    )
    program = Program(
        tiers=("gpu", "host", "disk"),
        needs=MemoryNeeds({"gpu": 2.0**30}, {("weights", "gpu"): {"gpu": 10 * 2.0**30}}),
        budgets={"gpu": 4 * 2.0**30},
        forbidden=frozenset(),
        solver=solver,
    )
    part = PricedPart(2.0, costs)
    found = program.fastest([part], category=category)
    assert found is not None
    weights = {tier: share for (tensor_class, tier), share in found.items() if tensor_class == "weights"}
    assert weights == pytest.approx({"gpu": 30, "host": 35, "disk": 35})
    assert part.seconds(found) == pytest.approx(2 * 3.5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_program_without_room_has_no_solution_and_prints_nothing(
    solver: str, capfd: pytest.CaptureFixture[str]
) -> None:
    program = Program(
        tiers=("gpu",),
        needs=MemoryNeeds({"gpu": 2.0 * MIB}, {}),
        budgets={"gpu": 1.0 * MIB},
        forbidden=frozenset(),
        solver=solver,
    )
    assert program.fastest([PricedPart(1.0, StepCosts(always={"compute": 1.0}, placed={}))], category="Integer") is None
    assert capfd.readouterr() == ("", "")


def test_without_a_solver_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulp, "listSolvers", lambda **_: ["GLPK_CMD"])
    with pytest.raises(PluginError, match="pip install highspy"):
        choose(planner(DEVICE_FAR, {"device": 64 * MIB, "far": 64 * MIB}))
    with pytest.raises(PluginError, match="pip install highspy"):
        LPScheduler.check_available()


@pytest.mark.parametrize("outcome", [pulp.PulpError("killed"), OSError("no such program"), pulp.LpStatusNotSolved])
def test_a_solver_that_is_there_and_does_not_run_is_told(
    monkeypatch: pytest.MonkeyPatch, outcome: Exception | int
) -> None:
    def solve(problem: pulp.LpProblem, solver: object) -> int:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    LPScheduler.check_available()
    monkeypatch.setattr(pulp.LpProblem, "solve", solve)
    with pytest.raises(PluginError, match=f"the solver {lp_solver.find_solver()} "):
        LPScheduler.check_available()


def test_with_room_for_everything_nothing_moves() -> None:
    plan = choose(planner(DEVICE_FAR_DISK, dict.fromkeys(DEVICE_FAR_DISK, 64 * MIB)))
    for tensor_class in ("weights", "kv_cache", "activations"):
        assert plan.policy.placement(tensor_class).fraction("device") == 1, plan.policy


@pytest.mark.parametrize(("room", "least"), [(10.0, 1.0), (5.0, 3.0)])
def test_what_moves_nothing_has_seconds_of_its_own(room: float, least: float) -> None:
    """Weights of 10 bytes, half of which take a second on the link; what is faster alone never counts beside it."""
    costs = StepCosts(always={"compute": 3.0}, placed={("weights", "far"): {"far.read": 2.0}}, unmoved={"compute": 1.0})
    part = PricedPart(2.0, costs)
    assert part.seconds({}) == 2.0
    assert part.seconds({("weights", "far"): 1.0}) == 6.0
    needs = MemoryNeeds({"device": 0.0, "far": 0.0}, {("weights", "device"): {"device": 10.0, "far": 0.0}})
    program = Program(
        tiers=("device", "far"), needs=needs, budgets={"device": room}, forbidden=frozenset(), solver=SOLVERS[0]
    )
    assert least_seconds(program, [part]) == 2 * least


def test_what_does_not_fit_goes_to_the_faster_link() -> None:
    machine = profile(links={"throttled": link(100e6), "zarr": link(1e6)})
    tight = planner(DEVICE_FAR_DISK, {"device": 600_000, "far": 64 * MIB, "disk": 64 * MIB}, machine=machine)
    weights = choose(tight).policy.weights
    assert weights.fraction("far") > 0
    assert weights.fraction("disk") == 0


def two_links(far_rate: float) -> Planner:
    """A fast processor, of which the disk's link takes its part, and little memory."""
    fast = Processor(
        matmul_flops_per_s={"float32": constant(1e9)},
        prefill_attention_flops_per_s=constant(1e9),
        decode_attention_bytes_per_s={"none": constant(1e9)},
        codecs={},
        memory_bytes_per_s=1e9,
        task_s=1e-4,
    )
    disk = Link(bytes_per_s=8e6, latency_s=0.0, beside=Beside(processors=0.6), leaves_processors=0.6)
    machine = profile(links={"throttled": link(far_rate), "zarr": disk}, cpu=fast)
    return planner(DEVICE_FAR_DISK, {"device": 800_000, "far": 64 * MIB, "disk": 64 * MIB}, machine=machine)


@pytest.mark.parametrize(("far_rate", "used"), [(2e6, ["disk"]), (4e6, ["far", "disk"])])
def test_a_slow_link_is_left_out_where_waiting_for_it_takes_longer(far_rate: float, used: list[str]) -> None:
    """Programs would have it help the fast one with a few percent; the clock decides."""
    best, *others = candidates(two_links(far_rate))
    assert [tier for tier in ("far", "disk") if best.weights.fraction(tier)] == used
    assert any(policy.weights.fraction("far") and policy.weights.fraction("disk") for policy in (best, *others))


class Told(LPScheduler):
    """Goes by seconds that it is told, whatever the clock would say."""

    def __init__(self, seconds: Callable[[Policy], float]) -> None:
        super().__init__(LPOptions())
        self._seconds = seconds

    def choose(self, request: PlanRequest) -> Policy:
        def predict(policy: Policy) -> Prediction:
            return replace(request.predict(policy), prefill_s=self._seconds(policy), decode_s=0.0)

        return super().choose(replace(request, predict=predict))


@pytest.mark.parametrize(("alone", "links"), [(1.02, 1), (1.1, 2)])
def test_of_policies_that_are_alike_the_host_runs_the_one_on_fewer_links(alone: float, links: int) -> None:
    """Both links together take a second, and either alone this much longer."""

    def used(policy: Policy) -> int:
        return sum(policy.weights.fraction(tier) > 0 for tier in ("far", "disk"))

    told = Told(lambda policy: 1.0 if used(policy) == 2 else alone)
    assert used(two_links(4e6).plan(told).policy) == links


@pytest.mark.parametrize(("larger", "taken"), [(1.02, True), (1.1, False)])
def test_of_policies_that_are_alike_the_host_runs_the_one_with_larger_pages(larger: float, taken: bool) -> None:
    told = Told(lambda policy: 1.0 if policy.kv_page_tokens == 1 else larger)
    assert (two_links(4e6).plan(told).policy.kv_page_tokens > 1) == taken


def test_a_gpu_batch_decodes_until_its_longest_sequence_ends() -> None:
    """One sequence of 100 new tokens and 99 of one, ten a GPU batch: one of ten rounds decodes."""
    lengths = as_admitted(WorkloadShape((8,) * 100, (100,) + (1,) * 99))
    shape = BatchShape(gpu_batch_size=10, num_gpu_batches=1, kv_page_tokens=16, attention="device")
    steps = defaultdict[str, float](float)
    for part in job_parts(shape, lengths):
        steps[part.shape.phase] += part.steps
    assert steps == pytest.approx({"prefill": 10, "decode": 99})


def test_options_are_held_fast() -> None:
    everything = planner(DEVICE_FAR_DISK, dict.fromkeys(DEVICE_FAR_DISK, 64 * MIB))
    policy = choose(everything, gpu_batch_size=3, num_gpu_batches=2, attention="device").policy
    assert (policy.gpu_batch_size, policy.num_gpu_batches, policy.attention) == (3, 2, "device")


def test_attention_runs_on_the_host_if_the_link_is_slow_and_on_the_device_if_the_host_is() -> None:
    """No room for the cache on the device."""
    long, budgets = WorkloadShape((60,) * 4, (3,) * 4), {"island": 1_200_000, "host": 64 * MIB, "disk": 64 * MIB}
    slow_link = profile(links={"pinned": link(1e4), "zarr": link(1e3)})
    fast_link = profile(links={"pinned": link(1e9), "zarr": link(1e3)})
    slow_host = replace(fast_link, processors={**fast_link.processors, "cpu": processor(task_s=10.0)})
    offering, also = (
        planner(ISLAND_HOST_DISK, budgets, machine=machine, workload=long) for machine in (slow_link, slow_host)
    )
    unlimited = tuple(replace(tier, placeable=tier.name != "host") for tier in offering.tiers)
    without = replace(offering, tiers=unlimited)
    places = [choose(of, gpu_batch_size=2).policy.attention for of in (offering, also, without)]
    assert places == ["host", "device", "device"], "it takes memory that the recipe offers"


def test_sizes_must_be_more_than_0() -> None:
    (problem,) = LPScheduler(LPOptions(gpu_batch_size=0)).problems(("device",))
    assert problem == "`gpu_batch_size` must be more than 0, not 0"


def test_the_same_request_gets_the_same_candidates_whatever_order_mappings_have() -> None:
    machine = profile(links={"throttled": link(20e6, 1e-4), "zarr": link(5e6, 1e-3)})
    backwards = replace(machine, links=dict(sorted(machine.links.items(), reverse=True)))
    budgets = {"device": 1 * MIB, "far": 1 * MIB, "disk": 64 * MIB}
    one, two, other = (
        candidates(planner(DEVICE_FAR_DISK, budgets, machine=each)) for each in (machine, machine, backwards)
    )
    assert one == two == other
    assert len(one) > 1


def candidates(of: Planner) -> list[Policy]:
    return [candidate.policy for candidate in of.candidates(LPScheduler(LPOptions()))]


def test_the_chosen_policy_comes_first_and_the_runners_up_lose() -> None:
    of = planner(DEVICE_FAR_DISK, {"device": 1 * MIB, "far": 1 * MIB, "disk": 64 * MIB})
    chosen, *others = (candidate.prediction.seconds for candidate in of.candidates(LPScheduler(LPOptions())))
    assert others == sorted(others)
    assert chosen <= 1.03 * others[0]
    assert choose(of).policy == candidates(of)[0]


def test_a_shape_whose_shares_do_not_fit_is_tried_with_classes_kept_off_the_first_tier() -> None:
    """Slots hold the largest layer's share, of which the linear formula knows the mean."""
    policy = choose(
        planner(DEVICE_FAR, {"device": 1_350_000, "far": 64 * MIB}), gpu_batch_size=12, num_gpu_batches=1
    ).policy
    assert policy.weights.fraction("device") == 0
    assert policy.kv_cache.fraction("device") == 1


@pytest.mark.parametrize("classes", [DEVICE_FAR, DEVICE_HOST_DISK, ISLAND_HOST_DISK], ids="-".join)
@given(data=st.data())
@settings(max_examples=12, phases=[Phase.generate])
def test_a_policy_fits_or_the_smallest_budget_that_is_named_would_do(
    classes: Mapping[str, type[Tier]], data: st.DataObject
) -> None:
    budgets = {name: data.draw(st.integers(100_000, 3 * MIB), name) for name in classes}
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=1, max_size=6), "lengths")
    job = WorkloadShape(*zip(*lengths, strict=True))
    try:
        plan = choose(planner(classes, budgets, workload=job))
    except PolicyError as error:
        enough = budgets | smallest_budgets(error)
        plan = choose(planner(classes, enough, workload=job))
    assert not plan.memory.exceeded


def smallest_budgets(error: PolicyError) -> dict[str, int]:
    """The first of the ways out that the message tells."""
    (_, told) = error.fix.split(": ")
    return {tier: parse_size(size) for tier, size in re.findall(r"(\w+) (\d+\w+)", told.split(" or ")[0])}
