"""Weights that lie on a tier already: what a disk reads of them, and not of what it has just written, is its rate."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from flexflow_engine.abc.tier import StoredTensor
from flexflow_engine.checkpoint.importing import WEIGHTS
from flexflow_engine.errors import CorruptDataError, StorageError
from flexflow_engine.store.array import read_layout
from flexflow_engine.store.header import StoreHeader, headers_in
from flexflow_engine.store.weights import stored_tensor


def stored_tensors(root: Path) -> tuple[StoredTensor, ...]:
    """What is read as it lies there of the model with the most bytes that is imported under `root`.

    Empty where nothing is imported, or nothing that lies there as it is read: compressed units are not.
    """
    stores = _stores(root)
    if not stores:
        return ()
    folder = max(stores, key=lambda path: stores[path].nbytes)
    tensors = (_tensor(folder, name) for name in stores[folder].arrays.values())
    return tuple(tensor for tensor in tensors if tensor is not None)


def cut_alike(tensors: Sequence[StoredTensor]) -> tuple[StoredTensor, ...]:
    """Those that are cut alike and have the most bytes."""
    alike: dict[tuple[int, int], list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        alike[tensor.unit_nbytes, tensor.units_per_page].append(tensor)
    return tuple(max(alike.values(), key=lambda some: sum(x.num_units * x.unit_nbytes for x in some), default=()))


def cut_most(tensors: Sequence[StoredTensor]) -> StoredTensor | None:
    """The one of most units, as a table is, of which single ones are looked up; None where every page is one unit."""
    cut = [tensor for tensor in tensors if tensor.units_per_page > 1]
    return max(cut, key=lambda tensor: tensor.num_units, default=None)


def is_imported_to(root: Path) -> bool:
    """Whether there is any model."""
    return bool(_stores(root))


def _stores(root: Path) -> dict[Path, StoreHeader]:
    """The complete ones, by folder."""
    return {folder: header for folder, header in headers_in(root / WEIGHTS).items() if header.complete}


def _tensor(folder: Path, name: str) -> StoredTensor | None:
    try:
        layout = read_layout(folder / name)
    except (CorruptDataError, StorageError):
        return None
    return stored_tensor(name, folder / name, layout, None) if layout.compression is None else None
