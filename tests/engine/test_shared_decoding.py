"""Threads that share a kernel's work do all of it, once; a layer's matrices come out as the codec decodes them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch

from flexflow_engine.cpu.workers import Workers
from flexflow_engine.runtime import shared_decoding
from flexflow_engine.runtime.shared_decoding import SharedDecoding
from flexflow_engine.testing.codec_suite import encoded, normal, round_trip
from flexflow_plugins.codecs.group_quant import GroupInt4Codec, GroupInt4Options, GroupInt8Codec, GroupQuantCodec
from watched import no_thread_left

SHAPES = ((1, (2, 48)), (7, (4, 33)), (3, (1, 130)), (11, (2, 2)))
"""Units of each matrix, and the shape of one."""


@pytest.fixture
def workers() -> Iterator[Workers]:
    with closing(Workers()) as workers:
        yield workers


@pytest.mark.parametrize("codec", [GroupInt4Codec(GroupInt4Options(encoder="minmax")), GroupInt8Codec()])
@pytest.mark.parametrize("num_threads", [1, 2, 3, 30])
def test_matrices_are_decoded_as_by_the_codec(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, codec: GroupQuantCodec, num_threads: int
) -> None:
    monkeypatch.setattr(shared_decoding, "_NUMBERS_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    values = [normal(units, shape, "bfloat16", seed=units) for units, shape in SHAPES]
    outs = [torch.zeros_like(x) for x in values]
    data = [encoded(codec, x, "bfloat16") for x in values]
    SharedDecoding(codec, list(zip(data, outs, strict=True))).run(workers)
    for value, out in zip(values, outs, strict=True):
        assert torch.equal(out, round_trip(codec, value, "bfloat16"))


def test_every_part_is_worked_on_once_and_the_first_in_the_caller(workers: Workers) -> None:
    threads: dict[int, str] = {}
    workers.share(lambda part: threads.update({part: threading.current_thread().name}), 3)
    assert sorted(threads) == [0, 1, 2]
    assert threads[0] == threading.current_thread().name


def test_what_a_part_raises_reaches_the_caller(workers: Workers) -> None:
    def fail(part: int) -> None:
        if part == 1:
            raise ValueError("part 1")

    with pytest.raises(ValueError, match="part 1"):
        workers.share(fail, 2)


def test_workers_leave_no_thread_behind() -> None:
    with no_thread_left():
        workers = Workers()
        workers.share(lambda part: None, 3)
        workers.close()
        workers.close()
