"""Policies that were simulated, and simpler ones beside them: of those that are predicted alike the simplest is taken
where the host computes, whose cores every task wants that moves something.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flexflow_engine.abc.policy import Policy
from flexflow_engine.abc.scheduler import Candidate, PlanRequest
from flexflow_plugins.schedulers.lp.search import MARGIN, Found, Search, shares_of

ALIKE = 1.03
"""Predictions that differ by less say nothing of which is faster."""


def scored(policies: Sequence[Policy], request: PlanRequest) -> list[Candidate]:
    """Simulated, the fastest first."""
    return _by_seconds([Candidate(policy, request.predict(policy)) for policy in policies])


def and_simpler(
    candidates: Sequence[Candidate], simpler: Callable[[Policy], list[Found]], request: PlanRequest
) -> list[Candidate]:
    """With those that are simpler than the first, as far as they promise anything; the fastest first."""
    first, known = candidates[0], {candidate.policy for candidate in candidates}
    found = [one.policy for one in simpler(first.policy) if one.seconds < MARGIN * first.prediction.seconds]
    return _by_seconds([*candidates, *scored([one for one in dict.fromkeys(found) if one not in known], request)])


def simplified(candidates: Sequence[Candidate], search: Search, request: PlanRequest) -> list[Candidate]:
    """With those that are simpler than the simplest of the fast ones, as long as that makes a simpler one."""
    found = _simplest_first(candidates)
    while True:
        before = found[0].policy
        for simpler in (search.less_spread, search.larger_pages):
            found = _simplest_first(and_simpler(found, simpler, request))
        if found[0].policy == before:
            return found


def _by_seconds(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: candidate.prediction.seconds)


def _simplest_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Of those that are as fast as the fastest, for all that a prediction can tell, the simplest; then the others,
    the fastest first.
    """
    ordered = _by_seconds(candidates)
    alike = [one for one in ordered if one.prediction.seconds <= ALIKE * ordered[0].prediction.seconds]
    chosen = min(alike, key=lambda one: _complexity(one.policy))
    return [chosen, *(one for one in ordered if one is not chosen)]


def _complexity(policy: Policy) -> tuple[int, int, int]:
    """What makes for more tasks: tiers that anything lies on, parts of classes, and small pages."""
    shares = shares_of(policy)
    return len({tier for _, tier in shares}), len(shares), -policy.kv_page_tokens
