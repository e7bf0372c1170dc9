"""Triton's kernels compile for the GPUs that people have. What they compute, test_group_quant.py asks of a GPU."""

import os
import subprocess
import sys
from collections.abc import Mapping

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch for GPUs alone")

TURING, AMPERE, HOPPER = 75, 80, 90
FORMS = [(4, 64, True), (4, 100, True), (4, 64, False), (8, 64, False)]


def compiled_bytes(name: str, signature: dict[str, str], constants: Mapping[str, object], architecture: int) -> int:
    """Of the machine code."""
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    from flexflow_plugins.codecs import triton_kernels  # noqa: PLC0415

    function = getattr(triton_kernels, name)
    places = {(function.arg_names.index(key),): value for key, value in constants.items()}
    types = signature | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=types, constexprs=places)
    return len(triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"])


@pytest.mark.parametrize("architecture", [TURING, AMPERE, HOPPER])
@pytest.mark.parametrize("numbers", ["*fp32", "*bf16", "*fp16"])
@pytest.mark.parametrize(("bits", "group_size", "words"), FORMS)
def test_decoding_compiles(bits: int, group_size: int, words: bool, numbers: str, architecture: int) -> None:
    from flexflow_plugins.codecs import triton_kernels  # noqa: PLC0415

    pointers = {"encoded": "*u8", "out": numbers}
    counts = dict.fromkeys(("start", "stride", "numbers", "groups", "blocks"), "i32")
    constants = triton_kernels.decoding_constants(group_size, bits, words=words, half=numbers == "*fp16")
    assert compiled_bytes("_decode", pointers | counts, constants._asdict(), architecture)
    table = {"table": "*i64", "like": numbers, "pairs": "i32"}
    assert compiled_bytes("_decode_all", table, constants._asdict(), architecture)
    for kernel in (triton_kernels._decode, triton_kernels._decode_all):
        assert kernel.arg_names[-len(constants) :] == list(constants._fields)


@pytest.mark.parametrize("architecture", [TURING, AMPERE, HOPPER])
@pytest.mark.parametrize("numbers", ["*fp32", "*bf16", "*fp16"])
def test_fitting_compiles(numbers: str, architecture: int) -> None:
    pointers = {"values": numbers, "out": "*u8"}
    counts = dict.fromkeys(("count", "row_groups", "row_nbytes"), "i32")
    assert compiled_bytes("_fit", pointers | counts, {"num_groups": 16}, architecture)


INTERPRETED = """
import torch
from flexflow_plugins.codecs import on_device, triton_kernels
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec, GroupInt8Options

torch.manual_seed(0)
on_device._kernels = lambda device_type: triton_kernels
fitted = GroupInt4Codec(GroupInt4Options(encoder="fit", group_size=GROUP_SIZE))
minmax = GroupInt4Codec(GroupInt4Options(encoder="minmax", group_size=GROUP_SIZE))
for codec in fitted, minmax, GroupInt8Codec(GroupInt8Options(group_size=GROUP_SIZE)):
    values = torch.randn(5, NUMBERS) * torch.logspace(-9, 4, 5)[:, None]
    values[1], values[2, 3] = 0, torch.nan
    by_torch = torch.zeros(5, codec.encoded_nbytes((NUMBERS,), "float32"), dtype=torch.uint8)
    codec.encode(values, by_torch)
    for dtype in torch.float32, torch.float16:
        host, kernels = (torch.empty_like(values, dtype=dtype) for _ in range(2))
        on_device.decode(codec, by_torch, kernels)
        codec.decode(by_torch, host)
        assert torch.equal(host.nan_to_num(7), kernels.nan_to_num(7)), codec.key
    pairs = []
    for count, size in ((3, 16 * GROUP_SIZE), (2, 64 * GROUP_SIZE), (4, 32 * GROUP_SIZE)):
        encoded = torch.zeros(count, codec.encoded_nbytes((size,), "float32"), dtype=torch.uint8)
        codec.encode(torch.randn(count, size), encoded)
        pairs.append((encoded, torch.zeros(count, size)))
    on_device.decoding(codec, pairs)()
    for encoded, together in pairs:
        alone = torch.zeros_like(together)
        codec.decode(encoded, alone)
        assert torch.equal(together, alone), codec.key
    by_kernels = torch.zeros_like(by_torch)
    on_device.encode(codec, values, by_kernels)
    found = torch.empty_like(values)
    codec.decode(by_kernels, found)
    bound = codec.error_bound(values)
    assert (((found - values).abs() <= bound) | bound.isinf()).all(), codec.key
"""


@pytest.mark.parametrize(("group_size", "numbers"), [(20, 640), (64, 640), (100, 641)])
def test_kernels_make_the_hosts_numbers_in_tritons_interpreter(group_size: int, numbers: int) -> None:
    """Which is chosen when the kernels are imported."""
    code = INTERPRETED.replace("GROUP_SIZE", str(group_size)).replace("NUMBERS", str(numbers))
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True)
