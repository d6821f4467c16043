"""The inversion check: can a model read backwards at all? It needs no label.

The instruction inferred from an answer is compared with the answer's own prompt and with those of other rows. A model
that reads finds its own; one that echoes the answer, or writes the same for every answer, does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from bon.evals.baselines import repeated, words_of

AMONG = (8, 64)
ECHO = 0.8
"""Share of the inferred words above which a reconstruction is an echo of the answer."""


def inversion(prompts: Sequence[str], inferred: Sequence[tuple[int, str, str]], seed: int) -> dict[str, Any]:
    """Whose prompt is it, by word F1.

    Args:
        prompts: one for each row.
        inferred: (row, inferred instruction, answer).
        seed: of the choice of other rows.

    Returns:
        ``retrieval_at_1``: how often the own prompt is the nearest among 8 and among 64, equals sharing the place (so
        chance is 1/8 and 1/64); ``margin``: the F1 with the own prompt less the best of 7 others; None where there are
        not so many different prompts. ``f1``: the mean with the own prompt. ``echo_rate``: the share of the inferred
        words that the answer has itself; ``echoes``: how often that is more than 0.8.
    """
    different = list(dict.fromkeys(prompts))
    known = [words_of(prompt) for prompt in different]
    rng = np.random.default_rng(seed)
    found: dict[int, list[float]] = {among: [] for among in AMONG}
    margins, own_f1 = [], []
    for row, text, _ in inferred:
        words, own = words_of(text), different.index(prompts[row])
        right = _f1(words, known[own])
        own_f1.append(right)
        others = rng.permutation(np.delete(np.arange(len(known)), own))[: AMONG[-1] - 1]
        rivals = np.array([_f1(words, known[other]) for other in others])
        for among in AMONG:
            if len(rivals) >= among - 1:
                near = rivals[: among - 1]
                found[among].append(float(right >= near.max()) / (1 + np.count_nonzero(near == right)))
        if len(rivals) >= AMONG[0] - 1:
            margins.append(right - rivals[: AMONG[0] - 1].max())
    shares = [repeated(text, answer) for _, text, answer in inferred]
    return {
        "retrieval_at_1": {str(among): _mean(hits) for among, hits in found.items()},
        "margin": _mean(margins),
        "f1": _mean(own_f1),
        "echo_rate": _mean(shares),
        "echoes": _mean([float(share > ECHO) for share in shares]),
    }


def _f1(one: Counter[str], other: Counter[str]) -> float:
    return 2 * (one & other).total() / max(1, one.total() + other.total())


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
