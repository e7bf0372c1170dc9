"""Hardware profiles as YAML: the files of `recipes/hardware`, and what `profile` leaves in the user's cache.

The keys are the fields of `abc.hardware`; a curve is one number, or a mapping from sizes to rates. Numbers may be
written as people do: 12.9e9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.hardware import (
    PLAIN,
    Beside,
    CodecRates,
    Curve,
    HardwareProfile,
    HostCosts,
    Link,
    Processor,
    ProductRates,
)
from flexflow_engine.errors import HardwareError, ProblemsError, RecipeError
from flexflow_engine.files import own_ending, replacing
from flexflow_engine.jobs.document import read_document
from flexflow_engine.jobs.problems import Problems
from flexflow_engine.jobs.schema import Size


def read_profile(path: Path) -> HardwareProfile:
    """Raises ProblemsError with everything that is wrong with the file."""
    problems = Problems(path, error=HardwareError)
    try:
        document = read_document(path, noun="hardware file")
    except RecipeError as error:
        raise ProblemsError([HardwareError(error.what, where=error.where, fix=error.fix)]) from error
    section = problems.validate(ProfileSection, document)
    problems.raise_any()
    assert section is not None, "what does not validate is a problem"
    return section.profile()


def write_profile(profile: HardwareProfile, path: Path) -> None:
    """Write what `read_profile` reads, whole or not at all; its folder is made. Raises StorageError."""
    with replacing(path, own_ending()) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(render_profile(profile), encoding="utf-8")


def render_profile(profile: HardwareProfile) -> str:
    """The YAML that `read_profile` reads."""
    return yaml.safe_dump(profile_as_document(profile), sort_keys=False, width=120)


def profile_as_document(profile: HardwareProfile) -> dict[str, Any]:
    """The same as plain data, ready for JSON."""
    document: dict[str, Any] = _plain(asdict(profile))
    return document


def _number(value: object) -> object:
    """YAML 1.1 takes 12.9e9, without a sign, for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _points(value: object) -> object:
    value = _number(value)
    return {"1": value} if isinstance(value, int | float) else value


def _curve_ready(points: Mapping[str, float]) -> Mapping[str, float]:
    for size in points:
        try:
            valid = float(size) > 0
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"a curve goes from sizes above 0 to rates, and {size!r} is no such size")
    return points


def _with_plain(rates: Mapping[str, Any]) -> Mapping[str, Any]:
    if PLAIN not in rates:
        raise ValueError(f"`{PLAIN}` is missing: the rate of a cache that is not encoded")
    return rates


Rate = Annotated[float, BeforeValidator(_number), Field(ge=1, allow_inf_nan=False)]
Seconds = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_number), Field(gt=0, le=1, allow_inf_nan=False)]
Points = Annotated[dict[str, Rate], Field(min_length=1), BeforeValidator(_points), AfterValidator(_curve_ready)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BesideSection(_Section):
    reverse: Fraction = 1.0
    links: Fraction = 1.0
    processors: Fraction = 1.0

    def beside(self) -> Beside:
        return Beside(**self.model_dump())


class LinkSection(_Section):
    bytes_per_s: Rate
    latency_s: Seconds
    unit_s: Seconds | None = None
    beside: BesideSection = BesideSection()
    leaves_processors: Fraction = 1.0

    def link(self) -> Link:
        return Link(
            bytes_per_s=self.bytes_per_s,
            latency_s=self.latency_s,
            unit_s=self.unit_s,
            beside=self.beside.beside(),
            leaves_processors=self.leaves_processors,
        )


class CodecRatesSection(_Section):
    encode_values_per_s: Rate
    decode_values_per_s: Rate
    product_flops_per_s: Points | None = None

    def rates(self) -> CodecRates:
        return CodecRates(
            encode_values_per_s=self.encode_values_per_s,
            decode_values_per_s=self.decode_values_per_s,
            product_flops_per_s=_curve(self.product_flops_per_s) if self.product_flops_per_s else None,
        )


class ProductSection(_Section):
    matmul_flops_per_s: Points
    product_s: Seconds = 0.0

    def rates(self) -> ProductRates:
        return ProductRates(matmul_flops_per_s=_curve(self.matmul_flops_per_s), product_s=self.product_s)


class ProcessorSection(_Section):
    matmul_flops_per_s: dict[DType, Points]
    prefill_attention_flops_per_s: Points
    decode_attention_bytes_per_s: Annotated[dict[str, Points], AfterValidator(_with_plain)]
    codecs: dict[str, CodecRatesSection] = Field(default_factory=dict)
    memory_bytes_per_s: Rate
    task_s: Seconds
    layer_s: Seconds = 0.0
    product_s: Seconds = 0.0
    float32_from: dict[Literal["float16", "bfloat16"], PositiveInt | None] = Field(default_factory=dict)
    torch_team: dict[DType, ProductSection | None] = Field(default_factory=dict)

    def processor(self) -> Processor:
        return Processor(
            matmul_flops_per_s={dtype: _curve(points) for dtype, points in self.matmul_flops_per_s.items()},
            prefill_attention_flops_per_s=_curve(self.prefill_attention_flops_per_s),
            decode_attention_bytes_per_s={
                codec: _curve(points) for codec, points in self.decode_attention_bytes_per_s.items()
            },
            codecs={name: section.rates() for name, section in self.codecs.items()},
            memory_bytes_per_s=self.memory_bytes_per_s,
            task_s=self.task_s,
            layer_s=self.layer_s,
            product_s=self.product_s,
            float32_from={dtype: tokens for dtype, tokens in self.float32_from.items()},  # noqa: C416  # of wider type
            torch_team={dtype: section.rates() if section else None for dtype, section in self.torch_team.items()},
        )


class HostSection(_Section):
    compile_task_s: Seconds
    gather_row_s: Seconds


class ProfileSection(_Section):
    """A whole file."""

    name: str
    links: dict[str, dict[Literal["read", "write"], LinkSection]]
    processors: dict[str, ProcessorSection]
    host: HostSection
    capacity_bytes: dict[str, Size] = Field(default_factory=dict)

    def profile(self) -> HardwareProfile:
        return HardwareProfile(
            name=self.name,
            links={tier: {way: link.link() for way, link in links.items()} for tier, links in self.links.items()},
            processors={memory: section.processor() for memory, section in self.processors.items()},
            host=HostCosts(**self.host.model_dump()),
            capacity_bytes=dict(self.capacity_bytes),
        )


def _curve(points: Mapping[str, float]) -> Curve:
    return Curve(tuple(sorted((float(size), rate) for size, rate in points.items())))


def _plain(value: Any) -> Any:
    """`asdict` of a profile as the file has it: a curve is a mapping."""
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("points"), tuple):
        return {f"{size:g}": rate for size, rate in value["points"]}
    return {str(key): _plain(part) for key, part in value.items()}
