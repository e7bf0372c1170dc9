"""Checkpoints in files: every format gives the same tensors, and what is wrong with a file is said before it hurts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.checkpoints import (
    CONFIG,
    FC1,
    FORMATS,
    TABLE,
    opened,
    tensors,
    write_bin,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
)
from flexflow_engine.errors import CheckpointError, FlexFlowError, ProblemsError

NESTED = "[" * 100_000


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_format_gives_the_same_tensors(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    content = tensors(dtype)
    checkpoint = opened(FORMATS[name](tmp_path, content))
    assert checkpoint.tensor_names() == set(content)
    for tensor, expected in content.items():
        assert checkpoint.shape(tensor) == tuple(expected.shape)
        assert torch.equal(checkpoint.read_rows(tensor, 0, len(expected)), expected)
    assert torch.equal(checkpoint.read_rows(TABLE, 17, 101), content[TABLE][17:101])


def test_tensors_that_share_or_transpose_a_storage_are_read_right(tmp_path: Path) -> None:
    content = tensors()
    base = torch.arange(64.0 * 40).reshape(40, 64)
    content[FC1] = base[4:36].t()  # 64 × 32, columns contiguous, behind an offset
    checkpoint = opened(write_bin(tmp_path, content))
    assert torch.equal(checkpoint.read_rows(FC1, 10, 20), content[FC1][10:20])


def test_safetensors_are_preferred_where_both_exist(tmp_path: Path) -> None:
    write_bin(tmp_path, {name: torch.zeros_like(tensor) for name, tensor in tensors().items()})
    checkpoint = opened(write_safetensors(tmp_path, tensors()))
    assert torch.equal(checkpoint.read_rows(FC1, 0, 64), tensors()[FC1])


def test_a_bin_file_that_was_packed_again_is_refused_and_not_misread(tmp_path: Path) -> None:
    file = write_bin(tmp_path, tensors()) / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="packed again"):
        opened(tmp_path).tensor_names()


def test_the_format_of_before_torch_1_6_is_refused(tmp_path: Path) -> None:
    folder = write_bin(tmp_path, tensors())
    torch.save(tensors(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6.*save_pretrained"):
        opened(folder).tensor_names()


class Malicious:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("by_torch", [True, False], ids=["in torch's zip", "a bare pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, by_torch: bool) -> None:
    folder, trap = write_bin(tmp_path / "checkpoint", tensors()), tmp_path / "trap"
    content = tensors() | {"evil": Malicious(trap)}
    if by_torch:
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"evil": Malicious(trap)}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        opened(folder).tensor_names()
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../x.safetensors"])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_sharded_safetensors(tmp_path / "checkpoint", tensors())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {FC1: name}}))
    with pytest.raises(CheckpointError, match="leads out of the checkpoint's folder"):
        opened(folder).tensor_names()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_safetensors(tmp_path / "checkpoint", tensors())
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match="leads out of the checkpoint's folder"):
        opened(folder).tensor_names()


def test_the_hub_caches_own_links_are_followed_and_no_others(tmp_path: Path) -> None:
    repository = tmp_path / "models--some--model"
    snapshot = write_safetensors(repository / "snapshots" / "0123", tensors())
    blobs = repository / "blobs"
    blobs.mkdir()
    for number, file in enumerate(snapshot.iterdir()):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    assert opened(snapshot).tensor_names() == set(tensors())
    shutil.move(blobs / "0", tmp_path / "0")
    (blobs / "0").symlink_to(tmp_path / "0")
    with pytest.raises(CheckpointError, match="leads out of the checkpoint's folder"):
        opened(snapshot).tensor_names()


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_sharded_safetensors(tmp_path, tensors())
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ProblemsError, match=r"(?s)00001-of-00002.*missing.*00002-of-00002.*missing"):
        opened(folder).tensor_names()


@pytest.mark.parametrize("write", [write_sharded_safetensors, write_sharded_bin])
def test_a_tensor_that_the_index_promises_and_the_file_lacks_is_named(tmp_path: Path, write: Any) -> None:
    folder = write(tmp_path, tensors())
    (index,) = folder.glob("*.index.json")
    content = json.loads(index.read_text())
    content["weight_map"]["promised.weight"] = content["weight_map"][FC1]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"promised\.weight") as caught:
        opened(folder).tensor_names()
    assert caught.value.where == str(folder / content["weight_map"][FC1])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', NESTED])
def test_an_index_that_makes_no_sense_is_named(tmp_path: Path, content: str) -> None:
    folder = write_sharded_safetensors(tmp_path, tensors())
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json.*index can't be read"):
        opened(folder).tensor_names()


@pytest.mark.parametrize("name", ["safetensors", "bin"])
@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_is_found_from_its_header(tmp_path: Path, name: str, kept: float) -> None:
    folder = FORMATS[name](tmp_path, tensors())
    (file,) = (path for path in folder.iterdir() if path.name != "config.json")
    os.truncate(file, int(file.stat().st_size * kept))
    with pytest.raises(CheckpointError) as caught:
        opened(folder).tensor_names()
    assert caught.value.where == str(file)


def test_a_header_that_is_nested_too_deeply_is_told(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path, tensors())
    (folder / "model.safetensors").write_bytes(len(NESTED).to_bytes(8, "little") + NESTED.encode())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file is damaged: it has no safetensors header"):
        opened(folder).tensor_names()


@pytest.mark.parametrize("dtype", ["U16", "U32", "U64", "F8_E8M0", "F4"])
def test_numbers_of_quantized_checkpoints_are_told_as_such(tmp_path: Path, dtype: str) -> None:
    """Nothing is wrong with such a file: fetching it again would not help."""
    folder = write_safetensors(tmp_path, tensors())
    nbytes = {"U16": 4, "U32": 8, "U64": 16, "F8_E8M0": 2, "F4": 1}[dtype]
    header = json.dumps({FC1: {"dtype": dtype, "shape": [2], "data_offsets": [0, nbytes]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    checkpoint = opened(folder)
    with pytest.raises(CheckpointError, match=rf"{FC1} is stored as .*; use a checkpoint that is not quantized"):
        raise checkpoint.problem(FC1, (2,)) or AssertionError("no problem")


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path, tensors())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights.*model\.safetensors.*pytorch_model\.bin"):
        opened(folder).tensor_names()


@pytest.mark.parametrize("content", [None, "", "[1]", "{", NESTED])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, content: str | None) -> None:
    folder = write_safetensors(tmp_path, tensors())
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        opened(folder)


def test_an_unknown_model_type_lists_the_known_ones(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path, tensors())
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    with pytest.raises(CheckpointError, match=r"'mamba'.*opt"):
        opened(folder)


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "vocab.json", "spiece.model", "sentencepiece.bpe.model"])
def test_a_tokenizers_folder_is_known_by_its_vocabulary(tmp_path: Path, vocabulary: str) -> None:
    folder = write_safetensors(tmp_path, tensors())
    assert opened(folder).tokenizer_folder is None
    (folder / vocabulary).write_text("{}")
    assert opened(folder).tokenizer_folder == folder


@pytest.mark.parametrize("name", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path, {"big": torch.zeros(300, 262_144)})
    program = (
        "import sys, pathlib\n"
        "from flexflow_engine.checkpoint.places import safetensors_places, torch_places\n"
        "def peak(): return int(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "read = {'.bin': torch_places, '.safetensors': safetensors_places}\n"
        "file = next(path for path in pathlib.Path(sys.argv[1]).iterdir() if path.suffix in read)\n"
        "before, place = peak(), read[file.suffix](file)['big']\n"
        "for row in range(0, 300, 10): place.read_rows(row, row + 10)\n"
        "print(peak() - before)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    output = subprocess.run(
        [sys.executable, "-c", program, tmp_path], env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert int(output) < 150 * 1024, "KiB, of a file of 300 MiB"


def test_problems_are_told_as_errors_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(FlexFlowError, match="no checkpoint"):
        opened(tmp_path / "nowhere")
