"""The registry, with distributions that nobody installed: a folder with metadata on sys.path is one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from flexflow_engine.errors import PluginError
from flexflow_engine.plugins import Registry, unknown_blocked

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
    error = error_of(Registry.load(), "unmarked_dist")
    assert "flexflow_register_schedulers is not marked with `flexflow_engine.hookimpl`" in error
    assert "did you mean" not in error


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("raise KeyError('licence')", "flexflow_register_schedulers raised KeyError: 'licence'"),
        ("raise SystemExit(3)", "flexflow_register_schedulers raised SystemExit: 3"),
        ("return None", "flexflow_register_schedulers gave None and no list of classes"),
        ("return Patient", "flexflow_register_schedulers gave <class 'odd_dist_module.Patient'> and no list"),
    ],
)
def test_a_hook_that_raises_or_gives_no_list_is_an_error_of_its_plugin(install: Install, body: str, error: str) -> None:
    install("odd_dist", GOOD.replace("return [Patient]", body))
    assert error in error_of(Registry.load(), "odd_dist")


def test_a_module_that_exits_ends_nothing_but_itself(install: Install) -> None:
    install("leaving_dist", "raise SystemExit(3)")
    registry = Registry.load()
    assert "SystemExit: 3" in error_of(registry, "leaving_dist")
    assert "cpu" in registry.names("tier")


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
    with pytest.raises(PluginError, match="scheduler plugin 'patient'"):
        registry.scheduler("patient")


@pytest.mark.parametrize(
    ("kind", "member", "error"),
    [
        ("tier", "name = ''", "its `name` must be a word, and is ''"),
        ("tier", "name = 'two words'", "its `name` must be a word, and is 'two words'"),
        ("tier", "read_concurrency = 0", "its `read_concurrency` must be a whole number above 0, and is 0"),
        ("tier", "write_concurrency = 2.0", "its `write_concurrency` must be a whole number above 0, and is 2.0"),
        ("tier", "memory = 'tpu'", "its `memory` must be one of 'cpu', 'cuda' or None"),
        ("tier", "memory = 'cpu'", "it has `memory = 'cpu'` and no `tensor`"),
        ("tier", "reads_store = True", "it has `reads_store = True` and no `attach`"),
        ("tier", "notices = lambda self: ()", "its `notices` is a method and must be a property"),
        ("tier", "torch_device = lambda self: 'cpu'", "its `torch_device` is a method and must be a property"),
        ("codec", "key = lambda self: 'odd'", "its `key` is a method and must be a property"),
        ("codec", "decodes_in_kernels = True", "it has `decodes_in_kernels = True` and no `kernel_decoder`"),
        ("codec", "multiplies_integers = True", "it has `multiplies_integers = True` and no `integer_decoder`"),
        ("codec", "compresses = True", "it has `compresses = True` and no `compressor`"),
        ("model", "pass", "its `model_types` must be a tuple of words, and is None"),
        ("model", "model_types = 'odd'", "its `model_types` must be a tuple of words, and is 'odd'"),
    ],
)
def test_a_class_whose_attributes_make_no_sense_is_listed_and_not_served(
    install: Install, kind: str, member: str, error: str
) -> None:
    contract = kind.capitalize()
    source = f"""
from flexflow_engine import hookimpl
from flexflow_engine.abc.{kind} import {contract}

class Whole({contract}):
    name = "odd"

for name in Whole.__abstractmethods__:
    setattr(Whole, name, lambda *inputs: None)
Whole.__abstractmethods__ = frozenset()

class Odd(Whole):
    {member}

@hookimpl
def flexflow_register_{kind}s():
    return [Odd]
"""
    install("odd_dist", source)
    registry = Registry.load()
    assert error in error_of(registry, "odd_dist")
    assert "odd" not in registry.names(kind)  # type: ignore[arg-type]  # the table above has kinds


def test_two_plugins_of_one_name_are_an_error_of_who_asks_for_it_and_name_both(install: Install) -> None:
    install("first_dist", GOOD)
    install("second_dist", GOOD)
    registry = Registry.load()
    for distribution in ("first_dist", "second_dist"):
        error = error_of(registry, distribution)
        assert "first_dist_module.Patient of first_dist, second_dist_module.Patient of second_dist" in error
    assert "patient" not in registry.names("scheduler")
    assert registry.scheduler("fixed").name == "fixed"
    with pytest.raises(PluginError, match=r"can't be used: 2 scheduler plugins have the name 'patient'"):
        registry.scheduler("patient")


def test_a_class_that_two_distributions_register_is_listed_once(install: Install) -> None:
    install("first_dist", GOOD)
    install("second_dist", "from first_dist_module import Patient, flexflow_register_schedulers")
    registry = Registry.load()
    assert registry.scheduler("patient").__module__ == "first_dist_module"
    assert [row.distribution for row in registry.listing() if row.name == "patient"] == ["first_dist"]


@pytest.mark.parametrize("blocked", ["second_dist", "other"])
def test_blocking_a_distribution_or_an_entry_point_leaves_it_alone(install: Install, blocked: str) -> None:
    install("first_dist", GOOD)
    install("second_dist", GOOD, entry_point="other")
    registry = Registry.load(blocked=[blocked])
    assert registry.scheduler("patient").__module__ == "first_dist_module"
    assert "blocked" in error_of(registry, "second_dist")


def test_where_nothing_is_blocked_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched:
        """Asked by `importlib.metadata` for what is installed."""

        @staticmethod
        def find_spec(*args: object) -> None:
            """Has no module."""

        @staticmethod
        def find_distributions(*args: object) -> list[Distribution]:
            raise AssertionError

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Watched])
    with pytest.raises(AssertionError):
        list(unknown_blocked(["tiers"]))
    assert list(unknown_blocked([])) == []
