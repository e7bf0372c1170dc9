"""What the group codecs decide about sizes, and about numbers that are not everyday ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from hashlib import sha256
from math import prod
from pathlib import Path

import pytest
import torch

from flexflow_engine.abc.hardware import measured_key
from flexflow_engine.cpu.settings import one_torch_thread
from flexflow_engine.errors import CorruptDataError
from flexflow_engine.jobs.identity import codecs_key
from flexflow_engine.testing.codec_suite import encoded, normal, round_trip
from flexflow_plugins.codecs import group_quant, on_device
from flexflow_plugins.codecs.group_quant import (
    GroupInt4Codec,
    GroupInt4Options,
    GroupInt8Codec,
    GroupInt8Options,
    GroupQuantCodec,
)
from flexflow_plugins.codecs.threads import share
from processors import run_without

MINMAX = GroupInt4Codec(GroupInt4Options(encoder="minmax"))
FIT = GroupInt4Codec(GroupInt4Options(encoder="fit"))
CODECS = [GroupInt4Codec(), FIT, MINMAX, GroupInt8Codec()]
UNLIKE = [GroupInt4Codec(GroupInt4Options(encoder="fit", group_size=size)) for size in (2, 20, 100)]
"""Of groups whose quarters are not of one size."""
each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.key)
each_version_1 = pytest.mark.parametrize("codec", [MINMAX, GroupInt8Codec()], ids=lambda codec: codec.key)
each_version_2 = pytest.mark.parametrize("codec", [GroupInt4Codec(), FIT], ids=lambda codec: codec.key)
NAN, INF = float("nan"), float("inf")


def decoded(codec: GroupQuantCodec, *numbers: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The numbers, repeated to fill one group, after a round trip."""
    values = torch.tensor(numbers, dtype=dtype).repeat(64 // len(numbers))[None]
    out = torch.empty_like(values)
    codec.decode(encoded(codec, values, "float32"), out)
    return out[0, : len(numbers)]


@pytest.mark.parametrize(
    ("size", "nbytes"), [(64, 36), (128, 72), (1, 1 + 4), (65, 33 + 8), (63, 32 + 4), (80 * 12, 480 + 60)]
)
def test_four_bits_and_a_half_a_value(size: int, nbytes: int) -> None:
    assert GroupInt4Codec().encoded_nbytes((size,), "bfloat16") == nbytes
    assert GroupInt4Codec().encoded_nbytes((1, size), "float32") == nbytes


def test_groups_run_over_rows_so_that_odd_rows_waste_nothing() -> None:
    assert GroupInt4Codec().encoded_nbytes((16, 80), "float16") * 8 == 16 * 80 * 4.5
    assert GroupInt8Codec().encoded_nbytes((16, 80), "float16") * 8 == 16 * 80 * 8.5


def test_version_1_is_codes_then_scales_then_lows() -> None:
    values = torch.arange(16.0).repeat(4)[None] * 0.5 - 2  # 16 places, half apart, from -2
    data = encoded(MINMAX, values, "float32")[0]
    assert data[:8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert data[32:34].view(torch.float16).item() == 0.5
    assert data[34:36].view(torch.float16).item() == -2


def test_version_2_is_codes_then_a_word_a_group() -> None:
    """16 places in each quarter: half apart from -2.5 in the first three, an eighth apart from 0 in the last."""
    values = torch.cat([(torch.arange(16.0) * 0.5 - 2.5).repeat(3), torch.arange(16.0) * 0.125])[None]
    data = encoded(GroupInt4Codec(), values, "float32")[0]
    assert torch.equal(round_trip(GroupInt4Codec(), values, "float32"), values)
    assert data[:8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    word = int(data[32:].view(torch.int32).item()) & 0xFFFFFFFF
    step = 2.0 ** ((word & 0xFF) // 8 - 18) * (1 + (word & 7) / 8)
    grids = [(word >> place & 7, word >> place + 3 & 7) for place in (8, 14, 20, 26)]
    scales, lows = [step * (c + 1) / 8 for c, _ in grids], [-step * low * 5 / 4 for _, low in grids]
    assert scales == [0.5, 0.5, 0.5, 0.125]
    assert lows == [-2.5, -2.5, -2.5, 0]


@each_codec
@pytest.mark.parametrize("number", [0.0, 1.0, -0.3330078125, 65504.0, -65504.0, 2.0**-24])
def test_a_constant_group_is_exact_where_float16_is(codec: GroupQuantCodec, number: float) -> None:
    assert decoded(codec, number).item() == number


@each_codec
def test_a_constant_that_float16_lacks_is_closer_than_float16(codec: GroupQuantCodec) -> None:
    assert abs(decoded(codec, 1.0001).item() - 1.0001) < 2**-12


def smallest_scale(codec: GroupQuantCodec) -> float:
    return 2.0**-24 if codec.version == 1 else 9 * 2.0**-24


@each_codec
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-20])
def test_tiny_ranges_stay_within_half_of_the_smallest_scale(codec: GroupQuantCodec, size: float) -> None:
    values = normal(1, (64,), "float32").clamp(-3, 3) * size
    error = (round_trip(codec, values, "float32") - values).abs().max()
    assert error <= max(6 * size / 15, smallest_scale(codec) / 2 * 1.01)


@each_version_1
def test_numbers_beyond_float16_end_at_the_grids_end(codec: GroupQuantCodec) -> None:
    top = (2**codec.bits - 2) * 65504.0
    assert decoded(codec, 0.0, 2e5).tolist() == pytest.approx([0, 2e5], rel=1e-3)
    assert decoded(codec, -1e5, 0.0).tolist() == pytest.approx([-65504, 0], abs=65504 / 15)
    assert decoded(codec, -65504.0, 3e38).tolist() == [-65504, top]
    assert decoded(codec, -3e38, 3e38).tolist() == [-65504, top]
    assert decoded(codec, 3e38, 3e38).tolist() == [65504 + top + 65504] * 2
    assert decoded(codec, -3e38, 3e38, dtype=torch.bfloat16).isfinite().all()


@each_version_2
def test_numbers_beyond_the_largest_step_end_at_the_grids_end(codec: GroupQuantCodec) -> None:
    step = 14336.0
    assert decoded(codec, 0.0, 2e5).tolist() == pytest.approx([0, 2e5], rel=1e-2)
    assert decoded(codec, 0.0, 3e38).tolist() == [0, 15 * step]
    assert decoded(codec, -3e38, 3e38).tolist() == [-8.75 * step, 6.25 * step]
    assert decoded(codec, -3e38, 3e38, dtype=torch.bfloat16).isfinite().all()
    assert decoded(codec, 3e38, 3e38).tolist() == pytest.approx([1e18, 1e18], rel=1e-4), "the largest constant"


@each_version_2
def test_numbers_close_together_are_told_apart_as_their_size_allows(codec: GroupQuantCodec) -> None:
    """A grid reaches to zero: around 100 its places are up to 100 / 13.75 * 9 / 8 apart."""
    values = normal(1, (64,), "float32") + 100
    assert (round_trip(codec, values, "float32") - values).abs().max() <= 100 / 13.75 * 9 / 8


@each_codec
def test_float16_numbers_stay_finite_in_float16(codec: GroupQuantCodec) -> None:
    assert decoded(codec, 65504.0, -65504.0, 3.0, 60000.0, dtype=torch.float16).isfinite().all()


@each_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("damaged", [NAN, INF, -INF])
def test_a_group_with_a_number_that_is_not_finite_is_nan_and_the_others_are_not(
    codec: GroupQuantCodec, dtype: torch.dtype, damaged: float
) -> None:
    values = torch.randn(1, 3, 64).to(dtype)
    values[0, 1, 17] = damaged
    out = torch.empty_like(values)
    codec.decode(encoded(codec, values, "float32"), out)
    assert out[0, 1].isnan().all()
    assert out[0, [0, 2]].isfinite().all()
    assert codec.error_bound(values)[0, 1].isinf().all()
    assert codec.error_bound(values)[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("codec", [GroupInt4Codec(), GroupInt8Codec()], ids=lambda codec: codec.key)
def test_a_dtypes_numbers_are_the_float32_ones_rounded(codec: GroupQuantCodec) -> None:
    data = encoded(codec, normal(3, (7, 80), "float32") * torch.logspace(-7, 3, 80), "float32")
    exact = torch.empty(3, 7, 80)
    codec.decode(data, exact)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        out = torch.empty(3, 7, 80, dtype=dtype)
        codec.decode(data, out)
        assert torch.equal(out, exact.to(dtype)), dtype


@pytest.mark.parametrize("codec", [*CODECS, *UNLIKE], ids=lambda codec: codec.key)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (65,), (7, 80), (64,)])
def test_torch_operators_do_what_the_kernels_do(
    codec: GroupQuantCodec, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_device, "_DECODED_AT_ONCE", 512)
    monkeypatch.setattr(on_device, "_ENCODED_AT_ONCE", 512)
    values = (normal(5, shape, "float32") * torch.logspace(-9, 4, 5).view(5, *[1] * len(shape))).to(dtype)
    values[1] = 0
    values[2].view(-1)[0] = NAN
    data = torch.empty(5, codec.encoded_nbytes(shape, "float32"), dtype=torch.uint8)
    on_device.encode(codec, values, data)
    by_kernels, by_torch = torch.empty_like(values), torch.empty_like(values)
    codec.decode(data, by_kernels)
    on_device.decode(codec, data, by_torch)
    assert torch.equal(by_kernels.nan_to_num(7), by_torch.nan_to_num(7))
    bound = codec.error_bound(values)
    assert (((by_torch - values).abs() <= bound) | bound.isinf()).all()
    assert torch.equal(by_torch.isnan(), bound.isinf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "codec",
    [GroupInt4Codec(), GroupInt4Codec(GroupInt4Options(group_size=6)), GroupInt8Codec()],
    ids=["4", "4g6", "8"],
)
def test_any_grids_are_read_alike(codec: GroupQuantCodec, dtype: torch.dtype) -> None:
    nbytes = codec.encoded_nbytes((1500,), "float32")
    data = torch.randint(256, (8, nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    if codec.bits == 4:
        words = data[:, 750:].view(8, -1, 4)
        words[0, 5, 0], words[1, [0, 7], 0] = 0, 255  # between others, a group of equal numbers, and of none
        words[2, :, 0] = torch.linspace(1, 254, words.shape[1]).round()  # from the smallest step to the largest
    by_kernels, by_torch = torch.empty(8, 1500, dtype=dtype), torch.empty(8, 1500, dtype=dtype)
    codec.decode(data, by_kernels)
    on_device.decode(codec, data, by_torch)
    assert torch.equal(by_kernels.nan_to_num(7), by_torch.nan_to_num(7))


@pytest.mark.parametrize("lacking", [("avx512", "evex"), ("avx512bf16",)], ids=str)
def test_any_grids_are_read_alike_by_processors_with_fewer_instructions(
    lacking: tuple[str, ...], tmp_path: Path
) -> None:
    run_without(lacking, f"{__file__}::test_any_grids_are_read_alike", cache=tmp_path)


@pytest.mark.parametrize(
    ("codec", "digest"),
    [
        (FIT, "4c97e50c6f631b36"),
        (GroupInt4Codec(), "b6ff2b89ae7529c9"),
        (UNLIKE[2], "3c7651c06b429f13"),
        (MINMAX, "3a9e62343a2c05b7"),
        (GroupInt8Codec(), "1b1da06b4cda26c0"),
    ],
    ids=lambda value: value.key if isinstance(value, GroupQuantCodec) else "",
)
def test_groups_are_written_alike_by_all_processors_and_versions(codec: GroupQuantCodec, digest: str) -> None:
    """Numbers of any size and few different ones, ends of groups that are cut short, equal ones, and none."""
    shape = (3, 5, 77)
    places = torch.arange(40 * prod(shape)).view(40, *shape)
    values = (places * 7919 % 2003 - 1001) * (2.0 ** (places % 1009 / 64).floor()) / 4096
    values[5], values[6, 1], values[7] = 0.3, torch.inf, values[7].round()
    written = torch.zeros(40, codec.encoded_nbytes(shape, "float32"), dtype=torch.uint8)
    codec.encode(values, written)
    assert sha256(written.numpy().tobytes()).hexdigest()[:16] == digest


def test_groups_are_written_alike_by_processors_with_fewer_instructions(tmp_path: Path) -> None:
    run_without(
        ("avx512", "evex"), f"{__file__}::test_groups_are_written_alike_by_all_processors_and_versions", cache=tmp_path
    )


@pytest.mark.cuda
@pytest.mark.parametrize("codec", [*CODECS, *UNLIKE], ids=lambda codec: codec.key)
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (65,), (7, 80), (64,), (32, 16, 64)])
def test_a_gpu_reads_what_the_host_reads_and_writes_as_well(
    codec: GroupQuantCodec,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    triton: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if triton and on_device._kernels(torch.device("cuda")) is None:
        pytest.skip("there is no Triton here, or no C compiler for it")
    if not triton:
        monkeypatch.setattr(on_device, "_kernels", lambda device_type: None)
    values = (normal(70, shape, "float32") * torch.logspace(-9, 4, 70).view(70, *[1] * len(shape))).to(dtype)
    values[1] = 0
    values[2].view(-1)[0] = NAN
    data = torch.empty(70, codec.encoded_nbytes(shape, "float32"), dtype=torch.uint8, device="cuda")
    codec.encode(values.cuda(), data)
    on_host, on_gpu = torch.empty_like(values), torch.empty_like(values, device="cuda")
    codec.decode(data.cpu(), on_host)
    codec.decode(data, on_gpu)
    assert torch.equal(on_host.nan_to_num(7), on_gpu.cpu().nan_to_num(7))
    bound = codec.error_bound(values)
    assert (((on_host - values).abs() <= bound) | bound.isinf()).all()
    assert torch.equal(on_host.isnan(), bound.isinf())


@pytest.mark.cuda
@pytest.mark.parametrize("codec", [*CODECS, *UNLIKE], ids=lambda codec: codec.key)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shapes", [((16, 64), (4, 320), (1, 1024)), ((16, 64), (7, 80))])
def test_a_gpu_decodes_matrices_together_as_alone(
    codec: GroupQuantCodec, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]
) -> None:
    """By one kernel where all are aligned."""
    pairs = []
    for count, shape in enumerate(shapes, start=3):
        data = torch.empty(count, codec.encoded_nbytes(shape, "float32"), dtype=torch.uint8)
        codec.encode(normal(count, shape, "float32"), data)
        pairs.append((data.cuda(), torch.empty(count, *shape, dtype=dtype, device="cuda")))
    if on_device._kernels(torch.device("cuda")):
        aligned = all(data.shape[1] % 16 == 0 for data, _ in pairs)
        assert (on_device.decoding(codec, pairs) is not None) == aligned
    codec.decoding(pairs)()
    for data, out in pairs:
        expected = torch.empty_like(out)
        codec.decode(data, expected)
        assert torch.equal(out, expected)


def test_a_call_is_shared_by_as_many_threads_as_it_asks_for() -> None:
    """Whatever torch computes with: an import keeps it to one thread, and searches with every core."""
    together, shares = threading.Barrier(8), list[tuple[int, int]]()

    def work(first: int, stop: int) -> None:
        together.wait(10)
        shares.append((first, stop))

    with one_torch_thread():
        share(work, 16, 8)
    assert sorted(shares) == [(first, first + 2) for first in range(0, 16, 2)]


@pytest.mark.parametrize(
    "codec",
    [
        MINMAX,
        FIT,
        GroupInt8Codec(GroupInt8Options(group_size=4096)),
        GroupInt4Codec(GroupInt4Options(group_size=4096, encoder="minmax")),
        GroupInt4Codec(GroupInt4Options(group_size=4096, encoder="fit")),
    ],
    ids=lambda codec: codec.key,
)
def test_many_threads_make_the_same_bytes(codec: GroupQuantCodec) -> None:
    values = normal(1, (1 << 21,), "bfloat16")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, *[3] * 8):
            torch.set_num_threads(count)
            data = encoded(codec, values, "bfloat16")
            results.append((data, round_trip(codec, values, "bfloat16")))
    finally:
        torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], again, strict=True))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the variable is glibc's")
