"""A checkpoint to import, and a cache of its own."""

from pathlib import Path

import pytest

from checkpoint.checkpoints import tensors, write_safetensors


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_safetensors(tmp_path / "checkpoint", tensors())
