"""Kills, full disks, flipped bytes and failing plugins: a clear end, nothing half-written, nothing left behind."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from commands import CommandLine, completions, ended, install, kept, start, token_ids, wait_until, write_recipe
from flexflow_engine.abc.hardware import HardwareProfile, Processor
from flexflow_engine.abc.progress import JobProgress
from flexflow_engine.cli.progress import PlainProgress
from flexflow_engine.engine import run_recipe
from flexflow_engine.errors import HardwareError, StorageError, TaskError
from flexflow_engine.jobs.load import load_recipe
from flexflow_engine.planning.hardware import read_profile
from flexflow_engine.plugins import Registry
from harness import random_prompts, reference_tokens, save_opt

RUN = "flexflow_engine.run"
T4 = Path(__file__).parents[2] / "recipes" / "hardware" / "t4_gcp.yaml"
PROMPTS = random_prompts(5, seed=1, longest=12)
FC1 = "model.decoder.layers.1.fc1.weight"
TABLE = "model.decoder.embed_tokens.weight"
NORM = "model.decoder.final_layer_norm.weight"
ENDLESS = "--set=workload={synthetic: {count: 20000, prompt_tokens: 4}, max_new_tokens: 6}"
"""Minutes of work, of which the first lines come at once."""
ON_DISK = tuple(f"--set=scheduler.{kind}={{disk: 100}}" for kind in ("weights", "kv_cache", "activations"))
ON_DEVICE = tuple(f"--set=scheduler.{kind}={{device: 100}}" for kind in ("weights", "kv_cache", "activations"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "job", save_opt(tmp_path / "checkpoint"), PROMPTS)


@pytest.fixture
def endless(recipe: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in the working directory `tmp_path / "first"` that has written its first completions."""
    folder = tmp_path / "first"
    folder.mkdir()
    process = start(RUN, recipe, ENDLESS, "--metrics", "m.json", cwd=folder)
    wait_until(lambda: kept(folder / "job.completions.jsonl.partial") > 0, process)
    yield process
    process.kill()
    process.communicate()


def scratch(recipe: Path) -> list[Path]:
    return list((recipe.parent / "disk" / "runs").iterdir())


def test_a_killed_run_leaves_a_partial_file_and_the_next_run_clears_its_scratch(
    endless: subprocess.Popen[str], recipe: Path, tmp_path: Path, command: CommandLine
) -> None:
    endless.kill()
    assert endless.wait(timeout=20) == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "first").iterdir() if path.is_file()] == ["job.completions.jsonl.partial"]
    (dead,) = scratch(recipe)
    assert dead.name.startswith(f"{endless.pid}-")
    assert command("run", recipe).status == 0
    assert not scratch(recipe)
    assert len(completions(Path("job.completions.jsonl"))) == len(PROMPTS)


def test_ctrl_c_ends_a_run_within_seconds_and_tidily(
    endless: subprocess.Popen[str], recipe: Path, tmp_path: Path
) -> None:
    endless.send_signal(signal.SIGINT)
    outcome = ended(endless, seconds=20)
    assert (outcome.status, outcome.stdout) == (130, "")
    last = outcome.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"interrupted; \d+ of 20000 completions are in job\.completions\.jsonl\.partial; run again to go on", last
    )
    assert "Traceback" not in outcome.stderr
    assert not scratch(recipe)
    assert [path.name for path in (tmp_path / "first").iterdir() if path.is_file()] == ["job.completions.jsonl.partial"]


def test_a_run_leaves_another_s_scratch_and_output_alone(
    endless: subprocess.Popen[str], recipe: Path, tmp_path: Path, command: CommandLine
) -> None:
    (living,) = scratch(recipe)
    assert command("run", recipe).status == 0
    assert scratch(recipe) == [living]
    output = tmp_path / "first" / "job.completions.jsonl"
    outcome = command("run", recipe, "--output", output)
    outcome.assert_user_error()
    assert "another run is writing its completions there" in outcome.stderr
    assert kept(output.with_name(f"{output.name}.partial")) > 0
    assert endless.poll() is None


def test_two_runs_at_once_on_a_new_disk_path(recipe: Path, tmp_path: Path) -> None:
    """One of them imports the weights, and the other waits for them."""
    processes = [start(RUN, recipe, "--output", f"{n}.jsonl", cwd=tmp_path) for n in range(2)]
    assert [ended(process).status for process in processes] == [0, 0]
    expected = reference_tokens(tmp_path / "checkpoint", PROMPTS, max_new_tokens=6)
    assert [token_ids(tmp_path / f"{n}.jsonl") for n in range(2)] == [expected, expected]
    assert len([path for path in (recipe.parent / "disk" / "weights").iterdir() if path.is_dir()]) == 1
    assert not scratch(recipe)


