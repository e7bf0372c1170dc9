"""How zarr.json names the codecs that made an array's bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexflow_engine.abc.codec import ZARR_PREFIX

UNIT_NBYTES = "unit_nbytes"
"""The array's attribute that tells a unit's encoded size, so that bytes are moved without knowing the codec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What makes a unit's bytes fewer, between the serializer and the checksum."""

    name: str
    """Zarr's."""
    configuration: str
    """As JSON with sorted keys."""

    @classmethod
    def parse(cls, codec: Mapping[str, Any]) -> Compression:
        """From the bytes-to-bytes codec's entry in zarr.json."""
        return cls(name=codec["name"], configuration=json.dumps(codec.get("configuration", {}), sort_keys=True))

    @property
    def metadata(self) -> dict[str, Any]:
        """The codec's entry in zarr.json."""
        return {"name": self.name, "configuration": json.loads(self.configuration)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """What turns a unit's numbers into bytes, when it is not Zarr's own `bytes`."""

    name: str
    """Of the codec."""
    configuration: str
    """What a reader must know besides, as JSON with sorted keys."""
    unit_nbytes: int
    """Encoded size of one unit."""

    @classmethod
    def of(cls, configuration: Mapping[str, Any], unit_nbytes: int) -> Encoding:
        """configuration: of a codec, its name included."""
        settings = {key: value for key, value in configuration.items() if key != "name"}
        return cls(
            name=configuration["name"], configuration=json.dumps(settings, sort_keys=True), unit_nbytes=unit_nbytes
        )

    @classmethod
    def parse(cls, serializer: Mapping[str, Any], attributes: Mapping[str, Any]) -> Encoding | None:
        """From the array-to-bytes codec's entry in zarr.json and the array's attributes; None for plain numbers."""
        if serializer["name"] == "bytes":
            return None
        settings = {**serializer["configuration"], "name": serializer["name"].removeprefix(ZARR_PREFIX)}
        return cls.of(settings, int(attributes[UNIT_NBYTES]))

    @property
    def metadata(self) -> dict[str, Any]:
        """The codec's entry in zarr.json."""
        return {"name": ZARR_PREFIX + self.name, "configuration": json.loads(self.configuration)}
