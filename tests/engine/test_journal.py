"""A job that was cut short goes on where it stopped, and loses no completion to another job."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import writers
from flexflow_engine.errors import StorageError
from flexflow_engine.jobs.batching import FinishedSequence
from flexflow_engine.jobs.completions import CompletionWriter
from flexflow_engine.jobs.identity import JobIdentity
from flexflow_engine.jobs.prompts import Prompt
from full_disk import no_room
from writers import JOB

OTHER = replace(JOB, task="another", prompts="others")
PROMPTS = tuple(Prompt(f"p{index}", (1, 2, 3)) for index in range(5))
PARTIAL = "out.jsonl.partial"


def writing(
    folder: Path, job: JobIdentity = JOB, told: list[str] | None = None, *, fresh: bool = False
) -> CompletionWriter:
    return writers.writing(folder / "out.jsonl", PROMPTS, job=job, told=told, fresh=fresh)


def finished(writer: CompletionWriter, custom_id: str) -> FinishedSequence:
    names = [prompt.custom_id for prompt in writer.pending]
    return FinishedSequence(names.index(custom_id), (int(custom_id[1:]), 7), "stop", (-0.5, -math.inf))


def run(
    folder: Path, *custom_ids: str, job: JobIdentity = JOB, told: list[str] | None = None, fresh: bool = False
) -> None:
    """A run of the job that is cut short after some completions."""
    with writing(folder, job, told, fresh=fresh) as writer:
        for custom_id in custom_ids:
            writer.add(finished(writer, custom_id))


def complete(folder: Path, told: list[str] | None = None, *, fresh: bool = False) -> bytes:
    """A run of the job that gets to its end; what it has written."""
    with writing(folder, told=told, fresh=fresh) as writer:
        for prompt in reversed(writer.pending):
            writer.add(finished(writer, prompt.custom_id))
        writer.finish()
    return (folder / "out.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run writes that nothing cuts short."""
    return complete(tmp_path_factory.mktemp("whole"))


def test_the_next_run_of_the_job_goes_on(tmp_path: Path, whole: bytes) -> None:
    run(tmp_path, "p3", "p1")
    told: list[str] = []
    with writing(tmp_path, told=told) as writer:
        assert [prompt.custom_id for prompt in writer.pending] == ["p0", "p2", "p4"]
        assert (writer.earlier, writer.done) == (2, 2)
    assert told == [f"continuing: 2 of 5 completions are in {tmp_path / PARTIAL}"]
    assert complete(tmp_path) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_the_answers_are_the_whole_job_s(tmp_path: Path) -> None:
    run(tmp_path, "p3", "p1")
    with writing(tmp_path) as writer:
        writer.add(finished(writer, "p0"))
        assert writer.answers.likelihood is not None
        assert writer.answers.likelihood.tokens == 6


@given(cut=st.integers(1, 400))
def test_a_line_that_a_kill_has_cut_is_dropped(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    run(folder, "p3", "p1", "p4")
    left = (folder / PARTIAL).read_bytes()[:-cut]
    (folder / PARTIAL).write_bytes(left)
    with writing(folder) as writer:
        assert writer.earlier == left.count(b"\n") - 1
    assert complete(folder) == whole


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\n" * 4096, b'{"custom_id": "p0"', b"[1]\n", b"\xff\n"])
def test_what_a_power_loss_leaves_behind_the_last_line_is_dropped(tmp_path: Path, whole: bytes, tail: bytes) -> None:
    run(tmp_path, "p3")
    with (tmp_path / PARTIAL).open("ab") as file:
        file.write(tail)
    run(tmp_path, "p1")
    with writing(tmp_path) as writer:
        assert writer.earlier == 2
    assert complete(tmp_path) == whole


def test_a_run_that_was_cut_short_before_the_last_rename_has_nothing_left_to_do(tmp_path: Path, whole: bytes) -> None:
    run(tmp_path, "p3", "p1", "p0", "p2", "p4")
    with writing(tmp_path) as writer:
        assert not writer.pending
        writer.finish()
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_another_job_s_completions_are_kept_under_another_name(tmp_path: Path, whole: bytes) -> None:
    run(tmp_path, "p3", job=OTHER)
    before = (tmp_path / PARTIAL).read_bytes()
    told: list[str] = []
    assert complete(tmp_path, told=told) == whole
    kept = tmp_path / f"{PARTIAL}.old"
    assert told == [f"{tmp_path / PARTIAL} is of another job (different: task, prompts): it will be kept as {kept}"]
    assert kept.read_bytes() == before


def test_no_name_is_taken_twice(tmp_path: Path) -> None:
    for job, custom_id in ((OTHER, "p1"), (JOB, "p2"), (OTHER, "p3")):
        run(tmp_path, custom_id, job=job)
    kept = {name: (tmp_path / name).read_bytes() for name in (f"{PARTIAL}.old", f"{PARTIAL}.old1")}
    assert [b'"p1"' in text for text in kept.values()] == [True, False]
    assert [b'"p2"' in text for text in kept.values()] == [False, True]


@pytest.mark.parametrize(
    "text", [b'{"custom_id": "p1", "token_ids": []}\n', b"notes", b"\nnotes\n", b"[" * 100_000 + b"\n"]
)
def test_a_file_of_an_unknown_kind_is_kept_too(tmp_path: Path, text: bytes) -> None:
    (tmp_path / PARTIAL).write_bytes(text)
    run(tmp_path, "p1")
    assert (tmp_path / f"{PARTIAL}.old").read_bytes() == text


def test_another_job_s_completions_keep_their_name_until_there_is_one_to_write(tmp_path: Path) -> None:
    """A job that does not fit, say, changes nothing."""
    run(tmp_path, "p3", job=OTHER)
    before = (tmp_path / PARTIAL).read_bytes()
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PARTIAL]
    assert (tmp_path / PARTIAL).read_bytes() == before


