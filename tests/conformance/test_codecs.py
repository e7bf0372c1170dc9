"""Every built-in codec keeps the contract of `Codec`, and the suite catches codecs that don't."""

import ctypes
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flexflow_engine.abc.codec import Codec, IntegerDecoder, KernelDecoder
from flexflow_engine.abc.dtypes import DType
from flexflow_engine.testing.codec_suite import NUM_THREADS, CodecTests
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec, GroupInt8Options
from flexflow_plugins.codecs.lossless import (
    BloscCodec,
    BloscOptions,
    Lz4Codec,
    Lz4Options,
    ZstdCodec,
    ZstdOptions,
)
from flexflow_plugins.codecs.none import NoneCodec

GOLDEN = Path(__file__).parent / "golden"


class TestNoneCodec(CodecTests):
    golden = GOLDEN

    def make_codec(self) -> Codec:
        return NoneCodec()

    def make_others(self) -> list[Codec]:
        return [GroupInt8Codec()]


class TestGroupInt4(CodecTests):
    golden = GOLDEN

    def make_codec(self) -> Codec:
        return GroupInt4Codec()

    def make_others(self) -> list[Codec]:
        return [NoneCodec(), GroupInt8Codec(), GroupInt4Codec(GroupInt4Options(group_size=32))]


class TestGroupInt4MinMax(CodecTests):
    golden = GOLDEN

    def make_codec(self) -> Codec:
        return GroupInt4Codec(GroupInt4Options(encoder="minmax"))

    def make_others(self) -> list[Codec]:
        return [NoneCodec(), GroupInt8Codec(), GroupInt4Codec(GroupInt4Options(group_size=32, encoder="minmax"))]


class TestGroupInt4Fit(CodecTests):
    golden = GOLDEN

    def make_codec(self) -> Codec:
        return GroupInt4Codec(GroupInt4Options(encoder="fit"))

    def make_others(self) -> list[Codec]:
        return [NoneCodec(), GroupInt8Codec(), GroupInt4Codec(GroupInt4Options(group_size=32, encoder="fit"))]


class TestGroupInt8(CodecTests):
    golden = GOLDEN

    def make_codec(self) -> Codec:
        return GroupInt8Codec()

    def make_others(self) -> list[Codec]:
        return [NoneCodec(), GroupInt4Codec(), GroupInt8Codec(GroupInt8Options(group_size=32))]


class TestSmallOddGroups(CodecTests):
    golden = GOLDEN

    def make_codec(self) -> Codec:
        return GroupInt4Codec(GroupInt4Options(group_size=6))

    def make_others(self) -> list[Codec]:
        return [GroupInt4Codec(), GroupInt8Codec(GroupInt8Options(group_size=6))]


class TestIntegersOfInt4(TestGroupInt4):
    def make_codec(self) -> Codec:
        return GroupInt4Codec(GroupInt4Options(int8_activations=True))


class TestIntegersOfInt4MinMax(TestGroupInt4MinMax):
    def make_codec(self) -> Codec:
        return GroupInt4Codec(GroupInt4Options(encoder="minmax", int8_activations=True))


class TestIntegersOfSmallOddGroups(TestSmallOddGroups):
    def make_codec(self) -> Codec:
        return GroupInt4Codec(GroupInt4Options(group_size=6, int8_activations=True))


class TestIntegersOfInt8(TestGroupInt8):
    def make_codec(self) -> Codec:
        return GroupInt8Codec(GroupInt8Options(int8_activations=True))


class TestZstd(CodecTests):
    golden = GOLDEN

    def make_codec(self) -> Codec:
        return ZstdCodec()

    def make_others(self) -> list[Codec]:
        return [NoneCodec(), ZstdCodec(ZstdOptions(level=4)), BloscCodec()]


class TestBlosc(CodecTests):
    golden = GOLDEN

    def make_codec(self) -> Codec:
        return BloscCodec()

    def make_others(self) -> list[Codec]:
        return [NoneCodec(), Lz4Codec(), BloscCodec(BloscOptions(shuffle="byte")), BloscCodec(BloscOptions(clevel=4))]


class TestLz4(CodecTests):
    golden = GOLDEN

    def make_codec(self) -> Codec:
        return Lz4Codec()

    def make_others(self) -> list[Codec]:
        return [NoneCodec(), ZstdCodec(), Lz4Codec(Lz4Options(acceleration=2))]


class TooSure(GroupInt8Codec):
    """Declares half the error it makes."""

    def error_bound(self, values: torch.Tensor) -> torch.Tensor:
        return super().error_bound(values) / 2


