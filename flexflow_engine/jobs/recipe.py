"""What the user asked for, checked and complete. Plain data; `jobs.load` makes it from YAML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexflow_engine.abc.dtypes import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecipe:
    """Which weights to run, and who computes them."""

    plugin: str
    checkpoint: str
    """An absolute folder, a hub id, or `synthetic:NAME`."""
    dtype: DType


@dataclass(frozen=True, slots=True, kw_only=True)
class TierRecipe:
    """One tier under the name that the recipe gives it."""

    name: str
    plugin: str
    budget_bytes: int
    options: Any
    """An instance of the tier class's `Options`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecRecipe:
    """How one tensor class is encoded."""

    plugin: str
    options: Any
    """An instance of the codec class's `Options`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecsRecipe:
    """The codecs of the two tensor classes that lie around for long."""

    weights: CodecRecipe
    kv_cache: CodecRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerRecipe:
    """Who chooses the policy."""

    plugin: str
    options: Any
    """An instance of the scheduler class's `Options`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticPrompts:
    """Random token ids of one length, to measure with."""

    count: int
    prompt_tokens: int
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Continue each prompt with the model's own tokens."""

    max_new_tokens: int
    ignore_eos: bool
    """Generate max_new_tokens for every prompt, whatever is sampled."""


@dataclass(frozen=True, slots=True)
class Score:
    """Find how probable the model takes the completion to be that each prompt line gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The prompts, and what is done with them."""

    prompts: Path | SyntheticPrompts
    """An absolute path of a JSON lines file, or random prompts, which are generated from only."""
    task: Generate | Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A job, with nothing left to look up but the plugins' classes."""

    name: str
    model: ModelRecipe
    tiers: tuple[TierRecipe, ...]
    """Fastest first; the first is where the model computes."""
    codecs: CodecsRecipe
    scheduler: SchedulerRecipe
    workload: Workload
