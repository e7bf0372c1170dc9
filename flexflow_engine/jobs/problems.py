"""Collects what is wrong with a recipe, or with another YAML file, so that all of it is told at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from inspect import isclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from flexflow_engine.abc.dtypes import DTYPES
from flexflow_engine.abc.near_miss import near_miss
from flexflow_engine.errors import FlexFlowError, PluginError, ProblemsError, RecipeError
from flexflow_engine.jobs.paths import expand_home

Section = TypeVar("Section", bound=BaseModel)

OTHER_NAMES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
"""What people call the dtypes elsewhere."""


class Problems:
    """The problems found so far, in the order of finding; `raise_any` ends it."""

    def __init__(
        self, path: Path, found: Iterable[FlexFlowError] = (), error: type[FlexFlowError] = RecipeError
    ) -> None:
        """error: what a problem of this kind of file is."""
        self._path, self._error = path, error
        self._found = list(found)

    def add(self, what: str, key: str, fix: str = "") -> None:
        """key: the dotted place in the file."""
        self._found.append(self._error(what, where=self._where(key), fix=fix))

    def take(self, error: FlexFlowError, key: str) -> None:
        """Tell somebody else's error as a problem at this place."""
        self._found.append(error.at(self._where(key)))

    def raise_any(self) -> None:
        if self._found:
            raise ProblemsError(self._found)

    def validate(self, section: type[Section], document: Mapping[str, Any]) -> Section | None:
        """The document as `section` has it, or None after noting what it has against it."""
        try:
            return section.model_validate_json(json.dumps(document), strict=True)
        except ValidationError as error:
            for details in error.errors():
                loc = tuple(map(str, details["loc"]))
                self._add_details(details, loc, _known_keys(section, details, loc))
            return None

    def options(self, options: type[Any], document: Mapping[str, Any], key: str, other_keys: Iterable[str]) -> Any:
        """An instance of a plugin's `Options` dataclass, or None after noting what is wrong.

        Of `Path` values `~` is expanded, and they are made absolute. other_keys: keys of the section that are not the
        plugin's, for near misses.
        """
        names = [option.name for option in fields(options)]
        unknown = [name for name in document if name not in names]
        for name in unknown:
            self.add(f"unknown key `{name}`", f"{key}.{name}", near_miss(name, [*names, *other_keys]))
        known = {name: value for name, value in document.items() if name in names}
        instance = self._read_options(options, known, key)
        return None if instance is None or unknown else _with_absolute_paths(instance)

    def _read_options(self, options: type[Any], document: Mapping[str, Any], key: str) -> Any:
        try:
            return TypeAdapter(options).validate_json(json.dumps(document), strict=True)
        except ValidationError as error:
            for details in error.errors():
                self._add_details(details, (*key.split("."), *map(str, details["loc"])), [])
        except FlexFlowError as error:
            self.take(error, key)
        except Exception as error:  # a field that pydantic can't read, or whatever the plugin's own code raises
            where, said = f"{options.__module__}.{options.__qualname__}", str(error).partition("\n")[0]
            self.take(PluginError(f"the plugin's {where} can't be read ({type(error).__name__}: {said})"), key)
        return None

    def _add_details(self, details: ErrorDetails, loc: tuple[str, ...], known: Iterable[str]) -> None:
        key = ".".join(part for part in loc if part != "[key]")
        match details["type"]:
            case "missing":
                self.add(f"`{loc[-1]}` is missing", key)
            case "extra_forbidden":
                self.add(f"unknown key `{loc[-1]}`", key, near_miss(loc[-1], known))
            case "value_error":
                self.add(str(details["ctx"]["error"]), key)
            case _:
                self.add(_sentence(details), key, _dtype_advice(details))

    def _where(self, key: str) -> str:
        return f"{self._path}: {key}" if key else str(self._path)


def _known_keys(section: type[BaseModel], details: ErrorDetails, loc: tuple[str, ...]) -> list[str]:
    """The keys of the section that an unknown key stands in."""
    if details["type"] != "extra_forbidden":
        return []
    annotation: Any = section
    for key in loc[:-1]:
        if isclass(annotation) and issubclass(annotation, BaseModel):
            annotation = _section_or_mapping(annotation.model_fields[key].annotation)
        else:  # a mapping from names, of which `key` is one
            annotation = _section_or_mapping(get_args(annotation)[-1])
    return list(annotation.model_fields)


def _section_or_mapping(annotation: Any) -> Any:
    """What holds further keys, of an annotation that may also allow something else."""
    candidates = (annotation, *get_args(annotation)) if get_origin(annotation) is not dict else (annotation,)
    return next(
        part for part in candidates if get_origin(part) is dict or (isclass(part) and issubclass(part, BaseModel))
    )


def _sentence(details: ErrorDetails) -> str:
    wanted = details["msg"].removeprefix("Input ").removeprefix("Dictionary ")
    wanted = (
        wanted.replace("an object", "a mapping").partition(" item after")[0].replace("at least 1", "at least 1 key")
    )
    return f"{wanted}, not {json.dumps(details['input'])}"


def _dtype_advice(details: ErrorDetails) -> str:
    value = details["input"]
    if details["type"] != "literal_error" or "float32" not in details["msg"] or not isinstance(value, str):
        return ""
    meant = OTHER_NAMES.get(value.lower())
    return f"did you mean `{meant}`?" if meant else near_miss(value, DTYPES)


def _with_absolute_paths(instance: Any) -> Any:
    values = {option.name: getattr(instance, option.name) for option in fields(instance)}
    paths = {name: expand_home(str(value)).absolute() for name, value in values.items() if isinstance(value, Path)}
    return replace(instance, **paths)
