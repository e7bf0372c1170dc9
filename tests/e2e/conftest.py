"""For all tests of whole runs: a cache folder of the test's own, the command line."""

from pathlib import Path

import pytest
from transformers.utils import logging

from commands import CommandLine


@pytest.fixture(autouse=True, scope="session")
def no_progress_bars() -> None:
    logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from the user's cache, and nothing is left there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The command line, called in a working directory of the test's own."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return CommandLine(capsys)
