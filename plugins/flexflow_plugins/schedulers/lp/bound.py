"""A job's least seconds under a batch shape, in closed form: decides which shapes are worth a linear program.

Each tensor class is taken alone, as if no other lay anywhere. What fits on tiers that cost nothing lies there; the rest
is spread over the others so that their lanes end together, with s_t seconds if all of the class lay on tier t:

    seconds of a part  >=  max(lanes' seconds that no placement changes, rest / sum over t of 1 / s_t)

or, where nothing needs to be moved, what a step takes then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexflow_engine.abc.policy import TENSOR_CLASSES, TensorClass
from flexflow_plugins.schedulers.lp.memory import MemoryNeeds
from flexflow_plugins.schedulers.lp.program import PricedPart, Program


def least_seconds(program: Program, parts: Sequence[PricedPart]) -> float:
    """Of the whole job."""
    return sum(part.steps * _least_step(program, part) for part in parts)


def _least_step(program: Program, part: PricedPart) -> float:
    moved = [_least_move(program, part, tensor_class) for tensor_class in TENSOR_CLASSES]
    least, unmoved = max(*part.costs.always.values(), *moved), part.costs.unmoved
    return min(least, max(unmoved.values())) if unmoved and not any(moved) else least


def _least_move(program: Program, part: PricedPart, tensor_class: TensorClass) -> float:
    rest, rate = 1.0, 0.0
    for tier in program.tiers:
        seconds = max(part.costs.placed.get((tensor_class, tier), {}).values(), default=0.0)
        if (tensor_class, tier) in program.forbidden:
            continue
        if seconds:
            rate += 1 / seconds
        else:
            rest -= _most(program.needs, program.budgets, tensor_class, tier)
    return max(0.0, rest) / rate if rate else 0.0


def _most(needs: MemoryNeeds, budgets: Mapping[str, float], tensor_class: TensorClass, tier: str) -> float:
    """The fraction of a class that fits on a tier; all of it on the slowest, of which nothing is known."""
    nbytes = needs.placed.get((tensor_class, tier), {}).get(tier, 0.0)
    return min(1.0, budgets[tier] / nbytes) if nbytes > 0 else 1.0
