"""What is to be measured of a machine, and what of it a profile lacks already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.hardware import HardwareProfile, measured_key
from flexflow_engine.abc.model import Model
from flexflow_engine.abc.tier import HOST, Tier
from flexflow_engine.files import nearest_existing
from flexflow_engine.placement.reach import is_direct
from flexflow_engine.planning.profile.stored import is_imported_to


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChoice:
    """A tier that could be opened."""

    name: str
    tier_class: type[Tier]
    options: Any
    """An instance of the class's `Options`."""

    @property
    def link_name(self) -> str:
        """What the tier's speed follows from: its plugin and options, of a path only the disk that it is on, and
        whether there are weights to be read.
        """
        options = [f"{field.name}={_described(getattr(self.options, field.name))}" for field in fields(self.options)]
        root = self.tier_class.store_root(self.options)
        options += ["imported weights"] if root and is_imported_to(root) else []
        return f"{self.tier_class.name}({', '.join(options)})" if options else self.tier_class.name


@dataclass(frozen=True, slots=True)
class ProcessorPart:
    """Everything about a processor but its codecs."""

    memory: str

    def __str__(self) -> str:
        return f"the processor of {self.memory} memory"


@dataclass(frozen=True, slots=True)
class CodecPart:
    """A codec on a processor: its rates, and attention over its pages."""

    memory: str
    codec: Codec

    def __str__(self) -> str:
        return f"{self.codec.name} on {self.memory}"


@dataclass(frozen=True, slots=True)
class LinkPart:
    """Both directions of a tier's link, beside the links of all other tiers."""

    tier: TierChoice
    name: str

    def __str__(self) -> str:
        return f"the link of {self.tier.name}"


Part = ProcessorPart | CodecPart | LinkPart


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a prediction is made of."""

    model: Model
    """Its dtype is the one that matters; of its shape, only how many tasks a step has is taken."""
    tiers: tuple[TierChoice, ...]
    """The first is where the model computes."""
    plain: Codec
    """A codec that keeps bytes."""
    codecs: tuple[Codec, ...]
    """Those that don't."""

    @property
    def device(self) -> TierChoice:
        return self.tiers[0]

    @property
    def links(self) -> tuple[LinkPart, ...]:
        """Of every tier but the first, and but those that are computed on in place."""
        near = self.device.tier_class
        far = [tier for tier in self.tiers[1:] if not is_direct(tier.tier_class, near)]
        return tuple(LinkPart(tier, _link_key(tier, [x for x in far if x is not tier], near)) for tier in far)

    @property
    def memories(self) -> tuple[str, ...]:
        """Kinds of memory that have a processor: the device's first, then the host's if a tier is there."""
        kinds = [tier.tier_class.memory for tier in self.tiers if tier.tier_class.memory]
        return tuple(dict.fromkeys(kind for kind in kinds if kind in {self.device.tier_class.memory, HOST}))

    def missing(self, known: HardwareProfile | None) -> tuple[Part, ...]:
        """What a profile lacks, in the order in which it is measured."""
        return tuple(self._missing(known))

    def choose(self, known: HardwareProfile) -> HardwareProfile:
        """The same profile, its links under the names of these tiers."""
        links: Mapping[str, Any] = {part.tier.name: known.links[part.name] for part in self.links}
        return replace(known, links=links)

    def _missing(self, known: HardwareProfile | None) -> Iterator[Part]:
        for memory in self.memories:
            processor = known.processors.get(memory) if known else None
            if processor is None:
                yield ProcessorPart(memory)
            for codec in self.codecs:
                if processor is None or measured_key(codec) not in processor.codecs:
                    yield CodecPart(memory, codec)
        for part in self.links:
            if known is None or part.name not in known.links:
                yield part


def _link_key(tier: TierChoice, others: list[TierChoice], near: type[Tier]) -> str:
    key = tier.link_name if near.memory == HOST else f"{tier.link_name} to {near.memory}"
    return " beside ".join([key, ", ".join(other.link_name for other in others)] if others else [key])


def _described(value: object) -> object:
    if not isinstance(value, Path):
        return value
    return f"device {nearest_existing(value).stat().st_dev}"
