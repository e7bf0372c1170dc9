"""What would keep runs from working on this machine or make them slow, with what would help."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.sizes import format_size
from flexflow_engine.abc.tier import HOST
from flexflow_engine.checkpoint.room import StoreRoom
from flexflow_engine.engine import recipe_checkpoint, recipe_codecs, recipe_store_room
from flexflow_engine.errors import FlexFlowError, ProblemsError
from flexflow_engine.jobs.recipe import Recipe
from flexflow_engine.jobs.references import is_hub_id
from flexflow_engine.planning.chosen_tiers import named_tiers
from flexflow_engine.planning.profile.installed import default_codec, tiers_by_default
from flexflow_engine.planning.profile.machine import Machine
from flexflow_engine.planning.profile.needs import TierChoice
from flexflow_engine.plugins import Registry
from flexflow_engine.user_cache import user_cache

State = Literal["fine", "note", "fails"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. A note is told of what a run does without, or does slowly; what fails stops it."""

    about: str
    state: State = "fine"
    found: str
    help: str = ""
    """What would work instead; empty where nothing is wrong, or `found` says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What is looked at: a recipe's own choices, or whatever is installed."""

    tiers: Sequence[TierChoice]
    """Fastest first."""
    budgets: Mapping[str, int]
    """Of tiers, by name; none without a recipe."""
    codecs: Sequence[Codec]
    schedulers: Sequence[str]
    refused: State
    """What it means that one of them does not work here."""


def diagnose(registry: Registry, recipe: Recipe | None) -> Iterator[Finding]:
    """Look at this machine, and at what the recipe asks of it; without one, at whatever is installed.

    Reads no weights, and leaves no folder that was not there. Tiers are opened, as a run would do first.
    """
    subject = _installed(registry) if recipe is None else _chosen(registry, recipe)
    yield from _machine()
    yield from _broken_plugins(registry)
    working = list[TierChoice]()
    for choice in subject.tiers:
        found = list(_tier(choice, subject.refused))
        working += [choice] if any(finding.state == "fine" for finding in found) else []
        yield from found
    yield from _room(working, subject.budgets)
    for name in subject.schedulers:
        yield from _scheduler(registry, name, subject.refused)
    for codec in subject.codecs:
        yield from _codec(codec, working)
    if recipe is not None:
        checkpoint = list(_checkpoint(registry, recipe))
        yield from checkpoint
        if not any(finding.state == "fails" for finding in checkpoint):
            yield from _store(registry, recipe)


def _installed(registry: Registry) -> _Subject:
    return _Subject(
        tiers=tuple(tiers_by_default(registry, user_cache())),
        budgets={},
        codecs=[default_codec(registry, name) for name in registry.names("codec")],
        schedulers=registry.names("scheduler"),
        refused="note",
    )


def _chosen(registry: Registry, recipe: Recipe) -> _Subject:
    codecs = recipe_codecs(recipe, registry)
    return _Subject(
        tiers=named_tiers(recipe, registry),
        budgets={tier.name: tier.budget_bytes for tier in recipe.tiers},
        codecs=list(dict.fromkeys((codecs.weights, codecs.kv_cache))),
        schedulers=(recipe.scheduler.plugin,),
        refused="fails",
    )


def _machine() -> Iterator[Finding]:
    machine = Machine.here()
    _, python, *versions = machine.versions
    yield Finding(about="machine", found=str(machine))
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "torch without CUDA"
    yield Finding(about="versions", found=", ".join((f"Python {python}", *versions, cuda)))


def _broken_plugins(registry: Registry) -> Iterator[Finding]:
    for row in registry.listing():
        if row.error:
            what = f"{row.kind} {row.name} of {row.distribution} can't be used: {row.error}"
            yield Finding(about="plugins", state="note", found=what)


def _tier(choice: TierChoice, refused: State) -> Iterator[Finding]:
    about = f"tier {choice.name}"
    try:
        choice.tier_class.check_available(choice.options)
        folder = choice.tier_class.store_root(choice.options)
        with _nothing_made(folder) if folder else nullcontext():
            tier = choice.tier_class(label=choice.name, budget_bytes=0, options=choice.options)
            with closing(tier):
                notices = tier.notices
    except FlexFlowError as error:
        yield from _told(about, error, refused)
        return
    yield Finding(about=about, found=f"{choice.tier_class.name} is available")
    for notice in notices:
        yield Finding(about=about, state="note", found=notice)