def test_what_a_thread_works_in_is_not_given_to_another() -> None:
    """All threads allocate from one arena, so that what is freed too early is another's at once."""
    test = f"{__file__}::test_many_threads_make_the_same_bytes"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def groups(kind: str) -> torch.Tensor:
    """[1, 4096, 64]"""
    torch.manual_seed(0)
    return {
        "normal": torch.randn(1, 4096, 64),
        "student": torch.distributions.StudentT(5.0).sample((1, 4096, 64)),
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((1, 4096, 64)),
    }[kind]


def squared_errors(codec: GroupQuantCodec, values: torch.Tensor) -> torch.Tensor:
    """Mean over each group, [groups]."""
    return (round_trip(codec, values, "float32") - values).square().mean((0, 2))


@pytest.mark.parametrize("kind", ["normal", "student", "laplace"])
@pytest.mark.parametrize(("codec", "most"), [(GroupInt4Codec(), 0.58), (FIT, 0.63)], ids=["search", "fit"])
def test_better_grids_save_squared_error(codec: GroupQuantCodec, most: float, kind: str) -> None:
    values = groups(kind)
    found, covered = squared_errors(codec, values), squared_errors(MINMAX, values)
    assert found.sum() <= most * covered.sum()
    assert (found <= covered).double().mean() > 0.97, "in hardly any group worse"