def unread() -> str:
    raise AssertionError


def test_the_checkpoint_is_not_read_before_that_is_needed(tmp_path: Path) -> None:
    """It may take long, and a run may yet be refused."""
    run(tmp_path, job=replace(JOB, checkpoint=unread))
    assert not any(tmp_path.iterdir())


def test_the_checkpoint_is_not_read_where_a_job_is_another_one_already(tmp_path: Path) -> None:
    run(tmp_path, "p3", job=OTHER)
    told: list[str] = []
    run(tmp_path, job=replace(JOB, checkpoint=unread), told=told)
    assert "is of another job" in told[0]


def test_another_checkpoint_makes_another_job(tmp_path: Path) -> None:
    run(tmp_path, "p3", job=replace(JOB, checkpoint=lambda: "another"))
    with writing(tmp_path) as writer:
        assert len(writer.pending) == len(PROMPTS)


def test_a_job_starts_anew_when_it_is_asked_to(tmp_path: Path, whole: bytes) -> None:
    run(tmp_path, "p3")
    before, told = (tmp_path / PARTIAL).read_bytes(), list[str]()
    assert complete(tmp_path, told=told, fresh=True) == whole
    kept = tmp_path / f"{PARTIAL}.old"
    assert told == [f"{tmp_path / PARTIAL} is not gone on with: it will be kept as {kept}"]
    assert kept.read_bytes() == before


def test_a_job_that_was_to_start_anew_and_did_not_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, "p3")
    run(tmp_path, fresh=True)
    with writing(tmp_path) as writer:
        assert writer.earlier == 1


def test_the_completions_of_a_run_that_is_alive_are_left_alone(tmp_path: Path) -> None:
    with writing(tmp_path) as writer:
        writer.add(finished(writer, "p1"))
        with pytest.raises(StorageError, match="another run is writing"):
            writing(tmp_path)
        with pytest.raises(StorageError, match="another run is writing"):
            writing(tmp_path, fresh=True)
        writer.add(finished(writer, "p2"))
    with writing(tmp_path) as writer:
        assert writer.earlier == 2


def test_a_run_that_is_interrupted_while_it_begins_lets_go_of_the_file(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    run(tmp_path, "p3")
    with pytest.raises(KeyboardInterrupt) as raised:  # whose frames keep the first writer
        CompletionWriter(tmp_path / "out.jsonl", PROMPTS, None, identity=JOB, tell=interrupt)
    with writing(tmp_path) as writer:
        assert writer.earlier == 1, raised


def test_a_disk_that_fills_up_costs_the_completion_that_met_it_and_none_before(tmp_path: Path) -> None:
    def fill() -> None:
        with no_room(nbytes=5000), writing(tmp_path) as writer:
            for number in range(len(PROMPTS)):
                writer.add(FinishedSequence(number, (7,) * 400, "length"))

    with pytest.raises(StorageError, match="file too large") as raised:
        fill()
    assert raised.value.__notes__ == [f"3 of 5 completions are in {tmp_path / PARTIAL}; run again to go on"]
    with writing(tmp_path) as writer:
        assert [prompt.custom_id for prompt in writer.pending] == ["p3", "p4"]


def test_a_disk_too_full_for_the_ordered_file_keeps_the_completions(tmp_path: Path, whole: bytes) -> None:
    with writing(tmp_path) as writer:
        for prompt in PROMPTS:
            writer.add(finished(writer, prompt.custom_id))
        with no_room(nbytes=100), pytest.raises(StorageError):
            writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == [PARTIAL]
    assert complete(tmp_path) == whole


def test_the_first_line_tells_whose_completions_they_are(tmp_path: Path) -> None:
    run(tmp_path, "p1")
    first = json.loads((tmp_path / PARTIAL).read_text().splitlines()[0])
    assert first == {"flexflow_engine": JOB.as_json()}
