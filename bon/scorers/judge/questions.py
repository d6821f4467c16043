"""One task's candidates before a judge, and what it is asked about them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bon.engines.base import Completion, Loglikelihood, Piece
from bon.errors import BonError, EngineError, PromptTooLongError
from bon.scorers.base import Pending
from bon.scorers.judge.contests import Contest, Shown, Weights, Wins
from bon.scorers.judge.verdict import Verdict
from bon.types import REWARDED, Score, Usage


@dataclass(frozen=True, slots=True)
class JudgeDetails:
    """What a judge knows about a score beside the reward.

    Args:
        verdicts: what each answer gave the candidate, in the order of the questions: a rating, or the share that went
            to it; None for an answer that could not be read.
    """

    verdicts: tuple[float | None, ...] = ()


@dataclass(eq=False)
class Case:
    """The candidates of one task; equal texts are one entrant.

    Args:
        pending: any of the candidates, for the task and the group.
        contest: who is compared with whom; see ``contests``.
        shown: the questions of the round under way.
        wins: the state of a contest that can be cut short; None where it cannot.
        rewards: one for each entrant, once the contest is over.
        asked: questions that have been answered.
    """

    pending: Pending
    contest: Contest = field(init=False)
    shown: Sequence[Shown] = ()
    wins: Wins | None = None
    rewards: list[float] | None = None
    asked: list[Question] = field(default_factory=list)
    entrants: list[tuple[Piece, list[int]]] = field(default_factory=list)
    _of: dict[str, list[int]] = field(default_factory=dict)

    def add(self, position: int, response: Piece) -> None:
        """Take in a candidate by its position in the call."""
        text = response if isinstance(response, str) else response.text
        if text not in self._of:
            self._of[text] = []
            self.entrants.append((response, self._of[text]))
        self._of[text].append(position)

    def draw(self) -> int:
        """Bring the entrants into an order that depends on the task and the texts alone; returns how many there are."""
        self.entrants.sort(key=lambda entrant: entrant[0] if isinstance(entrant[0], str) else entrant[0].text)
        random.Random(self.pending.task.instruction).shuffle(self.entrants)
        return len(self.entrants)

    def scores(self) -> list[tuple[int, Score]]:
        """A score for each position, once the contest is over; what an entrant cost is counted once."""
        return [
            (position, self._score(entrant, counted=not copy))
            for entrant, (_, positions) in enumerate(self.entrants)
            for copy, position in enumerate(positions)
        ]

    def _score(self, entrant: int, *, counted: bool) -> Score:
        mine = [question for question in self.asked if entrant in question.shown]
        usage = sum((question.usage for question in mine if question.shown[0] == entrant and counted), Usage())
        verdicts = [verdict for question in mine for verdict in question.verdicts]
        known = [verdict for verdict in verdicts if verdict.weights is not None]
        details = JudgeDetails(tuple(q.weight(entrant, verdict) for q in mine for verdict in q.verdicts))
        failed = [str(verdict.reason) for verdict in verdicts if verdict.weights is None]
        if any(verdict.status == "pruned" for verdict in verdicts):
            most = None if self.wins is None else self.wins.most(entrant)
            return Score(None, "pruned", failed[0], details=details, upper_bound=most, usage=usage)
        if not known:
            errors = [question.error for question in mine if isinstance(question.error, EngineError)]
            error = errors[0] if errors else None
            return Score(None, "failed", failed[0], details=details, usage=usage, error=error)
        assert self.rewards is not None
        # What a judge is unsure of is not told apart by rounding, whatever the order of the sums.
        reward = round(self.rewards[entrant], 12)
        status = max((verdict.status for verdict in known), key=REWARDED.index)
        reason = next(verdict.reason for verdict in known if verdict.status == status)
        if failed:
            status = "repaired" if status == "ok" else status
            reason = f"{len(failed)} of {len(verdicts)} answers of the judge could not be read: {failed[0]}"
        return Score(reward, status, reason, known[0].explanation, details=details, usage=usage)


@dataclass(eq=False)
class Question:
    """One question about one or several entrants, and the answers to it (one for each criterion and repetition)."""

    case: Case
    shown: Shown
    verdicts: list[Verdict] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    error: BonError | None = None

    @property
    def weights(self) -> Weights:
        """The mean of what could be read."""
        known = [verdict.weights for verdict in self.verdicts if verdict.weights is not None]
        return tuple(math.fsum(column) / len(known) for column in zip(*known, strict=True)) if known else None

    @property
    def wanted(self) -> bool:
        """Whether the answer may still say who wins."""
        wins, group = self.case.wins, self.case.pending.group
        return not group.over and not (wins is not None and all(wins.hopeless(entrant) for entrant in self.shown))

    @property
    def too_long(self) -> bool:
        """Whether it did not fit the judge's context."""
        return isinstance(self.error, PromptTooLongError)

    def weight(self, entrant: int, verdict: Verdict) -> float | None:
        """What an answer gave to one of those that were shown."""
        return None if verdict.weights is None else verdict.weights[self.shown.index(entrant)]

    def take(self, completion: Completion, verdict: Verdict, answers: int) -> None:
        """Take in an answer, one of so many."""
        self.verdicts.append(verdict)
        self.error = self.error or completion.error
        self.usage += Usage(
            scorer_prompt_tokens=completion.prompt_tokens,
            scorer_completion_tokens=completion.completion_tokens,
            cached_tokens=completion.cached_tokens,
        )
        if self.case.wins is not None and len(self.verdicts) == answers and verdict.status != "pruned":
            self.case.wins.take(self.shown, self.weights)

    def expect(self, at: int, rated: Sequence[Loglikelihood], values: Sequence[float] | None) -> None:
        """Put the probabilities of all answers in the place of the one that was given.

        Args:
            at: which verdict.
            rated: one for each answer that could have been given.
            values: what the answers are worth, where they are numbers and their mean is wanted; None for shares.
        """
        self.usage += Usage(
            scorer_prompt_tokens=sum(one.prompt_tokens + one.tokens for one in rated),
            cached_tokens=sum(one.cached_tokens for one in rated),
        )
        totals, old = [one.total for one in rated], self.verdicts[at]
        error = next((one.error for one in rated if one.error is not None), None)
        if error is not None and old.weights is None:
            self.error, self.verdicts[at] = error, Verdict(None, "failed", str(error))
        if not all(math.isfinite(total) for total in totals):
            return  # the answer counts as it is
        shares = [math.exp(total - max(totals)) for total in totals]
        weights = tuple(share / sum(shares) for share in shares)
        if values is not None:
            weights = (math.fsum(w * value for w, value in zip(weights, values, strict=True)),)
        self.verdicts[at] = replace(old, weights=weights) if old.weights is not None else Verdict(weights)
