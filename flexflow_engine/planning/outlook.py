"""What would make a job faster: one change of the machine, the budgets or the codecs at a time.

Estimated without a simulation, so that `plan` stays quick, by the closed form that schedulers plan with
(`planning.step_costs`): with n new tokens on average and R rounds of all rows,

    seconds = R * (slowest lane of the prefill + (n - 1) * slowest lane of a decode step in the middle)

The gain is the ratio of the seconds before and after. The policy stays as it is, but for a tier with a larger budget:
there as much moves up from slower tiers as fits, or there are twice the GPU batches, whichever is faster. A scheduler
that plans anew may gain more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import DIRECTIONS, HardwareProfile, Link
from flexflow_engine.abc.policy import TENSOR_CLASSES, Placement, Policy, TensorClass
from flexflow_engine.abc.prediction import StepShape
from flexflow_engine.abc.sizes import format_size
from flexflow_engine.abc.step import Phase
from flexflow_engine.abc.tier import HOST
from flexflow_engine.errors import HardwareError
from flexflow_engine.placement.reach import direct_tiers
from flexflow_engine.planning.plan import Planner

FACTOR = 2
"""How much more of a budget or of a link's rate is asked about."""
LEAST_GAIN = 0.005
"""Smaller ones are not told: closed form and simulation differ by more."""


@dataclass(frozen=True, slots=True)
class Improvement:
    """One change, and by which fraction the job's tokens a second would grow; about."""

    change: str
    gain: float


def what_would_help(planner: Planner, policy: Policy, codecs: Mapping[str, Codec]) -> tuple[Improvement, ...]:
    """The changes that would make the job faster under this policy, the best first.

    codecs: by name, what could encode weights or cache that are not encoded yet. Raises HardwareError where the
    machine lacks what the policy needs.
    """
    before = _seconds(planner, policy)
    found = (Improvement(change, before / after() - 1) for change, after in _changes(planner, policy, codecs))
    return tuple(sorted((x for x in found if x.gain >= LEAST_GAIN), key=lambda x: (-x.gain, x.change)))


Seconds = Callable[[], float]


def _changes(planner: Planner, policy: Policy, codecs: Mapping[str, Codec]) -> Iterator[tuple[str, Seconds]]:
    yield from _larger_budgets(planner, policy)
    yield from _faster_links(planner, policy)
    yield from _codecs(planner, policy, codecs)


def _larger_budgets(planner: Planner, policy: Policy) -> Iterator[tuple[str, Seconds]]:
    offered = [tier for tier in planner.tiers if tier.placeable]
    for index, tier in enumerate(offered[:-1]):
        budget = FACTOR * tier.budget_bytes
        tiers = tuple(replace(t, budget_bytes=budget) if t is tier else t for t in planner.tiers)
        larger = replace(planner, tiers=tiers)
        slower = tuple(t.name for t in offered[index + 1 :])

        def seconds(larger: Planner = larger, to: str = tier.name, slower: tuple[str, ...] = slower) -> float:
            policies = [policy, _moved(larger, policy, to, slower), _doubled(larger, policy)]
            return min(_seconds(larger, each) for each in policies)

        yield f"{tier.name}: a budget of {format_size(budget)}", seconds


def _faster_links(planner: Planner, policy: Policy) -> Iterator[tuple[str, Seconds]]:
    profile, direct = planner.hardware(), direct_tiers(planner.tiers)
    for tier in planner.tiers:
        if tier.name not in direct:
            faster = {direction: _faster(profile.link(tier, direction)) for direction in DIRECTIONS}
            changed = replace(profile, links={**profile.links, tier.name: faster})
            what = "host-device link" if tier.memory == HOST else "disk"
            yield f"{tier.name}: a {what} of twice the rate", _on(planner, policy, changed)


def _faster(link: Link) -> Link:
    return replace(link, bytes_per_s=FACTOR * link.bytes_per_s)


def _on(planner: Planner, policy: Policy, profile: HardwareProfile) -> Seconds:
    return lambda: _seconds(replace(planner, hardware=lambda: profile), policy)


