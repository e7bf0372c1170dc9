"""Files are whole or not there, whatever happens while they are written."""

from __future__ import annotations

import errno
import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flexflow_engine.checkpoint.digest import DigestCache
from flexflow_engine.errors import StorageError
from flexflow_engine.files import open_locked, replacing


def write(path: Path, text: str, error: BaseException | None = None) -> None:
    with replacing(path) as partial:
        partial.write_text(text)
        if error is not None:
            raise error


def test_a_file_has_its_name_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_can_t_be_written_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "numbers.json"
    path.write_text("old")
    told = StorageError if isinstance(error, OSError) else type(error)
    with pytest.raises(told):
        write(path, "ne", error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_taken_by_a_folder_is_told_and_nothing_left(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.mkdir()
    with pytest.raises(StorageError, match="taken: is a directory"):
        write(path, "new")
    assert list(tmp_path.iterdir()) == [path]


def test_digests_that_can_t_be_kept_leave_nothing_behind(tmp_path: Path) -> None:
    """A new temporary file at every start would fill what is full already."""
    weights, digests = tmp_path / "weights", tmp_path / "cache" / "digests.json"
    weights.write_bytes(b"1" * 100)
    digests.mkdir(parents=True)
    assert DigestCache(digests).content_key({"weights": weights}, lambda done, total: None)
    assert list(digests.parent.iterdir()) == [digests]


def test_digests_that_can_t_be_kept_are_found_once_all_the_same(tmp_path: Path) -> None:
    """A run asks twice for its checkpoint's content."""
    weights, digests = tmp_path / "weights", tmp_path / "digests.json"
    weights.write_bytes(b"1" * 100)
    digests.mkdir()
    cache, read = DigestCache(digests), list[int]()
    keys = [cache.content_key({"weights": weights}, lambda done, total: read.append(done)) for _ in range(2)]
    assert keys[0] == keys[1]
    assert read == [100]


def test_a_lock_is_held_by_one_at_a_time_though_each_removes_its_file(tmp_path: Path) -> None:
    path, holder = tmp_path / "lock", tmp_path / "holder"

    def hold(number: int) -> None:
        descriptor = open_locked(path, fcntl.LOCK_EX)
        try:
            holder.touch(exist_ok=False)
            holder.unlink()
            path.unlink()
        finally:
            os.close(descriptor)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(hold, range(400)))
    assert not list(tmp_path.iterdir())
