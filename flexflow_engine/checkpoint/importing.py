"""Streaming a checkpoint into a weight store, page by page.

    <root>/weights/<content key>-<dtype>-<codec>/       the store
    <root>/weights/<content key>-<dtype>-<codec>.lock   held while it is written, gone then

The codec of the tables follows where it is another one. Stores of one checkpoint share the pages that are equal, as
hard links: small tensors, and what the same codec has encoded.
An import that was interrupted goes on where it stopped. Memory holds one page at a time, whatever the model's size.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.sizes import rounded_down, rounded_up
from flexflow_engine.checkpoint.checkpoint import ByteProgress, Checkpoint, silent
from flexflow_engine.checkpoint.plan import ImportPlan, TensorPlan, find_names
from flexflow_engine.cpu.settings import one_torch_thread
from flexflow_engine.errors import CorruptDataError, StorageError
from flexflow_engine.files import free_nbytes, make_folder, open_locked, reporting
from flexflow_engine.placement.pages import PagedTensor
from flexflow_engine.store.array import METADATA, read_layout
from flexflow_engine.store.header import StoreHeader, headers_in, read_header
from flexflow_engine.store.weights import WeightStore
from flexflow_engine.store.writing import StoreWriter, missing_nbytes

WEIGHTS = "weights"
"""The folder of all stores under a root."""


def import_checkpoint(  # noqa: PLR0917  # in the order the data pass; every one of another type
    checkpoint: Checkpoint,
    model: Model,
    codec: Codec,
    small_codec: Codec,
    root: Path,
    progress: ByteProgress,
    *,
    reading: ByteProgress = silent,
) -> WeightStore:
    """The weight store of `checkpoint` under `root`, which is made unless it is there; the caller closes it.

    codec: of the large tensors, tables by its `for_table`. progress: called after every page with the bytes done and
    in all; reading: likewise, as the checkpoint's files are read to know their content. A second import of the same
    content waits for the first. Raises CheckpointError or ProblemsError before anything is written, StorageError when
    the disk is too small or fails.
    """
    plan = ImportPlan.of(model, codec, small_codec)
    content_key = checkpoint.content_key(reading)
    folder = store_folder(root, content_key, plan)
    store = _finished(folder, plan)
    if store is not None:
        return store
    header = _header(checkpoint, content_key, plan, find_names(checkpoint, model))
    with locked(folder), one_torch_thread():  # casting a page is a copy, and waking other cores takes as long
        store = _finished(folder, plan)
        if store is None:
            _import(folder, checkpoint, plan, header, progress)
    return store or WeightStore.open(folder, plan.compressor)


def store_folder(root: Path, content_key: str, plan: ImportPlan) -> Path:
    codecs = dict.fromkeys((plan.codec.key, plan.codec.for_table().key))
    return root / WEIGHTS / "-".join((content_key[:16], plan.dtype, *codecs))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a store's folder; waits for whoever holds it. Raises StorageError."""
    path = folder.with_name(folder.name + ".lock")
    make_folder(path.parent)
    with reporting(path):
        descriptor = open_locked(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError):  # it stays, and does no harm
            path.unlink()
        os.close(descriptor)


def _finished(folder: Path, plan: ImportPlan) -> WeightStore | None:
    """The store at `folder` when it is whole and cut as `plan` says. Raises StorageError for one of a newer format."""
    if not (folder / METADATA).exists():
        return None
    try:
        header = read_header(folder)
        fits = header.complete and all(_is_stored(folder, header, entry) for entry in plan.tensors)
    except CorruptDataError:
        return None
    return WeightStore(folder, header, plan.compressor) if fits else None


def _is_stored(folder: Path, header: StoreHeader, entry: TensorPlan) -> bool:
    array = header.arrays.get(entry.name)
    return array is not None and (folder / array).exists() and read_layout(folder / array) == entry.layout


