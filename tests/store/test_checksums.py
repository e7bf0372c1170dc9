"""Checksums of many units are those of each, whatever computes them, and wherever the units lie."""

from __future__ import annotations

from collections.abc import Iterator

import google_crc32c
import numpy as np
import pytest

from flexflow_engine.store import checksums
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


@pytest.mark.skipif(google_crc32c.implementation != "c", reason="google-crc32c has no C library here")
def test_the_library_brings_its_c_function() -> None:
    """Where it does not, reads hold Python's lock while they are verified."""
    assert checksums._library_function() is not None
