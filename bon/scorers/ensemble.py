"""Several rewards as one: each brought to one scale within its task, then their weighted mean."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from bon.errors import InputError, UnknownNameError, number
from bon.scorers.base import Compound, Needs, Pending, Scorer, by_group
from bon.scorers.function import RewardFunction
from bon.spec import SCORERS
from bon.types import Score, Usage

Normalise = Literal["zscore", "rank", "minmax"]


class Ensemble(Compound):
    """Scores candidates by the weighted mean of several scorers' rewards.

    Each scorer's rewards are brought to one scale within the task, so that scales and signs of different kinds can be
    added; a scorer that finds all candidates alike counts with what it breaks ties by, as ``default`` does for two
    candidates, or says nothing. Where a scorer has no reward for a candidate, it says nothing about it either (its mean
    stands there), and the score's ``reason`` tells. The rewards as they were are in ``Score.parts``.

    Args:
        scorers: specs, scorers or reward functions; a text divides them with " + ":
            ``ensemble:"likelihood,style=turns + consensus"``.
        weights: one positive number for each; None weighs all alike.
        normalise: "zscore", minus the mean, divided by the standard deviation; "minmax", from 0 to 1; or "rank", evenly
            from 0 to 1 in their order, which no outlier moves.

    Raises:
        InputError: no scorers, one named twice, an ensemble in an ensemble, or weights that are no such numbers.
        UnknownNameError: a scorer or a scale that does not exist.
    """

    def __init__(
        self,
        scorers: str | Sequence[str | Scorer | Callable[..., Any]],
        weights: Sequence[float] | None = None,
        *,
        normalise: Normalise = "zscore",
    ) -> None:
        given = [part.strip() for part in scorers.split(" + ")] if isinstance(scorers, str) else list(scorers)
        if not given:
            raise InputError("an ensemble needs at least one scorer.")
        if twice := [each for at, each in enumerate(given) if each in given[:at]]:
            raise InputError(f"an ensemble names {twice[0]!r} twice: name it once, with a larger weight.")
        self.parts = [
            each if isinstance(each, Scorer) else RewardFunction(each) if callable(each) else SCORERS.make(each)
            for each in given
        ]
        if any(isinstance(part, Ensemble) for part in self.parts):
            raise InputError("an ensemble is no part of an ensemble: name the parts of both in one.")
        self.weights = [1.0] * len(given) if weights is None else [number("a weight", weight) for weight in weights]
        if len(self.weights) != len(given) or not 0 < min(self.weights) <= max(self.weights) < math.inf:
            raise InputError(f"an ensemble of {len(given)} scorers needs as many positive weights, got {weights!r}.")
        if normalise not in get_args(Normalise):
            raise UnknownNameError("scale of an ensemble (normalise=)", normalise, get_args(Normalise))
        self.normalise = normalise

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Whole groups, and what any of the parts needs."""
        needs = [part.needs for part in self.parts]
        logprobs, reference = any(each.logprobs for each in needs), any(each.reference for each in needs)
        top = max(each.top_logprobs for each in needs)
        return Needs(group=True, all_rewards=True, logprobs=logprobs, top_logprobs=top, reference=reference)

    @property
    def name(self) -> str:
        """The parts' names."""
        return " + ".join(part.name for part in self.parts)

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``."""
        found: list[dict[int, Score]] = []
        for part in self.parts:
            found.append({})
            async with aclosing(part.score(pending)) as scores:
                async for position, score in scores:
                    found[-1][position] = score
        groups = by_group(pending)
        rewards = [await _told_apart(*given, pending, groups) for given in zip(self.parts, found, strict=True)]
        for at, positions in enumerate(groups):
            rows = [scaled(of_part[at], self.normalise) for of_part in rewards]
            totals = np.average(rows, axis=0, weights=self.weights)
            for position, total in zip(positions, totals, strict=True):
                yield position, self._score(float(total), [scores.get(position) for scores in found])

    def _score(self, total: float, scores: Sequence[Score | None]) -> Score:
        parts = dict(zip(self.part_names, (None if s is None else s.reward for s in scores), strict=True))
        missing, told = [], []
        for part, score in zip(self.parts, scores, strict=True):
            if score is None or score.reward is None:
                missing.append(f"{part.name}: {'no score' if score is None else score.reason or score.status}")
            elif score.reason:
                told.append(f"{part.name}: {score.reason}")
        known = [score for score in scores if score is not None]
        common: dict[str, Any] = {
            "explanation": next((s.explanation for s in known if s.explanation is not None), None),
            "parts": parts,
            "usage": sum((s.usage for s in known), Usage()),
            "error": next((s.error for s in known if s.error is not None), None),
        }
        if len(missing) == len(scores):
            return Score(None, "failed", "; ".join(missing), **common)
        return Score(total, "repaired" if missing else "ok", "; ".join([*missing, *told]) or None, **common)


async def _told_apart(
    part: Scorer, scores: dict[int, Score], pending: Sequence[Pending], groups: Sequence[Sequence[int]]
) -> list[list[float | None]]:
    """A part's rewards of each group; where they are all alike, what the part breaks ties by (``Scorer.settle``).

    A candidate that loses the tie is as far below the others as these are apart. What was read counts as usage.
    """
    rewards = [[scores[p].reward if p in scores else None for p in positions] for positions in groups]
    alike = [at for at, row in enumerate(rewards) if len({*row} - {None}) == 1]
    texts = {
        at: {str(pending[p].candidate.text): p for p in groups[at] if p in scores and scores[p].reward is not None}
        for at in alike
    }
    tied = [(at, text) for at in alike for text in texts[at] if len(texts[at]) > 1]
    told: dict[int, dict[str, float | None]] = {}
    if tied:
        async with aclosing(part.settle([pending[texts[at][text]] for at, text in tied])) as settled:
            async for place, score in settled:
                at, text = tied[place]
                told.setdefault(at, {})[text] = score.reward
                before = scores[texts[at][text]]
                why: dict[str, Any] = {} if score.reward is not None else {"reason": score.reason, "error": score.error}
                scores[texts[at][text]] = replace(before, usage=before.usage + score.usage, **why)
    for at, found in told.items():
        known = [reward for reward in found.values() if reward is not None]
        if known:
            least = min(known) - ((max(known) - min(known)) or 1.0)
            lost = {text: least if reward is None else reward for text, reward in found.items()}
            rewards[at] = [lost.get(str(pending[p].candidate.text)) for p in groups[at]]
    return rewards


def scaled(rewards: Sequence[float | None], how: Normalise) -> list[float]:
    """Rewards on a common scale; their mean for None, and 0 where all are alike."""
    known = np.array([reward for reward in rewards if reward is not None and math.isfinite(reward)])
    if not len(known) or np.ptp(known) <= 1e-12 * max(1.0, float(np.abs(known).max())):
        return [0.0] * len(rewards)
    if how == "rank":
        _, level, counts = np.unique(known, return_inverse=True, return_counts=True)
        found = (counts.cumsum() - (counts + 1) / 2)[level] / (len(known) - 1)
    elif how == "minmax":
        found = (known - known.min()) / np.ptp(known)
    else:
        found = (known - known.mean()) / known.std()
    each, mean = iter(found.tolist()), float(found.mean())
    return [mean if reward is None or not math.isfinite(reward) else next(each) for reward in rewards]
