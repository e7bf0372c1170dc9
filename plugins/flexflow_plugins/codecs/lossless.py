"""Lossless codecs of numcodecs: numbers are themselves on every tier, and compressed in the store's files.

Those of which a weight store's arrays are read by any Zarr v3: by the codecs `zstd` and `blosc` of its specification,
and by `numcodecs.lz4`, which zarr-python brings along. numcodecs' others are slower than disks are (zlib and gzip: 80
MB/s), so that reading fewer bytes would gain nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from flexflow_engine.abc.compressor import Compressor
from flexflow_engine.abc.dtypes import ITEM_NBYTES, DType
from flexflow_plugins.codecs.none import NoneCodec
from flexflow_plugins.codecs.numcodecs_compressor import (
    NumcodecsCompressor,
    blosc_bound,
    blosc_size,
    lz4_bound,
    lz4_size,
    zstd_bound,
    zstd_size,
)

PREFIX = "numcodecs:"
BLOSC_SHUFFLES = {"none": "noshuffle", "byte": "shuffle", "bit": "bitshuffle"}
"""The recipe's word -> Zarr's; numcodecs counts them in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZstdOptions:
    """What a recipe may say of numcodecs:zstd."""

    level: int = 3
    """1, the fastest, to 22, the smallest."""

    def __post_init__(self) -> None:
        _check("level", self.level, 1, 22)


@dataclass(frozen=True, slots=True, kw_only=True)
class BloscOptions:
    """What a recipe may say of numcodecs:blosc."""

    cname: Literal["lz4", "lz4hc", "blosclz", "zlib", "zstd"] = "lz4"
    """What compresses the shuffled blocks."""
    clevel: int = 5
    """1, the fastest, to 9, the smallest."""
    shuffle: Literal["byte", "bit", "none"] = "bit"
    """Bytes, or bits, of equal significance are put side by side first: exponents repeat, mantissas don't."""

    def __post_init__(self) -> None:
        _check("clevel", self.clevel, 1, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lz4Options:
    """What a recipe may say of numcodecs:lz4."""

    acceleration: int = 1
    """From 1 on; more is faster, and larger."""

    def __post_init__(self) -> None:
        _check("acceleration", self.acceleration, 1, 65537)


class LosslessCodec(NoneCodec):
    """What the family shares: on tiers, the codec of the identity."""

    compresses = True
    Options: ClassVar[type[Any]]

    def __init__(self, options: Any = None) -> None:
        """options: an instance of `Options`; its defaults without."""
        super().__init__(self.Options() if options is None else options)

    @property
    def key(self) -> str:
        return "-".join(["numcodecs", self.name.removeprefix(PREFIX), *map(str, self._settings().values())])

    def configuration(self) -> Mapping[str, Any]:
        return {"name": self.name, **self._settings()}

    @abstractmethod
    def compressor(self, dtype: DType) -> Compressor: ...

    def _settings(self) -> Mapping[str, Any]:
        return {name: getattr(self.options, name) for name in self.options.__slots__}


class ZstdCodec(LosslessCodec):
    """Zarr's `zstd`: entropy coding of bytes as they come."""

    name = f"{PREFIX}zstd"
    Options = ZstdOptions

    def compressor(self, dtype: DType) -> Compressor:
        from numcodecs.zstd import Zstd  # noqa: PLC0415  # plugins are listed without it

        configuration = {"level": self.options.level, "checksum": False}
        return NumcodecsCompressor("zstd", configuration, Zstd(**configuration), bound=zstd_bound, size=zstd_size)


class BloscCodec(LosslessCodec):
    """Zarr's `blosc`: blocks of a cache's size, shuffled and then compressed."""

    name = f"{PREFIX}blosc"
    Options = BloscOptions

    def compressor(self, dtype: DType) -> Compressor:
        from numcodecs.blosc import Blosc  # noqa: PLC0415  # plugins are listed without it

        common = {
            "cname": self.options.cname,
            "clevel": self.options.clevel,
            "blocksize": 0,
            "typesize": ITEM_NBYTES[dtype],
        }
        shuffle: str = self.options.shuffle
        codec = Blosc(**common, shuffle=list(BLOSC_SHUFFLES).index(shuffle))
        configuration = {**common, "shuffle": BLOSC_SHUFFLES[shuffle]}
        return NumcodecsCompressor("blosc", configuration, codec, bound=blosc_bound, size=blosc_size)


class Lz4Codec(LosslessCodec):
    """zarr-python's `numcodecs.lz4`: repeated bytes only; of use where weights were pruned."""

    name = f"{PREFIX}lz4"
    Options = Lz4Options

    def compressor(self, dtype: DType) -> Compressor:
        from numcodecs.lz4 import LZ4  # noqa: PLC0415  # plugins are listed without it

        configuration = {"acceleration": self.options.acceleration}
        return NumcodecsCompressor("numcodecs.lz4", configuration, LZ4(**configuration), bound=lz4_bound, size=lz4_size)


FAMILY: tuple[type[LosslessCodec], ...] = (ZstdCodec, BloscCodec, Lz4Codec)


def _check(name: str, value: int, least: int, most: int) -> None:
    """Raise ValueError, which is told at the recipe's key."""
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}; choose one from {least} to {most}")
