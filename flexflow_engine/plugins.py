"""The registry: every tier, codec, model and scheduler class, by name.

A plugin is an entry point of the group `flexflow_engine`; its module's hooks return classes. The engine's own
plugins come the same way as anyone's. What fails to load is remembered with its error and takes nothing else down:
it matters only to somebody who asks for a name that nobody has, or that two have.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Literal

import pluggy

from flexflow_engine import hookspecs
from flexflow_engine.abc import codec, model, scheduler, tier
from flexflow_engine.abc.near_miss import near_miss
from flexflow_engine.declared.classes import Kind, class_problem
from flexflow_engine.errors import PluginError
from flexflow_engine.hookspecs import NAME

BLOCK_VARIABLE = f"{NAME.upper()}_BLOCK"
"""Environment variable that the command line reads: names of entry points or distributions not to load."""

BROKEN = (Exception, SystemExit)
"""What a plugin's module may raise: it is told to whoever misses the plugin."""

HOOKS: Mapping[Kind, str] = {
    "tier": "flexflow_register_tiers",
    "codec": "flexflow_register_codecs",
    "model": "flexflow_register_models",
    "scheduler": "flexflow_register_schedulers",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginRow:
    """One class that a plugin registered, or one plugin that registered none because of its error."""

    kind: Kind | Literal["entry point"]
    name: str
    module: str
    distribution: str
    version: str
    error: str | None = None


Loaded = tuple[PluginRow, type[Any] | None]
"""A row, with its class unless that can't be used."""


class Registry:
    """Built once, then only read."""

    def __init__(self, classes: Mapping[tuple[str, str], type[Any]], rows: tuple[PluginRow, ...]) -> None:
        self._classes = classes
        self._rows = rows

    @classmethod
    def load(cls, blocked: Collection[str] = ()) -> Registry:
        """Import every installed plugin.

        blocked: names of entry points or distributions that are left alone.
        """
        manager = pluggy.PluginManager(NAME)
        manager.add_hookspecs(hookspecs)
        found = [loaded for entry in _installed() for loaded in _load_entry(manager, entry, blocked)]
        classes: dict[tuple[str, str], type[Any]] = {}
        rows: list[PluginRow] = []
        for row, plugin_class in _without_clashes(found):
            rows.append(row)
            if plugin_class is not None:
                classes[row.kind, row.name] = plugin_class
        return cls(classes, tuple(rows))

    def tier(self, name: str) -> type[tier.Tier]:
        """Raises PluginError when there is none of that name; so do the three methods below."""
        return self._find("tier", name)

    def codec(self, name: str) -> type[codec.Codec]:
        return self._find("codec", name)

    def model(self, name: str) -> type[model.Model]:
        return self._find("model", name)

    def scheduler(self, name: str) -> type[scheduler.Scheduler]:
        return self._find("scheduler", name)

    def names(self, kind: Kind) -> tuple[str, ...]:
        """The names that can be asked for, sorted; not those that two classes have."""
        return tuple(sorted(name for of_kind, name in self._classes if of_kind == kind))

    def listing(self) -> tuple[PluginRow, ...]:
        """Everything found, broken plugins included, by kind and name."""
        return tuple(sorted(self._rows, key=lambda row: (row.kind, row.name, row.module)))

    def _find(self, kind: Kind, name: str) -> type[Any]:
        found = self._classes.get((kind, name))
        if found is not None:
            return found
        for row in self._rows:
            if (row.kind, row.name) == (kind, name):
                raise PluginError(f"the {kind} plugin {name!r} can't be used: {row.error}")
        raise PluginError(f"unknown {kind} plugin {name!r}", fix="; ".join(self._advice(kind, name)))

    def _advice(self, kind: Kind, name: str) -> Iterator[str]:
        known = self.names(kind)
        if "did you mean" in (hint := near_miss(name, known)):
            yield hint
        yield f"known: {', '.join(known) or 'none'}"
        for row in self._rows:
            if row.error and row.kind in (kind, "entry point"):
                yield f"{row.kind} `{row.name}` of {row.distribution} could not be loaded: {row.error}"


def unknown_blocked(blocked: Collection[str]) -> Iterator[str]:
    """A line for each name to block that is no entry point's and no distribution's."""
    if not blocked:  # to look for what is installed takes a while
        return
    known = sorted({name for entry in _installed() for name in (entry.name, _distribution(entry))})
    for name in blocked:
        if name not in known:
            yield f"{BLOCK_VARIABLE}: nothing is blocked by {name!r}; {near_miss(name, known)}"


def _installed() -> list[EntryPoint]:
    return sorted(entry_points(group=NAME), key=lambda entry: (_distribution(entry), entry.name))


def _load_entry(manager: pluggy.PluginManager, entry: EntryPoint, blocked: Collection[str]) -> list[Loaded]:
    """The rows of one entry point, each with its class unless that can't be used."""
    if {entry.name, _distribution(entry)} & set(blocked):
        return [(_row("entry point", entry.name, entry, f"blocked by {BLOCK_VARIABLE}"), None)]
    try:
        registered = _register(manager, entry)
    except BROKEN as error:
        return [(_row("entry point", entry.name, entry, f"{type(error).__name__}: {error}"), None)]
    return [_checked(kind, candidate, entry) for kind, candidate in registered]


def _register(manager: pluggy.PluginManager, entry: EntryPoint) -> list[tuple[Kind, Any]]:
    module = entry.load()
    name = f"{_distribution(entry)}:{entry.name}"
    try:
        manager.register(module, name=name)
        manager.check_pending()
        _check_unmarked(module)
        return [(kind, candidate) for kind in HOOKS for candidate in _call(manager, kind, module)]
    except BROKEN:
        if manager.has_plugin(name):
            manager.unregister(name=name)
        raise


def _call(manager: pluggy.PluginManager, kind: Kind, module: ModuleType) -> Iterator[Any]:
    for implementation in getattr(manager.hook, HOOKS[kind]).get_hookimpls():
        if implementation.plugin is module:
            yield from _returned(HOOKS[kind], implementation.function)


def _returned(hook: str, function: Callable[[], Any]) -> list[Any]:
    """The classes that a hook gives. Raises PluginError, which names it, where it fails or gives something else."""
    try:
        classes = function()
        if isinstance(classes, Iterable) and not isinstance(classes, type | str):
            return list(classes)
    except BROKEN as error:
        raise PluginError(f"{hook} raised {type(error).__name__}: {error}") from error
    raise PluginError(f"{hook} gave {classes!r} and no list of classes")


def _check_unmarked(module: ModuleType) -> None:
    """Find the hook that pluggy can't see, because its author forgot the marker."""
    for name, member in vars(module).items():
        marked = hasattr(member, f"{NAME}_impl")
        if name.startswith("flexflow_register") and inspect.isfunction(member) and not marked:
            hint = "" if name in HOOKS.values() else near_miss(name, HOOKS.values())
            raise PluginError(f"{name} is not marked with `flexflow_engine.hookimpl`", where=module.__name__, fix=hint)


def _checked(kind: Kind, candidate: Any, entry: EntryPoint) -> Loaded:
    problem = class_problem(kind, candidate)
    name = getattr(candidate, "name", None)
    module = getattr(candidate, "__module__", entry.module)
    row = _row(kind, name if name and isinstance(name, str) else repr(candidate), entry, problem)
    return replace(row, module=module), None if problem else candidate


def _without_clashes(found: Iterable[Loaded]) -> Iterator[Loaded]:
    """Classes that share a name can't be used, and are told with each other. A class that two distributions register is
    the first one's.
    """
    classes: dict[tuple[str, str], dict[type[Any], PluginRow]] = defaultdict(dict)
    for row, plugin_class in found:
        if plugin_class is None:
            yield row, None
        else:
            classes[row.kind, row.name].setdefault(plugin_class, row)
    for (kind, name), rows in classes.items():
        where = ", ".join(f"{one.__module__}.{one.__qualname__} of {row.distribution}" for one, row in rows.items())
        clash = (
            f"{len(rows)} {kind} plugins have the name {name!r}: {where}; uninstall one, or block it: {BLOCK_VARIABLE}"
        )
        for plugin_class, row in rows.items():
            yield (row, plugin_class) if len(rows) == 1 else (replace(row, error=clash), None)


def _row(kind: Kind | Literal["entry point"], name: str, entry: EntryPoint, error: str | None) -> PluginRow:
    version = entry.dist.version if entry.dist else ""
    distribution = _distribution(entry)
    return PluginRow(kind=kind, name=name, module=entry.module, distribution=distribution, version=version, error=error)


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else ""
