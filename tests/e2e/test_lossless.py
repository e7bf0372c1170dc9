"""Jobs on weights that lie compressed in the store: the same tokens, fewer bytes read, the same memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from commands import CommandLine, token_ids, write_recipe
from flexflow_engine.abc.codec import Codec
from flexflow_engine.placement.memory import memory_table
from flexflow_engine.testing.tiers import IslandTier
from flexflow_plugins.codecs.lossless import BloscCodec, BloscOptions, Lz4Codec, ZstdCodec
from harness import JobResult, TierSetup, policy, random_prompts, run_job, save_opt, three_tiers

PROMPTS = random_prompts(6)
ON_DISK = {"disk": 100}
FC1 = "model.decoder.layers.1.fc1.weight"
CODECS = [ZstdCodec(), BloscCodec(), BloscCodec(BloscOptions(cname="zstd", shuffle="byte")), Lz4Codec()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_opt(tmp_path_factory.mktemp("opt") / "checkpoint")


def job(
    checkpoint: Path, folder: Path, codec: Codec | None, shares: Mapping[str, float], *, island: bool = False
) -> JobResult:
    tiers = three_tiers(folder) | ({"device": TierSetup(IslandTier)} if island else {})
    chosen = policy(tiers, weights=shares)
    return run_job(
        checkpoint, tiers, chosen, PROMPTS, store=folder / "s", weight_codec=codec, dtype="bfloat16", max_new_tokens=4
    )


def loaded_nbytes(result: JobResult) -> int:
    """Bytes of weights that the disk lane read, pages only."""
    return sum(e.task.nbytes for e in result.trace.events if e.task.lane == "disk.read" and "weight[" in e.task.key)


@pytest.mark.parametrize("shares", [{"device": 100}, ON_DISK, {"device": 20, "host": 30, "disk": 50}], ids=str)
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.key)
def test_tokens_and_memory_are_those_of_no_codec(
    tmp_path: Path, checkpoint: Path, codec: Codec, shares: Mapping[str, float]
) -> None:
    plain, compressed = (job(checkpoint, tmp_path, each, shares) for each in (None, codec))
    assert compressed.tokens == plain.tokens
    assert compressed.peaks == plain.peaks
    assert memory_table(compressed.layout) == memory_table(plain.layout)


def test_weights_pass_host_memory_on_the_way_to_an_accelerator(tmp_path: Path, checkpoint: Path) -> None:
    plain, compressed = (job(checkpoint, tmp_path, each, ON_DISK, island=True) for each in (None, BloscCodec()))
    assert compressed.tokens == plain.tokens
    lanes = compressed.trace.lanes(["disk.read", "host.read"])
    assert lanes["disk.read"].nbytes < lanes["host.read"].nbytes == plain.trace.lanes(["host.read"])["host.read"].nbytes


def test_the_lane_counts_the_bytes_that_lie_in_the_files(tmp_path: Path, checkpoint: Path) -> None:
    plain, compressed = (job(checkpoint, tmp_path, each, ON_DISK) for each in (None, BloscCodec()))
    steps = len(compressed.trace.step_ends())
    (store,) = (tmp_path / "s" / "weights").glob("*-blosc-*/zarr.json")
    pages = [path for path in store.parent.glob("*/c/*/*") if "embed_positions" not in str(path)]
    files = sum(path.stat().st_size for path in pages)
    assert 0.95 * files * steps < loaded_nbytes(compressed) < files * steps
    assert loaded_nbytes(compressed) < 0.8 * loaded_nbytes(plain)


def test_a_recipe_names_the_codec_and_its_options(tmp_path: Path, checkpoint: Path, command: CommandLine) -> None:
    recipe = write_recipe(tmp_path / "job", checkpoint, PROMPTS)
    blosc = "codecs.weights={plugin: numcodecs:blosc, cname: zstd, clevel: 5, shuffle: bit}"
    for name, change in (("plain", "name=plain"), ("zstd", "codecs.weights=numcodecs:zstd"), ("blosc", blosc)):
        outcome = command("run", recipe, "--set", change, "--set", "scheduler.weights={disk: 100}", "--output", name)
        assert outcome.status == 0, outcome.stderr
    assert token_ids(Path("plain")) == token_ids(Path("zstd")) == token_ids(Path("blosc"))
    listed = json.loads(command("store", "list", "--under", recipe.parent / "disk", "--json").stdout)
    sizes = {entry["codec"]: entry["nbytes"] for entry in listed}
    assert sizes.keys() == {"none", "numcodecs-zstd-3", "numcodecs-blosc-zstd-5-bit"}
    assert max(sizes.values()) == sizes["none"]


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_page_is_told_and_gives_no_tokens(
    tmp_path: Path, checkpoint: Path, command: CommandLine, damage: str
) -> None:
    recipe = write_recipe(tmp_path / "job", checkpoint, PROMPTS)
    arguments = ("run", recipe, "--set", "codecs.weights=numcodecs:blosc", "--set", "scheduler.weights={disk: 100}")
    assert command(*arguments).status == 0
    Path("job.completions.jsonl").unlink()
    (page,) = (recipe.parent / "disk" / "weights").glob(f"*/{FC1}/c/0/0")
    content = bytearray(page.read_bytes())
    content[1000] ^= 1
    page.write_bytes(content if damage == "flipped" else content[:-1])
    outcome = command(*arguments)
    outcome.assert_user_error()
    assert FC1 in outcome.stderr
    assert str(page) in outcome.stderr
    assert "import the checkpoint again" in outcome.stderr
    assert not Path("job.completions.jsonl").exists()


def test_plugins_lists_the_family(command: CommandLine) -> None:
    rows = json.loads(command("plugins", "--json").stdout)
    assert {"numcodecs:zstd", "numcodecs:blosc", "numcodecs:lz4"} <= {r["name"] for r in rows if r["kind"] == "codec"}
