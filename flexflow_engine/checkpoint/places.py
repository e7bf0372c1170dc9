"""Where in a file a tensor lies, and reading rows of it.

Files are read at an offset into memory that belongs to the caller. Mapping them would be shorter, but mapped pages
count as the process's memory until the system wants them back: with the size of the checkpoint, not of a page.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexflow_engine.errors import CheckpointError

NOT_QUANTIZED = "use a checkpoint that is not quantized"
_MAX_HEADER_NBYTES = 100 * 2**20
"""Longer headers are refused by the safetensors library too."""
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FIX = "fetch the checkpoint again"
_SAVE_AGAIN = "load it once with transformers and save_pretrained it"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """One tensor in one file."""

    path: Path
    offset: int
    """Of the first element, in bytes."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements."""

    @property
    def span(self) -> int:
        """Elements from the first to behind the last."""
        return _span(self.shape, self.stride)

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first axis. Raises CheckpointError when the file can't be read or is too short."""
        assert 0 <= start <= stop <= self.shape[0], (self, start, stop)
        shape = (stop - start, *self.shape[1:])
        elements = torch.empty(_span(shape, self.stride), dtype=self.dtype)
        offset = self.offset + start * self.stride[0] * self.dtype.itemsize
        _read_exactly(self.path, offset, elements.view(torch.uint8).numpy())
        return elements.as_strided(shape, self.stride)


def safetensors_places(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file, by name. Raises CheckpointError when its header or its size is wrong."""
    header, data_offset = _safetensors_header(path)
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            place = _safetensors_place(path, name, entry, data_offset)
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(path, f"the header's entry for {name} makes no sense") from error
        _check_inside(name, place)
        places[name] = place
    return places


def torch_places(path: Path) -> dict[str, TensorPlace]:
    """The tensors of a file that torch.save wrote, by name. Nothing but tensors is ever unpickled from it.

    Raises CheckpointError when the file holds anything else, is damaged, or has the format of before torch 1.6.
    """
    content, data_offsets = _load_without_data(path), _zip_data_offsets(path)
    places = {}
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        places[name] = TensorPlace(
            path=path,
            offset=_storage_offset(path, tensor, data_offsets) + int(tensor.storage_offset()) * tensor.dtype.itemsize,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            stride=tuple(int(step) for step in tensor.stride()),
        )
        _check_inside(name, places[name])
    return places


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed header and the offset of the data behind it (safetensors format: u64 length, JSON, data)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = file.read(length) if length <= _MAX_HEADER_NBYTES else b""
        header = json.loads(content)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "it has no safetensors header, or only a part of it") from error
    if len(content) != length or not isinstance(header, dict):
        raise _damaged(path, "it has no safetensors header, or only a part of it")
    return header, 8 + length


def _safetensors_place(path: Path, name: str, entry: Mapping[str, Any], data_offset: int) -> TensorPlace:
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise CheckpointError(f"{name} is stored as {entry['dtype']}", where=str(path), fix=NOT_QUANTIZED)
    dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
    start, stop = entry["data_offsets"]
    if stop - start != prod(shape) * dtype.itemsize or start < 0:
        raise ValueError(entry)
    stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return TensorPlace(path=path, offset=data_offset + start, dtype=dtype, shape=shape, stride=stride)


def _load_without_data(path: Path) -> Mapping[str, Any]:
    """What torch.save saved, its tensors on the meta device: the pickle is read, the storages are not."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except OSError as error:
        raise _unreadable(path, error) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "the file holds more than tensors, and reading it could run code that it brings along",
            where=str(path),
            fix="use a checkpoint in the safetensors format",
        ) from error
    except Exception as error:  # torch's reader raises many kinds for a file that is cut or overwritten
        raise _damaged(path, "torch can't read it") from error
    if not isinstance(content, Mapping):
        raise CheckpointError("the file holds no tensors by name", where=str(path))
    return content


def _zip_data_offsets(path: Path) -> frozenset[int]:
    """Where the archive's uncompressed members have their data; torch computes that, and trusts the layout it writes.

    Empty for the format of before torch 1.6, which is no archive. Local file header: 30 bytes, the lengths of the
    name and of the extra field that follow it at 26 and 28 (APPNOTE, section 4.3.7).
    """
    if not zipfile.is_zipfile(path):
        return frozenset()
    offsets = set()
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            lengths = file.read(4)
            if member.filename.endswith("/byteorder") and archive.read(member) != b"little":
                raise CheckpointError("the file is from a big-endian machine", where=str(path), fix=_SAVE_AGAIN)
            if member.compress_type == zipfile.ZIP_STORED:
                name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
                offsets.add(member.header_offset + 30 + name + extra)
    return frozenset(offsets)


def _storage_offset(path: Path, tensor: torch.Tensor, data_offsets: frozenset[int]) -> int:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset not in data_offsets:
        raise CheckpointError(
            "the file has the format of torch before 1.6, or was packed again", where=str(path), fix=_SAVE_AGAIN
        )
    return int(offset)


def _check_inside(name: str, place: TensorPlace) -> None:
    end = place.offset + place.span * place.dtype.itemsize
    found = place.path.stat().st_size
    if end > found:
        raise _damaged(place.path, f"it has {found} bytes, and {name} would end at byte {end}")


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _read_exactly(path: Path, offset: int, out: NDArray[np.uint8]) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while len(out):
                count = os.preadv(descriptor, [out.data], offset)
                if count == 0:
                    raise _damaged(path, f"it ends at byte {offset}")
                out, offset = out[count:], offset + count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(path, error) from error


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"the file is damaged: {what}", where=str(path), fix=_FIX)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"the file can't be read: {error.strerror}", where=str(path), fix=_FIX)