@pytest.mark.parametrize("placement", [ON_DISK, ON_DEVICE], ids=["on disk", "on device"])
@pytest.mark.parametrize("tensor", [FC1, TABLE, NORM])
def test_a_flipped_byte_of_a_weight_is_told_and_gives_no_tokens(
    recipe: Path, command: CommandLine, tensor: str, placement: tuple[str, ...]
) -> None:
    assert command("run", recipe, *placement).status == 0
    Path("job.completions.jsonl").unlink()
    file = page_file(recipe, tensor)
    flip(file, 1000 if tensor != NORM else 10)
    outcome = command("run", recipe, *placement)
    outcome.assert_user_error()
    assert tensor in outcome.stderr
    assert str(file) in outcome.stderr
    assert "import the checkpoint again" in outcome.stderr
    assert_nothing_left(recipe)


@pytest.mark.parametrize("damage", ["cut", "removed", "metadata"])
def test_a_damaged_store_is_told(recipe: Path, command: CommandLine, damage: str) -> None:
    assert command("run", recipe).status == 0
    Path("job.completions.jsonl").unlink()
    file = page_file(recipe, FC1)
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "removed":
        file.unlink()
    else:
        (store_folder(recipe) / FC1 / "zarr.json").write_text("{}")
    outcome = command("run", recipe)
    if damage == "metadata":  # known before the run: the store is made anew
        assert outcome.status == 0
        return
    outcome.assert_user_error()
    assert FC1 in outcome.stderr
    assert str(file) in outcome.stderr
    assert_nothing_left(recipe)


def test_a_removed_store_is_imported_again(recipe: Path, command: CommandLine) -> None:
    assert command("run", recipe).status == 0
    first = token_ids(Path("job.completions.jsonl"))
    flip(page_file(recipe, FC1), 1000)
    name, under = store_folder(recipe).name, recipe.parent / "disk"
    assert command("store", "remove", name, "--under", under).status == 0
    assert command("run", recipe).status == 0
    assert token_ids(Path("job.completions.jsonl")) == first


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; the checkpoint's weights take 0.9."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_too_small_for_the_weights_is_told_before_one_is_written(
    recipe: Path, command: CommandLine, small_disk: Path
) -> None:
    fill(small_disk / "others", leaving=512 * 1024)
    outcome = command("run", recipe, f"--set=tiers.disk.path={small_disk}")
    outcome.assert_user_error()
    assert "the weights need" in outcome.stderr
    assert not Path("job.completions.jsonl").exists()
    assert not [path for path in small_disk.rglob("*") if path.is_file() and path.name == "0"]
    outcome = command("doctor", recipe, f"--set=tiers.disk.path={small_disk}")
    assert outcome.status == 2
    assert "error: weight store: " in outcome.stderr
    assert f"under {small_disk}, and 512.0 KiB free; free some space" in outcome.stderr


def test_a_disk_too_small_for_the_cache_is_told_before_the_run(
    recipe: Path, command: CommandLine, small_disk: Path
) -> None:
    settings = [f"--set=tiers.disk.path={small_disk}", "--set=scheduler.kv_cache={disk: 100}"]
    batches = ["--set=scheduler.gpu_batch_size=64", "--set=scheduler.num_gpu_batches=2"]
    outcome = command("run", recipe, *settings, *batches, ENDLESS.replace("prompt_tokens: 4", "prompt_tokens: 12"))
    outcome.assert_user_error()
    assert "are free" in outcome.stderr
    assert "tiers.disk" in outcome.stderr
    assert not list(Path.cwd().iterdir())
    assert not any((small_disk / "runs").iterdir())


def test_a_disk_that_others_fill_during_the_run_ends_it(recipe: Path, tmp_path: Path, small_disk: Path) -> None:
    settings = (f"--set=tiers.disk.path={small_disk}", "--set=scheduler.kv_cache={disk: 100}")
    batches = ("--set=scheduler.gpu_batch_size=8", "--set=workload.max_new_tokens=100")
    slow = install(tmp_path, "slow_start", SLOW_START)
    process = start(RUN, recipe, "--set=model.plugin=slow", *settings, *batches, cwd=tmp_path, PYTHONPATH=str(slow))
    wait_until((tmp_path / "computing").exists, process)
    fill(small_disk / "others", leaving=0)
    (tmp_path / "go").touch()
    outcome = ended(process, seconds=60)
    outcome.assert_user_error()
    assert "no space left on device" in outcome.stderr
    assert "free some space there" in outcome.stderr
    assert not (tmp_path / "job.completions.jsonl").exists()
    assert not any((small_disk / "runs").iterdir())


