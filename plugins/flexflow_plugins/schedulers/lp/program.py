"""The linear program: shares in percent, minimising the seconds of a job's slowest lanes.

    minimise    sum over parts of the job   steps * (T_part + TRAFFIC * work of all lanes)
    subject to  T_part >= work of each lane                        StepCosts: linear in the shares
                shares of a tensor class add up to 100
                peak bytes of each tier <= its budget              MemoryNeeds: linear in the shares

The same as FlexGen's (arXiv 2303.06865, section 4.3), with measured curves for its constants, all lanes overlapping as
the runtime has them, and the runtime's own memory formula. Shares are real numbers where shapes are compared and whole
percentages in what is handed out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pulp

from flexflow_engine.abc.policy import TENSOR_CLASSES, MemoryTable, TensorClass
from flexflow_engine.abc.prediction import StepCosts
from flexflow_plugins.schedulers.lp.memory import MemoryNeeds, Share
from flexflow_plugins.schedulers.lp.solver import solve

TRAFFIC = 0.01
"""What a second of work on any lane counts beside one of the slowest: of placements that are equally fast, the one that
leaves the others more room."""
CORRECTIONS = 4
"""Times that a program is solved again with budgets corrected by what the linear memory formula was off by."""
_GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class PricedPart:
    """So many steps of a job, and what each of them gives the lanes."""

    steps: float
    costs: StepCosts

    @property
    def lanes(self) -> tuple[str, ...]:
        """Those with work, in a fixed order."""
        placed = {lane for costs in self.costs.placed.values() for lane in costs}
        return tuple(sorted(placed | self.costs.always.keys()))

    def seconds(self, percent: Mapping[Share, float]) -> float:
        """Of all its steps, each as long as its slowest lane."""
        fractions = {share: value / 100 for share, value in percent.items()}
        return self.steps * max(self.costs.seconds_at(fractions).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One batch shape's."""

    tiers: tuple[str, ...]
    """Those that tensors may lie on, fastest first."""
    needs: MemoryNeeds
    budgets: Mapping[str, float]
    """Bytes; a tier that is left out is not limited."""
    forbidden: frozenset[Share]
    solver: str

    def fastest(self, parts: Sequence[PricedPart], *, category: str) -> dict[Share, float] | None:
        """The shares in percent under which the job ends soonest; None where nothing fits.

        category: PuLP's, "Continuous" or "Integer".
        """
        problem, shares = self._problem(category)
        work = [self._slowest(problem, shares, part, index) for index, part in enumerate(parts)]
        problem += pulp.lpSum(work)
        return self._solved(problem, shares)

    def without(self, shares: Iterable[Share]) -> Program:
        """The same where none of these is taken either."""
        return replace(self, forbidden=self.forbidden.union(shares))

    def smallest(self, tier: str) -> dict[Share, float] | None:
        """The shares in whole percent that need least of a tier, which `budgets` leaves out; None where the others'
        budgets are too small whatever this tier has.
        """
        problem, shares = self._problem("Integer")
        problem += self._peak(tier, shares)
        return self._solved(problem, shares)

    def corrected(self, percent: Mapping[Share, float], table: MemoryTable, budgets: Mapping[str, float]) -> Program:
        """With limits under which these shares would have met the budgets: larger ones where the linear formula said
        more than the table does.
        """
        fractions = {share: value / 100 for share, value in percent.items()}
        off = {tier: self.needs.peak_bytes(tier, fractions) - table.peak_bytes(tier) for tier in self.budgets}
        return replace(self, budgets={tier: budgets[tier] + off[tier] for tier in self.budgets})

    def _problem(self, category: str) -> tuple[pulp.LpProblem, dict[Share, pulp.LpVariable]]:
        problem = pulp.LpProblem("policy", pulp.LpMinimize)
        shares = {
            (tensor_class, tier): problem.add_variable(
                f"{tensor_class}_{index}", 0, self._most(tensor_class, tier), category
            )
            for tensor_class in TENSOR_CLASSES
            for index, tier in enumerate(self.tiers)
        }
        for tensor_class in TENSOR_CLASSES:
            problem += pulp.lpSum(shares[tensor_class, tier] for tier in self.tiers) == 100
        for tier, budget in self.budgets.items():
            problem += self._peak(tier, shares) <= budget / _GIB
        return problem, shares

    def _most(self, tensor_class: TensorClass, tier: str) -> int:
        return 0 if (tensor_class, tier) in self.forbidden else 100

    def _peak(self, tier: str, shares: Mapping[Share, pulp.LpVariable]) -> pulp.LpAffineExpression:
        """In GiB: solvers work with tolerances near 1."""
        placed = self.needs.placed.items()
        moved = [nbytes[tier] / 100 / _GIB * shares[share] for share, nbytes in placed if nbytes[tier]]
        return pulp.lpSum(moved) + self.needs.always[tier] / _GIB

    def _slowest(
        self, problem: pulp.LpProblem, shares: Mapping[Share, pulp.LpVariable], part: PricedPart, index: int
    ) -> pulp.LpAffineExpression:
        """Adds the part's longest step to the problem; returns what the part adds to the objective."""
        step_s = problem.add_variable(f"step_{index}", 0)
        total: list[pulp.LpAffineExpression] = []
        for lane in part.lanes:
            placed = part.costs.placed
            moved = [costs[lane] / 100 * shares[share] for share, costs in placed.items() if costs.get(lane)]
            work = pulp.lpSum(moved) + part.costs.always.get(lane, 0.0)
            problem += step_s >= work
            total.append(work)
        return part.steps * (step_s + TRAFFIC * pulp.lpSum(total))

    def _solved(self, problem: pulp.LpProblem, shares: Mapping[Share, pulp.LpVariable]) -> dict[Share, float] | None:
        if not solve(problem, self.solver):
            return None
        solved = {share: float(variable.varValue or 0.0) for share, variable in shares.items()}
        whole = {share for share, variable in shares.items() if variable.cat == pulp.LpInteger}
        return {share: round(value) if share in whole else value for share, value in solved.items()}
