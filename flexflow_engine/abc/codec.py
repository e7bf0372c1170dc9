"""Contract of a codec: tensors to encoded tensors and back, with a declared error.

The engine encodes tensors of one shape, many at a time: units of weights (rows of a matrix) at import, pages of the
KV cache ([num_kv_heads, page_tokens, head_dim]) while it runs. Encoded bytes are what lies on tiers and in the store,
and what moves over links. Their size follows from the shape; a codec may have them compressed, to sizes that follow
from the data, in the store's files.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flexflow_engine.abc.compressor import Compressor
from flexflow_engine.abc.dtypes import DType

if TYPE_CHECKING:
    import torch

API_VERSION = 1
ZARR_PREFIX = "flexflow_engine."
"""Zarr knows codec `group-int4` as `flexflow_engine.group-int4`, if somebody registered it there."""


@dataclass(frozen=True, slots=True)
class NoCodecOptions:
    """For codecs that take nothing."""


@dataclass(frozen=True, slots=True)
class PageProducts:
    """Products with matrices of an encoded tensor [matrices, rows, columns], for kernels of the host's processor, which
    attend to pages of keys and values without decoding them.

    Functions are called from several threads at once, without Python's lock. Their C type, little-endian throughout:

        void product(const uint8_t *encoded, const int64_t *settings, int64_t first, int64_t count,
                     float *vectors, float *weights, int64_t stride)

    `encoded` is one encoded tensor, at any address, and `settings` those of its `KernelDecoder`. Each of its matrices
    [first, first + count) has a vector of `columns` numbers, one behind the other, and `rows` weights, those of the
    next matrix `stride` numbers further, at least `rows`. All is computed in float32, in any order.

    Only pages whose rows are all there are multiplied, and only where every head of a query has keys of its own; others
    are decoded.
    """

    multiply: int
    """Address of the function that sets the weights: weights[r] = sum over c of matrix[r, c] * vectors[c]."""
    accumulate: int
    """Address of the function that adds to the vectors: vectors[c] += sum over r of weights[r] * matrix[r, c]."""


@dataclass(frozen=True, slots=True)
class KernelDecoder:
    """Decoding for kernels of the host's processor, which decode a few numbers at a time into their cache.

    A function is called from several threads at once, without Python's lock. Its C type, little-endian throughout:

        void decode(const uint8_t *encoded, const int64_t *settings, int64_t first, int64_t count, void *out)

    `encoded` is one encoded tensor, at any address; its numbers [first, first + count), in C order, go to `out`.
    """

    addresses: Mapping[DType, int]
    """The function that writes numbers of each type; float16 and bfloat16 as `decode` rounds them."""
    settings: tuple[int, ...]
    """Handed to each call; what the codec's options and the tensor's shape decide."""
    owner: Any
    """Whatever keeps the functions in memory."""
    products: PageProducts | None = None
    """Of a tensor of three dimensions, if that is faster than decoding it and multiplying its numbers."""


INTEGER_GROUP_UNIT = 4
"""Integers that are multiplied at once: groups of whose multiples are multiplied as such."""


@dataclass(frozen=True, slots=True)
class IntegerDecoder:
    """Decoding to 8-bit integers for kernels of the host's processor, which multiply them by rounded activations.

    A function is called from several threads at once, without Python's lock. Its C type, little-endian throughout:

        void decode(const uint8_t *encoded, const int64_t *settings, int64_t first, int64_t count,
                    uint8_t *integers, float *scales, float *lows)

    `encoded` is one encoded tensor, at any address. Of its numbers [first, first + count), in C order and whole groups,
    the integers are written, and each group's scale and low: a number is low + scale * integer. Scale or low are NaN
    where numbers are.
    """

    address: int
    settings: tuple[int, ...]
    """Handed to each call; what the codec's options and the tensor's shape decide."""
    group_size: int
    """Of numbers that have a scale and a low in common; up to 65536."""
    owner: Any
    """Whatever keeps the function in memory."""


@dataclass(frozen=True, slots=True)
class DeviceDecoder:
    """Decoding for kernels of a GPU, which Triton compiles: they decode a few numbers at a time into registers.

    The function is one of `triton.jit`, called within a kernel:

        function(encoded, first, mask, settings)  ->  float32 [tokens, runs, 8]

    It gives eight numbers each from number `first` on, in C order, of encoded tensors: `encoded` [tokens, 1] points to
    their first bytes, uint8; addresses are multiples of 16, or of what 16 and a tensor's encoded size have in common.
    `first` and `mask` [tokens, runs] are integers, multiples of what 8 and the last dimension of the tensors' shape
    have in common, and whether there are such numbers. Where there are none, and behind a tensor's last number, any
    finite number will do.
    """

    function: Any
    settings: tuple[int, ...]
    """`tl.constexpr` in the function; what the codec's options and the tensor's shape decide."""


def with_products(key: str, codec: Codec) -> str:
    """A key of a codec for weights, different as well where the host multiplies integers."""
    return f"{key}-int8" if codec.multiplies_integers else key


class Codec(ABC):
    """Stateless and thread-safe; called from the import, and from lanes and the threads that share their work."""

    api_version: ClassVar[int] = API_VERSION
    name: ClassVar[str]
    Options: ClassVar[type[Any]] = NoCodecOptions
    """A frozen dataclass: the recipe's further keys of this codec, with their types and defaults."""
    keeps_bytes: ClassVar[bool] = False
    """Whether encoded bytes are the tensor's own, so that what is encoded is computed on in place."""

    decodes_in_kernels: ClassVar[bool] = False
    """Whether there is a `kernel_decoder`. Without one, pages of a cache are decoded before they are attended to, and
    on the host weights before they are multiplied, both by one thread."""

    compresses: ClassVar[bool] = False
    """Whether there is a `compressor`: the store's files hold encoded units compressed. Such a codec is for weights."""

    def __init__(self, options: Any) -> None:
        """options: an instance of `Options`."""
        self.options = options

    def __eq__(self, other: object) -> bool:
        """Codecs are equal that read each other's bytes."""
        return isinstance(other, Codec) and self.configuration() == other.configuration()

    def __hash__(self) -> int:
        return hash(json.dumps(self.configuration(), sort_keys=True))

    def notices(self, memory: str) -> tuple[str, ...]:
        """What makes the codec slow on this machine for tensors in `memory`, a tier's label, a line each; may take
        seconds. Called by `doctor`.
        """
        return ()

    @property
    def key(self) -> str:
        """Name and settings in a word of a-z, 0-9, `-`, `_` and `.`; different where the bytes made may differ."""
        return self.name

    @property
    def multiplies_integers(self) -> bool:
        """Whether the host may multiply 8-bit integers of an `integer_decoder` by activations that are rounded to as
        many bits. It does where the processor can, groups are of a multiple of four numbers, and rows of whole groups;
        elsewhere it multiplies numbers. Only of a codec for weights that decodes in kernels; `for_table` says the same.
        """
        return False

    def for_cache(self) -> Codec:
        """The codec to use for a KV cache: an equal one that encodes as fast as pages fill."""
        return self

    def for_table(self) -> Codec:
        """The codec to use for an embedding table, which a tied head multiplies by, where this one is for the weights:
        it keeps bytes, decodes in kernels and has an equal compressor if this one does. Called when a job is planned,
        imported or measured: equal each time.
        """
        return self

    @abstractmethod
    def configuration(self) -> Mapping[str, Any]:
        """What a reader must know to decode, ready for JSON: the name, the format's version, its settings."""

    @abstractmethod
    def encoded_nbytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        """Exact size in bytes of one tensor of this shape once encoded."""

    @abstractmethod
    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Encode `values` [n, *shape], any float dtype, into `out`: uint8 [n, encoded_nbytes], the caller's buffer."""

    @abstractmethod
    def decode(self, encoded: torch.Tensor, out: torch.Tensor) -> None:
        """Decode uint8 [n, encoded_nbytes] into `out` [n, *shape], the caller's buffer, in its dtype."""

    def decoding(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        """What decodes each `encoded` into its `out`, as `decode` does, as often as it is called. Made once for tensors
        that stay where they are: on a GPU one kernel may do for all, and starting a kernel takes longer than many run.
        """

        def decode_all() -> None:
            for encoded, out in pairs:
                self.decode(encoded, out)

        return decode_all

    @abstractmethod
    def error_bound(self, values: torch.Tensor) -> torch.Tensor:
        """Largest absolute difference that a round trip of `values` [n, *shape] may show at each place, float32."""

    def kernel_decoder(self, shape: tuple[int, ...]) -> KernelDecoder:
        """Compiled decoding of tensors of this shape, the very numbers of `decode`. Called while a run is prepared, and
        when a layer is first computed; only where `decodes_in_kernels`.
        """
        raise AssertionError(f"{type(self).__name__} does not decode in kernels")

    def integer_decoder(self, shape: tuple[int, ...]) -> IntegerDecoder:
        """Compiled decoding of tensors of this shape to integers, the numbers of `decode` but for float32's rounding.
        Called while a run is prepared, when a layer is first computed, and when it is measured; only where
        `multiplies_integers`.
        """
        raise AssertionError(f"{type(self).__name__} does not decode to integers")

    def device_decoder(self, shape: tuple[int, ...]) -> DeviceDecoder | None:
        """Decoding of tensors of this shape within kernels for a GPU, the numbers of `decode` before they are rounded.
        Called where Triton is; None where there is none: pages of a cache are decoded before they are attended to then.
        """
        return None

    def compressor(self, dtype: DType) -> Compressor:
        """What compresses encoded units of weights of this dtype in the store. Called once an import and once a run;
        only where `compresses`.
        """
        raise AssertionError(f"{type(self).__name__} does not compress")
