"""Which batch shapes are solved, and which policies come out of them.

    every shape         a lower bound of the job's seconds, without a solver
    best bounds first   the linear program, until no bound is near the best solutions any more
    the best few        whole percentages, checked with the runtime's memory formula and corrected by what it says
    the very best       once more without each of the slower tiers that it uses, less spread, with larger pages

Nothing depends on the clock or on the order of mappings: shapes are compared by seconds, then by their position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from flexflow_engine.abc.policy import TENSOR_CLASSES, Policy, TensorClass
from flexflow_engine.abc.scheduler import PlanRequest
from flexflow_plugins.schedulers.lp.bound import least_seconds
from flexflow_plugins.schedulers.lp.job import as_admitted, job_parts
from flexflow_plugins.schedulers.lp.memory import MemoryModel, Share, forbidden, make_policy, placeable
from flexflow_plugins.schedulers.lp.program import CORRECTIONS, PricedPart, Program
from flexflow_plugins.schedulers.lp.refusal import SmallPolicy, small_policies
from flexflow_plugins.schedulers.lp.shapes import KV_PAGE_TOKENS, BatchShape, Choices

FINALISTS = 4
"""Shapes that become policies, no two alike but for their pages: so many simulations are a matter of seconds."""
MOVED_WHOLE: tuple[tuple[TensorClass, ...], ...] = (("weights",), ("kv_cache",), ("weights", "kv_cache"))
"""Classes that are kept off the first tier where no policy is found otherwise."""
MARGIN = 1.1
"""Shapes whose bound is worse than so many times the last finalist's seconds are not solved; nor are simpler
policies simulated whose program takes more than so many times what the best one was simulated to take."""


@dataclass(frozen=True, slots=True)
class _Solved:
    seconds: float
    position: int
    shape: BatchShape


@dataclass(frozen=True, slots=True)
class Found:
    """A policy and the job's seconds by the program that it solves."""

    seconds: float
    policy: Policy


def shares_of(policy: Policy) -> list[Share]:
    """What lies where, in a fixed order."""
    return [(c, tier) for c in TENSOR_CLASSES for tier, percent in policy.placement(c).shares if percent]


def _shape_of(policy: Policy) -> BatchShape:
    return BatchShape(
        gpu_batch_size=policy.gpu_batch_size,
        num_gpu_batches=policy.num_gpu_batches,
        kv_page_tokens=policy.kv_page_tokens,
        attention=policy.attention,
    )


