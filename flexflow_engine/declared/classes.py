"""Classes of plugins: that they keep to the contract of their kind, as far as a class alone tells."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Literal

from flexflow_engine.abc import codec, model, scheduler, tier

Kind = Literal["tier", "codec", "model", "scheduler"]

CONTRACTS: Mapping[Kind, tuple[type[Any], int]] = {
    "tier": (tier.Tier, tier.API_VERSION),
    "codec": (codec.Codec, codec.API_VERSION),
    "model": (model.Model, model.API_VERSION),
    "scheduler": (scheduler.Scheduler, scheduler.API_VERSION),
}
TORCH_MEMORIES = ("cpu", "cuda")
"""Kinds of memory that are called as torch calls their device."""


def class_problem(kind: Kind, candidate: Any) -> str | None:
    """What keeps the engine from using it, the first that is found; None for nothing."""
    return _contract_problem(kind, candidate) or next(_wrong_attributes(kind, candidate), None)


def _contract_problem(kind: Kind, candidate: Any) -> str | None:
    contract, version = CONTRACTS[kind]
    bases: tuple[type[Any], ...] = getattr(candidate, "__mro__", ())
    if contract not in bases:
        return f"it is no subclass of {contract.__module__}.{contract.__name__}"
    if candidate.api_version != version:
        return f"it is written for version {candidate.api_version} of the {kind} API, this engine has {version}"
    if inspect.isabstract(candidate):
        return f"it does not implement {', '.join(sorted(candidate.__abstractmethods__))}"
    return None


def _wrong_attributes(kind: Kind, candidate: type[Any]) -> Iterator[str]:
    name = getattr(candidate, "name", None)
    if not isinstance(name, str) or name.split() != [name]:
        yield "it has no `name`" if name is None else f"its `name` must be a word, and is {name!r}"
    if kind != "model" and not is_dataclass(getattr(candidate, "Options", None)):
        yield "its `Options` is no dataclass"
    for member in _properties(CONTRACTS[kind][0]):
        if inspect.isroutine(inspect.getattr_static(candidate, member)):
            yield f"its `{member}` is a method and must be a property"
    if kind == "tier":
        yield from _wrong_tier(candidate)
    elif kind == "codec":
        yield from _missing(candidate, codec.Codec, "decodes_in_kernels", "kernel_decoder")
        yield from _missing(candidate, codec.Codec, "compresses", "compressor")
        if _has_own(candidate, codec.Codec, "multiplies_integers"):
            yield from _missing(candidate, codec.Codec, "multiplies_integers", "integer_decoder")
    elif kind == "model":
        yield from _wrong_model_types(getattr(candidate, "model_types", None))


def _wrong_tier(candidate: type[tier.Tier]) -> Iterator[str]:
    for attribute in ("read_concurrency", "write_concurrency"):
        number = getattr(candidate, attribute)
        if type(number) is not int or number < 1:
            yield f"its `{attribute}` must be a whole number above 0, and is {number!r}"
    memory = candidate.memory
    if memory is not None and memory not in TORCH_MEMORIES and not _has_own(candidate, tier.Tier, "torch_device"):
        known = ", ".join(map(repr, TORCH_MEMORIES))
        yield f"its `memory` must be one of {known} or None, or have a `torch_device` of its own, and is {memory!r}"
    yield from _missing(candidate, tier.Tier, "memory", "tensor")
    yield from _missing(candidate, tier.Tier, "reads_store", "attach")


def _missing(candidate: type[Any], contract: type[Any], attribute: str, member: str) -> Iterator[str]:
    if getattr(candidate, attribute) and not _has_own(candidate, contract, member):
        yield f"it has `{attribute} = {getattr(candidate, attribute)!r}` and no `{member}`"


def _has_own(candidate: type[Any], contract: type[Any], member: str) -> bool:
    return inspect.getattr_static(candidate, member) is not inspect.getattr_static(contract, member)


def _properties(contract: type[Any]) -> list[str]:
    return [name for name, member in vars(contract).items() if isinstance(member, property)]


def _wrong_model_types(model_types: object) -> Iterator[str]:
    if not isinstance(model_types, tuple) or not all(isinstance(word, str) for word in model_types):
        yield f"its `model_types` must be a tuple of words, and is {model_types!r:.80}"
