"""How large the pieces are that are measured, and how long a figure may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The defaults suit machines from a laptop to a server; smaller ones are for tests."""

    seconds: float = 0.1
    """For one figure of a processor."""
    link_seconds: float = 0.3
    """For one figure of a link."""
    tokens: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    """Rows of one matmul."""
    features: int = 4096
    """Matrices are [features, features]."""
    small_features: int = 1024
    """Of matrices that hardly take more than what a product takes whatever its size."""
    cold_nbytes: int = 128 * 2**20
    """What is read anew has more bytes than any cache: weights, a KV cache."""
    prompts: tuple[int, ...] = (16, 64, 256, 1024)
    """Tokens of the prompts that attend to themselves."""
    contexts: tuple[int, ...] = (16, 64, 256, 1024)
    """Cached tokens that one new token attends to."""
    heads: int = 16
    head_dim: int = 64
    attention_rows: int = 16
    """Sequences of one tile."""
    device_attention_rows: int = 512
    """The same on a device, where so many fit into `cold_nbytes`."""
    units: int = 4
    """Of a weight page's size, that a codec encodes or decodes in one call."""
    device_units: int = 32
    """The same on a device."""
    page_tokens: int = 16
    page_nbytes: int = 4 * 2**20
    """What one transfer carries."""
    pages: int = 16
    """Pages of a region that transfers go through in turn."""
    written_pages: int = 128
    """Of a region on a disk, which are written in turn: writing what was written before may cost less."""
    small_nbytes: int = 4096
    """A transfer that is hardly more than its latency."""
    small_units: int = 32
    """Of so many bytes, that a tier gathers in one call."""
