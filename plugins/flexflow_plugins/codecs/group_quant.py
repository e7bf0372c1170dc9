"""Codecs of few bits: groups of numbers on grids (Dettmers 2022; FlexGen 2023, section 4.1).

A tensor is flattened and cut into groups of `group_size` numbers; the last may be short. A number is a code: one of 16
(or 256) evenly spaced places, low + code * scale. There are two formats, of one size. One encoded tensor of N numbers
in G groups, little-endian throughout:

    version 1   | codes, low nibble first | scale, float16, [G] | low, float16, [G] |
    version 2   | codes, low nibble first | word, 32 bits, [G]                       |
    offset      0                         ceil(N * bits / 8)

In version 1 a group has one grid; group-int8 writes it, and group-int4 with `encoder: minmax`. In version 2 a word
describes a grid for each quarter of a group (parts.py); group-int4 writes it. With a group size of 64 and N a multiple
of it that is 4.5 (or 8.5) bits a number.

What is not on the grid of everyday numbers (version 2 in brackets, where it differs):
    a constant group, zeros     exact if float16 holds the number, else to float16's rounding of what is left
                                [to 24 of float32's 32 bits]
    a range near or below float16's smallest number, 2^-24
                                the scale is rounded up, so numbers stay within half a step of 2^-24 or its multiple
                                [the smallest scale is 9 * 2^-24]
    numbers far from zero, close to each other
                                as any others [a grid is no farther from zero than its own length: the places are
                                about as far apart as a 15th of the largest number]
    numbers beyond 65504        low and scale stop at float16's largest: -65504 ... 15 * 65504 (255 * 65504) is
                                covered, what lies beyond becomes the end of it [-125440 ... 215040];
                                `error_bound` says by how much
    NaN and infinity            the whole group decodes to NaN: a damaged tensor must not look like a sound one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F  # noqa: N812  # the field's usual name

from flexflow_engine.abc.codec import INTEGER_GROUP_UNIT, Codec, DeviceDecoder, IntegerDecoder, KernelDecoder
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.abc.tier import HOST
from flexflow_engine.cpu.instructions import has_amx, has_bfloat_instructions, has_integer_instructions
from flexflow_engine.errors import CorruptDataError
from flexflow_plugins.codecs import on_device, on_device_parts, threads
from flexflow_plugins.codecs.part_format import MAX_HALF

DEFAULT_GROUP_SIZE = 64
MAX_GROUP_SIZE = 4096
_SLACK = 1 + 2**-10
"""Encoders compute in float32: near the middle of two places either may be taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInt4Options:
    """What a recipe may say of group-int4."""

    group_size: int = DEFAULT_GROUP_SIZE
    """Numbers that share a scale; even."""
    encoder: Literal["auto", "search", "fit", "minmax"] = "auto"
    """`search` takes its time for less error, `fit` takes a part of both, `minmax` is the fastest and has one grid a
    group; `auto` searches for weights and fits a cache."""
    table_bits: Literal[4, 8] = 8
    """Of weights: those of the embedding table, which a tied head multiplies by; 8 as `group-int8` has them."""
    int8_activations: bool = False
    """Of weights: whether the host rounds what it multiplies by them to 8 bits, with a scale for each `group_size`
    numbers of a token, where its processor multiplies such numbers faster (AVX-512 VNNI, AVX-VNNI)."""

    def __post_init__(self) -> None:
        _check_group_size(self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInt8Options:
    """What a recipe may say of group-int8."""

    group_size: int = DEFAULT_GROUP_SIZE
    """Numbers that share a scale; even."""
    int8_activations: bool = False
    """Of weights: whether the host rounds what it multiplies by them to 8 bits, with a scale for each `group_size`
    numbers of a token, where its processor multiplies such numbers faster (AVX-512 VNNI, AVX-VNNI)."""

    def __post_init__(self) -> None:
        _check_group_size(self.group_size)


class GroupQuantCodec(Codec):
    """What the two sizes share."""

    bits: ClassVar[int]
    versions: ClassVar[Mapping[int, Mapping[str, Any]]]
    """Of the format, with the options of a codec that writes it."""
    decodes_in_kernels = True

    def __init__(self, options: Any = None) -> None:
        """options: an instance of `Options`; its defaults without."""
        super().__init__(self.Options() if options is None else options)
        self.group_size: int = self.options.group_size

    @property
    def encoder(self) -> str:
        return "minmax"

    @property
    def key(self) -> str:
        """Codecs of one version read each other's bytes, and still don't write the same ones."""
        return f"{self.name}-g{self.group_size}" + ("" if self.version == 1 else f"-v{self.version}-{self.encoder}")

    @property
    def multiplies_integers(self) -> bool:
        return bool(self.options.int8_activations)

    @property
    def version(self) -> int:
        """Of the format."""
        return 1

    @classmethod
    def of_version(cls, version: int, group_size: int) -> Self:
        """A codec that reads it. Raises CorruptDataError for a version or a group size that can't be."""
        if version not in cls.versions:
            raise CorruptDataError(
                f"the data have version {version} of {cls.name}, and this reads {', '.join(map(str, cls.versions))}",
                fix="update flexflow-engine, or import the checkpoint again",
            )
        try:
            return cls(cls.Options(group_size=group_size, **cls.versions[version]))
        except ValueError as error:
            raise CorruptDataError(f"the data of {cls.name} make no sense: {error}") from error

    def configuration(self) -> Mapping[str, Any]:
        return {"name": self.name, "version": self.version, "group_size": self.group_size}

    def encoded_nbytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        return self._nbytes(prod(shape))

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        self._check(values, out)
        backend = threads if values.device.type == "cpu" else on_device
        backend.encode(self, values, out)

    def decode(self, encoded: torch.Tensor, out: torch.Tensor) -> None:
        self._check(out, encoded)
        backend = threads if out.device.type == "cpu" else on_device
        backend.decode(self, encoded, out)

    def decoding(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        for encoded, out in pairs:
            self._check(out, encoded)
        return on_device.decoding(self, pairs) or super().decoding(pairs)

    def notices(self, memory: str) -> tuple[str, ...]:
        notices = on_device.notices(memory)
        if not self.multiplies_integers:
            return notices
        if hindrance := self._integer_hindrance(memory):
            return (*notices, f"`int8_activations` changes nothing: {hindrance}")
        if has_amx() and has_bfloat_instructions():
            return (
                *notices,
                "`int8_activations` is slower where `dtype` is bfloat16: this processor has AMX",
            )
        return notices

    def kernel_decoder(self, shape: tuple[int, ...]) -> KernelDecoder:
        return threads.multiplying_decoder(self, shape)

    def integer_decoder(self, shape: tuple[int, ...]) -> IntegerDecoder:
        return threads.integer_decoder(self, prod(shape))

    def device_decoder(self, shape: tuple[int, ...]) -> DeviceDecoder | None:
        return on_device.decoder(self, shape)

    def error_bound(self, values: torch.Tensor) -> torch.Tensor:
        """Half a step of the covering grid (a whole one in version 2), and the dtype's own rounding.

        Infinite for every number of a group that holds one that is not finite.
        """
        numbers = self._grouped(values)  # [n, groups, group_size]
        bound = self._grid_bound(numbers) + torch.finfo(values.dtype).eps * numbers.abs()
        bound = torch.where(numbers.isfinite().all(2, keepdim=True), bound, torch.inf)
        return bound.flatten(1)[:, : values[0].numel()].reshape(values.shape)

    def _integer_hindrance(self, memory: str) -> str | None:
        """Why products with weights in this memory are not of integers."""
        if memory != HOST:
            return f"the host multiplies integers, and {memory} computes"
        if self.group_size % INTEGER_GROUP_UNIT:
            return f"groups of {self.group_size} numbers are not of a multiple of {INTEGER_GROUP_UNIT}"
        if not has_integer_instructions():
            return "this processor has neither AVX-512 VNNI nor AVX-VNNI"
        return None

    def _grid_bound(self, numbers: torch.Tensor) -> torch.Tensor:
        """Of decoding to float32, and, in part, of rounding that; numbers [n, groups, group_size]."""
        low = numbers.amin(2, keepdim=True).clamp(min=-MAX_HALF)
        low = torch.minimum(low, low.clamp(max=MAX_HALF).half().float())
        low = torch.where(low.half().float() > low, low - low.abs() * 2**-10 - 2**-24, low)
        levels = float(2**self.bits - 1)
        high = torch.minimum(numbers.amax(2, keepdim=True), low + levels * MAX_HALF)
        step = ((high - low) / levels * _SLACK + 2**-24).clamp(max=MAX_HALF)
        outside = (low - numbers).clamp(min=0) + (numbers - low - levels * step).clamp(min=0)
        return 0.5 * step * _SLACK + outside + step * 2**-7

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        """values [n, *shape] as float32 [n, groups, group_size], the last group filled up with its last number."""
        flat = values.float().flatten(1)
        padding = -flat.shape[1] % self.group_size
        return F.pad(flat[:, None], (0, padding), mode="replicate").view(len(flat), -1, self.group_size)

    def _nbytes(self, size: int) -> int:
        return -(-size * self.bits // 8) + 4 * -(-size // self.group_size)

    def _check(self, values: torch.Tensor, encoded: torch.Tensor) -> None:
        expected = values.shape[0], self._nbytes(prod(values.shape[1:]))
        if encoded.shape != expected or encoded.dtype != torch.uint8:
            raise CorruptDataError(
                f"{self.name} stores {list(values.shape)} in {expected[1]} bytes a tensor, "
                f"and the data are {encoded.dtype} {list(encoded.shape)}",
                fix="it was encoded with other settings, or is cut short; import the checkpoint again",
            )


class GroupInt4Codec(GroupQuantCodec):
    """16 places a grid; 4.5 bits a number with groups of 64."""

    name = "group-int4"
    Options = GroupInt4Options
    bits = 4
    versions: ClassVar[Mapping[int, Mapping[str, Any]]] = {1: {"encoder": "minmax"}, 2: {}}

    @property
    def encoder(self) -> str:
        chosen: str = self.options.encoder
        return "search" if chosen == "auto" else chosen

    @property
    def version(self) -> int:
        return 1 if self.encoder == "minmax" else 2

    def for_table(self) -> GroupQuantCodec:
        if self.options.table_bits == 4:
            return self
        int8_activations = self.options.int8_activations
        return GroupInt8Codec(GroupInt8Options(group_size=self.group_size, int8_activations=int8_activations))

    def for_cache(self) -> GroupInt4Codec:
        encoder = "fit" if self.options.encoder == "auto" else self.options.encoder
        return GroupInt4Codec(replace(self.options, encoder=encoder, int8_activations=False))

    def _grid_bound(self, numbers: torch.Tensor) -> torch.Tensor:
        if self.version == 1:
            return super()._grid_bound(numbers)
        return on_device_parts.bound(numbers) * _SLACK


class GroupInt8Codec(GroupQuantCodec):
    """256 places a group; 8.5 bits a number with groups of 64."""

    name = "group-int8"
    Options = GroupInt8Options
    bits = 8
    versions: ClassVar[Mapping[int, Mapping[str, Any]]] = {1: {}}

    def for_cache(self) -> GroupInt8Codec:
        return GroupInt8Codec(replace(self.options, int8_activations=False))


def _check_group_size(group_size: int) -> None:
    if group_size % 2 or not 2 <= group_size <= MAX_GROUP_SIZE:
        what = f"group_size is {group_size}, and groups are of an even number of values"
        raise ValueError(f"{what}; choose one from 2 to {MAX_GROUP_SIZE}; {DEFAULT_GROUP_SIZE} is usual")
