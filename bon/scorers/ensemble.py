"""Several rewards as one: each brought to one scale within its task, then their weighted mean."""

from __future__ import annotations

import copy
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from bon.engines.base import Engine
from bon.errors import InputError, number
from bon.scorers.base import Needs, Pending, Scorer, by_group
from bon.scorers.function import RewardFunction
from bon.spec import SCORERS
from bon.types import Score, Usage

if TYPE_CHECKING:
    from bon.models import Model


class Ensemble(Scorer):
    """Scores candidates by the weighted mean of several scorers' rewards.

    Each scorer's rewards are standardised within the task (minus their mean, divided by their standard deviation), so
    that scales and signs of different kinds can be added; a scorer that finds all candidates alike says nothing. Where
    a scorer has no reward for a candidate, it says nothing about it either, and the score's ``reason`` tells. The
    rewards as they were are in ``Score.parts``.

    Args:
        scorers: specs, scorers or reward functions; a text divides them with " + ":
            ``ensemble:"likelihood,style=turns + consensus"``.
        weights: one positive number for each; None weighs all alike.

    Raises:
        InputError: no scorers, or weights that are no such numbers.
        UnknownNameError: a scorer that does not exist.
    """

    def __init__(
        self, scorers: str | Sequence[str | Scorer | Callable[..., Any]], weights: Sequence[float] | None = None
    ) -> None:
        given = [part.strip() for part in scorers.split(" + ")] if isinstance(scorers, str) else list(scorers)
        if not given:
            raise InputError("an ensemble needs at least one scorer.")
        self.parts: list[Scorer] = [
            each if isinstance(each, Scorer) else RewardFunction(each) if callable(each) else SCORERS.make(each)
            for each in given
        ]
        self.weights = [1.0] * len(given) if weights is None else [number("a weight", weight) for weight in weights]
        if len(self.weights) != len(given) or min(self.weights) <= 0:
            raise InputError(f"an ensemble of {len(given)} scorers needs as many positive weights, got {weights!r}.")

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """Whole groups, and what any of the parts needs."""
        needs = [part.needs for part in self.parts]
        logprobs, reference = any(each.logprobs for each in needs), any(each.reference for each in needs)
        return Needs(group=True, all_rewards=True, logprobs=logprobs, reference=reference)

    @property
    def name(self) -> str:
        """The parts' names."""
        return " + ".join(part.name for part in self.parts)

    @property
    def version(self) -> str:  # type: ignore[override]
        """The parts'."""
        return " ".join(part.version for part in self.parts).strip()

    @property
    def models(self) -> Sequence[Model | None]:  # type: ignore[override]
        """What is still to be loaded for any of the parts."""
        return [model for part in self.parts for model in part.models]

    @property
    def engines(self) -> Sequence[Engine]:
        """What the parts run on."""
        return [engine for part in self.parts for engine in part.engines]

    @property
    def concurrent(self) -> bool:  # type: ignore[override]
        """Whether calls may run at the same time: where they may for all parts."""
        return all(part.concurrent for part in self.parts)

    def bound(self, find: Callable[[Model | None], Engine]) -> Self:
        """The same ensemble with all models in place."""
        other = copy.copy(self)
        other.parts = [part.bound(find) for part in self.parts]
        return other

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``."""
        found: list[dict[int, Score]] = []
        for part in self.parts:
            found.append({})
            async with aclosing(part.score(pending)) as scores:
                async for position, score in scores:
                    found[-1][position] = score
        for positions in by_group(pending):
            rewards = [[scores[p].reward if p in scores else None for p in positions] for scores in found]
            totals = np.average([_standardised(row) for row in rewards], axis=0, weights=self.weights)
            for position, total in zip(positions, totals, strict=True):
                yield position, self._score(float(total), [scores.get(position) for scores in found])

    def _score(self, total: float, scores: Sequence[Score | None]) -> Score:
        parts: dict[str, float | None] = {}
        missing = []
        for part, score in zip(self.parts, scores, strict=True):
            name = part.name if part.name not in parts else f"{part.name} ({len(parts) + 1})"
            parts[name] = None if score is None else score.reward
            if score is None or score.reward is None:
                missing.append(f"{part.name}: {'no score' if score is None else score.reason or score.status}")
        known = [score for score in scores if score is not None]
        common: dict[str, Any] = {
            "explanation": next((s.explanation for s in known if s.explanation is not None), None),
            "parts": parts,
            "usage": sum((s.usage for s in known), Usage()),
            "error": next((s.error for s in known if s.error is not None), None),
        }
        if len(missing) == len(scores):
            return Score(None, "failed", "; ".join(missing), **common)
        return Score(total, "repaired" if missing else "ok", "; ".join(missing) or None, **common)

    async def aclose(self) -> None:
        """Free what the parts hold."""
        for part in self.parts:
            await part.aclose()


def _standardised(rewards: Sequence[float | None]) -> list[float]:
    """Rewards minus their mean, in standard deviations; 0 for None, and where all are alike."""
    known = np.array([reward for reward in rewards if reward is not None and math.isfinite(reward)])
    spread = float(known.std()) if len(known) else 0.0
    if spread <= 1e-12 * max(1.0, float(np.abs(known).max(initial=0.0))):
        return [0.0] * len(rewards)
    return [0.0 if reward is None else (reward - float(known.mean())) / spread for reward in rewards]
