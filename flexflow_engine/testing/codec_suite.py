"""What every codec promises, as tests to inherit.

    class TestMyCodec(CodecTests):
        golden = Path(__file__).parent / "golden"

        def make_codec(self):
            return MyCodec(MyOptions(group_size=64))

        def make_others(self):
            return [MyCodec(MyOptions(group_size=32))]

pytest collects the inherited tests under the subclass's name. `golden` is a folder with a file of encoded bytes for
each codec, in version control: it pins the format that earlier versions wrote. A file that is missing fails the test
and is written, so that it can be looked at and kept. What compressed it may make other bytes of the same numbers in its
next release, so golden files pin what is read, never what is written.

Of a codec that compresses, sizes of encoded units are as exact as of any; what its compressor makes of them is held to
`max_nbytes`. These tests skip where a codec does not compress.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexflow_engine.abc.codec import Codec, IntegerDecoder, KernelDecoder
from flexflow_engine.abc.compressor import Compressor
from flexflow_engine.abc.dtypes import DTYPES, DType
from flexflow_engine.abc.tier import HostBytes
from flexflow_engine.declared.codecs import KEY_CHARACTERS
from flexflow_engine.errors import CorruptDataError

NUM_THREADS = 4
GOLDEN_SHAPE = (3, 5, 16)
"""A tensor of 240 values: no multiple of 64, and longer than one group."""
SHAPES = ((1,), (7,), (64,), (2, 80), (16, 4, 80), (5, 3, 7), (33, 64))
MATRICES = ((3, 4, 64), (4, 8, 192), (2, 3, 80))
"""Shapes of pages of a cache: matrices, rows, columns."""

Shape = tuple[int, ...]


class CodecTests:
    """Inherit it and define `make_codec`, `make_others` and `golden`."""

    golden: ClassVar[Path]
    """Folder of the golden files."""

    def make_codec(self) -> Codec:
        """The codec under test; each call a new one, equal to the last."""
        raise NotImplementedError

    def make_others(self) -> list[Codec]:
        """Codecs that read or write other bytes than the one under test."""
        raise NotImplementedError

    def test_codecs_of_one_configuration_are_equal(self) -> None:
        codec = self.make_codec()
        assert codec == self.make_codec()
        assert hash(codec) == hash(self.make_codec())
        assert codec.configuration() == self.make_codec().configuration()
        for other in self.make_others():
            assert codec != other
            assert codec.key != other.key

    def test_the_codec_for_a_cache_is_an_equal_one(self) -> None:
        codec = self.make_codec()
        assert codec.for_cache() == codec
        assert hash(codec.for_cache()) == hash(codec)

    def test_the_codec_for_tables_is_of_the_same_kind(self) -> None:
        codec = self.make_codec()
        table = codec.for_table()
        assert table == codec.for_table()
        assert (table.keeps_bytes, table.decodes_in_kernels) == (codec.keeps_bytes, codec.decodes_in_kernels)
        assert table.compresses == codec.compresses
        if codec.compresses:
            assert table.compressor("float32") == codec.compressor("float32")

    def test_the_configuration_names_the_codec_and_is_ready_for_json(self) -> None:
        codec = self.make_codec()
        configuration = dict(codec.configuration())
        assert configuration["name"] == codec.name
        assert json.loads(json.dumps(configuration)) == configuration

    def test_the_key_may_be_part_of_a_file_name(self) -> None:
        key = self.make_codec().key
        assert key
        assert set(key) <= KEY_CHARACTERS

    @settings(
        max_examples=60,
        deadline=None,  # the first example may compile
        report_multiple_bugs=False,  # one AssertionError, not a group of them
        suppress_health_check=[HealthCheck.differing_executors],  # the test is inherited on purpose
    )
    @given(data=st.data())
    def test_a_round_trip_stays_within_the_declared_error(self, data: st.DataObject) -> None:
        codec = self.make_codec()
        dtype = data.draw(st.sampled_from(DTYPES))
        values = data.draw(_tensors()).to(getattr(torch, dtype))
        decoded = round_trip(codec, values, dtype)
        bound = codec.error_bound(values)
        assert bound.shape == values.shape
        assert bound.dtype == torch.float32
        error = (decoded.float() - values.float()).abs()
        inside = (error <= bound) | bound.isinf()
        assert inside.all(), (values[~inside], decoded[~inside], bound[~inside])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_declared_error_tells_something(self, dtype: DType, shape: Shape) -> None:
        values = normal(3, shape, dtype)
        spread = values.float().abs().max()
        assert (self.make_codec().error_bound(values) <= spread).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_declared_byte_is_written_and_no_other(self, dtype: DType, shape: Shape) -> None:
        codec = self.make_codec()
        nbytes = codec.encoded_nbytes(shape, dtype)
        results = []
        for before in (0x00, 0xFF):
            buffer = torch.full((3 * nbytes + 20,), before, dtype=torch.uint8)
            codec.encode(normal(3, shape, dtype), buffer[7 : 7 + 3 * nbytes].view(3, nbytes))
            assert (buffer[:7] == before).all()
            assert (buffer[7 + 3 * nbytes :] == before).all()
            results.append(buffer[7 : 7 + 3 * nbytes])
        assert torch.equal(results[0], results[1])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_decoding_fills_its_slice_and_nothing_beside_it(self, dtype: DType) -> None:
        codec, values = self.make_codec(), normal(2, (5, 16), dtype)
        buffer = torch.full((200,), 9.0, dtype=getattr(torch, dtype))
        codec.decode(encoded(codec, values, dtype), buffer[13:173].view(2, 5, 16))
        assert (buffer[:13] == 9).all()
        assert (buffer[173:] == 9).all()
        assert torch.equal(buffer[13:173].view(2, 5, 16), round_trip(codec, values, dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_tensors_may_lie_apart_and_transposed(self, dtype: DType) -> None:
        codec, values = self.make_codec(), normal(4, (16, 8), dtype)
        expected = round_trip(codec, values, dtype)
        apart = values.new_zeros(4, 3, 16, 8)
        apart[:, 1] = values
        data = encoded(codec, apart[:, 1], dtype)
        assert torch.equal(data, encoded(codec, values, dtype))
        codec.decode(data, apart[:, 2])
        assert torch.equal(apart[:, 2], expected)
        assert not apart[:, 0].any()
        turned = values.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(encoded(codec, turned, dtype), data)
        codec.decode(data, turned)
        assert torch.equal(turned, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_many_tensors_at_once_are_each_as_if_alone(self, dtype: DType, shape: Shape) -> None:
        codec, values = self.make_codec(), normal(5, shape, dtype)
        data, decoded = encoded(codec, values, dtype), round_trip(codec, values, dtype)
        for i in range(5):
            assert torch.equal(encoded(codec, values[i : i + 1], dtype)[0], data[i])
            assert torch.equal(round_trip(codec, values[i : i + 1], dtype)[0], decoded[i])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_tensors_decoded_together_are_each_as_if_alone_every_time(self, dtype: DType) -> None:
        codec = self.make_codec()
        values = [normal(3, shape, dtype) for shape in SHAPES]
        pairs = [(encoded(codec, some, dtype), torch.full_like(some, 9.0)) for some in values]
        decode = codec.decoding(pairs)
        for seed in range(2):
            for some, (data, _) in zip(values, pairs, strict=True):
                some.copy_(normal(3, tuple(some.shape[1:]), dtype, seed))
                data.copy_(encoded(codec, some, dtype))
            decode()
            for some, (_, out) in zip(values, pairs, strict=True):
                assert torch.equal(out, round_trip(codec, some, dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_kernels_decode_any_part_to_the_same_numbers(self, dtype: DType, shape: Shape) -> None:
        codec, size = self.make_codec(), prod(shape)
        if not codec.decodes_in_kernels:
            pytest.skip("this codec does not decode in kernels")
        values = normal(1, shape, dtype)
        data, expected = encoded(codec, values, dtype), round_trip(codec, values, dtype).flatten()
        decoder = codec.kernel_decoder(shape)
        few = {(size // 2, 1), (size - 1, 1), (1, size // 2), (size // 2 | 1, 0)}
        for first, count in {(0, size), (size // 3, size - size // 3), *few}:
            part = expected[first : first + count]
            room = torch.full((len(part) + 2,), 9.0, dtype=values.dtype)
            _decode_part(decoder, data, range(first, first + len(part)), room[1:], dtype)
            assert torch.equal(room[1:-1], part)
            assert room[0] == room[-1] == 9

    @pytest.mark.parametrize("alike", [0.0, 1.5, -3e-7, torch.nan])
    @pytest.mark.parametrize("shape", MATRICES)
    def test_kernels_multiply_any_matrices(self, shape: tuple[int, int, int], alike: float) -> None:
        codec = self.make_codec()
        if not codec.decodes_in_kernels:
            pytest.skip("this codec does not decode in kernels")
        decoder = codec.kernel_decoder(shape)
        if decoder.products is None:
            pytest.skip("this codec has no products with such matrices here")
        values = normal(1, shape, "float32")
        values[:, 1:, 1, :64], values[:, -1, -1] = alike, 100 * alike  # one that is not finite makes rows so
        data, matrices = encoded(codec, values, "float32"), round_trip(codec, values, "float32")[0].double()
        for part in (range(shape[0]), range(1, shape[0] - 1), range(shape[0] - 1, shape[0])):
            given = vectors, weights = [normal(1, (len(part), n), "float32")[0] for n in (shape[2], shape[1])]
            some = matrices[part.start : part.stop]
            same, found = _multiply(decoder.products.multiply, decoder, data, part, given)
            assert torch.equal(same, vectors)
            _assert_close(found, torch.einsum("mrc,mc->mr", some, vectors.double()))
            found, same = _multiply(decoder.products.accumulate, decoder, data, part, given)
            assert torch.equal(same, weights)
            _assert_close(found, vectors + torch.einsum("mrc,mr->mc", some, weights.double()))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_kernels_decode_any_groups_to_integers(self, dtype: DType, shape: Shape) -> None:
        codec = self.make_codec()
        if not codec.multiplies_integers:
            pytest.skip("this codec does not decode to integers")
        decoder = codec.integer_decoder(shape)
        size, groups = decoder.group_size, prod(shape) // decoder.group_size
        for number in (0.0, 1.5, -3e-7, torch.nan):  # every third group consists of it
            values = normal(1, shape, dtype)
            for group in range(0, groups, 3):
                values.view(-1)[group * size : (group + 1) * size] = number
            data, expected = encoded(codec, values, dtype), torch.empty((1, *shape), dtype=torch.float32)
            codec.decode(data, expected)
            for part in (range(groups), range(groups // 2, groups), range(groups // 3)):
                integers, scales, lows = _decode_groups(decoder, data, part)
                found = expected.flatten()[part.start * size : part.stop * size].view(-1, size)
                wrong = (scales * integers + lows - found).abs() > 2**-22 * (scales * integers).abs()
                assert not wrong[~found.isnan()].any()
                assert torch.equal((scales + lows).isnan().expand_as(found), found.isnan())

    @settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.differing_executors],  # the test is inherited on purpose
    )
    @given(data=st.data())
    def test_compressed_units_are_bounded_and_come_back_bit_for_bit(self, data: st.DataObject) -> None:
        codec, dtype = self._compressing(), data.draw(st.sampled_from(DTYPES))
        compressor = codec.compressor(dtype)
        for unit in encoded(codec, data.draw(_tensors()).to(getattr(torch, dtype)), dtype).numpy():
            before = unit.copy()
            compressed = compressor.compress(unit)
            assert len(compressed) <= compressor.max_nbytes(len(unit))
            assert np.array_equal(unit, before)
            assert np.array_equal(_decompressed(compressor, compressed, len(unit)), unit)

    @pytest.mark.parametrize("nbytes", [4, 400, 2**16 + 4, 2**20])
    def test_compressed_noise_is_within_the_bound(self, nbytes: int) -> None:
        noise = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
        compressor = self._compressing().compressor("float32")
        compressed = compressor.compress(noise)
        assert len(compressed) <= compressor.max_nbytes(nbytes)
        assert np.array_equal(_decompressed(compressor, compressed, nbytes), noise)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_compressors_of_one_configuration_are_equal(self, dtype: DType) -> None:
        compressor, again = (self._compressing().compressor(dtype) for _ in range(2))
        assert compressor == again
        assert hash(compressor) == hash(again)
        entry = dict(compressor.zarr_codec())
        assert entry.keys() == {"name", "configuration"}
        assert json.loads(json.dumps(entry)) == entry

    def test_compressed_data_of_another_size_are_refused(self) -> None:
        codec = self._compressing()
        unit, compressor = (
            encoded(codec, normal(1, (33, 64), "float16"), "float16")[0].numpy(),
            codec.compressor("float16"),
        )
        compressed = compressor.compress(unit)
        for size in (len(unit) - 1, len(unit) + 1):
            with pytest.raises(CorruptDataError):
                compressor.decompress(compressed, np.empty(size, np.uint8))
        for foreign in (compressed[:0], compressed[:3], compressed[: len(compressed) // 2], np.zeros(64, np.uint8)):
            with pytest.raises(CorruptDataError):
                compressor.decompress(foreign, np.empty(len(unit), np.uint8))

    def test_threads_share_one_compressor(self) -> None:
        codec = self._compressing()
        compressor = codec.compressor("bfloat16")
        units = [encoded(codec, normal(1, (64, 80), "bfloat16", seed=s), "bfloat16")[0].numpy() for s in range(4)]

        def keeps(thread: int) -> bool:
            unit = units[thread]
            return np.array_equal(_decompressed(compressor, compressor.compress(unit), len(unit)), unit)

        assert all(_at_once(keeps))

    def test_no_tensor_at_all_is_fine(self) -> None:
        codec, values = self.make_codec(), torch.empty(0, 4, 16)
        assert round_trip(codec, values, "float32").shape == (0, 4, 16)

    def test_the_input_is_left_alone(self) -> None:
        codec, values = self.make_codec(), normal(2, (5, 16), "float32")
        before, data = values.clone(), encoded(codec, values, "float32")
        data_before = data.clone()
        codec.decode(data, torch.empty_like(values))
        codec.error_bound(values)
        assert torch.equal(values, before)
        assert torch.equal(data, data_before)

    def test_threads_share_one_codec(self) -> None:
        codec, shape = self.make_codec(), (16, 4, 80)
        inputs = [normal(20, shape, "bfloat16", seed=seed) for seed in range(NUM_THREADS)]
        expected = [round_trip(self.make_codec(), values, "bfloat16") for values in inputs]

        def decodes_alike(thread: int) -> bool:
            return torch.equal(round_trip(codec, inputs[thread], "bfloat16"), expected[thread])

        assert all(_at_once(decodes_alike))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_bytes_of_earlier_versions_are_still_read(self, dtype: DType) -> None:
        codec = self.make_codec()
        path = self.golden / f"{codec.key}-{dtype}.npz"
        if not path.exists():
            write_golden(path, codec, dtype)
            pytest.fail(f"{path} was missing, and is written now: look at it, and keep it")
        with np.load(path) as content:
            data, bits = torch.from_numpy(content["encoded"]), content["decoded"]
            assert json.loads(str(content["configuration"])) == codec.configuration()
            if codec.compresses:
                found = _decompressed(codec.compressor(dtype), content["compressed"], data.numel())
                assert np.array_equal(found, data.view(-1).numpy())
        decoded = torch.empty((2, *GOLDEN_SHAPE), dtype=getattr(torch, dtype))
        assert data.shape == (2, codec.encoded_nbytes(GOLDEN_SHAPE, dtype))
        codec.decode(data, decoded)
        assert np.array_equal(_bits(decoded), bits)

    def _compressing(self) -> Codec:
        codec = self.make_codec()
        if not codec.compresses:
            pytest.skip("this codec does not compress")
        return codec


def normal(count: int, shape: Shape, dtype: DType, seed: int = 0) -> torch.Tensor:
    """Normally distributed numbers [count, *shape]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *shape), generator=generator).to(getattr(torch, dtype))


