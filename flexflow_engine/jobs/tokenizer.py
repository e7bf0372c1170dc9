"""Text to token ids and back, with whatever tokenizer a checkpoint's folder holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from flexflow_engine.errors import CheckpointError

FAST_FILE = "tokenizer.json"
VOCABULARIES = (FAST_FILE, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""A folder with any of these has a tokenizer."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What vocabularies but tokenizer.json leave open."""


class Tokenizer(ABC):
    """The two directions that a job needs. Special tokens of a prompt are added as transformers would."""

    @abstractmethod
    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, BOS included where the checkpoint wants one."""

    @abstractmethod
    def encode_completion(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that continues a prompt: no special tokens are added."""

    @abstractmethod
    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens left out."""


def load_tokenizer(folder: Path | None) -> Tokenizer | None:
    """The folder's tokenizer, or None when it has none; tokenizer.json is preferred, as the fastest to load.

    Raises CheckpointError when the files are there and broken. Runs no code of the checkpoint.
    """
    if folder is None:
        return None
    fast = folder / FAST_FILE
    if fast.is_file():
        return FastTokenizer.read(fast)
    if any((folder / name).is_file() for name in VOCABULARIES):
        return TransformersTokenizer.read(folder)
    return None


def decoding_files(folder: Path) -> tuple[Path, ...]:
    """What the folder's tokenizer makes text of token ids by; those that are missing are none of it."""
    fast = folder / FAST_FILE
    return (fast,) if fast.is_file() else tuple(folder / name for name in (*VOCABULARIES, *SETTINGS))


class FastTokenizer(Tokenizer):
    """A tokenizer.json, which says itself what special tokens a prompt gets."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    @classmethod
    def read(cls, path: Path) -> FastTokenizer:
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise CheckpointError(f"the tokenizer can't be read ({error})", where=str(path)) from error
        backend.no_padding()
        backend.no_truncation()
        return cls(backend)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text).ids)

    def encode_completion(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=True)


class TransformersTokenizer(Tokenizer):
    """Older files, such as OPT's vocab.json with merges.txt, whose BOS is a matter of tokenizer_config.json."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    @classmethod
    def read(cls, folder: Path) -> TransformersTokenizer:
        # Imported here, because it takes seconds and most checkpoints have a tokenizer.json.
        from transformers import AutoTokenizer  # noqa: PLC0415  # see above

        try:
            backend = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises whatever its many readers raise
            first_line = str(error).strip().partition("\n")[0]
            raise CheckpointError(f"the tokenizer can't be read ({first_line})", where=str(folder)) from error
        return cls(backend)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend(text, truncation=False)["input_ids"])

    def encode_completion(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend(text, truncation=False, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=True)
        return text
