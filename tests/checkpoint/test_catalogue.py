"""Weight stores are listed, whatever an import does to their files meanwhile, and removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkpoint.checkpoints import FC1, imported, opened
from flexflow_engine.checkpoint.catalogue import list_stores, remove_store
from flexflow_engine.errors import StorageError
from store.stores import flip_byte

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("stats_before", [0, 1])
def test_a_file_that_an_import_renames_meanwhile_keeps_no_store_from_being_listed(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, stats_before: int
) -> None:
    root = tmp_path / "root"
    imported(opened(folder), root).close()
    (entry,) = list_stores(root)
    page = next(path for path in entry.path.rglob("c/0/0") if FC1 in str(path))
    partial = page.rename(page.with_name("0.partial"))
    seen, stat = list[Path](), Path.stat

    def renaming(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        seen.append(path)
        if path == partial and seen.count(partial) == stats_before + 1:
            partial.rename(page)
        return stat(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", renaming)
    (listed,) = list_stores(root)
    assert listed.name == entry.name
    assert 0 < listed.nbytes <= entry.nbytes


def test_stores_are_listed_and_removed(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "root"
    assert list_stores(root) == ()
    imported(opened(folder, "float16"), root).close()
    imported(opened(folder, "float32"), root).close()
    half, single = list_stores(root)
    assert (half.reference, half.dtype, half.codec, half.complete) == (str(folder), "float16", "none", True)
    assert 0 < half.nbytes < single.nbytes
    assert remove_store(root, half.name) == half
    assert list_stores(root) == (single,)
    with pytest.raises(StorageError, match=f"no weight store.*{single.name}"):
        remove_store(root, "../weights")
    flip_byte(single.path / "zarr.json", 0)
    (unreadable,) = list_stores(root)
    assert (unreadable.reference, unreadable.complete) == ("", False)
    remove_store(root, single.name)
    assert list(root.rglob("*")) == [root / "weights"], "a lock file is left"
