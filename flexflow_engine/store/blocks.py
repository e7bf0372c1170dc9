"""Moving bytes between a shard file and memory, in as many calls as the system takes."""

from __future__ import annotations

import os
from typing import Any

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.files import reporting
from flexflow_engine.store.access import OpenFile
from flexflow_engine.store.shard import BLOCK_NBYTES, ShardFile, round_up


def read_into(shard: ShardFile, file: OpenFile, offset: int, buffers: list[HostBytes], needed: int) -> None:
    """Fill `buffers` from `offset` on: their first `needed` bytes at least, the rest as far as the file goes.

    Raises CorruptDataError when the file ends before, StorageError on an I/O error.
    """
    done = 0
    while done < needed:
        with reporting(shard.path), file.reading:
            moved = os.preadv(file.descriptor, _behind(buffers, done), offset + done)
        done += moved
        if done < needed and (moved == 0 or done % BLOCK_NBYTES):  # what is left of a block is the file's end
            raise shard.corrupt(f"a page of {shard.name} ends at byte {offset + done}, before its last unit")


def fetch(shard: ShardFile, file: OpenFile, offset: int, nbytes: int) -> HostBytes:
    """Bytes [offset, offset + nbytes) of the file, as a view of its buffer, through which whole blocks are read.

    nbytes: at most `fetch_nbytes`. Raises like `read_into`.
    """
    skipped = offset % BLOCK_NBYTES
    blocks = file.buffer[: round_up(skipped + nbytes)]
    read_into(shard, file, offset - skipped, [blocks], skipped + nbytes)
    return blocks[skipped : skipped + nbytes]


def fetch_nbytes(file: OpenFile) -> int:
    """How many bytes can be fetched in one go, wherever they begin."""
    return len(file.buffer) - BLOCK_NBYTES


def write_from(shard: ShardFile, descriptor: int, offset: int, buffers: list[HostBytes]) -> None:
    """Write all bytes of `buffers` to `offset`. Raises StorageError when the disk is full or fails."""
    left = _behind(buffers, 0)
    while left:
        with reporting(shard.path):
            moved = os.pwritev(descriptor, left, offset)
        offset += moved
        left = _behind(left, moved)


def _behind(buffers: list[HostBytes], moved: int) -> list[Any]:  # numpy's types call no array a buffer before 3.12
    """What is left of `buffers` after their first `moved` bytes."""
    for position, buffer in enumerate(buffers):
        if moved < len(buffer):
            return [buffer[moved:], *buffers[position + 1 :]]
        moved -= len(buffer)
    return []
