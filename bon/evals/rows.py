"""Rows of a dataset on their way through an evaluation: with candidates and labels, and then with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
        greedy: the label of the policy's greedy answer; None without a policy.
    """

    position: int
    example: Example
    candidates: Sequence[str | Candidate]
    labels: Sequence[float]
    generators: Sequence[str] = ()
    greedy: float | None = None

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
    def sampled(cls, position: int, example: Example, greedy: Candidate, candidates: Sequence[Candidate]) -> Row:
        """A row with a policy's candidates, checked."""
        assert example.passes is not None
        labels = [float(example.passes(candidate.text)) for candidate in candidates]
        return cls(position, example, candidates, labels, greedy=float(example.passes(greedy.text)))

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
    """

    row: Row
    texts: Sequence[str]
    labels: Floats
    scores: Mapping[str, Sequence[Score]]
    rewards: Mapping[str, Floats]

    @classmethod
    def of(cls, row: Row, scores: Mapping[str, Sequence[Score]]) -> ScoredRow:
        """Add the scores, and the rewards of the baselines."""
        texts, labels = row.texts, np.array(row.labels, float)
        rewards = {
            name: np.array([-np.inf if score.reward is None else score.reward for score in some])
            for name, some in scores.items()
        }
        return cls(row, texts, labels, scores, {**rewards, **baselines(texts, labels, row.example.extract)})

    @property
    def prompt(self) -> str:
        """What is asked."""
        return self.row.example.task.instruction

    def pick(self, rule: str, size: int | None = None) -> float:
        """The expected label of the rule's pick among ``size`` of the candidates; among all where that is None."""
        if rule == "greedy":
            assert self.row.greedy is not None
            return self.row.greedy
        return expected_best(self.labels, self.rewards[rule], size or len(self.labels))

    def right(self, rule: str) -> float:
        """The chance that the pick is among the best; 0 where all are equally good: nothing is to be decided."""
        best = (self.labels == self.labels.max()).astype(float)
        return 0.0 if best.all() else expected_best(best, self.rewards[rule], len(best))

    def tied(self, rule: str) -> bool:
        """Whether candidates with different texts share the best reward."""
        rewards = self.rewards[rule]
        return len({text for text, reward in zip(self.texts, rewards, strict=True) if reward == rewards.max()}) > 1
