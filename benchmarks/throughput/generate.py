"""transformers with everything in memory: the seconds of one call of `generate`.

    python -m throughput.generate CHECKPOINT BATCH_SIZE PROMPT_TOKENS NEW_TOKENS

A call of two tokens goes before it, so that what is set up once is not timed. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM


def generate_seconds(checkpoint: str, batch_size: int, prompt_tokens: int, new_tokens: int) -> float:
    """Greedy, prefill and decode, no stop before the last token."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, model.config.vocab_size, (batch_size, prompt_tokens), generator=generator)
    mask = torch.ones_like(prompts)
    model.generate(prompts, attention_mask=mask, do_sample=False, min_new_tokens=2, max_new_tokens=2)
    started = time.perf_counter()
    model.generate(prompts, attention_mask=mask, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    return time.perf_counter() - started


if __name__ == "__main__":
    with torch.inference_mode():
        seconds = generate_seconds(sys.argv[1], *map(int, sys.argv[2:]))
    print(json.dumps({"seconds": seconds}))
