"""transformers with accelerate's offload: the seconds of one batch's prefill and of some of its decode steps.

    python -m throughput.baseline CHECKPOINT BATCH_SIZE PROMPT_TOKENS NEW_TOKENS [GPU_NBYTES]

Every weight is offloaded to the disk, read from the checkpoint's own safetensors files (no second copy). With so many
bytes of a GPU, weights fill what the cache and a reserve leave of them, and the others are in host memory. The last
steps run with a cache that is as long as at the job's end, filled with zeros: memory and time are those of a real one.
Prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

FIRST_STEPS = 4
LAST_STEPS = 4
GPU_RESERVE_NBYTES = 2 * 10**9
"""For activations, and for the layer whose weights are on their way."""
HOST_NBYTES = 10**12


def sample(
    checkpoint: str, batch_size: int, prompt_tokens: int, new_tokens: int, gpu_nbytes: int = 0
) -> dict[str, Any]:
    """Seconds of the load, the prefill, the first decode steps and the last ones."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as offload_folder:
        placement: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": offload_folder}
        if gpu_nbytes:
            cache_nbytes = _cache_nbytes(
                AutoConfig.from_pretrained(checkpoint), batch_size * (prompt_tokens + new_tokens)
            )
            memory = {0: gpu_nbytes - cache_nbytes - GPU_RESERVE_NBYTES, "cpu": HOST_NBYTES}
            placement = {"device_map": "auto", "max_memory": memory}
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, **placement).eval()
        load_s = time.perf_counter() - started
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(4, model.config.vocab_size, (batch_size, prompt_tokens), generator=generator)
        prompts = prompts.to("cuda" if gpu_nbytes else "cpu")
        cache = DynamicCache(config=model.config)
        prefill_s, tokens = _step(model, prompts, cache)
        first = _steps(model, tokens, cache, min(FIRST_STEPS, new_tokens - 1))
        del cache
        last_steps = min(LAST_STEPS, new_tokens - 1)
        cache = _filled_cache(model, prompts.device, batch_size, prompt_tokens + new_tokens - 1 - last_steps)
        last = _steps(model, tokens, cache, last_steps)
    return {"load_s": load_s, "prefill_s": prefill_s, "first_steps_s": first, "last_steps_s": last}


def _steps(model: Any, tokens: torch.Tensor, cache: DynamicCache, count: int) -> list[float]:
    seconds = []
    for number in range(1, count + 1):
        step_s, tokens = _step(model, tokens, cache)
        seconds.append(step_s)
        print(f"    step {number} of {count} at {cache.get_seq_length()} tokens: {step_s:.1f} s", file=sys.stderr)
    return seconds


def _step(model: Any, tokens: torch.Tensor, cache: DynamicCache) -> tuple[float, torch.Tensor]:
    """tokens [batch, n] -> seconds and the next tokens [batch, 1], greedy. Only the last position's logits are made."""
    started = time.perf_counter()
    logits = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    following = logits[:, -1].argmax(dim=-1, keepdim=True).cpu()  # waits for the device
    return time.perf_counter() - started, following.to(tokens.device)


def _cache_nbytes(config: Any, tokens: int) -> int:
    """Of keys and values of bfloat16."""
    return int(4 * config.num_hidden_layers * config.hidden_size * tokens)


def _filled_cache(model: Any, device: torch.device, batch_size: int, tokens: int) -> DynamicCache:
    """Keys and values [batch, heads, tokens, head_dim] of every layer."""
    config = model.config
    shape = (batch_size, config.num_attention_heads, tokens, config.hidden_size // config.num_attention_heads)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps(sample(sys.argv[1], *map(int, sys.argv[2:]))))
