"""RewardBench 2 (arXiv 2506.01937), with the score that its released code computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bon.errors import InputError
from bon.evals.dataset import Example
from bon.evals.named import Hub, Named, shuffled

TIES = "Ties"
"""The subset of questions with several right answers, each beside a question with one."""


class RewardBench2(Named):
    """One right answer among four, and questions with many right answers (Ties)."""

    title = "rewardbench2"
    file = "rewardbench2.jsonl"
    source = "huggingface.co/datasets/allenai/reward-bench-2 (as JSON Lines: datasets' to_json)"
    hub = Hub("allenai/reward-bench-2", ["test"], {})

    def convert(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The right answers come first as published; here they are shuffled."""
        return shuffled(fields, fields["chosen"], fields["rejected"]) | {"subset": fields["subset"]}

    def example(self, fields: dict[str, Any]) -> Example:
        """See ``Named.example``; a row of Ties must have an id of its kind."""
        example = super().example(fields)
        if example.subset == TIES:
            _pair(example)
        return example

    def official(self, rows: Sequence[Example], rewards: Sequence[Sequence[float]]) -> dict[str, float]:
        """See ``rewardbench2_score``."""
        return rewardbench2_score(rows, rewards)


def rewardbench2_score(rows: Sequence[Example], rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """The leaderboard's figures: one for each subset that is there, and their mean as "mean".

    A subset other than Ties scores the share of rows whose right answer has the highest reward, credit split among
    equals. Ties are scored by ``ties_score`` (``run_v2.py`` and ``utils.py`` of github.com/allenai/reward-bench).

    Args:
        rows: examples of ``RewardBench2``.
        rewards: of the candidates of each row.
    """
    subsets: dict[str, list[tuple[Example, Sequence[float]]]] = {}
    for row, given in zip(rows, rewards, strict=True):
        subsets.setdefault(row.subset, []).append((row, given))
    scores = {
        subset: ties_score(pairs) if subset == TIES else float(np.mean([_credit(*pair) for pair in pairs]))
        for subset, pairs in subsets.items()
    }
    return {**scores, "mean": float(np.mean(list(scores.values())))}


def _pair(row: Example) -> tuple[str, str]:
    """Kind and number of a row of Ties."""
    kind, _, number = str(row.task.metadata.get("id")).partition(":")
    if kind not in ("ref", "tied"):
        raise InputError(f"the id of a row of Ties must be ref:NUMBER or tied:NUMBER, not {kind!r}.")
    return kind, number


def _credit(row: Example, rewards: Sequence[float]) -> float:
    best = [label for label, reward in zip(row.labels, rewards, strict=True) if reward == max(rewards)]
    return sum(best) / len(best)


def ties_score(pairs: Sequence[tuple[Example, Sequence[float]]]) -> float:
    """The score of Ties: accuracy, and whether right answers are told from wrong ones more than from each other.

    A row's id is "ref:NUMBER" (one right answer) or "tied:NUMBER" (several), in pairs of the same number. With the
    margin between the worst right and the best wrong answer, and the spread of the right ones: 0.3 for the tied rows
    with a positive margin, 0.3 for those of the reference rows, 0.2 for the pairs whose tied margin exceeds the spread,
    0.2 for those whose lesser margin does, and 0.01 for how far it does.

    Args:
        pairs: rows of the subset, each with the rewards of its candidates.
    """
    margins: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    spreads: dict[str, float] = {}
    for row, rewards in pairs:
        kind, number = _pair(row)
        right = [reward for label, reward in zip(row.labels, rewards, strict=True) if label]
        wrong = [reward for label, reward in zip(row.labels, rewards, strict=True) if not label]
        margins[kind][number] = min(right) - max(wrong)
        if kind == "tied":
            spreads[number] = max(right) - min(right)
    accuracy = {kind: np.mean([m > 0 for m in found.values()]) if found else 0.0 for kind, found in margins.items()}
    both = [number for number in margins["tied"] if number in margins["ref"]]
    if not both:  # a part of the subset
        return float(0.3 * accuracy["tied"] + 0.3 * accuracy["ref"])
    spread = np.array([spreads[number] for number in both])
    tied = np.array([margins["tied"][number] for number in both])
    least = np.minimum(tied, [margins["ref"][number] for number in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.nan_to_num(np.tanh(least / spread - 1), nan=0.0)
    return float(
        0.3 * accuracy["tied"]
        + 0.3 * accuracy["ref"]
        + 0.2 * np.mean(tied > spread)
        + 0.2 * np.mean(least > spread)
        + 0.01 * np.mean(excess)
    )