class Spilling(GroupInt8Codec):
    """Declares a byte more than it writes."""

    def encoded_nbytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        return super().encoded_nbytes(shape, dtype) + 1

    def encode(self, values: torch.Tensor, out: torch.Tensor) -> None:
        super().encode(values, out[:, :-1])


class Mixing(GroupInt8Codec):
    """Decodes a tensor otherwise in company."""

    def decode(self, encoded: torch.Tensor, out: torch.Tensor) -> None:
        super().decode(encoded, out)
        out[1:] = out[:1].clone()


class Nameless(GroupInt8Codec):
    """Leaves its group size out of the configuration, so that unequal codecs are equal."""

    def configuration(self) -> dict[str, object]:
        return {"name": self.name}


class Remembering(GroupInt8Codec):
    """Keeps state between calls that other threads overwrite: all that use it meet where it hurts."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._maker, self._met = threading.get_ident(), threading.Barrier(NUM_THREADS, timeout=60)

    def decode(self, encoded: torch.Tensor, out: torch.Tensor) -> None:
        self.shared = encoded
        if threading.get_ident() != self._maker:
            self._met.wait()
        super().decode(self.shared, out)


class Shifted(GroupInt8Codec):
    """Reads what earlier versions wrote a little differently."""

    def decode(self, encoded: torch.Tensor, out: torch.Tensor) -> None:
        super().decode(encoded ^ 1, out)


class Elsewhere(GroupInt8Codec):
    """Kernels decode from the tensor's start, whatever part they ask for."""

    def kernel_decoder(self, shape: tuple[int, ...]) -> KernelDecoder:
        decoder, kind = super().kernel_decoder(shape), ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 5)

        def from_the_start(address: int) -> Any:
            decode = kind(address)
            return kind(lambda data, settings, first, count, out: decode(data, settings, 0, count, out))

        functions: dict[DType, Any] = {d: from_the_start(address) for d, address in decoder.addresses.items()}
        addresses = {dtype: ctypes.cast(f, ctypes.c_void_p).value or 0 for dtype, f in functions.items()}
        return KernelDecoder(addresses, decoder.settings, functions)


class Forgetful(GroupInt8Codec):
    """What kernels add up begins at zero for each page: `multiply` is told for both."""

    def kernel_decoder(self, shape: tuple[int, ...]) -> KernelDecoder:
        decoder = super().kernel_decoder(shape)
        if decoder.products is None:
            pytest.skip("this processor has no products")
        return replace(decoder, products=replace(decoder.products, accumulate=decoder.products.multiply))


class OtherGroups(GroupInt8Codec):
    """Kernels get the integers of groups of another size."""

    multiplies_integers = True

    def integer_decoder(self, shape: tuple[int, ...]) -> IntegerDecoder:
        decoder = super().integer_decoder(shape)
        return replace(decoder, group_size=decoder.group_size // 2)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Elsewhere, "test_kernels_decode_any_part_to_the_same_numbers"),
        (OtherGroups, "test_kernels_decode_any_groups_to_integers"),
        (Forgetful, "test_kernels_multiply_any_matrices"),
        (TooSure, "test_a_round_trip_stays_within_the_declared_error"),
        (Spilling, "test_every_declared_byte_is_written_and_no_other"),
        (Mixing, "test_many_tensors_at_once_are_each_as_if_alone"),
        (Nameless, "test_codecs_of_one_configuration_are_equal"),
        (Remembering, "test_threads_share_one_codec"),
        (Shifted, "test_bytes_of_earlier_versions_are_still_read"),
    ],
)
def test_a_broken_codec_is_caught(broken: type[GroupInt8Codec], test: str) -> None:
    class Suite(CodecTests):
        golden = GOLDEN

        def make_codec(self) -> Codec:
            return broken()

        def make_others(self) -> list[Codec]:
            return [broken(GroupInt8Options(group_size=32))]

    arguments = {
        "test_kernels_decode_any_part_to_the_same_numbers": ("float32", (64,)),
        "test_kernels_decode_any_groups_to_integers": ("float32", (2, 80)),
        "test_kernels_multiply_any_matrices": ((3, 4, 64), 0.0),
        "test_every_declared_byte_is_written_and_no_other": ("float32", (7,)),
        "test_many_tensors_at_once_are_each_as_if_alone": ("float32", (64,)),
        "test_bytes_of_earlier_versions_are_still_read": ("float32",),
    }
    with pytest.raises(AssertionError):
        getattr(Suite(), test)(*arguments.get(test, ()))
