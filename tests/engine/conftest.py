"""Shared by the tests of the engine's parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from flexflow_engine.cpu.workers import Workers


@pytest.fixture(params=[1, 3])
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    """One thread, and several."""
    with closing(Workers(request.param)) as workers:
        yield workers
