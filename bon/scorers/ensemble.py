"""Several rewards as one: each brought to one scale within its task, then their weighted mean."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Literal, get_args

import numpy as np

from bon.errors import InputError, UnknownNameError, number, user_error
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
        for part, of_part in zip(self.parts, found, strict=True):
            await _settle(part, of_part, pending, groups)
        for positions in groups:
            texts = [pending[p].candidate.text for p in positions]
            rewards = [_told_apart([of_part.get(p) for p in positions], texts) for of_part in found]
            totals = np.average([scaled(row, self.normalise) for row in rewards], axis=0, weights=self.weights)
            for position, total in zip(positions, totals, strict=True):
                yield position, self._score(float(total), [of_part.get(position) for of_part in found])

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


async def _settle(
    part: Scorer, scores: dict[int, Score], pending: Sequence[Pending], groups: Sequence[Sequence[int]]
) -> None:
    """Let a part decide between the candidates of a group that it finds all alike; a tie that stays costs no reward."""
    tied: list[int] = []
    for positions in groups:
        rewarded = [p for p in positions if p in scores and scores[p].reward is not None]
        texts = {pending[p].candidate.text: p for p in rewarded}
        if len(texts) > 1 and len({scores[p].reward for p in rewarded}) == 1:
            tied += texts.values()
    if not tied:
        return
    try:
        async with aclosing(part.settle([pending[p] for p in tied])) as settled:
            async for place, told in settled:
                scores[tied[place]] = scores[tied[place]].settled(told)
    except Exception as error:
        said = user_error(f"the scorer {part.name!r}", error)
        for p in tied:
            scores[p] = scores[p].settled(Score(None, "failed", str(said), error=said))


def _told_apart(scores: Sequence[Score | None], texts: Sequence[str]) -> list[float | None]:
    """A part's rewards of a group; where they are all alike, its tie-breaks, and for who has none less than any."""
    rewards = [None if score is None else score.reward for score in scores]
    ties = {t: s.tie_break for t, s in zip(texts, scores, strict=True) if s is not None and s.tie_break is not None}
    if len({*rewards} - {None}) != 1 or not ties:
        return rewards
    least = min(ties.values()) - ((max(ties.values()) - min(ties.values())) or 1.0)
    return [None if reward is None else ties.get(text, least) for reward, text in zip(rewards, texts, strict=True)]


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