@pytest.mark.parametrize("kind", ["normal", "student", "laplace"])
def test_torch_operators_fit_as_the_kernels_do(kind: str) -> None:
    values = groups(kind)
    data = torch.empty(1, FIT.encoded_nbytes(tuple(values.shape[1:]), "float32"), dtype=torch.uint8)
    on_device.encode(FIT, values, data)
    decoded = torch.empty_like(values)
    FIT.decode(data, decoded)
    by_torch = (decoded - values).square().mean((0, 2))
    assert by_torch.sum().item() == pytest.approx(squared_errors(FIT, values).sum().item(), rel=2e-3)


@pytest.mark.parametrize("group_size", [0, 1, 7, -64, 8192])
def test_groups_of_no_use_are_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"group_size is {group_size}.*choose one from 2 to 4096"):
        GroupInt8Options(group_size=group_size)
    with pytest.raises(CorruptDataError, match=f"group_size is {group_size}"):
        GroupInt8Codec.of_version(1, group_size)


def test_search_and_fit_write_one_format_and_min_max_another() -> None:
    assert GroupInt4Codec() == FIT
    assert hash(GroupInt4Codec()) == hash(FIT)
    assert GroupInt4Codec().key != FIT.key, "the bytes differ, and so do stores of them"
    assert GroupInt4Codec() != MINMAX
    assert (GroupInt4Codec().configuration()["version"], MINMAX.configuration()["version"]) == (2, 1)


