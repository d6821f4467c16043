"""The scorer contract: candidates in, one score each out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from bon.task import Task
from bon.types import Candidate, Score, Usage


@dataclass(slots=True)
class Board:
    """The rewards of one task as they come in: what pruning may rely on.

    Args:
        best: highest reward of a finished score, or None so far.
        stop_at: a reward that is good enough: once reached, what is unfinished is given up. None asks for all.
        prune: whether a scorer may give up a candidate that provably stays strictly below ``best``.
    """

    prune: bool = True
    stop_at: float | None = None
    best: float | None = None

    def post(self, reward: float | None) -> None:
        """Record a finished reward."""
        if reward is not None and (self.best is None or reward > self.best):
            self.best = reward

    @property
    def reached(self) -> bool:
        """Whether a reward is good enough to stop."""
        return self.stop_at is not None and self.best is not None and self.best >= self.stop_at

    def hopeless(self, upper_bound: float) -> bool:
        """Whether a candidate that can reach ``upper_bound`` at most may be given up."""
        return self.reached or (self.prune and self.best is not None and upper_bound < self.best)


@dataclass(frozen=True, slots=True)
class Item:
    """One candidate to score.

    ``board`` is shared by the candidates of one task; scorers post finished rewards to it.
    """

    task: Task
    candidate: Candidate
    board: Board = field(default_factory=Board)


@dataclass(frozen=True, slots=True)
class Scored:
    """A score, which of the items it belongs to, and the tokens it cost."""

    item: int
    score: Score
    usage: Usage = field(default_factory=Usage)


@runtime_checkable
class Scorer(Protocol):
    """A source of rewards.

    Attributes:
        name: what to call it in a table.
        overlaps: True when items may be scored in several calls at the same time, each as its candidate finishes.
    """

    @property
    def name(self) -> str:
        """What to call the scorer in a table."""

    @property
    def overlaps(self) -> bool:
        """Whether calls may run at the same time."""

    def score(self, items: Sequence[Item]) -> AsyncIterator[Scored]:
        """Score every item exactly once, in any order; candidates are never empty here.

        A candidate that cannot be scored gets status "failed" with a reason, never a number.
        """

    async def aclose(self) -> None:
        """Free what the scorer holds."""


def no_response(index: int, item: Item) -> Scored:
    """Score a candidate that has nothing to score."""
    reason = "there is no text" if not item.candidate.text.strip() else "there is nothing but thinking"
    return Scored(index, Score(item.candidate.index, None, "empty", reason=reason))
