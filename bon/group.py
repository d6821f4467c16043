"""One task, its candidates and their scores, while they come and after.

Everything that concerns a task as a whole happens here and only here: candidates are admitted, scores are posted,
times are stamped, tokens are counted, watchers are told, copies share a score, and what goes wrong stays with the task.

Identical candidates are scored once, unless the scorer looks at the whole group. A candidate without text is not
scored (status "empty"), nor one that was stopped because a good enough one was there ("pruned"); one that was cut off
is scored like any other. What a deadline leaves is "late". A sample that could not be made and a score that could not
be had are "failed" with the reason, and the others count; only when a task has no reward at all is the error its
outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter, time
from typing import Any

from bon.engines.base import Partial
from bon.errors import BonError, EngineError, InputError, several, user_error
from bon.remarks import of_result
from bon.scorers.base import Pending
from bon.selectors import Selector, select
from bon.task import Conversation, Task
from bon.types import REWARDED, Candidate, Result, Score, Stop, Timing, Usage, without_text

Callback = Callable[[Candidate | Score], None]
Follow = Callable[[Partial], None]

_PATIENCE = 4  # samples in a row that may fail before no more are asked for


class Group:
    """The candidates of one task.

    Args:
        task: what is asked.
        prune: whether a scorer may give up a candidate that provably stays strictly below the best so far.
        stop_at: a reward that is good enough: once reached, what is unfinished is given up. None asks for all.
        whole: whether the scorer sees all candidates at once, so that copies are scored like any other.
        callback: told of every candidate and every score the moment it is there.
        follow: told how far each candidate is, every few tokens, perhaps from an engine's thread.

    Attributes:
        asked: samples that were asked for so far.
        error: why the task has no result; None while it may have one.
        best_reward: the highest reward so far.
        usage: tokens spent so far.
        warnings: what is known before there is a result, see ``Result.warnings``.
        range: the least and the largest reward that the scorer can give, where there is one; not where rewards depend
            on the other candidates, so that the largest may not stay it.
        stop: why no more samples are asked for, where the budget says it.
    """

    def __init__(
        self,
        task: Task,
        *,
        prune: bool = False,
        stop_at: float | None = None,
        whole: bool = False,
        callback: Callback | None = None,
        follow: Follow | None = None,
    ) -> None:
        self.task, self.prune, self.stop_at, self.whole = task, prune, stop_at, whole
        self.asked = 0
        self.error: BonError | None = None
        self.best_reward: float | None = None
        self.usage = Usage()
        self.warnings: list[str] = []
        self.range: tuple[float, float] | None = None
        self.stop: Stop | None = None
        self._callback, self._follow = callback, follow
        self._candidates: dict[int, Candidate] = {}
        self._scores: dict[int, Score] = {}
        self._waiting: list[int] = []  # candidates that need a score of their own
        self._copies: dict[str, list[int]] = {}  # text -> candidates with it, the first of which is scored
        self._unsampled: BonError | None = None
        self._unscored: BonError | None = None
        self._start, self._started, self._asked_at = perf_counter(), time(), 0.0

    @classmethod
    def of(
        cls,
        prompt: Conversation | Task,
        candidates: Sequence[str | Candidate],
        *,
        instruction: str | None = None,
        prune: bool = False,
        stop_at: float | None = None,
        whole: bool = False,
    ) -> Group:
        """A group whose candidates came from elsewhere.

        Raises:
            InputError: a prompt that is none, no candidates, or one that is neither text nor a ``Candidate``.
        """
        group = cls(Task.of(prompt, instruction), prune=prune, stop_at=stop_at, whole=whole)
        if not (all_given := [*several("candidates are a list of texts", candidates)]):
            raise InputError("there are no candidates to rank.")
        group.asked = len(all_given)
        for index, given in enumerate(all_given):
            if not isinstance(given, str | Candidate):
                raise InputError(f"candidate {index} must be text, not {type(given).__name__}.")
            known = Candidate(index, given) if isinstance(given, str) else given
            group.admit(replace(known, index=index), sampled=False)
        return group

    def __repr__(self) -> str:
        best = "" if self.best_reward is None else f", best reward {self.best_reward:.4g}"
        return f"Group({self.task.instruction!r:.60}, n={len(self._candidates)}{best})"

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The candidates that are there, by index."""
        return tuple(self._candidates[i] for i in sorted(self._candidates))

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores that are there, by index of their candidates."""
        return tuple(self._scores[i] for i in sorted(self._scores))

    @property
    def rewards(self) -> tuple[float | None, ...]:
        """One reward for each candidate; None where there is none."""
        return tuple(self._scores[i].reward if i in self._scores else None for i in sorted(self._candidates))

    @property
    def reached(self) -> bool:
        """Whether a reward is good enough to stop."""
        return self.stop_at is not None and self.best_reward is not None and self.best_reward >= self.stop_at

    @property
    def seconds(self) -> float:
        """How long it has been there."""
        return self._now()

    @property
    def watched(self) -> bool:
        """Whether somebody is told of candidates and scores as they come."""
        return self._callback is not None

    @property
    def followed(self) -> bool:
        """Whether somebody is told of texts while they grow."""
        return self._follow is not None

    @property
    def over(self) -> bool:
        """Whether nothing more is to be done for this task."""
        return self.error is not None or self.reached

    @property
    def stuck(self) -> bool:
        """Whether none of the last few samples could be made: a budget that waits for a reward would ask for ever."""
        latest = self.candidates[-_PATIENCE:]
        return len(latest) == _PATIENCE and all(candidate.finish_reason == "error" for candidate in latest)

    def hopeless(self, upper_bound: float) -> bool:
        """Whether a candidate that can reach ``upper_bound`` at most may be given up."""
        best = self.best_reward  # asked of every reconstruction every few tokens
        return self.error is not None or (best is not None and ((self.prune and upper_bound < best) or self.reached))

    def follow(self, partial: Partial) -> bool:
        """Tell how far a candidate is; whether it is still wanted."""
        try:
            if self._follow is not None:
                self._follow(partial)
        except Exception as error:
            self._follow = None
            self.fail(user_error("the callback", error))
        return not self.over

    def ask(self, more: int) -> int:
        """Note that so many more samples are asked for; returns the index of the first."""
        self.asked, self._asked_at = self.asked + more, self._now()
        return self.asked - more

    def admit(
        self,
        candidate: Candidate,
        usage: Usage | None = None,
        *,
        error: BonError | None = None,
        sampled: bool = True,
    ) -> bool:
        """Take in a candidate; True when it needs a score of its own.

        Args:
            candidate: whose index was asked for.
            usage: what it cost.
            error: why it could not be sampled.
            sampled: whether it was made just now.

        Raises:
            EngineError: a sample that was not asked for, or that is there already.
        """
        index = candidate.index
        if index in self._candidates or not 0 <= index < self.asked:
            raise EngineError(f"the policy returned sample {index} twice or unasked ({self.asked} were asked for).")
        times = (self._asked_at, self._now()) if sampled else (0.0, 0.0)
        self._candidates[index] = replace(candidate, started=times[0], finished=times[1])
        self.usage += usage or Usage()
        self._unsampled = error or self._unsampled
        self._tell(self._candidates[index])
        if candidate.finish_reason == "abort":
            reached = f": a reward of {self.best_reward} was reached" if self.reached else ""
            self._record(index, Score(None, "pruned", reason=f"not needed{reached}"))
        elif candidate.finish_reason == "error":
            self._record(index, Score(None, "failed", reason=f"not sampled: {candidate.error}"))
        elif not candidate.text.strip():
            reason = without_text(candidate.refusal, candidate.reasoning, candidate.finish_reason)
            self._record(index, Score(None, "empty", reason=reason))
        elif self.whole or candidate.text not in self._copies:
            self._copies.setdefault(candidate.text, [index])
            self._waiting.append(index)
            return True
        else:
            copies = self._copies[candidate.text]
            copies.append(index)
            if copies[0] in self._scores:
                self._copy(copies[0], index)
        return False

    def pending(self) -> list[Pending]:
        """The candidates that need a score of their own: all with text for a scorer that looks at the whole group."""
        return [
            Pending(self, self._candidates[i]) for i in sorted(self._waiting) if self.whole or i not in self._scores
        ]

    def scored(self, candidate: Candidate) -> bool:
        """Whether a candidate has its score."""
        return candidate.index in self._scores

    def post(self, candidate: Candidate, score: Score, started: float = 0.0) -> None:
        """Take in a score of a candidate, and of all that are identical.

        Args:
            candidate: what was scored.
            score: a reward that is no finite number becomes a failed score.
            started: when the scorer got it, by ``perf_counter``.

        Raises:
            EngineError: it is there already.
        """
        index = candidate.index
        if index in self._scores and not self.whole:
            raise EngineError(f"candidate {index} was scored twice.")
        if score.reward is not None and not math.isfinite(score.reward):
            reason = f"the reward is {score.reward}, not a finite number"
            score = replace(score, reward=None, status="failed", reason=reason)
        elif score.reward is None and score.status in REWARDED:
            score = replace(score, status="failed", reason=score.reason or "the scorer gave no reward")
        self.usage += score.usage
        self._unscored = score.error or self._unscored
        self._record(index, score, started=max(0.0, started - self._start), finished=self._now())
        for copy in self._copies.get(candidate.text, [])[1:]:
            self._copy(index, copy)

    def tied(self) -> list[Pending]:
        """One candidate of each text that shares the best reward; none where one text has it alone."""
        rewards = self.rewards
        best = max((reward for reward in rewards if reward is not None), default=None)
        share: dict[str, Candidate] = {}
        for candidate, reward in zip(self.candidates, rewards, strict=True):
            if reward is not None and reward == best:
                share.setdefault(candidate.text, candidate)
        return [Pending(self, candidate) for candidate in share.values()] if len(share) > 1 else []

    def settle(self, candidate: Candidate, score: Score) -> None:
        """Take in what decides between equal rewards, for all candidates with this text; nobody is told a second time.

        Args:
            candidate: of ``tied``.
            score: whose reward is the tie-break; one that could not be had says why.
        """
        self.usage += score.usage
        for index, known in self._scores.items():
            if self._candidates[index].text == candidate.text and known.reward is not None:
                told = score if index == candidate.index else replace(score, usage=Usage())
                self._scores[index] = replace(known.settled(told), finished=self._now())

    def fail(self, error: BonError) -> None:
        """Note why the task has no result; the first reason stays."""
        self.error = self.error or error

    def expire(self, why: str) -> None:
        """Make up for what was cut off, by a deadline for instance: candidates and scores that are missing are late."""
        self.stop = Stop(why)
        passed = f"{why} before it was"
        for index in range(self.asked):
            if index not in self._candidates:
                self._candidates[index] = Candidate(index, "", "abort", finished=self._now())
                self._record(index, Score(None, "late", reason=f"{passed} finished"))
        for waiting in self.pending():
            if not self.scored(waiting.candidate):
                self.post(waiting.candidate, Score(None, "late", reason=f"{passed} scored"), perf_counter())

    def result(self, selector: Selector) -> Result:
        """Select a winner.

        Raises:
            BonError: why there is none.
        """
        if len(self._candidates) < self.asked:
            self.fail(EngineError(f"the policy returned {len(self._candidates)} of {self.asked} completions."))
        if self._unscored is not None and all(score.reward is None for score in self._scores.values()):
            self.fail(self._unscored)
        if self._unsampled is not None and all(c.finish_reason == "error" for c in self._candidates.values()):
            self.fail(self._unsampled)
        if self.error is not None:
            raise self.error
        total = self._now()
        timed = [score for score in self._scores.values() if score.finished > score.started and score.same_as is None]
        timing = Timing(
            sample=max((c.finished for c in self._candidates.values()), default=0.0),
            score=max(s.finished for s in timed) - min(s.started for s in timed) if timed else 0.0,
            total=total,
            started=self._started,
        )
        try:
            selection = select(selector, self.scores, self.candidates)
        except BonError as error:
            self.fail(error)
            raise
        except Exception as error:
            self.error = user_error("the selector", error)
            raise self.error from error
        timing = replace(timing, select=self._now() - total)
        warnings = (*self.warnings, *of_result(self.candidates, self.scores, selection))
        stop = self.stop or (Stop(f"a reward of {self.stop_at:g} was reached", 0.0) if self.reached else None)
        return Result(self.task, self.candidates, self.scores, selection, timing, self.usage, warnings, stop=stop)

    def _copy(self, first: int, index: int) -> None:
        self._record(index, self._scores[first], same_as=first)

    def _record(self, index: int, score: Score, **stamps: Any) -> None:
        score = replace(score, candidate=index, **stamps)
        self._scores[index] = score
        if score.reward is not None and (self.best_reward is None or score.reward > self.best_reward):
            self.best_reward = score.reward
        self._tell(score)

    def _tell(self, event: Candidate | Score) -> None:
        try:
            if self._callback is not None:
                self._callback(event)
        except Exception as error:
            self._callback = None
            self.fail(user_error("the callback", error))

    def _now(self) -> float:
        return perf_counter() - self._start
