"""A YAML file, or a `--set` value, as plain mappings, lists, texts, numbers and booleans."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from flexflow_engine.errors import RecipeError

Document = dict[str, Any]


def read_document(path: Path, noun: str = "recipe") -> Document:
    """The mapping that a file holds; noun: what kind of file it is. Raises RecipeError saying the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the {noun} can't be read ({_reason(error)})", where=str(path)) from error
    document = parse_yaml(text, where=str(path))
    if not isinstance(document, dict):
        raise RecipeError(f"a {noun} is a mapping of keys", where=str(path), fix="it begins with `name: …`")
    return document


def parse_yaml(text: str, *, where: str) -> Any:
    """Plain data from YAML. Raises RecipeError on a syntax error, a key given twice, a value that is not plain, or one
    that is part of itself.
    """
    try:
        document = yaml.load(text, Loader=_PlainLoader)  # derived from SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"not valid YAML: {error.problem or error.context}", where=f"{where}{line}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {error}", where=where) from error
    except RecursionError as error:
        raise _too_deep(where) from error
    try:
        json.dumps(document)
    except ValueError as error:
        raise RecipeError("an alias refers to what it is part of", where=where) from error
    except RecursionError as error:
        raise _too_deep(where) from error
    return document


class _PlainLoader(yaml.SafeLoader):
    """YAML without dates, sets and binary, and without a key that quietly replaces another."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error(key_node, "a key must be a text")
            if key_node.value in seen:
                raise _error(key_node, f"the key `{key_node.value}` is given twice")
            seen.add(key_node.value)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


def _unsupported(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    raise _error(node, f"values of the type {node.tag.rpartition(':')[2]} have no place here")


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _too_deep(where: str) -> RecipeError:
    return RecipeError("it is nested too deeply", where=where)


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "it is not UTF-8"


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in ("binary", "omap", "pairs", "set", "timestamp"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _unsupported)
