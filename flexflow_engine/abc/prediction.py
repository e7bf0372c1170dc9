"""What a job would take, predicted; plain data, and what a scheduler may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flexflow_engine.abc.policy import AttentionPlace, Policy, TensorClass
from flexflow_engine.abc.step import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """A step in which every row of every GPU batch does the same."""

    phase: Phase
    gpu_batch_size: int
    num_gpu_batches: int
    context: int
    """prefill: tokens of each prompt. decode: tokens of each sequence that are cached already."""
    attention: AttentionPlace
    kv_page_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Seconds of work that a step gives each lane: linear in the shares of a placement, as a linear program needs it.

    A step takes about as long as its busiest lane works, at least. All layers are included, embedding and head too.
    Where lanes take from each other's rates, what they lose counts; pairs of them are lanes of their own here.
    """

    always: Mapping[str, float]
    """Lane -> seconds, wherever tensors lie."""
    placed: Mapping[tuple[TensorClass, str], Mapping[str, float]]
    """(tensor class, tier) -> lane -> seconds, if all of that class lay on that tier."""
    unmoved: Mapping[str, float] = field(default_factory=dict)
    """Lane -> seconds in place of `always` where nothing lies on a tier of `placed`, if that is faster: what is not
    linear. Empty: it is not."""

    def seconds(self, policy: Policy) -> dict[str, float]:
        """Lane -> seconds, for a policy of the same shape."""
        return self.seconds_at({share: policy.placement(share[0]).fraction(share[1]) for share in self.placed})

    def seconds_at(self, fractions: Mapping[tuple[TensorClass, str], float]) -> dict[str, float]:
        """Lane -> seconds, for these fractions of what `placed` tells; those that are left out are 0."""
        moved = {share: fractions.get(share, 0.0) for share in self.placed}
        lanes = dict(self.always if any(moved.values()) else self.unmoved or self.always)
        for share, costs in self.placed.items():
            for lane, seconds in costs.items():
                lanes[lane] = lanes.get(lane, 0.0) + moved[share] * seconds
        return lanes


@dataclass(frozen=True, slots=True)
class LaneUse:
    """One lane over a whole job, as predicted or as run; busy time is the union of its tasks' intervals."""

    busy_s: float
    nbytes: int
    flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A whole job on the virtual clock, no sequence ending before its last token."""

    prefill_s: float
    decode_s: float
    prompt_tokens: int
    generated_tokens: int
    first_tokens: int
    """Generated tokens that were sampled from prompts."""
    lanes: Mapping[str, LaneUse]
    relative_error: float
    """How far sampling of steps and layers may have moved the seconds, as a fraction of them; 0 when every task of the
    job was simulated. What the profile itself is wrong by comes on top."""

    @property
    def seconds(self) -> float:
        return self.prefill_s + self.decode_s

    @property
    def tokens_per_s(self) -> float:
        return self.generated_tokens / self.seconds

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None for a job without decode steps."""
        return (self.generated_tokens - self.first_tokens) / self.decode_s if self.decode_s else None

    @property
    def bound_by(self) -> str:
        """The lane that is busy longest."""
        return max(self.lanes, key=lambda lane: self.lanes[lane].busy_s)
