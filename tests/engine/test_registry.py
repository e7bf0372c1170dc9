"""The registry, with distributions that nobody installed: a folder with metadata on sys.path is one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexflow_engine.errors import PluginError
from flexflow_engine.plugins import Registry

Install = Callable[..., None]

GOOD = """
from dataclasses import dataclass
from flexflow_engine import hookimpl
from flexflow_engine.abc.scheduler import Scheduler

@dataclass(frozen=True)
class Options:
    hurry: bool = False

class Patient(Scheduler):
    name = "patient"
    Options = Options

    def choose(self, request):
        raise AssertionError

@hookimpl
def flexflow_register_schedulers():
    return [Patient]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    installed: list[str] = []

    def install_source(distribution: str, source: str, entry_point: str = "main") -> None:
        folder = tmp_path / distribution
        metadata = folder / f"{distribution}-3.2.1.dist-info"
        metadata.mkdir(parents=True)
        module = f"{distribution}_module"
        (folder / f"{module}.py").write_text(source)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 3.2.1\n")
        (metadata / "entry_points.txt").write_text(f"[flexflow_engine]\n{entry_point} = {module}\n")
        monkeypatch.syspath_prepend(folder)
        installed.append(module)

    yield install_source
    for module in installed:
        sys.modules.pop(module, None)


def error_of(registry: Registry, distribution: str) -> str:
    (error,) = (row.error for row in registry.listing() if row.distribution == distribution)
    assert error is not None
    return error


def test_the_built_in_plugins_come_through_their_entry_points() -> None:
    registry = Registry.load()
    assert set(registry.names("tier")) >= {"cpu", "cuda", "pinned", "zarr"}
    assert "opt" in registry.names("model")
    assert "none" in registry.names("codec")
    assert "fixed" in registry.names("scheduler")


def test_a_plugin_of_another_distribution_is_found_by_name(install: Install) -> None:
    install("good_dist", GOOD)
    registry = Registry.load()
    assert registry.scheduler("patient").name == "patient"
    (row,) = (row for row in registry.listing() if row.distribution == "good_dist")
    assert (row.kind, row.name, row.module, row.version) == ("scheduler", "patient", "good_dist_module", "3.2.1")


def test_the_listing_is_sorted_and_has_no_error_for_what_works() -> None:
    rows = Registry.load().listing()
    assert [(row.kind, row.name) for row in rows] == sorted((row.kind, row.name) for row in rows)
    assert not any(row.error for row in rows if row.distribution == "flexflow-engine")


def test_an_unknown_name_lists_the_known_ones_and_the_near_miss() -> None:
    with pytest.raises(PluginError, match=r"unknown tier plugin 'pined'; did you mean `pinned`\?; known: .*zarr"):
        Registry.load().tier("pined")


def test_a_broken_import_takes_nothing_down_and_is_told_to_who_misses_a_plugin(install: Install) -> None:
    install("broken_dist", "import a_library_nobody_has")
    registry = Registry.load()
    assert "cpu" in registry.names("tier")
    assert "a_library_nobody_has" in error_of(registry, "broken_dist")
    with pytest.raises(PluginError, match="`main` of broken_dist could not be loaded: ModuleNotFoundError"):
        registry.scheduler("patient")


def test_a_misspelt_hook_is_an_error_of_its_plugin_alone(install: Install) -> None:
    install("misspelt_dist", GOOD.replace("flexflow_register_schedulers", "flexflow_register_shedulers"))
    install("good_dist", GOOD)
    registry = Registry.load()
    assert "flexflow_register_shedulers" in error_of(registry, "misspelt_dist")
    assert registry.scheduler("patient").__module__ == "good_dist_module"


def test_a_hook_without_its_marker_is_an_error(install: Install) -> None:
    install("unmarked_dist", GOOD.replace("@hookimpl", ""))
    assert "not marked with `flexflow_engine.hookimpl`" in error_of(Registry.load(), "unmarked_dist")


def test_a_hook_that_raises_is_an_error_of_its_plugin(install: Install) -> None:
    install("raising_dist", GOOD.replace("return [Patient]", "raise RuntimeError('no licence')"))
    assert "RuntimeError: no licence" in error_of(Registry.load(), "raising_dist")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('name = "patient"', 'name = "patient"\n    api_version = 99', "version 99 of the scheduler API"),
        ('name = "patient"', "", "no `name`"),
        ("def choose", "def chose", "does not implement choose"),
        ("    Options = Options", "", "`Options` is no dataclass"),
        ("return [Patient]", "return [Options]", "no subclass of flexflow_engine.abc.scheduler.Scheduler"),
        ("return [Patient]", "return ['patient']", "no subclass of flexflow_engine.abc.scheduler.Scheduler"),
    ],
)
def test_a_class_that_breaks_the_contract_is_listed_and_not_served(
    install: Install, old: str, new: str, error: str
) -> None:
    install("odd_dist", GOOD.replace(old, new))
    registry = Registry.load()
    assert error in error_of(registry, "odd_dist")
    with pytest.raises(PluginError, match="unknown scheduler plugin"):
        registry.scheduler("patient")


def test_two_plugins_of_one_name_raise_naming_both_modules(install: Install) -> None:
    install("first_dist", GOOD)
    install("second_dist", GOOD)
    with pytest.raises(PluginError, match="first_dist_module and second_dist_module"):
        Registry.load()


@pytest.mark.parametrize("blocked", ["second_dist", "other"])
def test_blocking_a_distribution_or_an_entry_point_leaves_it_alone(install: Install, blocked: str) -> None:
    install("first_dist", GOOD)
    install("second_dist", GOOD, entry_point="other")
    registry = Registry.load(blocked=[blocked])
    assert registry.scheduler("patient").__module__ == "first_dist_module"
    assert "blocked" in error_of(registry, "second_dist")
