"""Contract of a scheduler: chooses a Policy and runs nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.hardware import HardwareProfile
from flexflow_engine.abc.model import ModelConfig
from flexflow_engine.abc.policy import AttentionPlace, MemoryTable, Policy, TierDescription, WorkloadShape
from flexflow_engine.abc.prediction import Prediction, StepCosts, StepShape

API_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything a scheduler may look at. Nothing has been read of the weights yet.

    The last three calls need a hardware profile and raise HardwareError on a machine without one. `step_costs` is a
    matter of microseconds, `memory_table` and `predict` lay the policy out: up to seconds for the largest models.
    """

    config: ModelConfig
    dtype: DType
    workload: WorkloadShape
    tiers: tuple[TierDescription, ...]
    """Fastest first; the first is where the model computes."""
    attention_places: tuple[AttentionPlace, ...]
    """Where attention can run with these tiers."""
    memory_table: Callable[[Policy], MemoryTable]
    """The runtime's own memory formula."""
    hardware: Callable[[], HardwareProfile]
    """The machine to plan for."""
    step_costs: Callable[[StepShape], StepCosts]
    """Seconds that a step gives each lane, as a function of where tensors lie: what a linear program is made of."""
    predict: Callable[[Policy], Prediction]
    """The whole job under this policy on a virtual clock, whether it fits the budgets or not."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy that a scheduler weighed, and what it expects of it."""

    policy: Policy
    prediction: Prediction


class Scheduler(ABC):
    """Called once a run, before the weights are imported."""

    api_version: ClassVar[int] = API_VERSION
    name: ClassVar[str]
    Options: ClassVar[type[Any]]
    """A frozen dataclass: the recipe's further keys under `scheduler`, with their types and defaults."""

    def __init__(self, options: Any) -> None:
        self.options = options

    @classmethod  # noqa: B027  # most schedulers need nothing
    def check_available(cls) -> None:
        """Raise PluginError when this machine lacks what the scheduler works with. Called by `doctor`."""

    @classmethod
    def solver(cls) -> str | None:
        """The solver that it works with on this machine, if it has one. Called by `doctor`, after `check_available`."""
        return None

    def problems(self, tiers: tuple[str, ...]) -> list[str]:
        """What is wrong with the options, given the recipe's tier names, at least one; told with the recipe's other
        problems.
        """
        return []

    @abstractmethod
    def choose(self, request: PlanRequest) -> Policy:
        """The policy to run. Raises PolicyError: the constraint that fails, and the smallest budget that would do."""

    def candidates(self, request: PlanRequest) -> tuple[Candidate, ...]:
        """The policies that were weighed, the chosen one first and the others by how much they lose; `plan` shows
        them. A scheduler that weighs none has its choice alone. Raises what `choose` raises.
        """
        policy = self.choose(request)
        return (Candidate(policy, request.predict(policy)),)
