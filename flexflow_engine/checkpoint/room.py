"""How much of a disk a job's weight store takes, before a weight is read or written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexflow_engine.abc.codec import Codec
from flexflow_engine.checkpoint.checkpoint import Checkpoint
from flexflow_engine.checkpoint.importing import WEIGHTS
from flexflow_engine.checkpoint.plan import ImportPlan
from flexflow_engine.files import free_nbytes
from flexflow_engine.store.header import StoreHeader, headers_in


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRoom:
    """A store is written once, whole, whatever the budgets of tiers."""

    root: Path
    """The folder of all stores is in it."""
    nbytes: int
    """Before compression; checksums and indices not counted."""
    imported: bool
    """Whether a whole store says that it was made of a checkpoint of this name, in this number format and codec."""
    beside_others: bool
    """Whether there are stores under the root already: what one of them has of this one is not written again."""

    @property
    def free_nbytes(self) -> int:
        """What is free on the disk where it lies, or will. Raises StorageError."""
        return free_nbytes(self.root)


def store_room(checkpoint: Checkpoint, codec: Codec, small_codec: Codec, root: Path) -> StoreRoom:
    """codec: of the large tensors, tables by its `for_table`. Reads the headers of the stores under `root`."""
    plan = ImportPlan.of(checkpoint.model, codec, small_codec)
    headers = headers_in(root / WEIGHTS).values()
    imported = any(_is_of(header, checkpoint.reference, plan) for header in headers)
    return StoreRoom(root=root, nbytes=plan.nbytes, imported=imported, beside_others=bool(headers))


def _is_of(header: StoreHeader, reference: str, plan: ImportPlan) -> bool:
    made_as = (header.reference, header.dtype, header.codec, header.table_codec)
    return header.complete and made_as == (reference, plan.dtype, plan.codec.key, plan.codec.for_table().key)
