"""From a recipe file and the command line's `--set` to a `Recipe`, or to everything that is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flexflow_engine.declared.policies import check_problems
from flexflow_engine.errors import PluginError, ProblemsError, RecipeError
from flexflow_engine.jobs.document import Document, read_document
from flexflow_engine.jobs.overrides import apply_overrides
from flexflow_engine.jobs.paths import expand_home
from flexflow_engine.jobs.problems import Problems, Section
from flexflow_engine.jobs.recipe import (
    CodecRecipe,
    CodecsRecipe,
    Generate,
    ModelRecipe,
    Recipe,
    SchedulerRecipe,
    Score,
    SyntheticPrompts,
    TierRecipe,
    Workload,
)
from flexflow_engine.jobs.references import SYNTHETIC, is_hub_id
from flexflow_engine.jobs.schema import ModelSection, RecipeDocument, WorkloadSection
from flexflow_engine.plugins import Registry


def load_recipe(path: Path, overrides: Sequence[str], registry: Registry) -> Recipe:
    """Read, change and check a recipe; touches no device and reads no weight.

    A relative `prompts` or local `checkpoint` is looked for beside the recipe, a plugin's path in the working
    directory. Raises ProblemsError with every problem of the recipe and the overrides.
    """
    document, problems = _read(path, overrides)
    parsed = problems.validate(RecipeDocument, document)
    tier_options = _read_tiers(document, registry, problems)
    codecs = _read_codecs(document, registry, problems)
    scheduler_options = _read_scheduler(document, registry, problems)
    _check_model(document, registry, problems)
    if parsed is None:
        _check_paths(document, path.parent, problems)
    else:
        model = _model(parsed.model, path.parent, problems)
        workload = _workload(parsed.workload, path.parent, problems)
    problems.raise_any()
    assert parsed is not None, "what does not validate is a problem"
    return Recipe(
        name=parsed.name,
        model=model,
        tiers=_tiers(parsed, tier_options),
        codecs=CodecsRecipe(**codecs),
        scheduler=SchedulerRecipe(plugin=parsed.scheduler.plugin, options=scheduler_options),
        workload=workload,
    )


def _read(path: Path, overrides: Sequence[str]) -> tuple[Document, Problems]:
    try:
        document, found = apply_overrides(_spread_codecs(read_document(path)), overrides)
    except RecipeError as error:
        raise ProblemsError([error]) from error
    return _spread_codecs(_spread_synthetic(document)), Problems(path, found)


def _spread_synthetic(document: Document) -> Document:
    """`prompts: {synthetic: …}` means `synthetic: …`."""
    workload = _section(document, "workload")
    prompts = workload.get("prompts")
    if not isinstance(prompts, dict) or list(prompts) != ["synthetic"] or "synthetic" in workload:
        return document
    rest = {key: value for key, value in workload.items() if key != "prompts"}
    return {**document, "workload": {**rest, **prompts}}


def _spread_codecs(document: Document) -> Document:
    """`weights: NAME` means `weights: {plugin: NAME}`."""
    codecs = _section(document, "codecs")
    spread = {key: {"plugin": value} if isinstance(value, str) else value for key, value in codecs.items()}
    return {**document, "codecs": spread} if spread else document


def _read_codecs(document: Document, registry: Registry, problems: Problems) -> dict[str, CodecRecipe]:
    codecs = {}
    for tensor_class in ("weights", "kv_cache"):
        section = _section(_section(document, "codecs"), tensor_class) or {"plugin": "none"}
        plugin, key = section.get("plugin"), f"codecs.{tensor_class}"
        if not isinstance(plugin, str):
            continue
        try:
            codec = registry.codec(plugin)
        except PluginError as error:
            problems.take(error, key)
            continue
        if tensor_class == "kv_cache" and codec.compresses:
            _refuse_compression(plugin, key, registry, problems)
        rest = {option: value for option, value in section.items() if option != "plugin"}
        options = problems.options(codec.Options, rest, key, ("plugin",))
        codecs[tensor_class] = CodecRecipe(plugin=plugin, options=options)
    return codecs


def _refuse_compression(plugin: str, key: str, registry: Registry, problems: Problems) -> None:
    able = [name for name in registry.names("codec") if not registry.codec(name).compresses]
    problems.add(
        f"{plugin} compresses the files of a weight store, and pages of a cache are rewritten while the job runs",
        key,
        f"choose one of {', '.join(able)}",
    )


def _read_tiers(document: Document, registry: Registry, problems: Problems) -> dict[str, Any]:
    """Each tier's options, by the recipe's name for it."""
    options: dict[str, Any] = {}
    for index, (name, section) in enumerate(_section(document, "tiers").items()):
        if isinstance(section, dict) and isinstance(plugin := section.get("plugin"), str):
            options[name] = _read_tier(name, plugin, section, registry, problems)
            if index == 0:
                _check_computes(name, plugin, registry, problems)
    return options


def _read_tier(name: str, plugin: str, section: Document, registry: Registry, problems: Problems) -> Any:
    key = f"tiers.{name}"
    try:
        tier = registry.tier(plugin)
    except PluginError as error:
        return problems.take(error, f"{key}.plugin")
    rest = {option: value for option, value in section.items() if option not in ("plugin", "budget")}
    return problems.options(tier.Options, rest, key, ("plugin", "budget"))


def _check_computes(name: str, plugin: str, registry: Registry, problems: Problems) -> None:
    if plugin in registry.names("tier") and not registry.tier(plugin).computes:
        able = [tier for tier in registry.names("tier") if registry.tier(tier).computes]
        what = f"the first tier is where the model computes, and the {plugin} tier can't"
        problems.add(what, f"tiers.{name}.plugin", f"begin with one of {', '.join(able)}")


def _read_scheduler(document: Document, registry: Registry, problems: Problems) -> Any:
    section = _section(document, "scheduler")
    if not isinstance(plugin := section.get("plugin"), str):
        return None
    try:
        scheduler = registry.scheduler(plugin)
    except PluginError as error:
        return problems.take(error, "scheduler.plugin")
    rest = {option: value for option, value in section.items() if option != "plugin"}
    options = problems.options(scheduler.Options, rest, "scheduler", ("plugin",))
    if options is not None and (tiers := tuple(_section(document, "tiers"))):
        try:
            found = check_problems(scheduler(options).problems(tiers), plugin)
        except PluginError as error:
            return problems.take(error, "scheduler.plugin")
        for problem in found:
            problems.add(problem, "scheduler")
    return options


def _check_model(document: Document, registry: Registry, problems: Problems) -> None:
    plugin = _section(document, "model").get("plugin")
    try:
        if isinstance(plugin, str):
            registry.model(plugin)
    except PluginError as error:
        problems.take(error, "model.plugin")


def _check_paths(document: Document, folder: Path, problems: Problems) -> None:
    """What can be said of a recipe's files although other parts of it are wrong."""
    if model := _valid(ModelSection, document.get("model")):
        _model(model, folder, problems)
    if workload := _valid(WorkloadSection, document.get("workload")):
        _workload(workload, folder, problems)


