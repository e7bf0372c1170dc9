"""Open files: reused, bounded, closed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Thread

import pytest

from flexflow_engine.store.descriptors import Descriptors


def opener(path: Path, opened: list[int]) -> Callable[[], int]:
    def open_file() -> int:
        opened.append(os.open(path, os.O_RDONLY | os.O_CREAT))
        return opened[-1]

    return open_file


def is_open(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_symlink()


def test_a_file_is_opened_once_and_the_least_recently_used_is_closed(tmp_path: Path) -> None:
    descriptors, opened = Descriptors(limit=2), list[int]()
    for name in "aabac":
        file = descriptors.borrow(tmp_path / name, opener(tmp_path / name, opened))
        assert is_open(file.descriptor)
        descriptors.give_back(file)
    assert [is_open(descriptor) for descriptor in opened] == [True, False, True]
    descriptors.close()
    descriptors.close()
    assert not any(is_open(descriptor) for descriptor in opened)


def test_borrowed_files_stay_open_beyond_the_limit(tmp_path: Path) -> None:
    descriptors, opened = Descriptors(limit=1), list[int]()
    files = [descriptors.borrow(tmp_path / name, opener(tmp_path / name, opened)) for name in "abc"]
    assert all(is_open(descriptor) for descriptor in opened)
    for file in files:
        descriptors.give_back(file)
    assert sum(is_open(descriptor) for descriptor in opened) == 1
    descriptors.close()


def test_two_threads_that_open_the_same_file_share_one_descriptor(tmp_path: Path) -> None:
    descriptors, barrier, opened, lent = Descriptors(), Barrier(2, timeout=30), list[int](), list[int]()

    def open_together() -> int:
        barrier.wait()
        opened.append(os.open(tmp_path / "a", os.O_RDONLY | os.O_CREAT))
        return opened[-1]

    def borrow() -> None:
        file = descriptors.borrow(tmp_path / "a", open_together)
        lent.append(file.descriptor)
        descriptors.give_back(file)

    threads = [Thread(target=borrow) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(lent)) == 1
    assert sum(is_open(descriptor) for descriptor in set(opened)) == 1
    descriptors.close()


def test_a_file_that_cannot_be_opened_is_not_remembered(tmp_path: Path) -> None:
    descriptors = Descriptors()

    def fail() -> int:
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        descriptors.borrow(tmp_path / "a", fail)
    opened = list[int]()
    descriptors.give_back(descriptors.borrow(tmp_path / "a", opener(tmp_path / "a", opened)))
    assert len(opened) == 1
    descriptors.close()
