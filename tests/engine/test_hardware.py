"""Hardware profiles: curves, files that are right, and files that are wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexflow_engine.abc.hardware import Curve
from flexflow_engine.abc.policy import TierDescription
from flexflow_engine.abc.tier import Tier
from flexflow_engine.errors import HardwareError, ProblemsError
from flexflow_engine.planning.hardware import read_profile, write_profile
from flexflow_engine.planning.plan import describe_tiers
from flexflow_tiers.pinned import PinnedTier
from flexflow_tiers.zarr import ZarrTier
from profiles import link, profile

SHIPPED = sorted((Path(__file__).parents[2] / "recipes" / "hardware").glob("*.yaml"))
FILE = SHIPPED[0]


def described(tier: type[Tier], name: str) -> TierDescription:
    return describe_tiers({name: tier}, {name: 1})[0]


def problems_of(tmp_path: Path, document: Any) -> str:
    path = tmp_path / "machine.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    with pytest.raises(ProblemsError) as caught:
        read_profile(path)
    assert all(isinstance(problem, HardwareError) for problem in caught.value.problems)
    return str(caught.value)


def changed(*keys: str, value: Any) -> dict[str, Any]:
    """A shipped file with one key set."""
    document = part = yaml.safe_load(FILE.read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return dict(document)


def test_a_curve_goes_straight_between_logarithms_and_stays_level_beyond_its_ends() -> None:
    curve = Curve(((1, 10), (100, 1000)))
    assert curve.at(10) == pytest.approx(100)
    assert [curve.at(size) for size in (0.1, 1, 100, 1e9)] == pytest.approx([10, 10, 1000, 1000])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_machine_plans_for_every_built_in_tier(path: Path) -> None:
    machine = read_profile(path)
    assert machine.name == path.stem
    for tier in (PinnedTier, ZarrTier):
        assert machine.link(described(tier, "t"), "read").bytes_per_s > 0
        assert machine.link(described(tier, "t"), "write").bytes_per_s > 0
    assert {"group-int4", "group-int8"} <= machine.processor("cuda").codecs.keys()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_written_reads_as_the_same(path: Path, tmp_path: Path) -> None:
    machine = read_profile(path)
    write_profile(machine, tmp_path / "new" / "copy.yaml")
    assert read_profile(tmp_path / "new" / "copy.yaml") == machine


def test_a_tier_may_have_the_name_of_a_curves_field(tmp_path: Path) -> None:
    machine = profile(links={"points": link(1e6)})
    write_profile(machine, tmp_path / "copy.yaml")
    assert read_profile(tmp_path / "copy.yaml") == machine


def test_budgets_that_a_machine_does_not_have_are_told_by_plugin() -> None:
    machine = replace(profile(), capacity_bytes={"pinned": 100, "zarr": 1000, "cuda": 7})
    assert machine.lacking_bytes([("pinned", 60), ("pinned", 70), ("zarr", 1000), ("cpu", 5)]) == {"pinned": 30}


def test_a_tiers_own_name_comes_before_its_plugin() -> None:
    machine = profile(links={"pinned": link(1e6), "far": link(5e6)})
    assert machine.link(described(PinnedTier, "far"), "read").bytes_per_s == 5e6
    assert machine.link(described(PinnedTier, "near"), "read").bytes_per_s == 1e6


def test_what_a_profile_lacks_is_named_with_what_would_do() -> None:
    machine = read_profile(FILE)
    with pytest.raises(HardwareError, match=r"no processor that computes on tpu memory.*processors\.tpu"):
        machine.processor("tpu")
    incomplete = replace(profile(), links={})
    with pytest.raises(HardwareError, match=r"no link `zarr\.read`, and tier `disk` needs it.*`profile`"):
        incomplete.link(described(ZarrTier, "disk"), "read")


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("links", "pinned", "read", "latency"), 1e-5, r"unknown key `latency`; did you mean `latency_s`\?"),
        (("processors", "cuda", "mamory_bytes_per_s"), 1e9, "did you mean `memory_bytes_per_s`"),
        (("links", "pinned", "read", "bytes_per_s"), -1, "links.pinned.read.bytes_per_s"),
        (("links", "pinned", "read", "bytes_per_s"), 1e-300, "links.pinned.read.bytes_per_s"),
        (("links", "pinned", "read", "bytes_per_s"), "fast", "links.pinned.read.bytes_per_s"),
        (("links", "zarr", "raed"), {"bytes_per_s": 1e9, "latency_s": 0}, "links.zarr.raed"),
        (("processors", "cuda", "matmul_flops_per_s", "float16"), {"few": 1e12}, "'few' is no such size"),
        (("processors", "cuda", "decode_attention_bytes_per_s"), {"group-int4": 1e9}, "`none` is missing"),
        (("links", "zarr", "read", "beside"), {"links": 1.5}, "links.zarr.read.beside.links"),
        (("links", "zarr", "read", "beside"), {"links": float("nan")}, "links.zarr.read.beside.links"),
        (("host",), {"compile_task_s": 1e-5}, "`gather_row_s` is missing"),
    ],
)
def test_a_wrong_figure_is_told_with_its_place(
    tmp_path: Path, keys: tuple[str, ...], value: object, message: str
) -> None:
    told = problems_of(tmp_path, changed(*keys, value=value))
    assert str(tmp_path / "machine.yaml") in told
    assert re.search(message, told), told


def test_a_file_that_is_no_profile_at_all(tmp_path: Path) -> None:
    assert "a hardware file is a mapping" in problems_of(tmp_path, "just words")
    assert "line 2" in problems_of(tmp_path, "name: x\nlinks: [")
    assert "an alias refers to what it is part of" in problems_of(tmp_path, "name: &a [*a]")
    assert "nested too deeply" in problems_of(tmp_path, f"name: {'[' * 3000}{']' * 3000}")
    with pytest.raises(ProblemsError, match="the hardware file can't be read"):
        read_profile(tmp_path / "nowhere.yaml")


def test_a_profile_that_another_process_is_writing_too_is_left_to_it(tmp_path: Path) -> None:
    path, others = tmp_path / "machine.yaml", tmp_path / "machine.yaml.partial"
    others.write_text("half of ")
    write_profile(profile(), path)
    assert read_profile(path) == profile()
    assert others.read_text() == "half of "
