"""The disk tier against the disk itself, and the host tiers against a copy.

    python benchmarks/disk.py [--path FOLDER] [--json FILE]

Each row is one kind of request, made by as many threads as the tier's lanes have: pages of weights are read, pages of
the KV cache written and read. Beside it, round by round in turns, as many threads move as many bytes a request with
direct I/O on the same file system and do nothing else. Before each round the files are taken out of the page cache;
what is there at the end is counted. Medians over the rounds; bytes are the engine's own, without checksums and padding.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from flexflow_engine.abc.tier import HostBytes, NoOptions, Region, RegionSpec, Tier
from flexflow_engine.cpu.mapping import populated_bytes
from flexflow_engine.store.array import ArrayLayout
from flexflow_engine.store.header import StoreHeader
from flexflow_engine.store.weights import WeightStore
from flexflow_engine.store.writing import StoreWriter
from flexflow_engine.testing.page_cache import cached_nbytes, drop_cached
from flexflow_tiers.cpu import CpuTier
from flexflow_tiers.pinned import PinnedTier
from flexflow_tiers.zarr import ZarrOptions, ZarrTier

MIB = 2**20
ROUND_NBYTES = 576 * MIB
"""About so many bytes, in as many requests for each thread, of two or of three."""
ROUNDS = 3
BUDGET_BYTES = 2**40
HUGE_NBYTES = 2 * MIB

Request = Callable[[int, HostBytes], None]
"""Moves the bytes of request number i from or to a slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One row of the table."""

    what: str
    unit_nbytes: int
    units: int
    """In one request."""

    @property
    def request_nbytes(self) -> int:
        return self.unit_nbytes * self.units

    @property
    def requests(self) -> int:
        """In one round."""
        return ROUND_NBYTES // self.request_nbytes // 6 * 6


@dataclass(frozen=True, slots=True)
class Moved:
    """A round."""

    gb_per_s: float
    cpu_s_per_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    what: str
    threads: int
    request_kib: int
    raw_gb_per_s: float
    tier_gb_per_s: float
    ratio: float
    """Median of the rounds' own ratios: the disk's speed changes from round to round."""
    raw_cpu_s_per_gb: float
    tier_cpu_s_per_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Pages of the KV cache: keys, or values, of one tile."""

    what: str
    unit_nbytes: int
    rows: int
    context: int
    """Full pages of a row when it is read."""

    def kind(self, what: str, pages: int) -> Kind:
        return Kind(what=f"{what} {self.what}KV", unit_nbytes=self.unit_nbytes, units=self.rows * pages)


