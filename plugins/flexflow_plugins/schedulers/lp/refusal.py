"""The policies that need least, and what is said when not even they fit.

One tier at a time is taken as unlimited: the least that it must have then, the other budgets being what they are, is
the smallest budget that would do. It must be found again once the user has given that budget; so a policy counts for
a tier only if it was found without looking at that tier's budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flexflow_engine.abc.policy import TENSOR_CLASSES, MemoryTable, Policy
from flexflow_engine.abc.scheduler import PlanRequest
from flexflow_engine.abc.sizes import rounded_down, rounded_up
from flexflow_engine.errors import PolicyError
from flexflow_plugins.schedulers.lp.memory import Share, make_policy
from flexflow_plugins.schedulers.lp.program import CORRECTIONS, Program
from flexflow_plugins.schedulers.lp.shapes import BatchShape


@dataclass(frozen=True, slots=True)
class SmallPolicy:
    """A policy of the fewest rows, and its memory."""

    policy: Policy
    memory: MemoryTable
    unlimited: frozenset[str]
    """Tiers whose budgets had no part in it."""

    @property
    def lacking(self) -> dict[str, int]:
        """Tier -> the budget that this policy would need, for the tiers whose budget is too small."""
        return {tier: self.memory.peak_bytes(tier) for tier in self.memory.exceeded}

    @property
    def lacking_bytes(self) -> int:
        return sum(needed - self.memory.budgets[tier] for tier, needed in self.lacking.items())


def small_policies(request: PlanRequest, program: Program, shape: BatchShape) -> Iterator[SmallPolicy]:
    """Of one shape: everything on one tier, for each tier; and as little as possible on each tier."""

    def small(percent: Mapping[Share, float], unlimited: Iterable[str]) -> SmallPolicy:
        policy = make_policy(shape, percent, program.tiers)
        return SmallPolicy(policy, request.memory_table(policy), frozenset(unlimited))

    for tier in program.tiers:
        everything = {(tensor_class, tier): 100.0 for tensor_class in TENSOR_CLASSES}
        if not program.forbidden & everything.keys():
            yield small(everything, program.tiers)
    for tier in program.tiers:
        budgets = {name: budget for name, budget in program.budgets.items() if name != tier}
        tried = replace(program, budgets=budgets)
        for _ in range(1 + CORRECTIONS):
            percent = tried.smallest(tier)
            if percent is None:
                break
            found = small(percent, [tier])
            yield found
            tried = tried.corrected(percent, found.memory, budgets)


def refusal(policies: Iterable[SmallPolicy]) -> PolicyError:
    """Which constraint fails, and the smallest budgets that would do, for each tier that could mend it alone."""
    sound = [small for small in policies if small.lacking.keys() <= small.unlimited]
    best = min(sound, key=lambda small: (len(small.lacking), small.lacking_bytes))
    alone: dict[str, int] = {}
    for small in sound:
        if len(small.lacking) == 1:
            ((tier, needed),) = small.lacking.items()
            alone[tier] = min(needed, alone.get(tier, needed))
    has = best.memory.budgets
    excess = "; ".join(
        f"{tier} needs {rounded_up(n)} and has {rounded_down(has[tier])}" for tier, n in best.lacking.items()
    )
    budgets = [_budgets({tier: needed}) for tier, needed in alone.items()] or [_budgets(best.lacking)]
    return PolicyError(
        f"no policy fits, not even with GPU batches of {best.policy.gpu_batch_size}: {excess}",
        where="tiers",
        fix=f"the smallest budget that would do: {', or '.join(budgets)}",
    )


def _budgets(needed: Mapping[str, int]) -> str:
    return ", ".join(f"{tier} {rounded_up(nbytes)}" for tier, nbytes in needed.items())