def test_a_full_disk_under_the_output_is_told_before_the_run(
    recipe: Path, command: CommandLine, small_disk: Path
) -> None:
    fill(small_disk / "others", leaving=0)
    outcome = command("run", recipe, "--output", small_disk / "out.jsonl")
    outcome.assert_user_error()
    assert "out.jsonl.partial: no space left on device; free some space there" in outcome.stderr
    assert [path.name for path in small_disk.iterdir()] == ["others"]


def test_a_trace_that_can_t_be_written_costs_no_completion(recipe: Path, tmp_path: Path) -> None:
    registry = Registry.load()
    with pytest.raises(StorageError, match=r"gone/t\.json"):
        run_recipe(
            load_recipe(recipe, [], registry),
            registry,
            output=tmp_path / "out.jsonl",
            trace=tmp_path / "gone" / "t.json",
            progress=PlainProgress(io.StringIO(), time.monotonic),
            hardware=lambda needs: read_profile(T4),
        )
    assert token_ids(tmp_path / "out.jsonl") == reference_tokens(tmp_path / "checkpoint", PROMPTS, max_new_tokens=6)


def test_completions_are_told_to_be_of_the_weights_that_were_imported(
    recipe: Path, tmp_path: Path, command: CommandLine
) -> None:
    """And not of what a training has made of the checkpoint by the time of the first."""

    class Training(PlainProgress):
        def notice(self, text: str) -> None:
            if text.startswith("loading resident weights"):
                save_opt(tmp_path / "checkpoint", seed=9)

        def step(self, job: JobProgress) -> None:
            if job.finished_sequences:
                raise KeyboardInterrupt

    registry, output = Registry.load(), Path("job.completions.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run_recipe(
            load_recipe(recipe, [], registry),
            registry,
            output=output,
            trace=None,
            progress=Training(io.StringIO(), time.monotonic),
            hardware=lambda needs: read_profile(T4),
        )
    outcome = command("run", recipe)
    assert outcome.status == 0
    assert "is of another job" in outcome.stderr
    assert token_ids(output) == reference_tokens(tmp_path / "checkpoint", PROMPTS, max_new_tokens=6)


def test_a_prediction_that_fails_after_the_run_costs_no_metrics(recipe: Path, tmp_path: Path) -> None:
    """It is made for the ends that were met, when the tiers are closed."""
    registry, output, told = Registry.load(), tmp_path / "out.jsonl", io.StringIO()
    eos = reference_tokens(tmp_path / "checkpoint", PROMPTS, max_new_tokens=6)[0][3]
    checkpoint = save_opt(tmp_path / "ends early", eos_token_id=eos)

    class Forgotten(HardwareProfile):
        def processor(self, memory: str | None) -> Processor:
            if output.exists():
                assert not scratch(recipe)
                raise HardwareError("the machine is forgotten")
            return super().processor(memory)

    profile = read_profile(T4)
    metrics = run_recipe(
        load_recipe(recipe, [f"model.checkpoint={checkpoint}"], registry),
        registry,
        output=output,
        trace=None,
        progress=PlainProgress(told, time.monotonic),
        hardware=lambda needs: Forgotten(**{field.name: getattr(profile, field.name) for field in fields(profile)}),
    )
    assert metrics["predicted_tokens_per_s"] > 0
    assert metrics["predicted_tokens_per_s_as_ended"] is None
    assert "no prediction: the machine is forgotten" in told.getvalue()


