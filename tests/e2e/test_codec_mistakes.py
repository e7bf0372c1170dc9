"""A codec's mistakes: each is told in its name, before a weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import CommandLine, install, write_recipe
from harness import random_prompts, save_opt

SOURCE = """
from dataclasses import dataclass

from flexflow_engine import hookimpl
from flexflow_engine.abc.codec import Codec
from flexflow_plugins.codecs.none import NoneCodec

@dataclass(frozen=True)
class Options:
    key: str = "'erring'"
    configuration: str = "{'name': 'erring', 'version': 1}"
    nbytes: str = "nbytes"
    instead: str = "self"

class Erring(NoneCodec):
    name = "erring"
    Options = Options

    def __init__(self, options):
        self.options = options

    @property
    def key(self):
        return eval(self.options.key)

    def configuration(self):
        return eval(self.options.configuration)

    def encoded_nbytes(self, shape, dtype):
        nbytes = super().encoded_nbytes(shape, dtype)
        return eval(self.options.nbytes)

    def for_cache(self):
        return eval(self.options.instead)

    def for_table(self):
        return eval(self.options.instead)

@hookimpl
def flexflow_register_codecs():
    return [Erring]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(install(tmp_path, "erring_codec", SOURCE))
    return write_recipe(tmp_path / "job", save_opt(tmp_path / "checkpoint"), random_prompts(2, longest=5))


def setting(tensor_class: str, **options: str) -> str:
    keys = "".join(f', {name}: "{value}"' for name, value in options.items())
    return f"--set=codecs.{tensor_class}={{plugin: erring{keys}}}"


def test_the_codec_without_a_mistake_runs(command: CommandLine, recipe: Path) -> None:
    assert command("run", recipe, setting("weights"), setting("kv_cache")).status == 0


@pytest.mark.parametrize("tensor_class", ["weights", "kv_cache"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "'acme/../../bad key'"}, "its `key` must be a word of a-z, 0-9, `-`, `_` and `.`, and is 'acme/../"),
        ({"key": "''"}, "its `key` must be a word"),
        ({"key": "None"}, "its `key` must be a word"),
        ({"configuration": "{'name': 'erring', 'x': {1, 2}}"}, "its `configuration` must be the same after JSON"),
        ({"configuration": "{'name': 'other'}"}, "its `configuration` must be a mapping with `name: erring`"),
        ({"configuration": "None"}, "its `configuration` must be a mapping with `name: erring`"),
        ({"nbytes": "0"}, "its `encoded_nbytes` must be a whole number above 0, and is 0 for the shape [8, 64]"),
        ({"nbytes": "float(nbytes)"}, "its `encoded_nbytes` must be a whole number above 0, and is 2048.0"),
        ({"nbytes": "None"}, "its `encoded_nbytes` must be a whole number above 0, and is None"),
        ({"instead": "None"}, "its codec gave None to be used instead, which is no codec"),
    ],
)
def test_a_codec_that_can_t_be_used_is_refused(
    command: CommandLine, recipe: Path, tensor_class: str, options: dict[str, str], message: str
) -> None:
    outcome = command("run", recipe, setting(tensor_class, **options))
    outcome.assert_user_error()
    assert f"error: codecs.{tensor_class}: " in outcome.stderr
    assert message in outcome.stderr
    assert not (recipe.parent / "disk").exists()
