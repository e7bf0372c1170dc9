"""Exact match of the quickstart model over the held-out prompts, decoded greedily with transformers.

PYTHONPATH=benchmarks python -m quickstart.evaluate [--model recipes/data/quickstart-opt]
    [--prompts recipes/data/quickstart.jsonl] [--dtype float32 | bfloat16] [--show-misses]
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from transformers import OPTForCausalLM

PAD_ID = 1
MAX_NEW_TOKENS = 24
BATCH_SIZE = 50
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    """Evaluate a checkpoint and print the figures."""
    options = _parse_arguments()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    model = OPTForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype])
    jobs = [json.loads(line) for line in options.prompts.read_text(encoding="utf-8").splitlines()]
    begin = time.monotonic()
    answers = greedy_answers(model, tokenizer, [job["prompt"] for job in jobs])
    seconds = time.monotonic() - begin
    misses = [(job, answer) for job, answer in zip(jobs, answers, strict=True) if answer != job["expected"]]
    lengths = sorted(len(tokenizer.encode(job["prompt"]).ids) for job in jobs)
    longest = max(len(tokenizer.encode(" " + job["expected"], add_special_tokens=False).ids) for job in jobs)
    print(f"{options.dtype}: {len(jobs) - len(misses)} of {len(jobs)} right, exact match "
          f"{1 - len(misses) / len(jobs):.4f}, {seconds:.0f} seconds")  # fmt: skip
    print(f"prompt tokens: {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}; "
          f"answer tokens: at most {longest} and the end token")  # fmt: skip
    if options.show_misses:
        for job, answer in misses:
            print(f"{job['prompt']!r}: expected {job['expected']!r}, got {answer!r}")


def exact_match(model: OPTForCausalLM, tokenizer: Tokenizer, examples: Sequence[tuple[str, str]]) -> float:
    """Share of (prompt, answer) pairs that greedy decoding gets exactly right."""
    answers = greedy_answers(model, tokenizer, [prompt for prompt, _ in examples])
    return sum(got == answer for got, (_, answer) in zip(answers, examples, strict=True)) / len(examples)


def greedy_answers(model: OPTForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
    """Continue each prompt greedily to the end token or ``MAX_NEW_TOKENS``; strips surrounding blanks."""
    answers: list[str] = []
    for first in range(0, len(prompts), BATCH_SIZE):
        encoded = [tokenizer.encode(prompt).ids for prompt in prompts[first : first + BATCH_SIZE]]
        width = max(len(ids) for ids in encoded)
        tokens = torch.tensor([[PAD_ID] * (width - len(ids)) + ids for ids in encoded])  # [B, T], padded left
        generated = cast(Any, model).generate(  # its stub declines the class it belongs to
            tokens,
            attention_mask=torch.ne(tokens, PAD_ID).long(),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )  # [B, T + new]
        answers += [tokenizer.decode(ids).strip() for ids in generated[:, width:].tolist()]
    return answers


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Exact match of the quickstart model on held-out prompts.")
    parser.add_argument("--model", type=Path, default=Path("recipes/data/quickstart-opt"))
    parser.add_argument("--prompts", type=Path, default=Path("recipes/data/quickstart.jsonl"))
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--show-misses", action="store_true", help="print the prompts answered wrongly")
    return parser.parse_args()


if __name__ == "__main__":
    main()