WEIGHTS = (
    Kind(what="read a page of weights", unit_nbytes=16 * MIB, units=1),
    Kind(what="read a page of group-int4 weights", unit_nbytes=1170 * 4032, units=1),
    Kind(what="read a page of the table", unit_nbytes=4096, units=4096),
)
CACHE = (
    Pages(what="", unit_nbytes=16 * 1024, rows=64, context=24),
    Pages(what="int4 ", unit_nbytes=4608, rows=64, context=24),
    Pages(what="16-token ", unit_nbytes=64 * 1024, rows=32, context=6),
    Pages(what="int4 16-token ", unit_nbytes=18 * 1024, rows=32, context=6),
)
"""Of 4 and of 16 tokens in OPT-1.3B (4 by default: `benchmarks/offload.py`), 96 tokens cached."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--path", type=Path, default=Path(), help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.path) as folder:
        rows, cached = measure_disk(Path(folder))
    links = measure_links()
    console = Console(width=130)
    console.print(_table(rows, "direct I/O", f"disk; {cached / MIB:.1f} MiB of the store's files in the page cache"))
    console.print(_table(links, "memcpy", "host memory"))
    if options.json:
        figures = {"page_cache_bytes": cached, "disk": [*map(asdict, rows)], "links": [*map(asdict, links)]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure_disk(folder: Path) -> tuple[list[Row], int]:
    """All rows, and the most bytes of the files that were in the page cache after one of them."""
    rows, cached = list[Row](), 0
    with closing(ZarrTier(label="disk", budget_bytes=BUDGET_BYTES, options=ZarrOptions(folder))) as tier:
        for what, kind, operation, request in _disk_requests(folder, tier):
            with _raw_requests(folder, kind, operation) as raw:
                threads = tier.read_concurrency if operation == "read" else tier.write_concurrency
                rows.append(_compare(what, kind, threads, raw, request, before=lambda: drop_cached(folder)))
            cached = max(cached, cached_nbytes(folder))
    return rows, cached


def _disk_requests(folder: Path, tier: ZarrTier) -> Iterator[tuple[str, Kind, str, Request]]:
    for kind in WEIGHTS:
        with WeightStore.open(_write_store(folder / "weights" / kind.what, kind)) as store:
            region = tier.attach(store.stored("tensor"), placed_units=0)
            yield kind.what, kind, "read", _reading(tier, region, kind)
            tier.free(region)
    for pages in CACHE:
        spec = RegionSpec(name="kv", num_units=ROUND_NBYTES // pages.unit_nbytes, unit_nbytes=pages.unit_nbytes)
        region = tier.allocate(spec)
        prompt = pages.kind("write a prompt's", pages.context // 3)
        yield prompt.what, prompt, "write", _writing(tier, region, prompt)
        filled = pages.kind("write filled", 1)
        yield filled.what, filled, "write", _writing(tier, region, filled)
        read = pages.kind("read", pages.context)
        yield read.what, read, "read", _reading(tier, region, read)
        tier.free(region)


def _write_store(folder: Path, kind: Kind) -> Path:
    layout = ArrayLayout.plain(
        (kind.requests * kind.units, kind.unit_nbytes // 2), "float16", page_rows=kind.units, unit_rows=1
    )
    header = StoreHeader(
        reference="benchmark",
        content_key="0",
        dtype="float16",
        codec="none",
        table_codec="none",
        small_codec="none",
        arrays={"tensor": "tensor"},
        nbytes=layout.nbytes,
    )
    writer = StoreWriter(folder, header, {"tensor": layout})
    page = np.random.default_rng(0).integers(0, 256, kind.request_nbytes, np.uint8)
    for number in range(layout.num_pages):
        writer.write_page("tensor", number, page)
    writer.finish()
    return folder


@contextmanager
def _raw_requests(folder: Path, kind: Kind, operation: str) -> Iterator[Request]:
    """The same requests on a plain file, in whole blocks; the file is there before it is measured."""
    stride = kind.request_nbytes + -kind.request_nbytes % 4096
    path = folder / "raw"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    try:
        slot: Any = _memory(stride)
        for number in range(kind.requests):
            os.pwrite(descriptor, slot, number * stride)
        move = os.preadv if operation == "read" else os.pwritev

        def request(number: int, memory: Any) -> None:
            moved = move(descriptor, [memory[:stride]], number * stride)
            assert moved == stride, "direct I/O fell short"

        yield request
    finally:
        os.close(descriptor)
        path.unlink()


def measure_links() -> list[Row]:
    """Copies between a tier in host memory and a slot, against the same copies between two arrays."""
    kind, rows = Kind(what="", unit_nbytes=MIB, units=16), list[Row]()
    for tier_class in (CpuTier, PinnedTier):
        with closing(tier_class(label="host", budget_bytes=BUDGET_BYTES, options=NoOptions())) as tier:
            spec = RegionSpec(name="pages", num_units=kind.requests * kind.units, unit_nbytes=kind.unit_nbytes)
            region, memory = tier.allocate(spec), _memory(ROUND_NBYTES)
            copy_in, copy_out = _copies(memory, kind)
            for what, raw, request in (
                ("read", copy_out, _reading(tier, region, kind)),
                ("write", copy_in, _writing(tier, region, kind)),
            ):
                rows.append(_compare(f"{what} {tier.name}", kind, 1, raw, request, before=lambda: None))
    return rows


def _copies(memory: HostBytes, kind: Kind) -> tuple[Request, Request]:
    """Into and out of a plain array."""
    parts = memory.reshape(kind.requests, kind.request_nbytes)
    return (
        lambda number, slot: np.copyto(parts[number], slot[: kind.request_nbytes]),
        lambda number, slot: np.copyto(slot[: kind.request_nbytes], parts[number]),
    )


def _reading(tier: Tier, region: Region, kind: Kind) -> Request:
    return lambda number, slot: tier.read(region, number * kind.units, kind.units, slot[: kind.request_nbytes])


def _writing(tier: Tier, region: Region, kind: Kind) -> Request:
    return lambda number, slot: tier.write(region, number * kind.units, kind.units, slot[: kind.request_nbytes])


def _compare(what: str, kind: Kind, threads: int, raw: Request, request: Request, *, before: Callable[[], None]) -> Row:
    """Rounds of both in turns, the first of each not counted."""
    rounds = []
    slots = [_memory(kind.request_nbytes + 4096) for _ in range(threads)]
    for _ in range(ROUNDS + 1):
        before()
        theirs = _move(kind, slots, raw)
        before()
        rounds.append((theirs, _move(kind, slots, request)))
    del rounds[0]
    return Row(
        what=what,
        threads=threads,
        request_kib=kind.request_nbytes // 1024,
        raw_gb_per_s=median(a.gb_per_s for a, _ in rounds),
        tier_gb_per_s=median(b.gb_per_s for _, b in rounds),
        ratio=median(b.gb_per_s / a.gb_per_s for a, b in rounds),
        raw_cpu_s_per_gb=median(a.cpu_s_per_gb for a, _ in rounds),
        tier_cpu_s_per_gb=median(b.cpu_s_per_gb for _, b in rounds),
    )


def _move(kind: Kind, slots: list[HostBytes], request: Request) -> Moved:
    """A round: every thread has a slot and takes every n-th request."""
    cpu, started = _cpu_seconds(), time.perf_counter()
    with ThreadPoolExecutor(len(slots)) as pool:
        for done in [pool.submit(_work, kind, slots, thread, request) for thread in range(len(slots))]:
            done.result()
    seconds, gigabytes = time.perf_counter() - started, kind.requests * kind.request_nbytes / 1e9
    return Moved(gigabytes / seconds, (_cpu_seconds() - cpu) / gigabytes)


def _work(kind: Kind, slots: list[HostBytes], thread: int, request: Request) -> None:
    for number in range(thread, kind.requests, len(slots)):
        request(number, slots[thread])


def _cpu_seconds() -> float:
    """Of this process, the system's work for it included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _memory(nbytes: int) -> HostBytes:
    """Touched, and in huge pages as far as the system gives them: as what lies in the midst of a tier's regions."""
    memory = populated_bytes(nbytes + -nbytes % HUGE_NBYTES)[:nbytes]
    memory.fill(1)
    return memory


def _table(rows: list[Row], against: str, title: str) -> Table:
    table = Table(
        "", "threads", "request KiB", f"{against} GB/s", "tier GB/s", "ratio", "CPU s/GB", "tier CPU s/GB", title=title
    )
    for row in rows:
        figures = (row.raw_gb_per_s, row.tier_gb_per_s, row.ratio, row.raw_cpu_s_per_gb, row.tier_cpu_s_per_gb)
        table.add_row(row.what, str(row.threads), str(row.request_kib), *(f"{figure:.2f}" for figure in figures))
    return table


if __name__ == "__main__":
    main()
