"""Importing: the store holds the checkpoint's numbers, whatever interrupted it, and says beforehand what won't work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from checkpoint.checkpoints import (
    CONFIG,
    FC1,
    FORMATS,
    TABLE,
    imported,
    imported_with,
    opened,
    pages,
    stock,
    tensors,
    write_bin,
    write_safetensors,
)
from flexflow_engine.abc.codec import Codec, NoCodecOptions
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.checkpoint.catalogue import list_stores
from flexflow_engine.checkpoint.importing import import_checkpoint
from flexflow_engine.errors import CheckpointError, CorruptDataError, PluginError, ProblemsError, StorageError
from flexflow_engine.store.array import ArrayLayout, read_layout
from flexflow_engine.store.header import FORMAT_VERSION
from flexflow_engine.store.weights import WeightStore
from flexflow_engine.store.writing import missing_nbytes
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec, GroupQuantCodec
from flexflow_plugins.codecs.lossless import BloscCodec, ZstdCodec
from flexflow_plugins.codecs.none import NoneCodec
from store.stores import flip_byte

TORCH_DTYPES: dict[DType, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_stock_zarr_reads_the_checkpoints_numbers(tmp_path: Path, folder: Path, dtype: DType) -> None:
    with imported(opened(folder, dtype), tmp_path / "root") as store:
        for name, expected in tensors().items():
            converted = expected.to(TORCH_DTYPES[dtype])
            bits = converted.view(torch.int16) if dtype == "bfloat16" else converted
            assert torch.equal(stock(store, name), bits)
            assert store.stored(name).name == name


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_store(tmp_path: Path, folder: Path, name: str) -> None:
    with (
        imported(opened(folder), tmp_path / "root") as expected,
        imported(opened(FORMATS[name](tmp_path / "other", tensors())), tmp_path / "root") as store,
    ):
        for page in pages(expected.path):
            assert (store.path / page.relative_to(expected.path)).read_bytes() == page.read_bytes()


def test_a_second_import_reuses_the_store_from_wherever_the_checkpoint_lies(tmp_path: Path, folder: Path) -> None:
    with imported(opened(folder), tmp_path / "root") as first:
        written = pages(tmp_path / "root")
        calls: list[int] = []
        folder.rename(tmp_path / "moved")
        with imported(opened(tmp_path / "moved"), tmp_path / "root", lambda done, total: calls.append(done)) as again:
            assert again.path == first.path
    assert calls == []
    assert pages(tmp_path / "root") == written


def test_progress_counts_up_to_all_bytes(tmp_path: Path, folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    with imported(opened(folder), tmp_path / "root", lambda done, total: calls.append((done, total))) as store:
        assert calls[-1] == (store.nbytes, store.nbytes)
    assert calls == sorted(calls)
    assert len(calls) == len(pages(tmp_path / "root"))


def test_older_spellings_are_stored_under_the_checkpoints_own_names(tmp_path: Path) -> None:
    content = {name.removeprefix("model."): tensor for name, tensor in tensors().items()}
    with imported(opened(write_bin(tmp_path / "old", content)), tmp_path / "root") as store:
        assert store.stored(FC1).name == FC1.removeprefix("model.")
        assert torch.equal(stock(store, FC1.removeprefix("model.")), tensors()[FC1])


def test_tensors_that_the_model_does_not_know_are_left_out(tmp_path: Path) -> None:
    content = tensors() | {"lm_head.weight": tensors()[TABLE].clone(), "rotary.inv_freq": torch.ones(3)}
    with imported(opened(write_safetensors(tmp_path / "more", content)), tmp_path / "root") as store:
        assert not (store.path / "lm_head.weight").exists()
        assert not (store.path / "rotary.inv_freq").exists()


def test_numbers_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    content = tensors()
    content[FC1][3, 4], content[FC1][3, 5] = float("nan"), float("inf")
    with imported(opened(write_safetensors(tmp_path / "nan", content)), tmp_path / "root") as store:
        assert torch.equal(stock(store, FC1).isnan(), content[FC1].isnan())
        assert torch.equal(stock(store, FC1).isinf(), content[FC1].isinf())


def test_every_problem_is_told_at_once_before_anything_is_written(tmp_path: Path) -> None:
    content = tensors()
    del content[TABLE]
    content[FC1] = content[FC1][:50].clone()
    content["model.decoder.layers.0.fc2.weight"] = torch.ones(32, 64, dtype=torch.int8)
    checkpoint = opened(write_safetensors(tmp_path / "wrong", content))
    with pytest.raises(ProblemsError) as caught:
        imported(checkpoint, tmp_path / "root")
    message = str(caught.value)
    assert len(caught.value.problems) == 3
    assert all(isinstance(problem, CheckpointError) for problem in caught.value.problems)
    assert f"{TABLE} is missing" in message
    assert f"{FC1} has shape [50, 32], and the config asks for [64, 32]" in message
    assert "fc2.weight is stored as int8" in message
    assert str(tmp_path / "wrong" / "model.safetensors") in message
    assert not (tmp_path / "root").exists()


def import_in_child(folder: Path, root: Path, killed_after_pages: int) -> int:
    """Import in another process, which kills itself; its exit status."""
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from checkpoint.checkpoints import imported, opened\n"
        "calls = []\n"
        "def progress(done, total):\n"
        "    calls.append(done)\n"
        "    if len(calls) == int(sys.argv[3]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "imported(opened(sys.argv[1]), Path(sys.argv[2]), progress)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program, folder, root, str(killed_after_pages)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    ).returncode


def test_an_import_that_was_killed_goes_on_and_keeps_its_pages(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "root"
    assert import_in_child(folder, root, killed_after_pages=20) == -signal.SIGKILL
    before = pages(root)
    assert len(before) == 20
    (entry,) = list_stores(root)
    assert not entry.complete
    with pytest.raises(StorageError, match="incomplete"):
        WeightStore.open(entry.path)
    last = max(before, key=lambda path: before[path])
    last.rename(last.with_name(last.name + ".partial"))  # as a kill in the midst of a page leaves it
    torn = next(path for path in before if path != last)
    os.truncate(torn, 10)
    with imported(opened(folder), root) as store:
        assert all(torch.equal(stock(store, name), expected) for name, expected in tensors().items())
    after = pages(root)
    assert {path for path in before if after[path] == before[path]} == set(before) - {last, torn}
    assert not list(root.rglob("*.partial"))


def test_two_imports_at_once_write_once(tmp_path: Path, folder: Path) -> None:
    entered, waiting = Event(), Event()

    def hold(done: int, total: int) -> None:
        entered.set()
        assert waiting.wait(timeout=30)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(imported, opened(folder), tmp_path / "root", hold)
        assert entered.wait(timeout=30)
        calls: list[int] = []
        second = pool.submit(imported, opened(folder), tmp_path / "root", lambda done, total: calls.append(done))
        waiting.set()
        assert first.result().path == second.result().path
    assert calls == []


def test_a_store_of_another_cut_is_made_anew(tmp_path: Path, folder: Path) -> None:
    with imported(opened(folder), tmp_path / "root") as store:
        metadata = store.path / FC1 / "zarr.json"
        metadata.write_text(metadata.read_text().replace("[\n        64,", "[\n        128,"))
    with imported(opened(folder), tmp_path / "root") as store:
        assert torch.equal(stock(store, FC1), tensors()[FC1])


def test_a_store_of_another_cut_needs_no_more_space_than_it_gives_back(tmp_path: Path, folder: Path) -> None:
    with imported(opened(folder), tmp_path / "root") as store:
        layout = read_layout(store.path / FC1)
        other = ArrayLayout.plain(layout.shape, "float32", page_rows=layout.shape[0], unit_rows=layout.shape[0])
        assert other != layout
        assert missing_nbytes(store.path, {FC1: layout}) == 0
        assert missing_nbytes(tmp_path / "nothing", {FC1: other}) >= other.nbytes
        assert missing_nbytes(store.path, {FC1: other}) < other.nbytes / 2


def test_a_newer_store_is_left_alone(tmp_path: Path, folder: Path) -> None:
    with imported(opened(folder), tmp_path / "root") as store:
        metadata = store.path / "zarr.json"
    newer = metadata.read_text().replace(
        f'"format_version": {FORMAT_VERSION}', f'"format_version": {FORMAT_VERSION + 1}'
    )
    metadata.write_text(newer)
    with pytest.raises(StorageError, match="update flexflow-engine"):
        imported(opened(folder), tmp_path / "root")
    assert metadata.read_text() == newer


class HalvingCodec(Codec):
    """Keeps each second byte: useless, and half the size."""

    name = "halving"

    def configuration(self) -> Mapping[str, Any]:
        return {"name": self.name}

    def encoded_nbytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        return NoneCodec().encoded_nbytes(shape, dtype) // 2

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(values.contiguous().view(torch.uint8).reshape(len(values), -1)[:, ::2])

    def decode(self, encoded: torch.Tensor, out: torch.Tensor) -> None:
        raise NotImplementedError

    def error_bound(self, values: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def test_encoded_units_are_stored_as_the_codec_gave_them(tmp_path: Path, folder: Path) -> None:
    checkpoint = opened(folder)
    with imported_with(HalvingCodec(NoCodecOptions()), checkpoint, tmp_path / "root") as store:
        stored = store.stored(FC1)
        encoded = np.empty(stored.num_units * stored.unit_nbytes, np.uint8)
        store.read_units(FC1, 0, stored.num_units, encoded)
        assert stored.path.parent.name.endswith("-float32-halving")
        metadata = json.loads((store.path / FC1 / "zarr.json").read_text())
        assert store.header.codec == "halving"
    plain = tensors()[FC1].reshape(-1).view(torch.uint8)[::2]
    assert np.array_equal(encoded[: len(plain)], plain.numpy())
    assert (metadata["shape"], metadata["data_type"]) == ([64, 32], "float32")
    assert metadata["attributes"] == {"dtype": "float32", "unit_nbytes": stored.unit_nbytes}
    (sharding,) = metadata["codecs"]
    assert sharding["configuration"]["codecs"] == [
        {"name": "flexflow_engine.halving", "configuration": {}},
        {"name": "crc32c"},
    ]


@pytest.mark.parametrize("codec", [GroupInt4Codec(), GroupInt8Codec()], ids=lambda codec: codec.key)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_stock_zarr_reads_encoded_weights_as_float32(
    tmp_path: Path, folder: Path, dtype: DType, codec: GroupQuantCodec
) -> None:
    with imported_with(codec, opened(folder, dtype), tmp_path / "root") as store:
        for name, used in ((TABLE, codec.for_table()), (FC1, codec)):
            assert isinstance(used, GroupQuantCodec)
            node = zarr.open_group(store.path, mode="r")[name]
            assert isinstance(node, zarr.Array)
            assert (node.shape, node.dtype) == (tuple(tensors()[name].shape), np.dtype("float32"))
            assert node.attrs["dtype"] == dtype
            values = tensors()[name].to(TORCH_DTYPES[dtype]).float()
            found = torch.from_numpy(np.asarray(node[:]))
            assert (found - values).abs().max() < 2 * values.abs().max() / (2**used.bits - 1)
            assert (found - values).abs().max() > 0
            assert torch.equal(found, decoded_units(store, used, name))


def decoded_units(store: WeightStore, codec: Codec, name: str) -> torch.Tensor:
    """A matrix as the engine reads it: units of bytes at fixed places, decoded."""
    stored, shape = store.stored(name), tensors()[name].shape
    unit_rows = json.loads((stored.path / "zarr.json").read_text())["codecs"][0]["configuration"]["chunk_shape"][0]
    encoded = np.empty((stored.num_units, stored.unit_nbytes), np.uint8)
    store.read_units(name, 0, stored.num_units, encoded.reshape(-1))
    out = torch.empty(stored.num_units, unit_rows, shape[1])
    codec.decode(torch.from_numpy(encoded), out)
    return out.view(-1, shape[1])[: shape[0]]


def test_a_flipped_bit_of_encoded_weights_is_told_by_zarr_and_by_the_engine(tmp_path: Path, folder: Path) -> None:
    with imported_with(GroupInt4Codec(), opened(folder), tmp_path / "root") as store:
        flip_byte(store.path / FC1 / "c/0/0", 5)
        with pytest.raises(CorruptDataError, match=r"unit 0 of .*fc1.* does not match its checksum"):
            store.read_units(FC1, 0, 1, np.empty(store.stored(FC1).unit_nbytes, np.uint8))
        with pytest.raises(ValueError, match="checksum"):
            stock(store, FC1)


def test_codecs_of_two_kinds_can_not_share_a_store(tmp_path: Path, folder: Path) -> None:
    class Mixed(ZstdCodec):
        def for_table(self) -> Codec:
            return BloscCodec()

    with pytest.raises(PluginError, match=r"zstd wants tables encoded by .*blosc"):
        imported_with(Mixed(), opened(folder), tmp_path / "root")


def test_a_store_from_before_tables_had_a_codec_is_found_again(tmp_path: Path, folder: Path) -> None:
    codec = GroupInt4Codec(GroupInt4Options(table_bits=4))
    with imported_with(codec, opened(folder), tmp_path / "root") as store:
        metadata = store.path / "zarr.json"
    older = json.loads(metadata.read_text())
    del older["attributes"]["flexflow_engine"]["table_codec"]
    metadata.write_text(json.dumps(older))
    with imported_with(codec, opened(folder), tmp_path / "root") as store:
        assert store.header.table_codec == codec.key
    assert json.loads(metadata.read_text()) == older, "nothing was written"


@pytest.mark.parametrize("codec", [ZstdCodec(), BloscCodec()], ids=lambda codec: codec.key)
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_stock_zarr_reads_compressed_weights_bit_for_bit(
    tmp_path: Path, folder: Path, dtype: DType, codec: Codec
) -> None:
    with imported_with(codec, opened(folder, dtype), tmp_path / "root") as store:
        for name, values in tensors().items():
            bits = values.to(TORCH_DTYPES[dtype])
            assert torch.equal(stock(store, name), bits.view(torch.int16) if dtype == "bfloat16" else bits)


def test_a_compressed_store_is_found_again(tmp_path: Path, folder: Path) -> None:
    with imported_with(ZstdCodec(), opened(folder), tmp_path / "root") as store:
        before = pages(tmp_path / "root")
        assert store.nbytes < sum(tensor.nbytes for tensor in tensors().values())
    imported_with(ZstdCodec(), opened(folder), tmp_path / "root").close()
    assert pages(tmp_path / "root") == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True).returncode:  # noqa: PLW1510
        pytest.skip("mounting a small file system is not permitted here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_is_too_small_is_told_before_starting(small_disk: Path, folder: Path) -> None:
    with pytest.raises(StorageError, match=r"weights need \d+KiB, and \d+KiB are free.*free some space") as caught:
        imported(opened(folder), small_disk)
    assert caught.value.where == str(small_disk / "weights")
    assert pages(small_disk) == {}


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    program = (
        "import sys, torch, zarr\n"
        "from pathlib import Path\n"
        "from checkpoint.checkpoints import imported, opened\n"
        "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "imported(opened('synthetic:opt-125m', 'float32'), Path(sys.argv[1])).close()\n"
        "print(peak() - before)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "root"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert int(output) < 150 * 1024, "KiB, of a model of 480 MiB"


def test_what_transformers_saves_is_imported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(**{key: value for key, value in CONFIG.items() if key != "model_type"})
    config.word_embed_proj_dim = CONFIG["hidden_size"]
    model = transformers.OPTForCausalLM(config)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    with imported(opened(tmp_path / "saved"), tmp_path / "root") as store:
        for name in (TABLE, FC1):
            assert torch.equal(stock(store, name), model.state_dict()[name])


def test_files_are_read_for_their_content_once_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no folder").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no folder"))
    folder = write_safetensors(tmp_path / "checkpoint", tensors())
    checkpoint, codec = opened(folder), NoneCodec()
    told: list[tuple[int, int]] = []
    store = import_checkpoint(
        checkpoint,
        checkpoint.model,
        codec,
        codec,
        tmp_path,
        lambda done, total: None,
        reading=lambda done, total: told.append((done, total)),
    )
    store.close()
    nbytes = sum((folder / name).stat().st_size for name in ("config.json", "model.safetensors"))
    assert {total for _, total in told} == {nbytes}
    assert [done for done, _ in told].count(nbytes) == 1
    assert told == sorted(told)
