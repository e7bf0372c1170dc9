"""Codecs: that their words may be parts of file names, and that what they say of themselves can be stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from flexflow_engine.abc.codec import Codec
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.errors import PluginError

KEY_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
SHAPES = ((8, 64), (2, 16, 64))
"""A matrix, and a page of a cache."""


def check_codec(codec: object, dtype: DType, *, where: str) -> Codec:
    """The codec. Raises PluginError in its name where the engine can't use it; where: the recipe's key that asks."""
    if not isinstance(codec, Codec):
        raise PluginError(f"its codec gave {codec!r:.80} to be used instead, which is no codec", where=where)
    problems = [*_wrong_key(codec.key), *_wrong_configuration(codec), *_wrong_sizes(codec, dtype)]
    if problems:
        raise PluginError(f"the codec {codec.name} can't be used: {'; '.join(problems)}", where=where)
    return codec


def _wrong_key(key: object) -> Iterator[str]:
    if not isinstance(key, str) or not key or not set(key) <= KEY_CHARACTERS:
        yield f"its `key` must be a word of a-z, 0-9, `-`, `_` and `.`, and is {key!r:.80}"


def _wrong_configuration(codec: Codec) -> Iterator[str]:
    configuration = codec.configuration()
    if not isinstance(configuration, Mapping) or configuration.get("name") != codec.name:
        yield f"its `configuration` must be a mapping with `name: {codec.name}`, and is {configuration!r:.80}"
    elif not _is_json(dict(configuration)):
        yield f"its `configuration` must be the same after JSON, and is {dict(configuration)!r:.80}"


def _is_json(value: object) -> bool:
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def _wrong_sizes(codec: Codec, dtype: DType) -> Iterator[str]:
    for shape in SHAPES:
        nbytes: object = codec.encoded_nbytes(shape, dtype)
        if type(nbytes) is not int or nbytes <= 0:
            yield f"its `encoded_nbytes` must be a whole number above 0, and is {nbytes!r} for the shape {list(shape)}"
            return