def encoded(codec: Codec, values: torch.Tensor, dtype: DType) -> torch.Tensor:
    out = torch.empty((len(values), codec.encoded_nbytes(tuple(values.shape[1:]), dtype)), dtype=torch.uint8)
    codec.encode(values, out)
    return out


def round_trip(codec: Codec, values: torch.Tensor, dtype: DType) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=getattr(torch, dtype))
    codec.decode(encoded(codec, values, dtype), out)
    return out


def _at_once(work: Callable[[int], bool]) -> list[bool]:
    """What `work` says, given a thread's number, in each of 20 rounds that every thread makes. Threads take turns far
    more often than elsewhere, so that others come in the midst of a call.
    """
    barrier = threading.Barrier(NUM_THREADS, timeout=60)

    def again(thread: int) -> list[bool]:
        barrier.wait()
        return [work(thread) for _ in range(20)]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return [right for results in pool.map(again, range(NUM_THREADS)) for right in results]
    finally:
        sys.setswitchinterval(before)


def _decode_part(decoder: KernelDecoder, data: torch.Tensor, part: range, out: torch.Tensor, dtype: DType) -> None:
    """Call the C function as a kernel does."""
    settings = (ctypes.c_int64 * len(decoder.settings))(*decoder.settings)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    arguments = data.data_ptr(), ctypes.addressof(settings), part.start, len(part), out.data_ptr()
    kind(decoder.addresses[dtype])(*arguments)


