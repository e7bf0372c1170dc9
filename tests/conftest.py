"""Shared by all tests: a GPU where one is needed, one thread for torch, no clock in properties."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from flexflow_engine.cli.hardware import HARDWARE_VARIABLE
from flexflow_engine.planning.hardware import write_profile
from profiles import profile

pytest.register_assert_rewrite("flexflow_engine.testing")  # a failing assertion of a suite shows its values
settings.register_profile("shared", deadline=None)  # whole jobs run in an example, on cores that others use too
settings.load_profile("shared")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU; torch sees none")


@pytest.fixture(autouse=True, scope="session")
def a_machine_of_round_numbers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs predict their throughput: none is to measure the machine for it, on cores that others use too."""
    path = tmp_path_factory.mktemp("hardware") / "round.yaml"
    write_profile(profile(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HARDWARE_VARIABLE, str(path))
        yield


@pytest.fixture(autouse=True, scope="session")
def processes_can_be_interrupted() -> None:
    """A shell has what it runs in the background ignore SIGINT, and so would every process that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> Iterator[None]:
    """Matrices here are tiny, and test workers share few cores: OpenMP's threads spin while they wait for each other.

    A job of 1400 tasks took 11 s with two threads on two busy cores, and 0.2 s with one.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_direct_io(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system as it is on a file system that refuses direct I/O."""
    open_file: Callable[..., int] = os.open

    def refuse(path: Path | str, flags: int, *args: int, **options: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        return open_file(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
