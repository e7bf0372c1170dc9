"""What stores of one checkpoint share: pages that are equal, as hard links."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint.checkpoints import (
    FC1,
    TABLE,
    imported_with,
    opened,
    pages,
    stock,
    tensors,
)
from flexflow_engine.abc.sizes import rounded_down, rounded_up
from flexflow_engine.checkpoint.catalogue import list_stores, remove_store
from flexflow_engine.errors import StorageError
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec
from flexflow_plugins.codecs.lossless import ZstdCodec
from flexflow_plugins.codecs.none import NoneCodec

pytestmark = pytest.mark.usefixtures("own_cache")


def test_stores_of_two_codecs_share_what_is_equal(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "root"
    codecs = [NoneCodec(), *(GroupInt4Codec(GroupInt4Options(encoder=how)) for how in ("auto", "minmax", "fit"))]
    stores = [imported_with(codec, opened(folder), root) for codec in codecs]
    assert len({store.path for store in stores}) == 4
    bias = f"{FC1.removesuffix('weight')}bias/c/0"
    for name, copies in ((bias, 1), (f"{FC1}/c/0/0", 4)):
        assert len({(store.path / name).stat().st_ino for store in stores}) == copies
    assert (stores[1].path / FC1 / "c/0/0").read_bytes() != (stores[2].path / FC1 / "c/0/0").read_bytes()
    remove_store(root, stores[0].path.name)
    assert torch.equal(stock(stores[1], bias.removesuffix("/c/0")), tensors()[bias.removesuffix("/c/0")])


def test_what_is_shared_needs_no_space(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def import_both(root: Path) -> Path:
        imported_with(NoneCodec(), opened(folder), root).close()
        with monkeypatch.context() as nearly_full:
            nearly_full.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
            imported_with(GroupInt4Codec(), opened(folder), root).close()
        return next(root.glob("weights/*int4*"))

    free = 2**30
    written = [path.stat() for path in pages(import_both(tmp_path / "roomy"))]
    free = sum(page.st_size for page in written if page.st_nlink == 1)
    assert 0 < free < sum(page.st_size for page in written)
    import_both(tmp_path / "exact")
    free -= 1
    with pytest.raises(
        StorageError, match=f"the weights need {rounded_up(free + 1)}, and {rounded_down(free)} are free"
    ):
        import_both(tmp_path / "short")


def test_what_can_not_be_linked_needs_its_space(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported_with(GroupInt4Codec(), opened(folder), tmp_path / "alone").close()
    needed = sum(path.stat().st_size for path in pages(tmp_path / "alone"))
    root = tmp_path / "root"
    imported_with(NoneCodec(), opened(folder), root).close()
    before = pages(root)
    monkeypatch.setattr(Path, "hardlink_to", refuse_link)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(StorageError, match=f"the weights need {rounded_up(needed)}"):
        imported_with(GroupInt4Codec(), opened(folder), root)
    assert pages(root) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    imported_with(GroupInt4Codec(), opened(folder), root).close()


def refuse_link(link: Path, target: Path) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_a_table_of_8_bits_is_shared_with_the_store_that_has_8_bits_throughout(tmp_path: Path, folder: Path) -> None:
    codecs = GroupInt8Codec(), GroupInt4Codec(), GroupInt4Codec(GroupInt4Options(table_bits=4))
    stores = [imported_with(codec, opened(folder), tmp_path / "root") for codec in codecs]
    table, fc1 = ([(store.path / name / "c/0/0").stat().st_ino for store in stores] for name in (TABLE, FC1))
    assert table[0] == table[1] != table[2]
    assert fc1[0] != fc1[1] == fc1[2]
    listed = {entry.path: (entry.codec, entry.table_codec) for entry in list_stores(tmp_path / "root")}
    assert listed[stores[1].path] == (codecs[1].key, codecs[0].key)
    assert listed[stores[2].path] == (codecs[1].key, codecs[1].key)


def test_compressed_and_plain_weights_share_what_is_equal(tmp_path: Path, folder: Path) -> None:
    stores = [imported_with(codec, opened(folder), tmp_path / "root") for codec in (NoneCodec(), ZstdCodec())]
    bias = f"{FC1.removesuffix('weight')}bias/c/0"
    for name, copies in ((bias, 1), (f"{FC1}/c/0/0", 2)):
        assert len({(store.path / name).stat().st_ino for store in stores}) == copies


def test_a_page_that_cannot_be_linked_is_written(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "hardlink_to", refuse_link)
    imported_with(NoneCodec(), opened(folder), tmp_path / "root").close()
    bias = f"{FC1.removesuffix('weight')}bias"
    with imported_with(GroupInt4Codec(), opened(folder), tmp_path / "root") as store:
        assert torch.equal(stock(store, bias), tensors()[bias])