def _codecs(planner: Planner, policy: Policy, codecs: Mapping[str, Codec]) -> Iterator[tuple[str, Seconds]]:
    for name, codec in codecs.items():
        for part in ("weights", "kv_cache"):
            used: Codec = getattr(planner.codecs, part)
            if used.keeps_bytes:
                other = codec.for_cache() if part == "kv_cache" else codec
                changed = replace(planner, codecs=replace(planner.codecs, **{part: other}))
                yield f"codecs.{part}: {name}", _if_known(changed, policy)


def _if_known(planner: Planner, policy: Policy) -> Seconds:
    """Never done where the profile has no rates for the codec: no gain."""

    def seconds() -> float:
        try:
            return _seconds(planner, policy)
        except HardwareError:
            return float("inf")

    return seconds


def _seconds(planner: Planner, policy: Policy) -> float:
    workload, costs = planner.workload, planner.step_costs()
    prompts = workload.prompt_tokens
    rounds = -(-len(prompts) // (policy.gpu_batch_size * policy.num_gpu_batches))
    prompt, steps = max(1, sum(prompts) // len(prompts)), sum(workload.new_tokens) / len(prompts) - 1

    def slowest(phase: Phase, context: int) -> float:
        shape = StepShape(
            phase=phase,
            gpu_batch_size=policy.gpu_batch_size,
            num_gpu_batches=policy.num_gpu_batches,
            context=context,
            attention=policy.attention,
            kv_page_tokens=policy.kv_page_tokens,
        )
        return max(costs.costs(shape).seconds(policy).values())

    return rounds * (slowest("prefill", prompt) + steps * slowest("decode", prompt + int(steps) // 2))


def _doubled(planner: Planner, policy: Policy) -> Policy:
    """Twice the GPU batches, if they fit and prompts fill them."""
    more = replace(policy, num_gpu_batches=FACTOR * policy.num_gpu_batches)
    filled = more.gpu_batch_size * more.num_gpu_batches <= len(planner.workload.prompt_tokens)
    return more if filled and not planner.memory(more).exceeded else policy


def _moved(planner: Planner, policy: Policy, to: str, slower: tuple[str, ...]) -> Policy:
    """As much of every class as fits moved up from slower tiers."""
    for tensor_class in TENSOR_CLASSES:
        device = planner.tiers[0].name
        if not (tensor_class == "kv_cache" and policy.attention == "host" and to == device):
            policy = _moved_class(planner, policy, tensor_class, (to, slower))
    return policy


def _moved_class(
    planner: Planner, policy: Policy, tensor_class: TensorClass, ways: tuple[str, tuple[str, ...]]
) -> Policy:
    """The most whole percent that fits; the memory formula is linear but for rounding to pages."""
    to, slower = ways
    before = policy.placement(tensor_class)
    elsewhere = sum(int(share) for tier, share in before.shares if tier in slower)
    everything = _with_share(policy, tensor_class, ways, elsewhere)
    table = planner.memory(everything)
    if not elsewhere or not table.exceeded:
        return everything
    least, most = planner.memory(policy).peak_bytes(to), table.peak_bytes(to)
    room = max(0, table.budgets[to] - least)
    percent = min(elsewhere, elsewhere * room // (most - least)) if most > least else 0
    for fewer in (percent, percent - 1):
        moved = _with_share(policy, tensor_class, ways, fewer)
        if fewer > 0 and not planner.memory(moved).exceeded:
            return moved
    return policy


def _with_share(policy: Policy, tensor_class: TensorClass, ways: tuple[str, tuple[str, ...]], percent: int) -> Policy:
    """So many percent of a class moved up, from the slowest tier first."""
    to, slower = ways
    shares = dict(policy.placement(tensor_class).shares)
    for tier in reversed(slower):
        moved = min(percent, int(shares.get(tier, 0)))
        percent -= moved
        shares[tier] = shares.get(tier, 0.0) - moved
        shares[to] = shares.get(to, 0.0) + moved
    return _with_placement(policy, tensor_class, Placement(tuple(shares.items())))


def _with_placement(policy: Policy, tensor_class: TensorClass, placement: Placement) -> Policy:
    match tensor_class:
        case "weights":
            return replace(policy, weights=placement)
        case "kv_cache":
            return replace(policy, kv_cache=placement)
        case "activations":
            return replace(policy, activations=placement)