def _import(
    folder: Path, checkpoint: Checkpoint, plan: ImportPlan, header: StoreHeader, progress: ByteProgress
) -> None:
    names = header.arrays
    layouts = {names[entry.name]: entry.layout for entry in plan.tensors}
    others = _others(folder, header.content_key)
    sources = {names[entry.name]: _sources(entry, others) for entry in plan.tensors}
    _check_space(folder, missing_nbytes(folder, {name: x for name, x in layouts.items() if not sources[name]}))
    writer = StoreWriter(folder, header, layouts, plan.compressor)
    done, total = 0, plan.nbytes
    for entry in plan.tensors:
        name = names[entry.name]
        for page in range(entry.layout.num_pages):
            there = writer.has_page(name, page) or any(writer.share_page(name, page, path) for path in sources[name])
            if not there:
                _write_page(writer, checkpoint, name, entry, page)
            done += len(entry.tensor.page_units(page)) * entry.layout.unit_nbytes
            progress(done, total)
    writer.finish()


def _others(folder: Path, content_key: str) -> dict[Path, StoreHeader]:
    """Complete stores of the same checkpoint beside `folder`, by path, whose files can be linked from there."""
    return {
        path: header
        for path, header in headers_in(folder.parent).items()
        if header.complete and header.content_key == content_key and path != folder and _can_link(path, folder)
    }


def _can_link(source: Path, folder: Path) -> bool:
    """Whether a store at `folder` can have hard links to the files of the one at `source`; by making one."""
    link = folder.with_name(f"{folder.name}.link")
    try:
        link.unlink(missing_ok=True)
        link.hardlink_to(source / METADATA)
        link.unlink()
    except OSError:
        return False
    return True


def _sources(entry: TensorPlan, others: Mapping[Path, StoreHeader]) -> tuple[Path, ...]:
    """The stores that have a tensor's very pages: plain numbers, or what the same encoder made of them."""
    codec, role = entry.tensor.codec, entry.tensor.role
    plain = codec.keeps_bytes and not codec.compresses
    return tuple(
        path
        for path, header in others.items()
        if (plain or header.codec_of(role) == codec.key) and _is_stored(path, header, entry)
    )


def _header(checkpoint: Checkpoint, content_key: str, plan: ImportPlan, names: Mapping[str, str]) -> StoreHeader:
    return StoreHeader(
        reference=checkpoint.reference,
        content_key=content_key,
        dtype=plan.dtype,
        codec=plan.codec.key,
        table_codec=plan.codec.for_table().key,
        small_codec=plan.small_codec.key,
        arrays=names,
        nbytes=plan.nbytes,
    )


def _check_space(folder: Path, needed: int) -> None:
    free = free_nbytes(folder.parent)
    if needed > free:
        raise StorageError(
            f"the weights need {rounded_up(needed)}, and {rounded_down(free)} are free",
            where=str(folder.parent),
            fix="free some space there, or choose a path on a larger disk",
        )


def _write_page(writer: StoreWriter, checkpoint: Checkpoint, array: str, entry: TensorPlan, page: int) -> None:
    tensor, unit_nbytes = entry.tensor, entry.layout.unit_nbytes
    units = tensor.page_units(page)
    rows = _read_rows(checkpoint, array, tensor, units).to(getattr(torch, writer.dtype))
    encoded = torch.empty((len(units), unit_nbytes), dtype=torch.uint8)
    tensor.codec.encode(_cut(rows, tensor.unit_rows), encoded)
    writer.write_page(array, page, encoded.view(-1).numpy())


def _read_rows(checkpoint: Checkpoint, name: str, tensor: PagedTensor, units: range) -> torch.Tensor:
    """The rows of `units` that the tensor has; a vector is read whole."""
    if len(tensor.shape) == 1:
        return checkpoint.read_rows(name, 0, tensor.shape[0])
    first, last = units.start * tensor.unit_rows, units.stop * tensor.unit_rows
    return checkpoint.read_rows(name, first, min(last, tensor.rows))


def _cut(rows: torch.Tensor, unit_rows: int) -> torch.Tensor:
    """Rows [R, columns] as units [n, unit_rows, columns], the last filled up with zeros; a vector is one unit."""
    if rows.ndim == 1:
        return rows[None]
    return F.pad(rows, (0, 0, 0, -len(rows) % unit_rows)).view(-1, unit_rows, rows.shape[1])