@contextmanager
def _nothing_made(folder: Path) -> Iterator[None]:
    """Folders around `folder` and in it that are there after the body and were not before are removed, unless somebody
    has put a file there. Nobody else may be making some.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    known = frozenset() if missing else frozenset(folder.iterdir())
    try:
        yield
    finally:
        made = missing[-1:] or [path for path in folder.iterdir() if path not in known]
        for path in sorted((path for top in made for path in (top, *top.rglob("*"))), reverse=True):
            with suppress(OSError):  # it is not empty
                path.rmdir()


def _room(tiers: Sequence[TierChoice], budgets: Mapping[str, int]) -> Iterator[Finding]:
    """Budgets against what is free; tiers in the host's memory share it."""
    sharing = defaultdict[str, list[TierChoice]](list)
    for choice in tiers:
        sharing[HOST if choice.tier_class.memory == HOST else choice.name].append(choice)
    for choices in sharing.values():
        names = ", ".join(choice.name for choice in choices)
        try:
            free = choices[0].tier_class.free_bytes(choices[0].options)
        except FlexFlowError as error:
            yield from _told(f"room of {names}", error, "note")
            continue
        if free is not None:
            yield _room_of(names, free, sum(budgets.get(choice.name, 0) for choice in choices))


def _room_of(names: str, free: int, asked: int) -> Finding:
    about, found = f"room of {names}", f"{format_size(free)} free"
    if asked:
        found += f", budgets of {format_size(asked)}"
    if asked <= free:
        return Finding(about=about, found=found)
    help_ = "budgets are limits: `run --dry-run` tells how much of them a plan takes"
    return Finding(about=about, state="note", found=found, help=help_)


def _scheduler(registry: Registry, name: str, refused: State) -> Iterator[Finding]:
    about = f"scheduler {name}"
    try:
        registry.scheduler(name).check_available()
    except FlexFlowError as error:
        yield from _told(about, error, refused)
    else:
        solver = registry.scheduler(name).solver()
        yield Finding(about=about, found=f"it works, with {solver}" if solver else "it works")


def _codec(codec: Codec, tiers: Sequence[TierChoice]) -> Iterator[Finding]:
    """How fast it can be where models may compute."""
    memories = sorted({tier.tier_class.memory for tier in tiers if tier.tier_class.computes and tier.tier_class.memory})
    notices = [notice for memory in memories for notice in codec.notices(memory)]
    for notice in notices:
        yield Finding(about=f"codec {codec.name}", state="note", found=notice)
    if memories and not notices:
        yield Finding(about=f"codec {codec.name}", found=f"ok on {' and '.join(memories)}")


def _checkpoint(registry: Registry, recipe: Recipe) -> Iterator[Finding]:
    about, reference = "checkpoint", recipe.model.checkpoint
    try:
        checkpoint = recipe_checkpoint(recipe, registry)
        found = f"{reference}, {checkpoint.model.config.num_layers} layers"
        if is_hub_id(reference):
            yield _of_hub(about, found, fetched=checkpoint.is_fetched)
            return
        checkpoint.tensor_names()
    except FlexFlowError as error:
        yield from _told(about, error, "fails")
    else:
        yield Finding(about=about, found=found)


def _of_hub(about: str, found: str, *, fetched: bool) -> Finding:
    if fetched:
        return Finding(about=about, found=f"{found}, in the Hugging Face cache")
    help_ = "an import fetches it, where the hub has it"
    return Finding(about=about, state="note", found=f"{found}, not fetched yet", help=help_)


def _store(registry: Registry, recipe: Recipe) -> Iterator[Finding]:
    """The room that it takes, unless it is there."""
    about = "weight store"
    try:
        room = recipe_store_room(recipe, registry)
        finding = _room_of_store(about, room, room.free_nbytes)
    except FlexFlowError as error:
        yield from _told(about, error, "fails")
    else:
        yield finding


def _room_of_store(about: str, room: StoreRoom, free: int) -> Finding:
    found, there = f"{format_size(room.nbytes)} under {room.root}", f"{format_size(free)} free"
    if room.imported:
        return Finding(about=about, found=f"{found}, imported")
    if room.nbytes <= free:
        return Finding(about=about, found=f"{found}, imported once; {there}")
    help_ = "free some space there, or choose a path on a larger disk"
    if room.beside_others:
        help_ = f"what stores there have of it already is not written again; else {help_}"
        return Finding(about=about, state="note", found=f"{found} at most, and {there}", help=help_)
    return Finding(about=about, state="fails", found=f"{found}, and {there}", help=help_)


def _told(about: str, error: FlexFlowError, state: State) -> Iterator[Finding]:
    for problem in error.problems if isinstance(error, ProblemsError) else (error,):
        found = f"{problem.where}: {problem.what}" if problem.where else problem.what
        yield Finding(about=about, state=state, found=found, help=problem.fix)
