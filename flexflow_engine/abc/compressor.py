"""Contract of a compressor: a unit's bytes in the files of a weight store, made fewer without loss.

How many are left depends on the data. Only files hold what it makes: whoever reads them gets the unit's own bytes, so
that memory, slots and links are sized by shape as if there were none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from flexflow_engine.abc.tier import HostBytes


class Compressor(ABC):
    """Stateless and thread-safe: called from the import, and from all threads of the lanes that read a store, at once.

    Compressors are equal that have the same entry in zarr.json.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compressor) and self.zarr_codec() == other.zarr_codec()

    def __hash__(self) -> int:
        return hash(self.zarr_codec()["name"])

    @abstractmethod
    def zarr_codec(self) -> Mapping[str, Any]:
        """Its entry in zarr.json, ready for JSON: `name` and `configuration` of a bytes-to-bytes codec that Zarr v3
        readers know.
        """

    @abstractmethod
    def max_nbytes(self, nbytes: int) -> int:
        """What `nbytes` bytes take at most, whatever they are."""

    @abstractmethod
    def compress(self, data: HostBytes) -> HostBytes:
        """`data`, uint8 [nbytes], contiguous, as uint8 [at most max_nbytes]; memory of its own."""

    @abstractmethod
    def decompress(self, data: HostBytes, out: HostBytes) -> None:
        """Fill `out`, the caller's uint8 buffer of the very size that was compressed.

        The checksum of `data` has been verified. Should not hold Python's lock: other lanes run meanwhile. Raises
        CorruptDataError when `data` are not what this compressor makes of so many bytes; `out` may be filled in part.
        """
