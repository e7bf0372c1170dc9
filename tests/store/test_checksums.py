"""Checksums of many units are those of each, whatever computes them, and wherever the units lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from flexflow_engine.errors import CorruptDataError
from flexflow_engine.store import checksums
from flexflow_engine.store.shard import ShardFile
from store.stores import random_units

KNOWN = {b"123456789": 0xE3069283, bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, b"": 0}
"""RFC 3720, appendix B.4, and the check value of every catalogue of CRCs."""


@pytest.fixture(params=["all at once", "one by one"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With the library's C function and without it."""
    if request.param == "one by one":
        monkeypatch.setattr(google_crc32c, "implementation", "python")
    checksums._library_function.cache_clear()
    yield
    checksums._library_function.cache_clear()


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("data", KNOWN)
def test_published_values_are_met(data: bytes) -> None:
    units = np.frombuffer(data, np.uint8)[None]
    assert checksums.checksums_of(units).tolist() == [KNOWN[data]]


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize(("count", "unit_nbytes"), [(0, 8), (1, 70_001), (7, 1), (64, 4608)])
def test_each_unit_has_its_own(count: int, unit_nbytes: int) -> None:
    units = random_units(count, unit_nbytes).reshape(count, unit_nbytes)
    expected = [google_crc32c.value(unit.tobytes()) for unit in units]
    assert checksums.checksums_of(units).tolist() == expected


@pytest.mark.usefixtures("_way")
def test_units_with_something_between_them_are_summed_without_it() -> None:
    units = random_units(5, 100).reshape(5, 100)[:, :96]
    assert checksums.checksums_of(units).tolist() == [google_crc32c.value(unit.tobytes()) for unit in units]


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("damaged", [None, 0, 3, 4])
def test_units_are_taken_from_where_they_lie_up_to_the_first_that_is_damaged(damaged: int | None) -> None:
    count, unit_nbytes, starts = 5, 100, np.array([0, 9, 3, 0, 21])
    shard = ShardFile(
        path=Path("page"), name="fc1", num_units=9, num_slots=9, unit_nbytes=unit_nbytes, bare=False, fix="import again"
    )
    units, places = random_units(count, unit_nbytes).reshape(count, -1), random_units(count, 130).reshape(count, -1)
    for place, start, unit in zip(places, starts.tolist(), units, strict=True):
        place[start : start + shard.stride] = [*unit, *google_crc32c.value(unit.tobytes()).to_bytes(4, "little")]
    out = np.zeros_like(units)
    if damaged is None:
        checksums.take(shard, range(2, 7), places, starts, out)
        assert (out == units).all()
        return
    places[damaged, starts[damaged] + 50] ^= 1
    with pytest.raises(CorruptDataError, match=f"unit {2 + damaged} of fc1"):
        checksums.take(shard, range(2, 7), places, starts, out)


@pytest.mark.skipif(google_crc32c.implementation != "c", reason="google-crc32c has no C library here")
def test_the_library_brings_its_c_function() -> None:
    """Where it does not, reads hold Python's lock while they are verified."""
    assert checksums._library_function() is not None
