"""Contract of a scheduler: chooses a Policy and runs nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.model import ModelConfig
from flexflow_engine.abc.policy import MemoryTable, Policy, TierDescription, WorkloadShape

API_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything a scheduler may look at. Nothing has been read of the weights yet."""

    config: ModelConfig
    dtype: DType
    workload: WorkloadShape
    tiers: tuple[TierDescription, ...]
    """Fastest first; the first is where the model computes."""
    memory_table: Callable[[Policy], MemoryTable]
    """The runtime's own memory formula."""


class Scheduler(ABC):
    """Called once a run, before the weights are imported."""

    api_version: ClassVar[int] = API_VERSION
    name: ClassVar[str]
    Options: ClassVar[type[Any]]
    """A frozen dataclass: the recipe's further keys under `scheduler`, with their types and defaults."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def problems(self, tiers: tuple[str, ...]) -> list[str]:
        """What is wrong with the options, given the recipe's tier names; told with the recipe's other problems."""
        return []

    @abstractmethod
    def choose(self, request: PlanRequest) -> Policy:
        """The policy to run. Raises PolicyError: the constraint that fails, and the smallest budget that would do."""
