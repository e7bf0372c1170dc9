"""Bytes of a file that begin and end anywhere, moved in whole blocks.

| head | whole blocks | tail |

head and tail   through a buffer, with what shares their blocks
whole blocks    straight from and to the caller's memory where direct I/O takes it, else through the buffer
"""

from __future__ import annotations

import os
from threading import Lock
from typing import Any

from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.files import reporting
from flexflow_engine.store.access import OpenFile
from flexflow_engine.store.blocks import fetch, fetch_nbytes, read_into, write_from
from flexflow_engine.store.shard import BLOCK_NBYTES, ShardFile


def read_span(shard: ShardFile, file: OpenFile, offset: int, out: HostBytes) -> None:
    """Bytes [offset, offset + len(out)) of the file into `out`, uint8.

    Raises CorruptDataError when the file ends before, StorageError on an I/O error.
    """
    head, tail = _edges(offset, len(out))
    whole = out[head : len(out) - tail]
    if not len(whole) or whole.ctypes.data % file.mode.memory_alignment:
        step = fetch_nbytes(file)
        for start in range(0, len(out), step):
            part = out[start : start + step]
            part[:] = fetch(shard, file, offset + start, len(part))
        return
    first, last = file.buffer[:BLOCK_NBYTES], file.buffer[BLOCK_NBYTES : 2 * BLOCK_NBYTES]
    before = -head % BLOCK_NBYTES
    parts = [*[first][: head > 0], whole, *[last][: tail > 0]]
    read_into(shard, file, offset - before, parts, before + len(out))
    out[:head] = first[before:][:head]
    out[len(out) - tail :] = last[:tail]


def write_span(shard: ShardFile, file: OpenFile, offset: int, data: HostBytes, *, edges: Lock) -> None:
    """`data`, uint8, as bytes [offset, offset + len(data)) of the file, whose other bytes stay as they are.

    edges: held for blocks that it fills a part of, by everybody who writes to this file. Raises StorageError.
    """
    head, tail = _edges(offset, len(data))
    stop = len(data) - tail
    if head:
        _patch(shard, file, offset, data[:head], edges)
    if head < stop:
        _write_blocks(shard, file, offset + head, data[head:stop])
    if tail:
        _patch(shard, file, offset + stop, data[stop:], edges)


def _edges(offset: int, nbytes: int) -> tuple[int, int]:
    """Bytes of the span before its first whole block, and behind its last."""
    head = min(-offset % BLOCK_NBYTES, nbytes)
    return head, (nbytes - head) % BLOCK_NBYTES


def _write_blocks(shard: ShardFile, file: OpenFile, offset: int, data: HostBytes) -> None:
    """Whole blocks at a block."""
    if data.ctypes.data % file.mode.memory_alignment == 0:
        write_from(shard, file.descriptor, offset, [data])
        return
    for start in range(0, len(data), len(file.buffer)):
        part = data[start : start + len(file.buffer)]
        file.buffer[: len(part)] = part
        write_from(shard, file.descriptor, offset + start, [file.buffer[: len(part)]])


def _patch(shard: ShardFile, file: OpenFile, offset: int, data: HostBytes, alone: Lock) -> None:
    """Less than a block, in one block."""
    block: Any = file.buffer[:BLOCK_NBYTES]  # numpy's types call no array a buffer before 3.12
    start = offset % BLOCK_NBYTES
    with alone:
        with reporting(shard.path):
            found = os.preadv(file.descriptor, [block], offset - start)  # short at the file's end
        block[found:] = 0
        block[start : start + len(data)] = data
        write_from(shard, file.descriptor, offset - start, [block])
