"""Shared by the tests of store files: every way to open one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexflow_engine.store.access import BUFFERED, MODES, Access
from flexflow_engine.store.shard import BLOCK_NBYTES
from store.stores import LEAST_BUFFER


@pytest.fixture(params=MODES, ids=["direct", "direct, blocks in memory", "buffered"])
def access(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Access]:
    """Every way to open files that works in the tests' folder, with the least buffer."""
    sample = tmp_path / "sample"
    sample.write_bytes(bytes(BLOCK_NBYTES))
    if request.param is not BUFFERED and Access.tried_on(sample).mode is BUFFERED:
        pytest.skip("the file system of the temporary folder refuses direct I/O")
    access = Access(request.param, buffer_nbytes=LEAST_BUFFER)
    yield access
    access.close()
