"""The recipe as YAML may spell it: pydantic models, used at the edge only, and the JSON schema made from them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.sizes import parse_size

Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string"}], "examples": ["15GiB"]}),
]
Count = Annotated[int, Field(gt=0)]


def _check_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{name!r} can't be a name; letters, digits, `.`, `_` and `-` can")
    return name


def _check_tier_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w-]*", name):
        raise ValueError(f"{name!r} can't be a tier's name; letters, digits, `_` and `-` can")
    return name


Name = Annotated[str, AfterValidator(_check_name)]
"""Part of file names."""
TierName = Annotated[str, AfterValidator(_check_tier_name)]
"""Part of dotted paths."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _PluginSection(BaseModel):
    """Its further keys are the plugin's options, which `jobs.problems.Problems.options` checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    plugin: str


class ModelSection(_Section):
    plugin: str
    checkpoint: Annotated[str, Field(min_length=1, description="hub id, local folder, or synthetic:NAME")]
    dtype: DType


class TierSection(_PluginSection):
    budget: Annotated[Size, Field(description="bytes that may lie there at once")]


class CodecSection(_PluginSection):
    pass


Codec = Annotated[
    CodecSection,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["plugin"]}], "default": "none"}),
]


class CodecsSection(_Section):
    """A codec is a name, or a mapping of `plugin` and the plugin's options; `NAME` is read as `{plugin: NAME}`."""

    weights: Codec = CodecSection(plugin="none")
    kv_cache: Codec = CodecSection(plugin="none")


class SchedulerSection(_PluginSection):
    pass


class SyntheticSection(_Section):
    count: Count
    prompt_tokens: Count
    seed: Annotated[int, Field(ge=0)] = 0


class WorkloadSection(_Section):
    """Exactly one of `prompts` and `synthetic`; `prompts: {synthetic: …}` is read as `synthetic: …`."""

    prompts: Annotated[
        str | None,
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "required": ["synthetic"]}]}),
        Field(description="JSON lines file, relative to the recipe"),
    ] = None
    synthetic: SyntheticSection | None = None
    task: Annotated[
        Literal["generate", "score"], Field(description="continue the prompts, or score the completions they give")
    ] = "generate"
    max_new_tokens: Annotated[Count | None, Field(description="required, unless the task is `score`")] = None
    ignore_eos: bool | None = None


class RecipeDocument(_Section):
    """Everything a recipe says, in its own order of keys."""

    name: Name
    model: ModelSection
    tiers: Annotated[
        dict[TierName, TierSection],
        Field(min_length=1, description="fastest first; the first is where the model computes"),
    ]
    codecs: CodecsSection = CodecsSection()
    scheduler: SchedulerSection
    workload: WorkloadSection


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe; a plugin's own options are free in it."""
    schema = RecipeDocument.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "flexflow_engine recipe"}
