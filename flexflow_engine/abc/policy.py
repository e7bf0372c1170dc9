"""What a scheduler chooses, and what it chooses from. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flexflow_engine.abc.tier import HOST

TensorClass = Literal["weights", "kv_cache", "activations"]
TENSOR_CLASSES: tuple[TensorClass, ...] = ("weights", "kv_cache", "activations")

AttentionPlace = Literal["device", "host"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Share of one tensor class on each tier, in percent, in the recipe's order of tiers; the shares add up to 100."""

    shares: tuple[tuple[str, float], ...]

    def fraction(self, tier: str) -> float:
        """The tier's share, 0 to 1."""
        return dict(self.shares).get(tier, 0.0) / 100

    def as_dict(self) -> dict[str, float]:
        return {tier: share for tier, share in self.shares if share}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a job is carried out."""

    gpu_batch_size: int
    """Sequences computed in one kernel call."""
    num_gpu_batches: int
    """GPU batches that share one load of a layer's weights."""
    weights: Placement
    kv_cache: Placement
    activations: Placement
    attention: AttentionPlace
    """Where decode attention runs. device: on the first tier. host: on the processor, in host memory; then nothing of
    `kv_cache` may lie on the first tier. Prompts attend on the first tier in any case.
    """
    kv_page_tokens: int
    """Tokens of one sequence in one page of the KV cache."""

    def placement(self, tensor_class: TensorClass) -> Placement:
        return {"weights": self.weights, "kv_cache": self.kv_cache, "activations": self.activations}[tensor_class]

    def as_fixed(self) -> dict[str, object]:
        """The keys under which the `fixed` scheduler takes this policy."""
        return {
            "gpu_batch_size": self.gpu_batch_size,
            "num_gpu_batches": self.num_gpu_batches,
            "weights": self.weights.as_dict(),
            "kv_cache": self.kv_cache.as_dict(),
            "activations": self.activations.as_dict(),
            "attention": self.attention,
            "kv_page_tokens": self.kv_page_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TierDescription:
    """A tier of the recipe, as a scheduler sees it."""

    name: str
    plugin: str
    budget_bytes: int
    memory: str | None
    direct: bool
    reads_store: bool
    read_concurrency: int
    write_concurrency: int
    placeable: bool = True
    """Whether tensors may lie there: not on a staging tier that the recipe doesn't name."""

    @property
    def read_by_host(self) -> bool:
        """Whether the host computes on its bytes in place."""
        return self.memory == HOST and self.direct


@dataclass(frozen=True, slots=True)
class WorkloadShape:
    """The job's size: what a scheduler may know of the prompts."""

    prompt_tokens: tuple[int, ...]
    """Length of each prompt."""
    new_tokens: tuple[int, ...]
    """What follows each: as many tokens as it may generate at most, or those that are scored."""

    @property
    def max_prompt_tokens(self) -> int:
        return max(self.prompt_tokens)

    @property
    def max_cached_tokens(self) -> int:
        """Longest KV cache of a sequence: the last new token is never fed back."""
        return max(prompt + new for prompt, new in zip(self.prompt_tokens, self.new_tokens, strict=True)) - 1


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """One entry of a policy's memory table."""

    tier: str
    what: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """What a policy puts on each tier: residents, slots and workspace; their sum is the peak."""

    lines: tuple[MemoryLine, ...]
    budgets: Mapping[str, int]

    def peak_bytes(self, tier: str) -> int:
        return sum(line.nbytes for line in self.lines if line.tier == tier)

    @property
    def exceeded(self) -> tuple[str, ...]:
        """Tiers whose budget is too small, in the recipe's order."""
        return tuple(tier for tier, budget in self.budgets.items() if self.peak_bytes(tier) > budget)