def test_a_file_system_mounted_read_only(recipe: Path, command: CommandLine, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for options in (["--output", f"{small_disk}/out.jsonl"], [f"--set=tiers.disk.path={small_disk}/disk"]):
        outcome = command("run", recipe, *options)
        outcome.assert_user_error()
        assert str(small_disk) in outcome.stderr


def test_a_file_system_without_direct_io_is_used_all_the_same_and_told_once(
    recipe: Path, command: CommandLine, request: pytest.FixtureRequest
) -> None:
    assert "direct I/O" not in command("run", recipe, *ON_DISK).stderr
    expected = token_ids(Path("job.completions.jsonl"))
    request.getfixturevalue("no_direct_io")
    outcome = command("run", recipe, *ON_DISK)
    assert outcome.status == 0
    (told,) = [line for line in outcome.stderr.splitlines() if "direct I/O" in line]
    assert told.startswith(f"{recipe.parent / 'disk'}: the file system refuses direct I/O")
    assert token_ids(Path("job.completions.jsonl")) == expected


PLUGIN = """
from flexflow_engine import hookimpl
from flexflow_engine.errors import FlexFlowError
from flexflow_plugins.models.opt import OPTModel
from flexflow_tiers.pinned import PinnedTier

class User(FlexFlowError):
    pass

class Moody(OPTModel):
    name = "moody"

    def attention_inputs(self, weights, hidden):
        raise {error}

class Torn(PinnedTier):
    name = "torn"

    def read(self, region, first, count, out):
        raise {error}

    direct = False

@hookimpl
def flexflow_register_models():
    return [Moody]

@hookimpl
def flexflow_register_tiers():
    return [Torn]
"""
ABSENT = """
from flexflow_engine import hookimpl
from flexflow_engine.errors import FlexFlowError
from flexflow_tiers.pinned import PinnedTier

class Moons(FlexFlowError):
    def __init__(self, count):
        super().__init__(f"{count} moons are missing", fix="wait")

class Absent(PinnedTier):
    name = "absent"

    @classmethod
    def check_available(cls, options):
        raise Moons(3)

@hookimpl
def flexflow_register_tiers():
    return [Absent]
"""
SLOW_START = """
import time
from pathlib import Path
from flexflow_engine import hookimpl
from flexflow_plugins.models.opt import OPTModel

class Slow(OPTModel):
    name = "slow"

    def embed(self, weights, rows, positions):
        Path("computing").touch()
        while not Path("go").exists():
            time.sleep(0.01)
        return super().embed(weights, rows, positions)

@hookimpl
def flexflow_register_models():
    return [Slow]
"""
USER_ERROR = 'User("the moon is wrong", where="the sky", fix="wait")'
BUG = 'ZeroDivisionError("of all things")'
PLACES = ["model.plugin=moody", "tiers.host.plugin=torn"]


@pytest.mark.parametrize("place", PLACES)
def test_a_plugin_s_own_error_is_told_to_the_user(
    recipe: Path, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, f"moody_{PLACES.index(place)}", PLUGIN.format(error=USER_ERROR)))
    before = set(threading.enumerate())
    outcome = command("run", recipe, f"--set={place}")
    assert (outcome.status, outcome.stdout) == (2, "")
    assert "error: the sky: the moon is wrong; wait\n" in outcome.stderr
    assert set(threading.enumerate()) == before, "no lane outlives its run"
    assert_nothing_left(recipe)


def test_a_plugin_s_own_error_is_told_where_it_is_found_whatever_it_takes(
    recipe: Path, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, "absent", ABSENT))
    outcome = command("run", recipe, "--set=tiers.host.plugin=absent")
    outcome.assert_user_error()
    assert "error: tiers.host: 3 moons are missing; wait\n" in outcome.stderr


@pytest.mark.parametrize("place", PLACES)
def test_a_plugin_s_bug_ends_the_run_with_its_cause(
    recipe: Path, command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, f"buggy_{PLACES.index(place)}", PLUGIN.format(error=BUG)))
    before = set(threading.enumerate())
    with pytest.raises(TaskError, match="of all things") as raised:
        command("run", recipe, f"--set={place}")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    assert set(threading.enumerate()) == before, "no lane outlives its run"
    assert_nothing_left(recipe)


def test_a_plugin_s_bug_is_exit_status_1_with_a_traceback(recipe: Path, tmp_path: Path) -> None:
    site = install(tmp_path, "buggy", PLUGIN.format(error=BUG))
    outcome = ended(start(RUN, recipe, "--set=model.plugin=moody", cwd=tmp_path, PYTHONPATH=str(site)), seconds=60)
    assert (outcome.status, outcome.stdout) == (1, "")
    assert "ZeroDivisionError: of all things" in outcome.stderr
    assert "in attention_inputs" in outcome.stderr
    assert not (tmp_path / "job.completions.jsonl").exists()


def page_file(recipe: Path, tensor: str) -> Path:
    """The first page of a stored tensor."""
    return next(path for path in sorted((store_folder(recipe) / tensor / "c").rglob("*")) if path.is_file())


def store_folder(recipe: Path) -> Path:
    (folder,) = (path for path in (recipe.parent / "disk" / "weights").iterdir() if path.is_dir())
    return folder


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 0x10
    file.write_bytes(content)


def fill(file: Path, *, leaving: int) -> None:
    """Take all of a file system's space but `leaving` bytes."""
    free = os.statvfs(file.parent).f_bavail * os.statvfs(file.parent).f_frsize
    file.write_bytes(b"x" * (free - leaving))


def assert_nothing_left(recipe: Path) -> None:
    """No completions under their final name or another, and no scratch on the disk."""
    assert not list(Path.cwd().iterdir())
    assert not scratch(recipe)
