"""`lp`: the policy under which the job is predicted to end soonest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from flexflow_engine.abc.policy import AttentionPlace, Policy
from flexflow_engine.abc.prediction import StepShape
from flexflow_engine.abc.scheduler import Candidate, PlanRequest, Scheduler
from flexflow_engine.abc.tier import HOST
from flexflow_engine.errors import HardwareError, PolicyError
from flexflow_plugins.schedulers.lp.refusal import refusal
from flexflow_plugins.schedulers.lp.search import Search
from flexflow_plugins.schedulers.lp.shapes import Choices
from flexflow_plugins.schedulers.lp.simpler import and_simpler, scored, simplified
from flexflow_plugins.schedulers.lp.solver import check_solver, find_solver


@dataclass(frozen=True, slots=True, kw_only=True)
class LPOptions:
    """What a recipe may hold fast; None and `auto` leave it to the scheduler."""

    gpu_batch_size: int | None = None
    num_gpu_batches: int | None = None
    attention: Literal["device", "host", "auto"] = "auto"


class LPScheduler(Scheduler):
    """Linear programs over batch shapes; the best few are simulated, the fastest of them also on fewer links, and the
    fastest of all is taken; where the host computes, of those that are alike the simplest.
    """

    name = "lp"
    Options = LPOptions

    def __init__(self, options: LPOptions) -> None:
        super().__init__(options)
        self._options = options

    @classmethod
    def check_available(cls) -> None:
        check_solver()

    @classmethod
    def solver(cls) -> str:
        return find_solver()

    def problems(self, tiers: tuple[str, ...]) -> list[str]:
        return list(self._wrong_sizes())

    def choose(self, request: PlanRequest) -> Policy:
        return self.candidates(request)[0].policy

    def candidates(self, request: PlanRequest) -> tuple[Candidate, ...]:
        search = Search(request, self._choices(request), find_solver())
        found = and_simpler(scored(search.policies() or [_small(search)], request), search.with_fewer_links, request)
        return tuple(found if request.tiers[0].memory != HOST else simplified(found, search, request))

    def _choices(self, request: PlanRequest) -> Choices:
        return Choices(
            num_prompts=len(request.workload.prompt_tokens),
            attention=self._attention(request),
            gpu_batch_size=self._options.gpu_batch_size,
            num_gpu_batches=self._options.num_gpu_batches,
        )

    def _attention(self, request: PlanRequest) -> tuple[AttentionPlace, ...]:
        wanted = self._options.attention
        if wanted == "auto":
            return _worth_trying(request)
        if wanted not in request.attention_places:
            raise PolicyError(
                f"attention can't run on the {wanted} with these tiers",
                where="scheduler.attention",
                fix=f"`auto` and {', '.join(f'`{place}`' for place in request.attention_places)} work",
            )
        return (wanted,)

    def _wrong_sizes(self) -> Iterator[str]:
        for key in ("gpu_batch_size", "num_gpu_batches"):
            value = getattr(self._options, key)
            if value is not None and value <= 0:
                yield f"`{key}` must be more than 0, not {value}"


def _small(search: Search) -> Policy:
    """The policy that needs least; raises PolicyError where it does not fit."""
    small = search.small_policies()
    fits = next((found.policy for found in small if not found.lacking), None)
    if fits is None:
        raise refusal(small)
    return fits


def _worth_trying(request: PlanRequest) -> tuple[AttentionPlace, ...]:
    """Not the host where it is the compute tier's own processor, where the recipe offers no memory of its, whose tails
    and slots nothing would limit, nor where the profile has no rates for it.
    """
    offered = any(tier.placeable and tier.memory == HOST for tier in request.tiers[1:])
    if request.tiers[0].memory == HOST or not offered:
        return ("device",)
    return tuple(place for place in request.attention_places if place == "device" or _is_priced(place, request))


def _is_priced(place: AttentionPlace, request: PlanRequest) -> bool:
    step = StepShape(phase="decode", gpu_batch_size=1, num_gpu_batches=1, context=1, attention=place, kv_page_tokens=1)
    try:
        request.step_costs(step)
    except HardwareError:
        return False
    return True
