"""Bytes: what keys and values of a token take, and what memory this process may use."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from bon.engines import cgroups


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Bytes of keys and values of one token, over all layers.

    Args:
        config: a transformers text configuration.
        itemsize: bytes of a number.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * itemsize)


def available_bytes(root: Path = cgroups.ROOT) -> int:
    """Main memory that this process can still take: what the machine has free, or what its control groups leave it.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    free = cgroups.number(root / "proc/meminfo", "MemAvailable:")
    found = [free * 1024] if free is not None else [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2]
    for folder in cgroups.folders("memory", root):
        for limit, usage, cache in _NAMES:
            most, used = cgroups.number(folder / limit), cgroups.number(folder / usage)
            if most is not None and used is not None:
                # Pages of files that nobody has used lately are given back before memory runs out.
                found.append(most - used + (cgroups.number(folder / "memory.stat", cache) or 0))
    return max(0, min(found))


_NAMES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def give_back() -> None:
    """Return to the system what was freed and glibc keeps: the heaps of the threads that loaded weights are large."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or in this process."""
    text = str(error)
    said = "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said)
