"""How many bytes torch held at once for what was made inside a `with`: the truth that a workspace bound is held to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import RLock
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakAllocations(TorchDispatchMode):
    """Counts the storages that operators create, from their creation to their end.

        with PeakAllocations() as allocations:
            hidden = model.embed(weights, rows, positions)
        assert allocations.peak_bytes <= bound

    Operators made of others are taken apart first, so that their intermediates count too; what a kernel takes for
    itself inside one operator stays unseen. What the engine's threads do for the caller counts as well.

    Changing state, guarded by `_lock`: `live_bytes`, `peak_bytes`, `_known`.
    """

    live_bytes: int
    peak_bytes: int

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.live_bytes = 0
        self.peak_bytes = 0
        self._lock = RLock()  # storages may end while this thread holds it
        self._known: dict[int, weakref.finalize[..., Any]] = {}
        """Storages seen so far that are still alive, by address of the storage object: each with its end."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            self._watch(storage, nbytes=0)  # made elsewhere, unless it is known already
        parts = self._taken_apart(func, args, kwargs)
        result = func(*args, **kwargs) if parts is NotImplemented else parts
        for storage in _storages(result):
            self._watch(storage, nbytes=storage.nbytes())
        return result

    def _taken_apart(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of the operators that `func` is made of; NotImplemented when it is a kernel itself."""
        with self:
            return func.decompose(*args, **kwargs)  # type: ignore[attr-defined]  # an OpOverload, which torch hides

    def _watch(self, storage: torch.UntypedStorage, *, nbytes: int) -> None:
        key = storage._cdata
        with self._lock:
            if key not in self._known:
                self.live_bytes += nbytes
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
                end = weakref.finalize(storage, self._ended, key, nbytes)
                end.atexit = False
                self._known[key] = end

    def _ended(self, key: int, nbytes: int) -> None:
        with self._lock:
            del self._known[key]
            self.live_bytes -= nbytes


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of the tensors in nested tuples, lists and mappings."""
    if isinstance(values, torch.Tensor):
        yield values.untyped_storage()
    elif isinstance(values, Mapping):
        yield from _storages(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _storages(value)
