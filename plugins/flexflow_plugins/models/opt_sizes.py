"""The published OPT checkpoints' shapes (Zhang et al. 2022, arXiv 2205.01068, table 1), known offline."""

from collections.abc import Mapping
from typing import Any

# size: (layers, heads, hidden size)
_SIZES = {
    "125m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "1.3b": (24, 32, 2048),
    "2.7b": (32, 32, 2560),
    "6.7b": (32, 32, 4096),
    "13b": (40, 40, 5120),
    "30b": (48, 56, 7168),
    "66b": (64, 72, 9216),
    "175b": (96, 96, 12288),
}


def _config(size: str) -> dict[str, Any]:
    layers, heads, hidden = _SIZES[size]
    post_norm = size == "350m"  # the only size that normalises after each residual, with narrower embeddings
    return {
        "model_type": "opt",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "word_embed_proj_dim": 512 if post_norm else hidden,
        "do_layer_norm_before": not post_norm,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
    }


PUBLISHED: Mapping[str, Mapping[str, Any]] = {f"facebook/opt-{size}": _config(size) for size in _SIZES}
