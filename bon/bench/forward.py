"""What computing a common prefix once saves: in a forward pass, in a decode step and in memory.

Bare forward passes are compared: transformers' own, with every row's prompt read in full (one batch, ``DynamicCache``,
its default attention), and bon's rows, which group the prompts by their common prefixes. Both decode greedily, and what
they decode must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bon.bench.harness import Pairs, interleave, milliseconds, table
from bon.engines.torch.paths import SharedPath
from bon.engines.torch.prefix.attention import NAME
from bon.engines.torch.rows import Rows, Run, Stats, cache_argument
from bon.errors import BonError

PLAIN, SHARED = "plain", "shared"


class DifferentTokensError(BonError):
    """The two sides of a comparison did not decode the same tokens."""


@dataclass(frozen=True, slots=True)
class Forward:
    """One pass of one side.

    Args:
        prefill: seconds until the next logits of all rows are there.
        step: seconds of one decode step.
        cache_bytes: keys and values of the prompts after prefill; on bon's side of what they share.
        tokens: what was decoded, shape (rows, steps).
    """

    prefill: float
    step: float
    cache_bytes: int
    tokens: Tensor


def plain_forward(model: Any, prompts: Sequence[tuple[int, ...]], steps: int) -> Forward:
    """Read equally long prompts in one batch and decode greedily, with transformers alone."""
    cache = DynamicCache(config=model.config)
    kept = {"use_cache": True, cache_argument(model): cache}
    ids = torch.tensor(prompts, device=model.device)

    def prefill() -> Tensor:
        logits: Tensor = model(input_ids=ids, logits_to_keep=1, **kept).logits
        return logits[:, -1]

    def step(tokens: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=tokens[:, None], **kept).logits
        return logits[:, -1]

    return _run(model.device, prefill, step, lambda: cache_bytes(cache), steps)


def shared_forward(model: Any, prompts: Sequence[tuple[int, ...]], steps: int) -> Forward:
    """The same with bon's rows; finding out what the prompts share is part of the prefill."""
    stats = Stats()
    rows: list[Rows] = []

    def prefill() -> Tensor:
        rows.append(SharedPath(Run(model, stats), prompts).rows())
        return rows[0].prefill(prompts, [1] * len(prompts))

    return _run(model.device, prefill, lambda tokens: rows[0].step(tokens), lambda: stats.prefix_bytes, steps)


def _run(
    device: torch.device,
    prefill: Callable[[], Tensor],
    step: Callable[[Tensor], Tensor],
    held: Callable[[], int],
    steps: int,
) -> Forward:
    with torch.inference_mode():
        started = _now(device)
        tokens = prefill().argmax(-1)
        read = _now(device)
        bytes_ = held()
        decoded = [tokens]
        begun = _now(device)
        for _ in range(steps):
            tokens = step(tokens).argmax(-1)
            decoded.append(tokens)
        ended = _now(device)
    return Forward(read - started, (ended - begun) / max(1, steps), bytes_, torch.stack(decoded, 1).cpu())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that a cache of transformers holds."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors)


def measure_forward(
    model: Any,
    *,
    prefix: int,
    rows: int,
    own: int = 2,
    steps: int = 16,
    rounds: int = 3,
    seed: int = 0,
    exact: bool = True,
) -> dict[str, Pairs]:
    """Compare prefill, decode step and memory for rows with a common prefix.

    Args:
        model: a transformers model; its attention implementation is what it was when this returns.
        prefix: tokens that all rows have in common.
        rows: how many rows.
        own: tokens of each row after the prefix; bon computes two for each row in any case.
        steps: decode steps that are timed.
        rounds: pairs.
        seed: of the token ids; every round has its own.
        exact: fail when the two sides decode different tokens. In half precision they may.

    Returns:
        Pairs under "prefill" and "decode" (seconds), and "memory" (bytes of the common prefix' keys and values).

    Raises:
        DifferentTokensError: see ``exact``.
    """

    def prompts(round_: int) -> list[tuple[int, ...]]:
        draw = torch.Generator().manual_seed(seed + 1000 * (round_ + 1))
        high = min(1000, model.config.vocab_size)
        common = torch.randint(3, high, (prefix,), generator=draw).tolist()
        return [(*common, *row) for row in _different(rows, own, high, draw)]

    before: str = model.config._attn_implementation
    usual = "sdpa" if before == NAME else before

    def plain_side(round_: int) -> Forward:
        model.set_attn_implementation(usual)
        return plain_forward(model, prompts(round_), steps)

    def shared_side(round_: int) -> Forward:
        model.set_attn_implementation(NAME)
        return shared_forward(model, prompts(round_), steps)

    try:
        sides = {PLAIN: plain_side, SHARED: shared_side}
        timed = interleave(sides, rounds, label=f"prefix {prefix}, {rows} rows")
    finally:
        model.set_attn_implementation(before)
    plain, shared = ([t.value for t in timed[side]] for side in (PLAIN, SHARED))
    same = all(torch.equal(a.tokens, b.tokens) for a, b in zip(plain, shared, strict=True))
    if exact and not same:
        raise DifferentTokensError(f"plain and shared decode different tokens at prefix {prefix}, {rows} rows.")
    sizes = {"prefix": prefix, "rows": rows, "own": own}

    def pairs(case: str, field: str, unit: str) -> Pairs:
        first, second = ([float(getattr(f, field)) for f in side] for side in (plain, shared))
        return Pairs(case, sizes, (PLAIN, SHARED), first, second, unit)

    return {
        "prefill": pairs("prefill", "prefill", "s"),
        "decode": pairs("decode", "step", "s"),
        "memory": Pairs(
            "memory",
            sizes,
            (PLAIN, SHARED),
            [f.cache_bytes * prefix / (prefix + own) for f in plain],  # without the rows' own tokens
            [f.cache_bytes * (prefix / (prefix + own) if rows == 1 else 1) for f in shared],
            "B",
        ),
    }


def _different(rows: int, own: int, high: int, draw: torch.Generator) -> list[list[int]]:
    """Own tokens of each row, the first of them different in every row, so that the common prefix is no longer."""
    first = torch.arange(rows) % (high - 3) + 3
    rest = torch.randint(3, high, (rows, own - 1), generator=draw)
    own_ids: list[list[int]] = torch.cat([first[:, None], rest], 1).tolist()
    return own_ids


def forward_table(measured: Sequence[Mapping[str, Pairs]]) -> str:
    """Milliseconds and megabytes for each size."""
    rows = []
    for cases in measured:
        prefill, decode, memory = (cases[name].to_dict() for name in ("prefill", "decode", "memory"))
        rows.append(
            [
                prefill["prefix"],
                prefill["rows"],
                " -> ".join(map(milliseconds, prefill["medians"])),
                f"{prefill['ratio']:.1f}",
                " -> ".join(map(milliseconds, decode["medians"])),
                f"{decode['ratio']:.2f}",
                " -> ".join(f"{b / 1e6:.1f}" for b in memory["medians"]),
                f"{memory['ratio']:.1f}",
            ]
        )
    headers = ["prefix", "rows", "prefill ms", "x", "step ms", "x", "prefix K/V MB", "x"]
    return "plain -> shared\n" + table(headers, rows)
