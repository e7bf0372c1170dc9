"""The policies of schedulers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from flexflow_engine.abc.policy import TENSOR_CLASSES, AttentionPlace, Placement, Policy, TierDescription
from flexflow_engine.abc.scheduler import Candidate
from flexflow_engine.abc.shares import wrong_shares
from flexflow_engine.errors import PluginError, PolicyError

SIZES = ("gpu_batch_size", "num_gpu_batches", "kv_page_tokens")


def check_policy(policy: object, tiers: Sequence[TierDescription], scheduler: str) -> Policy:
    """The policy, if it can be laid out on these tiers. Raises PolicyError, with all that stands against it, in the
    scheduler's name.
    """
    problems = list(_problems(policy, tiers))
    if problems or not isinstance(policy, Policy):
        raise PolicyError(f"the policy of {scheduler} makes no sense: {'; '.join(problems)}", where="scheduler")
    return policy


def check_candidates(candidates: object, tiers: Sequence[TierDescription], scheduler: str) -> tuple[Candidate, ...]:
    """The same of each candidate; there must be one."""
    listed = tuple(candidates) if isinstance(candidates, list | tuple) else ()
    if not listed or not all(isinstance(candidate, Candidate) for candidate in listed):
        raise PolicyError(f"the candidates of {scheduler} are no Candidates: {candidates!r:.80}", where="scheduler")
    for candidate in listed:
        check_policy(candidate.policy, tiers, scheduler)
    return listed


def check_problems(problems: object, scheduler: str) -> list[str]:
    """What a scheduler finds wrong with its options. Raises PluginError when it is no list of sentences."""
    if not isinstance(problems, list | tuple) or not all(isinstance(problem, str) for problem in problems):
        raise PluginError(f"`problems` of {scheduler} gave {problems!r:.80} and not a list of sentences")
    return list(problems)


def _problems(policy: object, tiers: Sequence[TierDescription]) -> Iterator[str]:
    if not isinstance(policy, Policy):
        yield f"it is a {type(policy).__name__} and no Policy"
        return
    for size in SIZES:
        value = getattr(policy, size)
        if type(value) is not int or value <= 0:
            yield f"`{size}` must be a whole number above 0, not {value!r}"
    places = get_args(AttentionPlace)
    if policy.attention not in places:
        yield f"`attention` must be one of {', '.join(places)}, not {policy.attention!r}"
    for tensor_class in TENSOR_CLASSES:
        yield from _wrong_placement(tensor_class, policy.placement(tensor_class), tiers)


def _wrong_placement(tensor_class: str, placement: object, tiers: Sequence[TierDescription]) -> Iterator[str]:
    """A tier without a share may be any, and named or not."""
    if not isinstance(placement, Placement) or not _are_shares(placement.shares):
        yield f"`{tensor_class}` must be a Placement of (tier, percent) pairs, each tier once, not {placement!r:.80}"
    else:
        yield from wrong_shares(tensor_class, placement.as_dict(), [tier.name for tier in tiers if tier.placeable])


def _are_shares(shares: object) -> bool:
    pairs = shares if isinstance(shares, tuple) else (None,)
    return all(_is_share(pair) for pair in pairs) and len({tier for tier, _ in pairs}) == len(pairs)


def _is_share(pair: object) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], int | float)
