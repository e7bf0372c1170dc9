"""A plan: the policy that the scheduler chose, its layout and its memory table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import HardwareProfile
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.policy import MemoryTable, Placement, Policy, TierDescription, WorkloadShape
from flexflow_engine.abc.prediction import Prediction
from flexflow_engine.abc.scheduler import Candidate, PlanRequest, Scheduler
from flexflow_engine.abc.sizes import format_size, rounded_down, rounded_up
from flexflow_engine.abc.tier import HOST, Tier
from flexflow_engine.declared.policies import check_candidates, check_policy
from flexflow_engine.errors import PolicyError
from flexflow_engine.placement.attention import attention_places
from flexflow_engine.placement.laying_out import make_layout
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.memory import memory_table
from flexflow_engine.placement.pages import PagedTensor, paged_tensors
from flexflow_engine.placement.reach import is_staged
from flexflow_engine.placement.weights import WeightLayout, place_weights
from flexflow_engine.planning.clock import VirtualDataflow, VirtualExecutor
from flexflow_engine.planning.predict import Predictor
from flexflow_engine.planning.step_costs import StepCostModel

TOLD_LINES = 3
"""Of a tier's memory, in an error: the largest."""


@dataclass(frozen=True, slots=True)
class Codecs:
    """The codecs of a run. Small parameters are never encoded."""

    weights: Codec
    """Of matrices; its `for_table` is that of the embedding table."""
    kv_cache: Codec
    small: Codec


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do. It may not fit: see `require_fit`."""

    policy: Policy
    layout: Layout
    memory: MemoryTable

    def with_exact_budget(self, tier: str) -> Plan:
        """The plan with a tier's budget set to what lies there: for a tier that no recipe names."""
        budget = self.memory.peak_bytes(tier)
        tiers = tuple(replace(t, budget_bytes=budget) if t.name == tier else t for t in self.layout.tiers)
        memory = MemoryTable(self.memory.lines, {**self.memory.budgets, tier: budget})
        return Plan(self.policy, replace(self.layout, tiers=tiers), memory)

    def require_fit(self) -> None:
        """Raise PolicyError if a budget is exceeded: what does not fit, and the smallest budgets that would do."""
        if not self.memory.exceeded:
            return
        excess = [self._excess(tier) for tier in self.memory.exceeded]
        needs = ", ".join(f"{tier} {rounded_up(self.memory.peak_bytes(tier))}" for tier in self.memory.exceeded)
        raise PolicyError(
            f"the policy does not fit: {'; '.join(excess)}",
            where="tiers",
            fix=f"the smallest budgets that would do: {needs}; or place less there, or use smaller GPU batches",
        )

    def _excess(self, tier: str) -> str:
        lines = sorted((x for x in self.memory.lines if x.tier == tier), key=lambda x: -x.nbytes)
        largest = ", ".join(f"{line.what} {format_size(line.nbytes)}" for line in lines[:TOLD_LINES])
        peak, budget = self.memory.peak_bytes(tier), self.memory.budgets[tier]
        return f"{tier} needs {rounded_up(peak)} (the most for {largest}) and has {rounded_down(budget)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """A job, whose policy is still open."""

    model: Model
    codecs: Codecs
    workload: WorkloadShape
    tiers: tuple[TierDescription, ...]
    hardware: Callable[[], HardwareProfile]
    """Asked by schedulers that plan by it, and for predictions. Raises HardwareError where nothing is known of the
    machine."""
    _predictions: dict[tuple[Policy, type[VirtualExecutor]], Prediction] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Of policies already asked about: a scheduler's choice is shown and compared with the run."""
    _placed_weights: dict[Placement, WeightLayout] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Of placements already asked about: a scheduler asks for many policies that differ in everything else."""

    def plan(self, scheduler: Scheduler) -> Plan:
        """Ask the scheduler, and lay its policy out. Raises PolicyError when it finds none, or one that
        makes no sense.
        """
        policy = scheduler.choose(self._request(scheduler))
        return self.plan_of(check_policy(policy, self.tiers, scheduler.name))

    def candidates(self, scheduler: Scheduler) -> tuple[Candidate, ...]:
        """The policies that the scheduler weighed, the chosen one first."""
        return check_candidates(scheduler.candidates(self._request(scheduler)), self.tiers, scheduler.name)

    def plan_of(self, policy: Policy) -> Plan:
        """A policy laid out."""
        layout = self._lay_out(policy, self._tensors())
        return Plan(layout.policy, layout, memory_table(layout))

    def memory(self, policy: Policy) -> MemoryTable:
        """The runtime's memory formula."""
        return memory_table(self._lay_out(policy, self._tensors()))

    def step_costs(self) -> StepCostModel:
        """What steps take in closed form. Raises HardwareError where the profile lacks a link or a processor."""
        return self._step_costs(self._tensors())

    def predict(self, layout: Layout, executor: type[VirtualExecutor] = VirtualDataflow) -> Prediction:
        """What the job takes with this layout, one of its own."""
        key = layout.policy, executor
        if key not in self._predictions:
            self._predictions[key] = self.predictor(executor).predict(layout, self.workload)
        return self._predictions[key]

    def predictor(self, executor: type[VirtualExecutor] = VirtualDataflow) -> Predictor:
        return Predictor(
            model=self.model,
            kv_codec=self.codecs.kv_cache,
            profile=self.hardware(),
            executor=executor,
        )

    def _request(self, scheduler: Scheduler) -> PlanRequest:
        tensors = self._tensors()
        step_costs = cache(lambda: self._step_costs(tensors))

        def lay_out(policy: Policy) -> Layout:
            return self._lay_out(check_policy(policy, self.tiers, scheduler.name), tensors)

        return PlanRequest(
            config=self.model.config,
            dtype=self.model.dtype,
            workload=self.workload,
            tiers=self.tiers,
            attention_places=attention_places(self.tiers),
            memory_table=lambda policy: memory_table(lay_out(policy)),
            hardware=self.hardware,
            step_costs=lambda shape: step_costs().costs(shape),
            predict=lambda policy: self.predict(lay_out(policy)),
        )

    def _step_costs(self, tensors: tuple[PagedTensor, ...]) -> StepCostModel:
        return StepCostModel(
            model=self.model,
            tensors=tensors,
            kv_codec=self.codecs.kv_cache,
            tiers=self.tiers,
            profile=self.hardware(),
        )

    def _tensors(self) -> tuple[PagedTensor, ...]:
        return paged_tensors(self.model, self.codecs.weights, self.codecs.small)

    def _lay_out(self, policy: Policy, tensors: tuple[PagedTensor, ...]) -> Layout:
        if policy.weights not in self._placed_weights:
            self._placed_weights[policy.weights] = place_weights(self.model, tensors, policy.weights)
        return make_layout(
            model=self.model,
            tensors=tensors,
            kv_codec=self.codecs.kv_cache,
            policy=_without_empty_rows(policy, len(self.workload.prompt_tokens)),
            workload=self.workload,
            tiers=self.tiers,
            weights=self._placed_weights[policy.weights],
        )