def _valid(section: type[Section], document: object) -> Section | None:
    """A section that is right by itself; what is wrong with another has been told."""
    try:
        return section.model_validate_json(json.dumps(document), strict=True)
    except ValidationError:
        return None


def _model(section: ModelSection, folder: Path, problems: Problems) -> ModelRecipe:
    checkpoint = section.checkpoint
    local, synthetic = folder / expand_home(checkpoint), checkpoint.startswith(SYNTHETIC)
    if local.is_dir() and not synthetic:
        checkpoint = str(local.resolve())
    elif not (synthetic or is_hub_id(checkpoint)):
        problems.add(f"there is no folder {local}", "model.checkpoint", "give a folder, a hub id or synthetic:NAME")
    return ModelRecipe(plugin=section.plugin, checkpoint=checkpoint, dtype=section.dtype)


def _workload(section: WorkloadSection, folder: Path, problems: Problems) -> Workload:
    synthetic = section.synthetic
    prompts = folder / expand_home(section.prompts or "")
    if (section.prompts is None) == (synthetic is None):
        how_many = "neither `prompts` nor `synthetic` is" if synthetic is None else "both `prompts` and `synthetic` are"
        problems.add(f"{how_many} given", "workload", "give exactly one")
    elif synthetic is None and not prompts.is_file():
        problems.add(f"there is no file {prompts}", "workload.prompts")
    return Workload(
        prompts=SyntheticPrompts(**synthetic.model_dump()) if synthetic else prompts.resolve(),
        task=_score(section, problems) if section.task == "score" else _generate(section, problems),
    )


def _generate(section: WorkloadSection, problems: Problems) -> Generate:
    if section.max_new_tokens is None:
        problems.add("`max_new_tokens` is missing", "workload.max_new_tokens")
    return Generate(
        max_new_tokens=section.max_new_tokens or 0,
        ignore_eos=bool(section.ignore_eos) or section.synthetic is not None,
    )


def _score(section: WorkloadSection, problems: Problems) -> Score:
    if section.synthetic is not None:
        problems.add("synthetic prompts have no completions to score", "workload.task", "give a file of `prompts`")
    for key in ("max_new_tokens", "ignore_eos"):
        if getattr(section, key) is not None:
            problems.add("a job that scores generates nothing", f"workload.{key}", "leave it out")
    return Score()


def _tiers(parsed: RecipeDocument, options: Mapping[str, Any]) -> tuple[TierRecipe, ...]:
    return tuple(
        TierRecipe(name=name, plugin=section.plugin, budget_bytes=section.budget, options=options[name])
        for name, section in parsed.tiers.items()
    )


def _section(document: Document, key: str) -> Document:
    """A part of the document, empty where it is missing or no mapping; validation tells that."""
    section = document.get(key)
    return section if isinstance(section, dict) else {}
