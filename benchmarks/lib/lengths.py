"""How long instructions and responses are: drawn from real ones, for models whose texts say nothing.

A row is one real instruction with the responses of some fifteen models to it. Their lengths vary more than those of one
model's samples would; what is far longer than the others is what overlapping is for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from bon.mini.tasks import instruction as instruction_of
from bon.mini.tasks import response, sample_tasks

TOKENS_PER_WORD = 4 / 3
"""Of English text under the tokenizers of today's large models."""
LONGEST = 2048
"""Tokens of a response at most, as the limit that a user would set."""
LONGEST_INSTRUCTION = 96
SPARE = 128
"""Tokens of a context that are left to the scorer's preamble and to chat templates."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """One prompt in tokens.

    Args:
        instruction: of the prompt, and of each reconstruction of it.
        responses: of the candidates, in order.
    """

    instruction: int
    responses: tuple[int, ...]


def real_lengths(path: Path, count: int, n: int, *, context: int | None, seed: int = 0) -> list[Lengths]:
    """Draw prompts from a file of real responses.

    Args:
        path: JSON lines with ``messages`` and ``candidates``; where there is none, the mini world's own instructions
            and responses are counted instead.
        count: prompts.
        n: candidates of each: its own responses in random order, drawn again from them when there are not enough.
        context: tokens that the models read at most; longer instructions are passed over, longer responses cut.
        seed: of the draw.
    """
    draw = random.Random(seed)
    rows = _read(path) if path.exists() else _mini_world(seed)
    longest = min(LONGEST, (context or LONGEST * 2) - 2 * LONGEST_INSTRUCTION - SPARE)
    fitting = [(i, r) for i, r in rows if 0 < i <= LONGEST_INSTRUCTION and r]
    return [
        Lengths(i, tuple(min(max(length, 1), longest) for length in _take(r, n, draw)))
        for i, r in draw.choices(fitting, k=count)
    ]


def _take(lengths: Sequence[int], n: int, draw: random.Random) -> list[int]:
    shuffled = draw.sample(lengths, len(lengths))
    return [*shuffled[:n], *draw.choices(lengths, k=max(0, n - len(shuffled)))]


def _read(path: Path) -> list[tuple[int, list[int]]]:
    with path.open("rb") as lines:
        rows = [orjson.loads(line) for line in lines]
    return [(_tokens(r["messages"][-1]["content"]), [_tokens(text) for text in r["candidates"]]) for r in rows]


def _mini_world(seed: int) -> list[tuple[int, list[int]]]:
    draw = random.Random(seed)
    tasks = sample_tasks(200, seed)
    return [(_tokens(instruction_of(t)), [_tokens(response(t, draw)) for _ in range(16)]) for t in tasks]


def _tokens(text: str) -> int:
    return round(len(text.split()) * TOKENS_PER_WORD)