def test_a_table_under_4_bits_has_8_unless_4_are_asked_for() -> None:
    table, four = GroupInt4Codec(GroupInt4Options(group_size=32)).for_table(), GroupInt4Options(table_bits=4)
    assert table == GroupInt8Codec(GroupInt8Options(group_size=32))
    assert GroupInt4Codec(four).for_table() == GroupInt4Codec()
    assert MINMAX.for_table() == GroupInt8Codec().for_table() == GroupInt8Codec()


@each_codec
def test_data_of_another_size_are_refused(codec: GroupQuantCodec) -> None:
    data, out = encoded(codec, normal(2, (80,), "float32"), "float32"), torch.empty(2, 80)
    with pytest.raises(CorruptDataError, match=f"{codec.name} stores .* bytes a tensor"):
        codec.decode(data[:, :-1], out)
    with pytest.raises(CorruptDataError, match="int8"):
        codec.decode(data.view(torch.int8), out)


def test_listing_plugins_imports_no_numba() -> None:
    program = (
        "import sys\nfrom flexflow_engine.plugins import Registry\nnames = Registry.load().names('codec')\n"
        "assert {'group-int4', 'group-int8', 'none'} <= set(names), names\nassert 'numba' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


INTEGERS = [
    GroupInt4Codec(GroupInt4Options(int8_activations=True)),
    GroupInt8Codec(GroupInt8Options(int8_activations=True)),
]


@pytest.mark.parametrize(("codec", "plain"), list(zip(INTEGERS, [GroupInt4Codec(), GroupInt8Codec()], strict=True)))
def test_activations_of_8_bits_change_no_bytes_but_what_is_measured_and_completed(
    codec: GroupQuantCodec, plain: GroupQuantCodec
) -> None:
    assert (codec, codec.key) == (plain, plain.key)
    assert measured_key(codec) == f"{measured_key(plain)}-int8"
    assert codecs_key(codec) != codecs_key(plain)
    assert codec.for_table().multiplies_integers
    assert not plain.for_table().multiplies_integers
    assert not codec.for_cache().multiplies_integers


def test_activations_of_8_bits_that_change_nothing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "notices", lambda memory: ())
    monkeypatch.setattr(group_quant, "has_amx", lambda: False)
    for works in (True, False):
        monkeypatch.setattr(group_quant, "has_integer_instructions", lambda works=works: works)
        assert GroupInt4Codec().notices("cpu") == ()
        assert bool(INTEGERS[0].notices("cpu")) != works
        assert "cuda computes" in INTEGERS[0].notices("cuda")[0]
        odd = GroupInt4Codec(GroupInt4Options(int8_activations=True, group_size=50))
        assert "groups of 50" in odd.notices("cpu")[0]


@pytest.mark.parametrize("granted", [True, False])
def test_activations_of_8_bits_are_told_to_be_slower_than_amx(granted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "notices", lambda memory: ())
    for name, has in (("integer_instructions", True), ("amx", True), ("bfloat_instructions", granted)):
        monkeypatch.setattr(group_quant, f"has_{name}", lambda has=has: has)
    assert GroupInt4Codec().notices("cpu") == ()
    notices = INTEGERS[0].notices("cpu")
    assert len(notices) == granted
    assert all("AMX" in notice for notice in notices)
