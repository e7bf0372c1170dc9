"""Stock zarr-python reads and writes encoded arrays, and refuses what is damaged or newer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import BloscCodec

from flexflow_engine.errors import CorruptDataError
from flexflow_engine.testing.codec_suite import normal, round_trip
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec, GroupQuantCodec
from flexflow_plugins.codecs.zarr_codecs import GroupInt4ZarrCodec, GroupInt8ZarrCodec

CODECS = [
    GroupInt4Codec(),
    GroupInt4Codec(GroupInt4Options(group_size=32)),
    GroupInt4Codec(GroupInt4Options(encoder="minmax")),
    GroupInt8Codec(),
]


def zarr_codec(codec: GroupQuantCodec) -> GroupInt4ZarrCodec | GroupInt8ZarrCodec:
    return GroupInt4ZarrCodec(codec) if isinstance(codec, GroupInt4Codec) else GroupInt8ZarrCodec(codec)


def written(path: Path, codec: GroupQuantCodec) -> torch.Tensor:
    """Write an array [20, 24] in chunks [8, 24]; what its chunks should read as."""
    values = normal(1, (24, 24), "float32")[0]
    values[20:] = 0  # Zarr fills the last chunk up
    array = zarr.create_array(
        path, shape=(20, 24), chunks=(8, 24), dtype="float32", serializer=zarr_codec(codec), compressors=None
    )
    array[:] = values[:20].numpy()
    return round_trip(codec, values.view(3, 8, 24), "float32").view(24, 24)[:20]


def edit(path: Path, old: str, new: str) -> None:
    text = json.dumps(json.loads((path / "zarr.json").read_text()))
    assert old in text, text
    (path / "zarr.json").write_text(text.replace(old, new))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.key)
def test_zarr_reads_what_zarr_wrote(tmp_path: Path, codec: GroupQuantCodec) -> None:
    expected = written(tmp_path / "a", codec)
    found = zarr.open_array(tmp_path / "a", mode="r")
    assert found.dtype == np.dtype("float32")
    assert np.array_equal(np.asarray(found[:]), expected.numpy())
    assert np.array_equal(np.asarray(found[7:19, 3]), expected.numpy()[7:19, 3])
    assert found.metadata.to_dict()["codecs"][0]["configuration"] == {  # type: ignore[index,call-overload]  # typed as any JSON
        key: value for key, value in codec.configuration().items() if key != "name"
    }


def test_a_compressor_may_follow(tmp_path: Path) -> None:
    codec = CODECS[0]
    expected = round_trip(codec, normal(1, (8, 24), "float32"), "float32")[0]
    array = zarr.create_array(
        tmp_path / "a", shape=(8, 24), dtype="float32", serializer=zarr_codec(codec), compressors=[BloscCodec()]
    )
    array[:] = normal(1, (8, 24), "float32")[0].numpy()
    assert np.array_equal(np.asarray(zarr.open_array(tmp_path / "a", mode="r")[:]), expected.numpy())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 2', '"version": 3', "version 3 of group-int4.*update flexflow-engine"),
        ('"version": 2', '"version": null', "configuration"),
        ('"group_size": 64', '"group_size": 64, "rotation": 3', "configuration"),
        ('"float32"', '"float64"', "float64 can't hold group-int4"),
    ],
)
def test_what_this_version_does_not_know_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    written(tmp_path / "a", CODECS[0])
    edit(tmp_path / "a", old, new)
    with pytest.raises(CorruptDataError, match=message):
        zarr.open_array(tmp_path / "a", mode="r")


def test_a_chunk_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a", CODECS[0])
    chunk = tmp_path / "a/c/1/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(CorruptDataError, match=r"in 108 bytes a tensor.*\[1, 107\]"):
        zarr.open_array(tmp_path / "a", mode="r")[:]


def test_another_group_size_than_the_data_have_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a", CODECS[0])
    edit(tmp_path / "a", '"group_size": 64', '"group_size": 16')
    with pytest.raises(CorruptDataError, match="encoded with other settings"):
        zarr.open_array(tmp_path / "a", mode="r")[:]
