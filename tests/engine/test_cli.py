"""What the command line makes of errors, progress, metrics and files, without a process of its own."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path

import pytest

from flexflow_engine.abc.durations import format_duration
from flexflow_engine.abc.policy import MemoryLine, MemoryTable, Placement, Policy
from flexflow_engine.abc.progress import JobProgress
from flexflow_engine.cli.exits import with_exit_status
from flexflow_engine.cli.outputs import check_writable, write_whole
from flexflow_engine.cli.progress import PlainProgress
from flexflow_engine.cli.report import plan_as_json, render_plan, render_run
from flexflow_engine.errors import CorruptDataError, FlexFlowError, ProblemsError, RecipeError, StorageError, TaskError

METRICS = {
    "prompt_tokens": 1000,
    "generated_tokens": 200,
    "prefill_s": 1.0,
    "decode_s": 3.0,
    "tokens_per_s": 50.0,
    "decode_tokens_per_s": 60.0,
    "predicted_tokens_per_s": None,
    "policy": {},
    "tiers": {"device": {"budget_bytes": 2**20, "peak_bytes": 2**19}, "disk": {"budget_bytes": 2**30, "peak_bytes": 0}},
    "lanes": {"compute": {"busy_s": 2.0, "flops": 4e9}, "disk read": {"busy_s": 3.0, "bytes": 3 * 2**30}},
    "bound_by": "disk read",
    "placement": {"weights": {"device": 2**18, "disk": 2**20}, "kv_cache": {"device": 2**10}, "activations": {}},
    "exact_match": {"matched": 19, "total": 20},
}
ALL_ON_DEVICE = Placement((("device", 100.0),))
POLICY = Policy(
    gpu_batch_size=4,
    num_gpu_batches=2,
    weights=ALL_ON_DEVICE,
    kv_cache=ALL_ON_DEVICE,
    activations=ALL_ON_DEVICE,
    attention="device",
    kv_page_tokens=16,
)
MEMORY = MemoryTable((MemoryLine("device", "weights", 2048), MemoryLine("device", "workspace", 1024)), {"device": 2048})


def status_of(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    def verb() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        with_exit_status(verb)()
    return caught.value.code, capsys.readouterr().err


def test_an_error_that_the_user_can_mend_is_status_2_and_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(RecipeError("no such key", where="r.yaml: a"), capsys) == (2, "error: r.yaml: a: no such key\n")


def test_every_problem_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    problems: list[FlexFlowError] = [RecipeError("one"), RecipeError("two")]
    assert status_of(ProblemsError(problems), capsys) == (2, "error: one\nerror: two\n")


def test_ctrl_c_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(KeyboardInterrupt(), capsys) == (130, "interrupted\n")


def test_a_failed_task_shows_the_cause_that_the_user_can_mend(capsys: pytest.CaptureFixture[str]) -> None:
    error = TaskError("LOAD failed")
    error.__cause__ = RuntimeError("in a lane")
    error.__cause__.__cause__ = CorruptDataError("a flipped byte", where="c/0")
    assert status_of(error, capsys) == (2, "error: c/0: a flipped byte\n")


@pytest.mark.parametrize("error", [TaskError("COMPUTE failed"), AssertionError("an invariant")])
def test_our_own_bugs_pass_through(error: Exception) -> None:
    def verb() -> None:
        raise error

    with pytest.raises(type(error)):
        with_exit_status(verb)()


def test_the_report_tells_throughput_placement_and_the_lane_that_bound() -> None:
    text = render_run(METRICS)
    assert "1000 prompt and 200 generated tokens in 4.0 s (prefill 1.0 s, decode 3.0 s)" in text
    assert "throughput: 50.0 tokens/s, 60.0 while decoding\n" in text
    assert "bound by: disk read (busy 75 % of the time)" in text
    assert "exact match: 19 of 20 (95.0 %)" in text
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert rows["device"].split() == ["device", "256.0", "KiB", "1.0", "KiB", "0", "B", "512.0", "KiB", "1.0", "MiB"]
    assert rows["disk read"].split() == ["disk", "read", "3.0", "s", "3.0", "GiB", "1.0", "GiB/s"]
    assert rows["compute"].endswith("2.0 Gflop/s")


def test_lanes_are_told_in_the_same_words_as_the_job() -> None:
    hour = {"compute": {"busy_s": 3725.0, "flops": 4e9}}
    text = render_run({**METRICS, "decode_s": 3725.0, "lanes": hour, "bound_by": "compute"})
    assert "decode 1:02:05)" in text
    assert ["compute", "1:02:05", "4.0", "Gflop"] in [line.split()[:4] for line in text.splitlines()]


def test_a_plan_shows_every_line_and_what_does_not_fit() -> None:
    text = render_plan(POLICY, MEMORY)
    assert "device  workspace  1.0 KiB" in text
    assert "device  3.0 KiB  2.0 KiB  too small" in text
    memory = plan_as_json(POLICY, MEMORY)["memory"]
    assert isinstance(memory, dict)
    assert (memory["device"]["peak_bytes"], memory["device"]["budget_bytes"]) == (3072, 2048)


def test_plain_progress_writes_a_line_now_and_then_and_always_the_last() -> None:
    stream, times = io.StringIO(), iter([0.0, 1.0, 4.9, 5.1, 5.2])
    progress = PlainProgress(stream, lambda: next(times))
    for finished in (0, 1, 2, 3, 4):
        progress.step(JobProgress(finished, 4, finished * 10, 2.0))
    assert stream.getvalue().splitlines() == [
        "0 of 4 sequences, 0 tokens, 0.0 tokens/s",
        "3 of 4 sequences, 30 tokens, 15.0 tokens/s, about 0.7 s left",
        "4 of 4 sequences, 40 tokens, 20.0 tokens/s",
    ]


def test_what_is_left_to_do_is_judged_by_what_this_run_has_done() -> None:
    stream = io.StringIO()
    PlainProgress(stream, lambda: 0.0).step(JobProgress(12, 16, 30, 2.0, earlier_sequences=8))
    assert stream.getvalue() == "12 of 16 sequences, 30 tokens, 15.0 tokens/s, about 2.0 s left\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.97, "1:00"), (125.4, "2:05"), (3725, "1:02:05")]
)
def test_durations_are_short_and_never_sixty_seconds(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_plain_progress_tells_the_import_in_bytes() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, lambda: 0.0)
    progress.reading(2**20, 2**20)
    progress.importing(2**20, 2**22)
    assert stream.getvalue().splitlines() == [
        "reading the checkpoint: 1.0 MiB of 1.0 MiB (100 %)",
        "importing weights: 1.0 MiB of 4.0 MiB (25 %)",
    ]


def test_plain_progress_goes_on_when_nobody_reads_it_any_more() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    progress = PlainProgress(stream, lambda: 0.0)
    progress.notice("the first line")
    progress.notice("the second line")
    with suppress(BrokenPipeError):  # what is left in its buffer
        stream.close()


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    check_writable(path)
    assert not any(tmp_path.iterdir())
    write_whole(path, "{}\n")
    check_writable(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]
    assert path.read_text() == "{}\n"


@pytest.mark.parametrize("place", ["missing/metrics.json", "."])
def test_an_unwritable_place_is_told_before_the_run(tmp_path: Path, place: str) -> None:
    with pytest.raises(StorageError):
        check_writable(tmp_path / place)


def test_a_prediction_that_ends_have_spoilt_is_told_as_such() -> None:
    kept = {**METRICS, "predicted_tokens_per_s": 90.0, "predicted_tokens_per_s_as_ended": 90.0}
    assert "90.0 predicted" in render_run(kept)
    assert "early" not in render_run(kept)
    spoilt = render_run({**kept, "predicted_tokens_per_s_as_ended": 55.0})
    assert "90.0 predicted if no sequence ends early" in spoilt
    assert "55.0 predicted for the ends that were met" in spoilt
