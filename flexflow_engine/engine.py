"""The facade: a recipe in, completions and metrics out.

recipe -> asked (checkpoint, model, prompts) -> plan (policy, layout, memory) -> weight store -> session -> journal
       -> completions, metrics
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import HardwareProfile, measured_key
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.prediction import Prediction
from flexflow_engine.abc.progress import JobProgress, Progress
from flexflow_engine.abc.scheduler import Candidate, Scheduler
from flexflow_engine.abc.step import Step
from flexflow_engine.abc.tier import Tier
from flexflow_engine.checkpoint.checkpoint import Checkpoint
from flexflow_engine.checkpoint.importing import import_checkpoint
from flexflow_engine.checkpoint.room import StoreRoom, store_room
from flexflow_engine.checkpoint.source import open_checkpoint
from flexflow_engine.declared.codecs import check_codec
from flexflow_engine.errors import FlexFlowError, HardwareError, NotFiniteError, ProblemsError, raise_problems
from flexflow_engine.graph.lanes import lane_widths
from flexflow_engine.graph.task import ATTENTION_LANE
from flexflow_engine.jobs.batching import Batcher, FinishedSequence
from flexflow_engine.jobs.completions import CompletionWriter
from flexflow_engine.jobs.recipe import Recipe
from flexflow_engine.planning import expectation
from flexflow_engine.planning.asked import Asked
from flexflow_engine.planning.availability import unavailable, without_room
from flexflow_engine.planning.chosen_tiers import job_tiers, named_tiers
from flexflow_engine.planning.clock import VirtualDataflow, VirtualExecutor
from flexflow_engine.planning.outlook import Improvement, what_would_help
from flexflow_engine.planning.plan import Codecs, Plan, Planner, describe_tiers
from flexflow_engine.planning.profile.needs import Needs, TierChoice
from flexflow_engine.plugins import Registry
from flexflow_engine.runtime.full_device import full_device_told
from flexflow_engine.runtime.host_products import float32_from, host_products
from flexflow_engine.runtime.metrics import collect, nothing_run
from flexflow_engine.runtime.session import OnStep, Session, StepTime
from flexflow_engine.runtime.trace import FoldedTrace, Trace
from flexflow_engine.store.weights import WeightStore
from flexflow_engine.user_cache import user_cache

T = TypeVar("T")
DENSER_CODECS = ("group-int4",)
"""What a forecast asks about where weights or cache are not encoded."""

HardwareFor = Callable[[Needs], HardwareProfile]
"""The machine to plan for: this one, measured for what a recipe needs, or one from a file. Called when a scheduler, a
prediction or a run asks, at most once a job; raises HardwareError where nothing is known of the machine."""


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A plan, and what the weights take on the disk."""

    plan: Plan
    store: StoreRoom


