"""Jobs on encoded weights and an encoded cache: where bytes lie changes no token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from flexflow_engine.abc.codec import Codec
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt8Codec
from flexflow_plugins.codecs.none import NoneCodec
from harness import policy, random_prompts, run_job, save_opt, three_tiers

PROMPTS = random_prompts(9)
SPREAD: list[Mapping[str, float]] = [{"host": 100}, {"disk": 100}, {"device": 20, "host": 30, "disk": 50}]


@pytest.mark.parametrize(
    ("weight_codec", "kv_codec"),
    [
        (GroupInt4Codec(), NoneCodec()),
        (NoneCodec(), GroupInt4Codec().for_cache()),
        (GroupInt8Codec(), GroupInt8Codec()),
        (GroupInt4Codec(), GroupInt4Codec().for_cache()),
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
