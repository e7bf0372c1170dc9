"""What a weight store says about itself: the attributes of its Zarr group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flexflow_engine.abc.model import Role
from flexflow_engine.errors import CorruptDataError, StorageError
from flexflow_engine.store.array import METADATA, read_metadata, write_metadata

KEY = "flexflow_engine"
"""The attribute under which the header stands."""
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreHeader:
    """Plain data; everything about the arrays' cut stands in the arrays' own zarr.json."""

    reference: str
    """The checkpoint as the user named it when it was imported."""
    content_key: str
    """Digest of the checkpoint's content."""
    dtype: str
    codec: str
    """Of the large tensors."""
    table_codec: str
    """Of those of them that rows are looked up in."""
    small_codec: str
    arrays: Mapping[str, str]
    """The model's tensor name -> name of the array, which is the checkpoint's spelling."""
    nbytes: int
    """Bytes of all units."""
    complete: bool = False

    def codec_of(self, role: Role) -> str:
        """The key of the codec of such tensors."""
        return {"matrix": self.codec, "table": self.table_codec, "small": self.small_codec}[role]


def write_header(folder: Path, header: StoreHeader) -> None:
    """Make the group at `folder`, or replace its header."""
    import zarr  # noqa: PLC0415  # 0.6 s, and plugins are listed without it
    from zarr.core.buffer import Buffer  # noqa: PLC0415
    from zarr.storage import MemoryStore  # noqa: PLC0415

    files: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(files), attributes={KEY: {"format_version": FORMAT_VERSION, **asdict(header)}})
    write_metadata(folder, files[METADATA].to_bytes())


def read_header(folder: Path) -> StoreHeader:
    """The header at `folder`.

    Raises StorageError when there is no group, or one of a newer version, CorruptDataError when it is foreign.
    """
    attributes = read_metadata(folder).get("attributes")
    header = attributes.get(KEY) if isinstance(attributes, dict) else None
    if not isinstance(header, dict):
        raise _foreign(folder)
    _check_version(folder, header.get("format_version"))
    header = {"table_codec": header.get("codec"), **header}  # older stores have one codec for both
    names = {entry.name for entry in fields(StoreHeader)}
    if not names <= header.keys():
        raise _foreign(folder)
    return StoreHeader(**{name: header[name] for name in names})


def header_or_none(folder: Path) -> StoreHeader | None:
    """The same; None for what can't be read: that is the business of who needs this very store."""
    try:
        return read_header(folder)
    except (CorruptDataError, StorageError):
        return None


def headers_in(folder: Path) -> dict[Path, StoreHeader]:
    """Those of the stores in `folder` that can be read, by the stores' paths and in their order."""
    paths = sorted(metadata.parent for metadata in folder.glob(f"*/{METADATA}"))
    return {path: header for path in paths if (header := header_or_none(path))}


def _check_version(folder: Path, version: Any) -> None:
    if not isinstance(version, int):
        raise _foreign(folder)
    if version > FORMAT_VERSION:
        raise StorageError(
            f"the weight store has format {version}, and this version reads up to {FORMAT_VERSION}",
            where=str(folder),
            fix="update flexflow-engine, or remove the store and import the checkpoint again",
        )


def _foreign(folder: Path) -> CorruptDataError:
    return CorruptDataError(
        "not a weight store of this engine",
        where=str(folder),
        fix="choose the folder of an imported checkpoint, or remove this one and import again",
    )
