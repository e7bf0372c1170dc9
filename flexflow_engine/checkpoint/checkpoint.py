"""What every kind of checkpoint can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.model import Model
from flexflow_engine.checkpoint.config import check_model_type
from flexflow_engine.declared.models import open_model
from flexflow_engine.errors import CheckpointError

if TYPE_CHECKING:
    import torch

ByteProgress = Callable[[int, int], None]
"""Called with the bytes done so far and the bytes in all."""


def silent(done_bytes: int, total_bytes: int) -> None:
    """Progress that nobody watches."""


class Checkpoint(ABC):
    """A model's configuration and tensors. Holds no file open."""

    def __init__(self, reference: str, config: Mapping[str, Any], model_class: type[Model], dtype: DType) -> None:
        """Raises CheckpointError when the model does not read the config's `model_type`."""
        check_model_type(config, model_class, where=reference)
        self.reference = reference
        """As the user named it."""
        self.config = config
        """The content of config.json, with the `eos_token_id` of generation_config.json if there is one."""
        self.dtype = dtype
        self.model_class = model_class

    @cached_property
    def model(self) -> Model:
        """The network of this checkpoint. Raises CheckpointError when its config can't be used, PluginError when the
        plugin makes no model of it.
        """
        try:
            return open_model(self.model_class, self.config, self.dtype)
        except CheckpointError as error:
            raise error.within(self.reference) from error

    @property
    @abstractmethod
    def tokenizer_folder(self) -> Path | None:
        """The folder of the tokenizer's files; None when there are none. Raises CheckpointError when the hub that has
        them does not give them.
        """

    @property
    def is_fetched(self) -> bool:
        """Whether the files of its tensors are on this machine; asks no hub."""
        return True

    @abstractmethod
    def content_key(self, progress: ByteProgress = silent) -> str:
        """A digest of config and tensors, 64 hexadecimal digits: equal content, equal key, wherever it lies."""

    @abstractmethod
    def tensor_names(self) -> frozenset[str]:
        """Names as the checkpoint spells them. Raises CheckpointError or ProblemsError for files that are damaged."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one of `tensor_names`."""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor's first axis, on the CPU, in the checkpoint's number format.

        Raises CheckpointError when the file ends before them.
        """

    def problem(self, name: str, shape: tuple[int, ...]) -> CheckpointError | None:
        """What stands against reading tensor `name` as `shape`; None when nothing does."""
        if self.shape(name) == shape:
            return None
        return CheckpointError(
            f"{name} has shape {list(self.shape(name))}, and the config asks for {list(shape)}",
            where=self.place(name),
        )

    def place(self, name: str) -> str:
        """Where tensor `name` is, for messages."""
        return self.reference
