"""Models that vLLM runs on one machine: which GPU each gets and how much of it; they start at the same time.

The rule: as many GPUs as models, one each. On one GPU, of the ``SHARE`` of its memory that is used at all, each model
takes its weights and ``WORKSPACE`` bytes for activations and CUDA graphs; what is left becomes keys and values, divided
so that all hold the same number of tokens (a policy and its scorer run about as many sequences of about the same
length). The cores of a CPU are divided evenly. Models whose options name their memory or devices keep them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bon import portal
from bon.engines.base import Engine
from bon.errors import InputError

SHARE = 0.9
"""Of a GPU's memory that is used; vLLM's own default."""
WORKSPACE = 3 << 30
"""Bytes of a GPU for activations and CUDA graphs of one model."""
LEAST_TOKENS = 8192
"""Tokens of keys and values below which a model is not worth starting."""

PLACED_BY = frozenset(
    {"gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "device_ids"}
    | {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"}
)
"""Options with which users place a model themselves."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a model takes.

    Args:
        name: for messages.
        weights: bytes.
        per_token: bytes of keys and values of one token.
    """

    name: str
    weights: int
    per_token: int


def place(needs: Sequence[Need], gpus: Sequence[int]) -> list[dict[str, Any]]:
    """Options that place each model, by the rule above.

    Args:
        needs: one for each model.
        gpus: memory of each GPU, in bytes.

    Raises:
        InputError: they do not fit one GPU together; the message has the numbers.
    """
    if len(gpus) >= len(needs):
        return [{"device_ids": [gpu]} for gpu in range(len(needs))]
    memory = gpus[0]
    usable = int(SHARE * memory)
    left = usable - sum(need.weights + WORKSPACE for need in needs)
    tokens = left // sum(need.per_token for need in needs)
    if tokens < LEAST_TOKENS:
        parts = ", ".join(f"{need.name} {_gib(need.weights)}" for need in needs)
        raise InputError(
            f"the models do not fit one GPU together: {_gib(usable)} of its {_gib(memory)} can be used, the weights "
            f"take {parts}, activations {_gib(WORKSPACE)} each, and {LEAST_TOKENS} tokens of each need another "
            f"{_gib(LEAST_TOKENS * sum(need.per_token for need in needs))}. Take a smaller or a quantised model, the "
            "same model for both, or give each engine its own gpu_memory_utilization."
        )
    placed = []
    for need in needs:
        cache = tokens * need.per_token
        share = (need.weights + WORKSPACE + cache) / memory
        # With the bytes given, vLLM does not measure them, which would go wrong while another engine starts.
        placed.append({"gpu_memory_utilization": int(share * 1000) / 1000, "kv_cache_memory_bytes": cache})
    return placed


def load_together(
    models: Sequence[tuple[str, Mapping[str, Any]]], make: Callable[[str, Mapping[str, Any]], Engine]
) -> list[Engine]:
    """Load models on vLLM at the same time, placed by the rule; their own options come first.

    Args:
        models: a name or a folder and options, for each.
        make: loads one of them.

    Raises:
        BonError: of the first that cannot be loaded; the others are closed.
    """
    options = [dict(given) for _, given in models]
    if not any(PLACED_BY & given.keys() for given in options):
        options = [{**place, **given} for place, given in zip(_placed(models), options, strict=True)]
    with ThreadPoolExecutor(len(models), thread_name_prefix="bon-load") as pool:
        loading = [pool.submit(make, model, given) for (model, _), given in zip(models, options, strict=True)]
    errors = [error for load in loading if (error := load.exception())]
    if errors:
        for load in loading:
            if not load.exception():
                portal.run(load.result().aclose())
        raise errors[0]
    return [load.result() for load in loading]


def _placed(models: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    gpus = visible_gpus()
    if not gpus:
        return [{"threads": max(1, len(os.sched_getaffinity(0)) // len(models))} for _ in models]
    if len(gpus) >= len(models):
        return place([Need(model, 0, 1) for model, _ in models], gpus)
    asked = ("dtype", "revision", "trust_remote_code")
    return place([need_of(model, **{n: given[n] for n in asked if n in given}) for model, given in models], gpus)


def visible_gpus() -> list[int]:
    """Memory of each GPU that vLLM sees; asks the driver, and starts no CUDA in this process."""
    from bon.engines.vllm.start import current_platform

    if current_platform.is_cpu():
        return []
    return [int(current_platform.get_device_total_memory(i)) for i in range(current_platform.device_count())]


def need_of(model: str, dtype: Any = None, *, revision: str | None = None, trust_remote_code: bool = False) -> Need:
    """Look up what a model takes on a GPU, without loading it.

    Args:
        model: a folder or a Hugging Face name.
        dtype: vLLM's option: what numbers are held in, however they are stored.
        revision: branch, tag or commit of a Hugging Face name.
        trust_remote_code: whether the model may bring its own code.

    Raises:
        ModelNotFoundError: neither on disk nor can it be fetched.
    """
    from bon.engines.loading import load_config
    from bon.engines.lora import adapter_of
    from bon.engines.memory import kv_bytes_per_token

    adapter = adapter_of(model)
    model = model if adapter is None else adapter.base
    whole = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
    config = whole.get_text_config(decoder=True)
    size = bytes_of(dtype)
    weights = weight_bytes(model, revision)
    stored = getattr(getattr(config, "dtype", None), "itemsize", None)
    if stored and getattr(whole, "quantization_config", None) is None:
        weights = weights * size // stored
    return Need(model, weights, kv_bytes_per_token(config, size))


def bytes_of(dtype: Any) -> int:
    """Bytes of a number on a GPU under vLLM's option ``dtype``: two unless it is float32."""
    return 4 if str(dtype) in ("float", "float32", "torch.float32") else 2


def weight_bytes(model: str, revision: str | None = None) -> int:
    """Size of a model's weight files: in its folder, in the local cache, or as the hub lists them."""
    from bon.engines.loading import cached, files_to_load, local_folder, look_up, weight_files

    folder = local_folder(model) or cached(model, revision)
    if folder is not None:
        return sum(file.stat().st_size for file in weight_files(Path(folder)))
    listed = files_to_load(look_up(model, revision))
    return sum(size for name, size in listed.items() if name.endswith((".safetensors", ".bin")))


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
