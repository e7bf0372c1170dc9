"""Jobs on encoded weights and an encoded cache: where bytes lie changes no token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from commands import CommandLine, token_ids, write_recipe
from flexflow_engine.abc.codec import Codec
from flexflow_engine.cpu.instructions import has_integer_instructions
from flexflow_engine.placement.memory import memory_table
from flexflow_engine.products.product_table import MatrixProduct
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec
from flexflow_plugins.codecs.none import NoneCodec
from harness import JobResult, policy, random_prompts, run_job, save_opt, three_tiers
from layouts import ISLAND_HOST_DISK, disk_setups

PROMPTS = random_prompts(9)
SPREAD: list[Mapping[str, float]] = [{"host": 100}, {"disk": 100}, {"device": 20, "host": 30, "disk": 50}]


@pytest.mark.parametrize(
    ("weight_codec", "kv_codec"),
    [
        (GroupInt4Codec(), NoneCodec()),
        (NoneCodec(), GroupInt4Codec().for_cache()),
        (GroupInt8Codec(), GroupInt8Codec()),
        (GroupInt4Codec(), GroupInt4Codec().for_cache()),
        (GroupInt4Codec(GroupInt4Options(table_bits=4)), NoneCodec()),
        (GroupInt4Codec(GroupInt4Options(int8_activations=True)), GroupInt4Codec().for_cache()),
    ],
    ids=lambda codec: codec.key,
)
def test_placement_changes_no_token_of_an_encoded_job(tmp_path: Path, weight_codec: Codec, kv_codec: Codec) -> None:
    folder = save_opt(tmp_path / "checkpoint")

    def tokens(shares: Mapping[str, float]) -> dict[int, tuple[int, ...]]:
        tiers = three_tiers(tmp_path)
        chosen = policy(tiers, weights=shares, kv_cache=shares, activations=shares)
        store = tmp_path / "store"
        job = run_job(folder, tiers, chosen, PROMPTS, store=store, weight_codec=weight_codec, kv_codec=kv_codec)
        return job.tokens

    resident = tokens({"device": 100})
    for shares in SPREAD:
        assert tokens(shares) == resident, shares


@pytest.mark.skipif(
    not has_integer_instructions(), reason="this processor has no instructions for 8-bit integers (VNNI)"
)
def test_a_recipe_has_its_weights_multiplied_as_integers(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexflow_engine.products.integer_products import IntegerProducts  # noqa: PLC0415  # compiled code is of no use elsewhere

    multiplied, multiply = list[int](), IntegerProducts.multiply

    def counted(self: IntegerProducts, x: torch.Tensor, products: Sequence[MatrixProduct], *, threads: int) -> None:
        multiplied.append(len(products))
        multiply(self, x, products, threads=threads)

    monkeypatch.setattr(IntegerProducts, "multiply", counted)
    recipe = write_recipe(tmp_path, save_opt(tmp_path / "checkpoint"), PROMPTS)

    def tokens(weights: str) -> dict[int, tuple[int, ...]]:
        multiplied.clear()
        output = tmp_path / "out.jsonl"
        outcome = command("run", recipe, "--fresh", f"--output={output}", f"--set=codecs.weights={weights}")
        assert outcome.status == 0, outcome
        return token_ids(output)

    numbers = tokens("group-int8")
    assert not multiplied
    of_integers = tokens("{plugin: group-int8, int8_activations: true}")
    assert 3 in multiplied, "queries, keys and values as one product"
    firsts = [of_integers[prompt][0] == found[0] for prompt, found in numbers.items()]
    assert sum(firsts) >= len(firsts) - 1


class TorchOnly(GroupInt8Codec):
    """Another package's codec, which has no compiled decoder."""

    decodes_in_kernels = False


def test_a_codec_without_a_compiled_decoder_gives_the_same_tokens(tmp_path: Path) -> None:
    folder = save_opt(tmp_path / "checkpoint")
    tiers = three_tiers(tmp_path)
    chosen = policy(tiers, kv_cache={"device": 50, "disk": 50})
    kernels, torch_only = (
        run_job(folder, tiers, chosen, PROMPTS, store=tmp_path / "store", weight_codec=codec, kv_codec=codec)
        for codec in (GroupInt8Codec(), TorchOnly())
    )
    assert torch_only.tokens == kernels.tokens
    assert "decoded kv" in what_lies_on_the_device(torch_only)
    assert "decoded kv" not in what_lies_on_the_device(kernels)


def test_pages_are_decoded_first_where_the_host_s_kernel_does_not_reach(tmp_path: Path) -> None:
    folder, tiers = save_opt(tmp_path / "checkpoint"), disk_setups(ISLAND_HOST_DISK, tmp_path / "disk")
    chosen, codec = policy(tiers, kv_cache={"island": 50, "host": 50}), GroupInt8Codec()
    job = run_job(folder, tiers, chosen, PROMPTS, store=tmp_path / "store", kv_codec=codec)
    assert "decoded kv" in what_lies_on_the_device(job)


def what_lies_on_the_device(job: JobResult) -> set[str]:
    device = job.layout.device.name
    return {line.what for line in memory_table(job.layout).lines if line.tier == device}