class Search:
    """For one request. Changing: what the memory model and `_parts` keep of questions already asked."""

    def __init__(self, request: PlanRequest, choices: Choices, solver: str) -> None:
        self._request, self._choices, self._solver = request, choices, solver
        self._memory = MemoryModel(request, choices.sizes()[-1])
        self._lengths = as_admitted(request.workload)
        self._parts: dict[BatchShape, tuple[PricedPart, ...]] = {}
        self._budgets = {tier.name: float(tier.budget_bytes) for tier in request.tiers if tier.placeable}

    def policies(self) -> list[Policy]:
        """Policies that fit, of the shapes that promise most, the most promising first; empty where none was found."""
        return [found.policy for found in self._found((self.program(shape), shape) for shape in self._best_shapes())]

    def with_fewer_links(self, policy: Policy) -> list[Found]:
        """Of the same shape, for each tier but the first that it uses, the best policy that leaves that one out. A
        program gains by spreading over all links so that they end together; tasks that wait for the slowest may lose.
        """
        slower = [tier for _, tier in shares_of(policy) if tier != self._request.tiers[0].name]
        return self._without(
            policy, [frozenset((moved, tier) for moved in TENSOR_CLASSES) for tier in dict.fromkeys(slower)]
        )

    def less_spread(self, policy: Policy) -> list[Found]:
        """Of the same shape, for each tier that a class shares with others, the best policy that keeps it off that one.
        What lies in two places is moved by more tasks.
        """
        shares = shares_of(policy)
        spread = [share for share in shares if sum(other[0] == share[0] for other in shares) > 1]
        return self._without(policy, [frozenset({share}) for share in spread])

    def larger_pages(self, policy: Policy) -> list[Found]:
        """The best policies whose cache has larger pages, which fill less often, with classes on the same tiers."""
        kept, shape = frozenset(shares_of(policy)), _shape_of(policy)
        larger = (replace(shape, kv_page_tokens=n) for n in KV_PAGE_TOKENS if n > shape.kv_page_tokens)
        others = {(c, tier) for c in TENSOR_CLASSES for tier in placeable(self._request)} - kept
        return self._found((self.program(each).without(others), each) for each in larger)

    def _without(self, policy: Policy, left_out: Sequence[frozenset[Share]]) -> list[Found]:
        """For each of these shares the best policy of the same shape that does without them, where one is left."""
        shape = _shape_of(policy)
        program = self.program(shape)
        return self._found((program.without(shares), shape) for shares in left_out)

    def _found(self, programs: Iterable[tuple[Program, BatchShape]]) -> list[Found]:
        """The best policies of these, where there is one, in their order."""
        found = (self._fastest(program, shape) for program, shape in programs)
        return [one for one in found if one is not None]

    def small_policies(self) -> list[SmallPolicy]:
        """The policies that need least memory, whether they fit or not."""
        shapes = list(self._choices.smallest())
        return [small for shape in shapes for small in small_policies(self._request, self.program(shape), shape)]

    def _fastest(self, program: Program, shape: BatchShape) -> Found | None:
        """The best policy of a shape in whole percent; None where there is none that fits. A class that lies in part on
        the first tier may need slots as large as one that lies elsewhere whole: it is tried there, too.
        """
        found = self._fitting(program, shape)
        if found is not None:
            return found
        near = program.tiers[0]
        elsewhere = (
            self._fitting(program.without((moved, near) for moved in classes), shape) for classes in MOVED_WHOLE
        )
        return min((one for one in elsewhere if one is not None), key=lambda one: one.seconds, default=None)

    def _fitting(self, program: Program, shape: BatchShape) -> Found | None:
        """The best policy that comes out of correcting the linear memory formula by what the runtime's says."""
        parts, best = self._priced(shape), None
        for _ in range(1 + CORRECTIONS):
            percent = program.fastest(parts, category="Integer")
            if percent is None:
                break
            policy = make_policy(shape, percent, program.tiers)
            table = self._request.memory_table(policy)
            seconds = sum(part.seconds(percent) for part in parts)
            if not table.exceeded and (best is None or seconds < best.seconds):
                best = Found(seconds, policy)
            corrected = program.corrected(percent, table, self._budgets)
            if corrected == program:
                break
            program = corrected
        return best

    def program(self, shape: BatchShape) -> Program:
        tiers = placeable(self._request)
        return Program(
            tiers=tiers,
            needs=self._memory.needs(shape),
            budgets=self._budgets,
            forbidden=forbidden(shape, tiers),
            solver=self._solver,
        )

    def _best_shapes(self) -> list[BatchShape]:
        """Those of the least seconds; shares are real numbers here."""
        best: list[_Solved] = []
        for bound, position, shape in self._by_bound():
            if len(best) == FINALISTS and bound > MARGIN * best[-1].seconds:
                break
            parts = self._priced(shape)
            percent = self.program(shape).fastest(parts, category="Continuous")
            if percent is not None:
                best = _leaders([*best, _Solved(sum(part.seconds(percent) for part in parts), position, shape)])
        return [solved.shape for solved in best]

    def _by_bound(self) -> list[tuple[float, int, BatchShape]]:
        bounds = (
            (least_seconds(self.program(shape), self._priced(shape)), position, shape)
            for position, shape in enumerate(self._choices.shapes())
        )
        return sorted(bounds, key=lambda x: x[:2])

    def _priced(self, shape: BatchShape) -> tuple[PricedPart, ...]:
        if shape not in self._parts:
            self._parts[shape] = tuple(
                PricedPart(part.steps, self._request.step_costs(part.shape)) for part in job_parts(shape, self._lengths)
            )
        return self._parts[shape]


def _leaders(solved: list[_Solved]) -> list[_Solved]:
    """The fastest, in order; of shapes that differ in nothing but their pages the faster one."""
    leaders: dict[BatchShape, _Solved] = {}
    for one in sorted(solved, key=lambda one: (round(one.seconds, 6), one.position)):
        leaders.setdefault(replace(one.shape, kv_page_tokens=1), one)
    return list(leaders.values())[:FINALISTS]
