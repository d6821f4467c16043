"""Rows of a dataset on their way through an evaluation: with candidates and labels, and then with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bon.errors import InputError
from bon.evals.baselines import baselines
from bon.evals.dataset import Example
from bon.evals.metrics import Floats, expected_best
from bon.types import Candidate, Score


@dataclass(frozen=True, slots=True)
class Row:
    """A row whose candidates are there and have labels.

    Args:
        position: in the dataset.
        example: what the dataset says of it.
        candidates, labels, generators: as in ``Example``, of those candidates that are evaluated.
        singles: the labels of answers that stand alone: "greedy", the policy's, and "bigger", a bigger model's.
    """

    position: int
    example: Example
    candidates: Sequence[str | Candidate]
    labels: Sequence[float]
    generators: Sequence[str] = ()
    singles: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def given(cls, position: int, example: Example) -> Row:
        """A row with the candidates that it brings.

        Raises:
            InputError: labels or generators that are not one for each candidate, or a label that is no number.
        """
        texts, labels = example.candidates, example.labels
        if not labels and example.passes is not None:
            labels = [float(example.passes(text)) for text in texts]
        for what, some in (("labels", labels), ("generators", example.generators or texts)):
            if len(some) != len(texts):
                raise InputError(f"row {position} has {len(some)} {what} for {len(texts)} candidates.")
        if not np.isfinite(labels).all():
            raise InputError(f"the labels of row {position} must be finite numbers, got {[*labels]!r:.80}.")
        return cls(position, example, texts, labels, example.generators)

    @classmethod
    def sampled(
        cls, position: int, example: Example, candidates: Sequence[Candidate], singles: Mapping[str, Candidate]
    ) -> Row:
        """A row with a policy's candidates, checked, and with answers that stand alone."""
        assert example.passes is not None
        labels = [float(example.passes(candidate.text)) for candidate in candidates]
        alone = {name: float(example.passes(answer.text)) for name, answer in singles.items()}
        return cls(position, example, candidates, labels, singles=alone)

    @property
    def texts(self) -> list[str]:
        """What the candidates say."""
        return [candidate if isinstance(candidate, str) else candidate.text for candidate in self.candidates]

    def within(self, words: int | None) -> Row:
        """The row without candidates that have more words.

        Raises:
            InputError: fewer than two are left of more.
        """
        if words is None:
            return self
        kept = [i for i, text in enumerate(self.texts) if len(text.split()) <= words]
        if len(kept) < min(2, len(self.candidates)):
            few = f"{len(kept)} of {len(self.candidates)} candidates with at most {words} words"
            raise InputError(f"row {self.position} has {few}: there must be two to choose from.")
        return replace(
            self,
            candidates=[self.candidates[i] for i in kept],
            labels=[self.labels[i] for i in kept],
            generators=[self.generators[i] for i in kept] if self.generators else (),
        )


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row with the scores of all scorers.

    Args:
        row: what was scored.
        texts, labels: of its candidates.
        scores: by scorer.
        rewards: by scorer or baseline; -inf where there is none.
        order: the same, equal rewards told apart as ``bon.selectors.Best`` does, but for the index: higher is better.
    """

    row: Row
    texts: Sequence[str]
    labels: Floats
    scores: Mapping[str, Sequence[Score]]
    rewards: Mapping[str, Floats]
    order: Mapping[str, Floats]

    @classmethod
    def of(cls, row: Row, scores: Mapping[str, Sequence[Score]]) -> ScoredRow:
        """Add the scores, and the rewards of the baselines."""
        texts, labels = row.texts, np.array(row.labels, float)
        rewards = {
            name: np.array([-np.inf if score.reward is None else score.reward for score in some])
            for name, some in scores.items()
        }
        free = baselines(texts, labels, row.example.extract)
        order = {name: _told_apart(rewards[name], some) for name, some in scores.items()}
        return cls(row, texts, labels, scores, {**rewards, **free}, {**order, **free})

    @property
    def prompt(self) -> str:
        """What is asked."""
        return self.row.example.task.instruction

    def pick(self, rule: str, size: int | None = None) -> float:
        """The expected label of the rule's pick among ``size`` of the candidates; among all where that is None."""
        if rule in self.row.singles:
            return self.row.singles[rule]
        return expected_best(self.labels, self.order[rule], size or len(self.labels))

    def right(self, rule: str) -> float:
        """The chance that the pick is among the best; 0 where all are equally good: nothing is to be decided."""
        best = (self.labels == self.labels.max()).astype(float)
        return 0.0 if best.all() else expected_best(best, self.order[rule], len(best))

    def tied(self, rule: str) -> bool:
        """Whether candidates with different texts share the best reward, before anything tells them apart."""
        rewards = self.rewards[rule]
        return len({text for text, reward in zip(self.texts, rewards, strict=True) if reward == rewards.max()}) > 1


def _told_apart(rewards: Floats, scores: Sequence[Score]) -> Floats:
    """Levels of (reward, tie-break, fewest tokens); candidates of the same level share a pick."""
    ties = [-np.inf if score.tie_break is None else score.tie_break for score in scores]
    keys = np.array([rewards, ties, [-score.tokens for score in scores]], float)
    keys[1:, np.isneginf(rewards)] = 0.0
    return np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1).astype(float)