def describe_tiers(classes: Mapping[str, type[Tier]], budgets: Mapping[str, int]) -> tuple[TierDescription, ...]:
    """The tiers as schedulers and layouts see them, in the given order."""
    return tuple(
        TierDescription(
            name=name,
            plugin=tier.name,
            budget_bytes=budgets[name],
            memory=tier.memory,
            direct=tier.direct,
            reads_store=tier.reads_store,
            read_concurrency=tier.read_concurrency,
            write_concurrency=tier.write_concurrency,
        )
        for name, tier in classes.items()
    )


def needs_staging(classes: Mapping[str, type[Tier]]) -> bool:
    """Whether bytes must pass through host memory and no tier of the recipe is in it."""
    device, *others = (tier.memory for tier in classes.values())
    return HOST not in others and any(is_staged(device, other) for other in others)


def _without_empty_rows(policy: Policy, num_prompts: int) -> Policy:
    """The policy with no more rows than there are prompts: memory for a row is taken whether it is used or not."""
    gpu_batch_size = min(policy.gpu_batch_size, num_prompts)
    num_gpu_batches = min(policy.num_gpu_batches, -(-num_prompts // gpu_batch_size))
    return replace(policy, gpu_batch_size=gpu_batch_size, num_gpu_batches=num_gpu_batches)