def _multiply(
    address: int, decoder: KernelDecoder, data: torch.Tensor, part: range, given: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call a product as a kernel does: what becomes of vectors [matrices, columns] and weights [matrices, rows].

    What is written beside them is an error.
    """
    vectors, weights = given
    settings, apart = (ctypes.c_int64 * len(decoder.settings))(*decoder.settings), weights.shape[1] + 3
    numbers, places = torch.full((vectors.numel() + 2,), 9.0), torch.full((len(part), apart), 9.0)
    found = numbers[1:-1].view_as(vectors).copy_(vectors), places[:, 1:-2].copy_(weights)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    kind = ctypes.CFUNCTYPE(None, pointer, pointer, number, number, pointer, pointer, number)
    out = found[0].data_ptr(), found[1].data_ptr(), apart
    kind(address)(data.data_ptr(), ctypes.addressof(settings), part.start, len(part), *out)
    assert numbers[0] == numbers[-1] == 9
    assert (places[:, [0, -2, -1]] == 9).all()
    return found


def _assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the rounding of float32."""
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5, equal_nan=True)


def _decode_groups(
    decoder: IntegerDecoder, data: torch.Tensor, part: range
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call the C function as a kernel does: integers [groups, group size], scales and lows [groups, 1], as float32.

    What is written beside them is an error.
    """
    settings, size = (ctypes.c_int64 * len(decoder.settings))(*decoder.settings), decoder.group_size
    integers = torch.full((len(part) * size + 2,), 9, dtype=torch.uint8)
    grids = [torch.full((len(part) + 2,), 9.0) for _ in range(2)]
    places = [integers.data_ptr() + 1, *(grid.data_ptr() + 4 for grid in grids)]
    kind = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 3
    )
    first, count = part.start * size, len(part) * size
    kind(decoder.address)(data.data_ptr(), ctypes.addressof(settings), first, count, *places)
    assert all(room[0] == room[-1] == 9 for room in (integers, *grids))
    scales, lows = (grid[1:-1, None] for grid in grids)
    return integers[1:-1].view(-1, size).float(), scales, lows


def write_golden(path: Path, codec: Codec, dtype: DType) -> None:
    """What `codec` makes of numbers of many sizes, and what it reads back, as bits."""
    values = normal(2, GOLDEN_SHAPE, dtype) * torch.logspace(-3, 1, prod(GOLDEN_SHAPE)).view(GOLDEN_SHAPE)
    data = encoded(codec, values.to(getattr(torch, dtype)), dtype)
    decoded = torch.empty(values.shape, dtype=getattr(torch, dtype))
    codec.decode(data, decoded)
    path.parent.mkdir(parents=True, exist_ok=True)
    configuration = np.array(json.dumps(dict(codec.configuration())))
    if codec.compresses:
        compressed = codec.compressor(dtype).compress(data.view(-1).numpy())
        np.savez(path, encoded=data.numpy(), decoded=_bits(decoded), configuration=configuration, compressed=compressed)
    else:
        np.savez(path, encoded=data.numpy(), decoded=_bits(decoded), configuration=configuration)


def _bits(values: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return values.contiguous().view(torch.uint8).numpy()


def _decompressed(compressor: Compressor, compressed: HostBytes, nbytes: int) -> HostBytes:
    """As it is put into a slot, with others around it."""
    room = np.full(nbytes + 2, 0xA5, np.uint8)
    compressor.decompress(compressed, room[1:-1])
    assert room[0] == room[-1] == 0xA5
    return room[1:-1]


@st.composite
def _tensors(draw: st.DrawFn) -> torch.Tensor:
    """[n, *shape], finite: noise of any size on an offset, with outliers, or few values repeated."""
    shape = draw(st.sampled_from(SHAPES))
    count = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn((count, *shape), generator=generator)
    kind = draw(st.sampled_from(("noise", "offset", "outlier", "constant", "given")))
    scale = float(10.0 ** draw(st.floats(-12, 3)))
    if kind == "constant":
        return torch.full_like(values, draw(st.floats(-6e4, 6e4, width=16)))
    if kind == "given":
        few = torch.tensor(draw(st.lists(st.floats(-6e4, 6e4, width=16), min_size=1, max_size=8)))
        return few.take(torch.randint(len(few), values.shape, generator=generator))
    values = values.clamp(-4, 4) * scale
    if kind == "offset":
        values = values + float(draw(st.floats(-49984, 49984, width=16)))
    if kind == "outlier":
        values.view(-1)[0] = draw(st.floats(-6e4, 6e4, width=16))
    return values
