"""What a run tells while nothing can be counted yet: its weights are loaded, its first step has not ended."""

from __future__ import annotations

from dataclasses import replace

from flexflow_engine.abc.durations import format_duration
from flexflow_engine.abc.sizes import format_size
from flexflow_engine.abc.step import Step
from flexflow_engine.placement.layout import Layout
from flexflow_engine.placement.memory import allocations
from flexflow_engine.planning.predict import Predictor

FIRST_STEP_TASKS = 20_000
"""So many are simulated in about two seconds, in which memory is taken and nothing runs."""


def loading(layout: Layout) -> str:
    """Of weights that lie in memory for the whole run."""
    resident = (a.spec.nbytes for a in allocations(layout) if a.what in {"weights", "small weights"})
    return f"loading resident weights: {format_size(sum(resident))}"


def first_prompts(step: Step) -> str:
    """Of a job of whose time nothing is known."""
    return f"first prompts: {step.new_tokens('prefill')} tokens"


def first_prompts_predicted(step: Step, layout: Layout, predictor: Predictor, job_s: float) -> str:
    """The same with the seconds that it takes, where it has not too many tasks, and those of the whole job."""
    step_s = replace(predictor, max_tasks=FIRST_STEP_TASKS).seconds(layout, [step])
    first = "" if step_s is None else f", about {format_duration(step_s)}"
    return f"{first_prompts(step)}{first}; the whole job about {format_duration(job_s)} (predicted)"
