"""Bytes: what keys and values of a token take, and what memory this process may use."""

from __future__ import annotations

from typing import Any


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Bytes of keys and values of one token, over all layers.

    Args:
        config: a transformers text configuration.
        itemsize: bytes of a number.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * itemsize)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or in this process."""
    text = str(error)
    said = "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said)