@dataclass(frozen=True, slots=True)
class Forecast(PlannedJob):
    """The same, and what the job would take with it."""

    prediction: Prediction
    hardware: HardwareProfile
    candidates: tuple[Candidate, ...]
    """What the scheduler weighed, its choice first, predicted with overlap."""
    improvements: tuple[Improvement, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """A recipe with everything that can be known of it before weights are read."""

    asked: Asked
    tiers: tuple[TierChoice, ...]
    planner: Planner
    plan: Plan


@dataclass(slots=True)
class _Run:
    """What is open while a job runs. `first_tokens` counts tokens sampled from prompts; `times` are there after it."""

    store: WeightStore
    tiers: Mapping[str, Tier]
    writer: CompletionWriter
    progress: Progress
    trace: Path | None
    machine: HardwareProfile | None
    predicted_tokens_per_s: float | None
    first_tokens: int = 0
    times: Sequence[StepTime] = ()


def run_recipe(
    recipe: Recipe,
    registry: Registry,
    *,
    output: Path,
    trace: Path | None,
    progress: Progress,
    hardware: HardwareFor,
    fresh: bool = False,
) -> dict[str, Any]:
    """Run a job; its metrics, ready for JSON. Completions are written to `output` in input order, whole or not at all;
    they are there whatever then happens to the trace. Prompts that an earlier run of the job has completed are not run
    again, unless it is to start afresh.

    Raises FlexFlowError for what the user can mend, TaskError with its cause when a task fails.
    """
    asked = _ask_to_run(recipe, registry)
    identity = asked.identity(progress.reading)
    with CompletionWriter(
        output, asked.prompts, asked.tokenizer, identity=identity, tell=progress.notice, fresh=fresh
    ) as writer:
        if writer.pending:
            job = _prepare_to_run(replace(asked, prompts=writer.pending), registry, hardware)
            metrics = _run(job, store_root(recipe, registry), writer, progress, trace)
        else:
            metrics = nothing_run()
            writer.finish()
    counts = {"completions": writer.done, "earlier_completions": writer.earlier}
    return {**metrics, **counts, **writer.answers.metrics()}


def plan_recipe(recipe: Recipe, registry: Registry, hardware: HardwareFor) -> PlannedJob:
    """The plan of a job, whether it fits or not. Reads no weights."""
    job = _prepare(_ask(recipe, registry), registry, hardware)
    return PlannedJob(job.plan, _store_room(job.asked.checkpoint, job.asked.codecs, store_root(recipe, registry)))


def recipe_needs(recipe: Recipe, registry: Registry) -> Needs:
    """What a profile must have to predict the recipe's job."""
    model, codecs = recipe_checkpoint(recipe, registry).model, recipe_codecs(recipe, registry)
    return _needs(model, codecs, job_tiers(recipe, registry))


def predict_recipe(
    recipe: Recipe,
    registry: Registry,
    *,
    hardware: HardwareFor,
    executor: type[VirtualExecutor],
    trace: Path | None,
) -> Forecast:
    """The plan of a job, whether it fits or not, and its time on a machine that need not be this one.

    Reads no weights. trace: where to write the events of the job's first steps. Raises HardwareError where the
    profile lacks what the plan needs. executor: with one that a run does not have, the policy is compared with nothing:
    what it was chosen by, and what would help it, are seconds of a run.
    """
    candidates: list[Candidate] = []

    def weigh(planner: Planner, scheduler: Scheduler) -> Plan:
        candidates.extend(planner.candidates(scheduler))
        return planner.plan_of(candidates[0].policy)

    job = _prepare(_ask(recipe, registry), registry, hardware, weigh)
    predictor, as_run = job.planner.predictor(executor), executor is VirtualDataflow
    if trace is not None:
        events = Trace()
        events.events += predictor.first_events(job.plan.layout, job.planner.workload)
        events.write(trace, {lane: _process(lane, job.plan) for lane in lane_widths(job.plan.layout)})
    return Forecast(
        plan=job.plan,
        store=_store_room(job.asked.checkpoint, job.asked.codecs, store_root(recipe, registry)),
        prediction=job.planner.predict(job.plan.layout, executor),
        hardware=predictor.profile,
        candidates=tuple(candidates if as_run else candidates[:1]),
        improvements=what_would_help(job.planner, job.plan.policy, _denser_codecs(registry)) if as_run else (),
    )


def import_recipe(recipe: Recipe, registry: Registry, progress: Progress) -> WeightStore:
    """Import the recipe's weights, if the store doesn't have them yet."""
    checkpoint = recipe_checkpoint(recipe, registry)
    return _import(checkpoint, recipe_codecs(recipe, registry), store_root(recipe, registry), progress)


def recipe_checkpoint(recipe: Recipe, registry: Registry) -> Checkpoint:
    """The recipe's checkpoint; its config has been read. Raises CheckpointError."""
    model = recipe.model
    return open_checkpoint(model.checkpoint, registry.model(model.plugin), dtype=model.dtype)


def recipe_codecs(recipe: Recipe, registry: Registry) -> Codecs:
    """The recipe's codecs. Raises PluginError in the name of one that can't be used."""
    chosen, none, dtype = recipe.codecs, registry.codec("none"), recipe.model.dtype
    weights = registry.codec(chosen.weights.plugin)(chosen.weights.options)
    kv_cache = registry.codec(chosen.kv_cache.plugin)(chosen.kv_cache.options)
    for codec in (weights, weights.for_table()):
        check_codec(codec, dtype, where="codecs.weights")
    return Codecs(
        weights=weights,
        kv_cache=check_codec(kv_cache.for_cache(), dtype, where="codecs.kv_cache"),
        small=none(none.Options()),
    )


def store_root(recipe: Recipe, registry: Registry) -> Path:
    """Where weight stores lie: under the first tier that reads them in place, else in the user's cache folder."""
    roots = (registry.tier(tier.plugin).store_root(tier.options) for tier in recipe.tiers)
    return next((root for root in roots if root is not None), user_cache())


def recipe_store_room(recipe: Recipe, registry: Registry) -> StoreRoom:
    """What the recipe's weight store takes, and where. Reads no weights. Raises CheckpointError."""
    checkpoint, codecs = recipe_checkpoint(recipe, registry), recipe_codecs(recipe, registry)
    return _store_room(checkpoint, codecs, store_root(recipe, registry))


def _store_room(checkpoint: Checkpoint, codecs: Codecs, root: Path) -> StoreRoom:
    return store_room(checkpoint, codecs.weights, codecs.small, root)


def _denser_codecs(registry: Registry) -> dict[str, Codec]:
    """Those that are installed, with the options that they have by themselves."""
    return {
        name: registry.codec(name)(registry.codec(name).Options())
        for name in registry.names("codec")
        if name in DENSER_CODECS
    }


def _ask(recipe: Recipe, registry: Registry) -> Asked:
    return Asked.read(recipe, recipe_checkpoint(recipe, registry), recipe_codecs(recipe, registry))


def _ask_to_run(recipe: Recipe, registry: Registry) -> Asked:
    """Raises with every problem of machine and prompts."""
    problems = list(unavailable(named_tiers(recipe, registry)))
    try:
        asked = _ask(recipe, registry)
    except ProblemsError as error:
        problems += error.problems
    except FlexFlowError as error:
        problems.append(error)
    raise_problems(problems)
    return asked


def _prepare(
    asked: Asked,
    registry: Registry,
    hardware: HardwareFor,
    choose: Callable[[Planner, Scheduler], Plan] = Planner.plan,
) -> _Job:
    recipe, model, codecs = asked.recipe, asked.model, asked.codecs
    tiers = job_tiers(recipe, registry)
    classes = {tier.name: tier.tier_class for tier in tiers}
    named = {tier.name: tier.budget_bytes for tier in recipe.tiers}
    described = describe_tiers(classes, dict.fromkeys(classes, sys.maxsize) | named)
    planner = Planner(
        model=model,
        codecs=codecs,
        workload=asked.shape(),
        tiers=tuple(replace(tier, placeable=tier.name in named) for tier in described),
        hardware=cache(lambda: hardware(_needs(model, codecs, tiers))),
    )
    plan = choose(planner, registry.scheduler(recipe.scheduler.plugin)(recipe.scheduler.options))
    for staging in classes.keys() - named.keys():
        plan = plan.with_exact_budget(staging)
    return _Job(asked, tiers, planner, plan)


def _needs(model: Model, codecs: Codecs, tiers: tuple[TierChoice, ...]) -> Needs:
    used = codecs.weights, codecs.weights.for_table(), codecs.kv_cache
    encoding = {measured_key(codec): codec for codec in used if not codec.keeps_bytes}
    return Needs(model=model, tiers=tiers, plain=codecs.small, codecs=tuple(encoding.values()))


def _known_machine(job: _Job, progress: Progress) -> HardwareProfile | None:
    """None, with a line why, where nothing is known of it."""
    return _if_known(job.planner.hardware, progress)


def _predicted_tokens_per_s(job: _Job, progress: Progress) -> float | None:
    """None, with a line why, where the profile lacks what the plan needs."""
    return _if_known(lambda: job.planner.predict(job.plan.layout).tokens_per_s, progress)


def _if_known(find: Callable[[], T], progress: Progress) -> T | None:
    """What is found with what is known of the machine; None, with a line why, where that is too little."""
    try:
        return find()
    except (HardwareError, ProblemsError) as error:
        progress.notice(f"no prediction: {error}")
        return None


def _prepare_to_run(asked: Asked, registry: Registry, hardware: HardwareFor) -> _Job:
    """The job, if it fits. Raises with every problem of the budgets and of the machine's free memory."""
    job = _prepare(asked, registry, hardware)
    job.plan.require_fit()
    raise_problems(list(without_room(job.tiers, job.plan.memory)))
    return job


def _import(checkpoint: Checkpoint, codecs: Codecs, root: Path, progress: Progress) -> WeightStore:
    return import_checkpoint(
        checkpoint,
        checkpoint.model,
        codecs.weights,
        codecs.small,
        root,
        progress.importing,
        reading=progress.reading,
    )


@contextmanager
def _open_tiers(job: _Job) -> Iterator[dict[str, Tier]]:
    """The job's tiers, fastest first; closed on the way out, whatever happened."""
    choices = {tier.name: tier for tier in job.tiers}
    with ExitStack() as stack:
        tiers = {}
        for description in job.plan.layout.tiers:
            name, choice = description.name, choices[description.name]
            tier = choice.tier_class(label=name, budget_bytes=description.budget_bytes, options=choice.options)
            tiers[name] = stack.enter_context(closing(tier))
        yield tiers


def _tell(store: WeightStore, tiers: Mapping[str, Tier], progress: Progress) -> None:
    """What store and tiers have to say; the store says nothing of its own where a tier reads it and says the same."""
    told = [text for tier in tiers.values() for text in tier.notices]
    if not any(tier.reads_store for tier in tiers.values()):
        told += store.notices
    for text in told:
        progress.notice(text)


def _run(job: _Job, root: Path, writer: CompletionWriter, progress: Progress, trace: Path | None) -> dict[str, Any]:
    """The metrics of a job's run, which is predicted first."""
    machine = _known_machine(job, progress)
    predicted = _predicted_tokens_per_s(job, progress) if machine else None
    store = _import(job.asked.checkpoint, job.asked.codecs, root, progress)
    writer.identity.checkpoint()  # now, while its files are those that were imported
    with store, _open_tiers(job) as tiers, full_device_told(job.plan.layout.device):
        _tell(store, tiers, progress)
        run = _Run(store, tiers, writer, progress, trace, machine, predicted)
        metrics = _carry_out(job, run)
    as_ended = _predicted_as_ended(job, run, metrics["generated_tokens"])
    return {**metrics, "predicted_tokens_per_s_as_ended": as_ended}


def _carry_out(job: _Job, run: _Run) -> dict[str, Any]:
    """Carry the plan out on open tiers; the writer takes completions as sequences end, and ends with the last."""
    chosen = job.plan.layout, job.asked.model.dtype, run.machine
    widened_from, products = float32_from(*chosen), host_products(*chosen)
    run.progress.notice(expectation.loading(job.plan.layout))
    session = Session(
        layout=job.plan.layout,
        tiers=run.tiers,
        model=job.asked.model,
        kv_codec=job.asked.codecs.kv_cache,
        store=run.store,
        prompts=job.asked.arrays(),
        source=job.asked.source(),
        float32_from=widened_from,
        products=products,
        trace=FoldedTrace if run.trace is None else Trace,
    )
    with closing(session):
        batcher = _batcher(job)
        run.progress.notice(_first_prompts(job, run.predicted_tokens_per_s))
        run.times = _run_steps(session, batcher, job, run)
        run.writer.finish()
        if run.trace is not None:
            session.trace.write(run.trace, {lane: _process(lane, job.plan) for lane in session.lanes})
        return collect(
            layout=job.plan.layout,
            tiers=run.tiers,
            lanes=session.trace.lanes(session.lanes),
            times=run.times,
            prompt_tokens=sum(job.planner.workload.prompt_tokens),
            first_tokens=run.first_tokens,
            generated_tokens=batcher.generated_tokens,
            predicted_tokens_per_s=run.predicted_tokens_per_s,
            float32_from=widened_from,
            products=products,
        )


def _run_steps(session: Session, batcher: Batcher, job: _Job, run: _Run) -> list[StepTime]:
    """Raises NotFiniteError in the name of the prompt."""
    try:
        return session.run(batcher, _on_step(batcher, job, run))
    except NotFiniteError as error:
        raise error.at(f"prompt {job.asked.prompts[error.sequence].custom_id!r}") from error


def _first_prompts(job: _Job, predicted_tokens_per_s: float | None) -> str:
    """What the first step computes, of whose end the progress tells first."""
    step = _batcher(job).next_step()
    assert step is not None, "there are prompts"
    if predicted_tokens_per_s is None:
        return expectation.first_prompts(step)
    job_s = sum(job.planner.workload.new_tokens) / predicted_tokens_per_s
    return expectation.first_prompts_predicted(step, job.plan.layout, job.planner.predictor(), job_s)


def _predicted_as_ended(job: _Job, run: _Run, generated_tokens: int) -> float | None:
    """The prediction made again for the steps that the run came to: no plan knows which sequences end early. None
    where there is no prediction, or the job is too long to be simulated step by step.
    """
    workload = job.planner.workload
    if run.predicted_tokens_per_s is None or generated_tokens == sum(workload.new_tokens):
        return run.predicted_tokens_per_s

    def predict() -> float | None:
        seconds = job.planner.predictor().seconds(job.plan.layout, [time.step for time in run.times])
        return generated_tokens / seconds if seconds else None

    return _if_known(predict, run.progress)


def _batcher(job: _Job) -> Batcher:
    workload = job.planner.workload
    return Batcher(
        workload.prompt_tokens,
        max_new_tokens=workload.new_tokens,
        eos_token_ids=job.asked.eos_token_ids,
        gpu_batch_size=job.plan.policy.gpu_batch_size,
        num_gpu_batches=job.plan.policy.num_gpu_batches,
    )


def _on_step(batcher: Batcher, job: _Job, run: _Run) -> OnStep:
    begin = time.perf_counter()

    def on_step(step: Step, finished: Sequence[FinishedSequence]) -> None:
        for sequence in finished:
            run.writer.add(sequence)
            run.first_tokens += bool(sequence.token_ids)
        earlier, pending = run.writer.earlier, len(job.asked.prompts)
        if finished or batcher.finished_sequences < pending:  # a step of surplus tokens only is no progress
            tokens, seconds = batcher.generated_tokens, time.perf_counter() - begin
            run.progress.step(JobProgress(run.writer.done, earlier + pending, tokens, seconds, earlier))

    return on_step


def _process(lane: str, plan: Plan) -> str:
    """What a lane's events are filed under in a trace: its tier."""
    if lane == ATTENTION_LANE:
        return plan.layout.attention.tier
    tier = lane.rpartition(".")[0]
    return tier or plan.layout.device.name
