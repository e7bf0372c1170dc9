"""What is measured when no recipe says what is needed: every tier that this machine offers, every codec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.hardware import PLAIN
from flexflow_engine.abc.model import Model, ModelConfig
from flexflow_engine.abc.tier import HOST, Tier
from flexflow_engine.errors import FlexFlowError
from flexflow_engine.planning.profile.needs import Needs, TierChoice
from flexflow_engine.plugins import Registry


def installed_needs(registry: Registry, dtype: DType, folder: Path) -> Needs:
    """The model computes on an accelerator if there is one. folder: where tiers that take a `path` get one."""
    works = filter(_works, tiers_by_default(registry, folder))
    tiers = sorted(works, key=lambda tier: (*_order(tier.tier_class), tier.name))
    codecs = [default_codec(registry, name) for name in registry.names("codec") if name != PLAIN]
    return Needs(
        model=_smallest_model(registry, dtype),
        tiers=tuple(tiers),
        plain=default_codec(registry, PLAIN),
        codecs=tuple(codec for codec in codecs if not codec.keeps_bytes),
    )


def _order(tier: type[Tier]) -> tuple[bool, bool]:
    """Where a model can be computed comes first, and devices of their own before the host."""
    return not tier.computes, tier.memory == HOST


def tiers_by_default(registry: Registry, folder: Path) -> Iterator[TierChoice]:
    """Tiers that need nothing but a path, which is `folder` then, or nothing at all; whether they work here or not."""
    for name in registry.names("tier"):
        tier_class = registry.tier(name)
        required = {f.name for f in fields(tier_class.Options) if f.default is f.default_factory is MISSING}
        if not required <= {"path"}:
            continue
        paths = {"path": folder} if required else {}
        yield TierChoice(name=name, tier_class=tier_class, options=tier_class.Options(**paths))


def _works(choice: TierChoice) -> bool:
    try:
        choice.tier_class.check_available(choice.options)
    except FlexFlowError:
        return False
    return True


def default_codec(registry: Registry, name: str) -> Codec:
    """With the options that it has by itself."""
    codec: type[Any] = registry.codec(name)
    return codec(codec.Options())  # type: ignore[no-any-return]  # what it registered as


def _smallest_model(registry: Registry, dtype: DType) -> Model:
    """Of all published shapes: of a model, only the number of a step's tasks matters."""
    known: list[tuple[int, str, type[Model], ModelConfig]] = []
    for name in registry.names("model"):
        model_class = registry.model(name)
        for reference, document in model_class.published().items():
            config = model_class.read_config(document)
            known.append((config.num_layers * config.hidden_size**2, reference, model_class, config))
    _, _, model_class, config = min(known, key=lambda entry: entry[:2])
    return model_class(config, dtype)
