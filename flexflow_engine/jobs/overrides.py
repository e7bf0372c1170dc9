"""`--set dotted.path=value`: what a command line changes in a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexflow_engine.errors import FlexFlowError, RecipeError
from flexflow_engine.jobs.document import Document, parse_yaml

PLUGIN_KEY = ("scheduler", "plugin")


@dataclass(frozen=True, slots=True)
class Override:
    """One `--set`."""

    text: str
    path: tuple[str, ...]
    value: Any

    @classmethod
    def parse(cls, text: str) -> Override:
        """Raises RecipeError when it is not `dotted.path=value` with a YAML value."""
        dotted, equals, value = text.partition("=")
        path = tuple(dotted.strip().split("."))
        if not equals or not all(path):
            raise RecipeError("not of the form dotted.path=value", where=_where(text), fix="try tiers.gpu.budget=8GiB")
        return cls(text, path, parse_yaml(value, where=_where(text)))


def apply_overrides(document: Document, texts: Sequence[str]) -> tuple[Document, list[FlexFlowError]]:
    """The changed document, and what was wrong with which override; a wrong one changes nothing, and `document` stays.

    `scheduler.plugin` is set before the rest, so that the keys it drops are the recipe's and never another `--set`'s.
    """
    changed = document
    overrides, problems = _parse_all(texts)
    for override in sorted(overrides, key=lambda override: override.path != PLUGIN_KEY):
        try:
            changed = _applied(changed, override)
        except RecipeError as problem:
            problems.append(problem)
    return changed, problems


def _parse_all(texts: Sequence[str]) -> tuple[list[Override], list[FlexFlowError]]:
    overrides: list[Override] = []
    problems: list[FlexFlowError] = []
    for text in texts:
        try:
            overrides.append(Override.parse(text))
        except RecipeError as problem:
            problems.append(problem)
    return overrides, problems


def _applied(document: Document, override: Override) -> Document:
    """The changed document. What lies on the way is copied: an alias stands elsewhere for the same mapping."""
    changed = target = dict(document)
    for depth, key in enumerate(override.path[:-1], start=1):
        held = {} if target.get(key) is None else target[key]
        if not isinstance(held, dict):
            dotted = ".".join(override.path[:depth])
            raise RecipeError(f"`{dotted}` holds a value and no keys", where=_where(override.text))
        target[key] = dict(held)
        target = target[key]
    if override.path == PLUGIN_KEY and target.get("plugin") != override.value:
        target.clear()
    target[override.path[-1]] = override.value
    return changed


def _where(text: str) -> str:
    return f"--set {text}"
