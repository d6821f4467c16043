"""The books of one run: what was sampled, what it scored, when, and what it cost.

Identical candidates of a task are scored once. Candidates without text are not scored at all (status "empty"), and
neither are those whose sampling was stopped because a good enough one had been found (status "pruned"). Truncated
candidates are scored like any other; their finish_reason says what they are. A deadline leaves the rest "late".
A sample that could not be made and a score that could not be had (an error that a retry may help against) are
"failed", with the reason, and the others count; only when a task has no reward at all is the error its outcome.
Any other error is the outcome of the task that it belongs to, and of all that are unfinished where that is not known.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from time import perf_counter, time

from bon.errors import BonError, EngineError, InputError
from bon.sampler import Failed, Sampled
from bon.scorers.base import Board, Item, Scorer
from bon.selectors import Selector, select
from bon.task import Task
from bon.types import Candidate, Result, Score, Timing, Usage

Watch = Callable[[int, Candidate | Score], None]


class Run:
    """Candidates and scores of some tasks that run together.

    Args:
        tasks: what is asked.
        boards: one for each task; the scorer posts finished rewards there.
        scorer: where rewards come from.
        watch: told of every candidate and every score the moment it is there, with the index of its task.
    """

    def __init__(
        self, tasks: Sequence[Task], boards: Sequence[Board], scorer: Scorer, watch: Watch | None = None
    ) -> None:
        self._tasks, self._boards, self._scorer = tasks, boards, scorer
        self._watch = watch or (lambda task, event: None)
        self._candidates: list[dict[int, Candidate]] = [{} for _ in tasks]
        self._scores: list[dict[int, Score]] = [{} for _ in tasks]
        self._first: list[dict[str, int]] = [{} for _ in tasks]  # text -> the candidate that is scored for it
        self._usage = [Usage() for _ in tasks]
        self._errors: dict[int, BonError] = {}  # task -> why it has no result
        self._unscored: dict[int, EngineError] = {}  # task -> why some of its scores failed
        self._start, self._started = perf_counter(), time()

    async def admit(self, source: AsyncIterator[Sampled | Failed]) -> AsyncIterator[tuple[int, Item]]:
        """Record candidates as they come; yield those that need a score of their own, with the index of their task."""
        async with aclosing(source):  # type: ignore[type-var]
            async for sampled in source:
                if isinstance(sampled, Failed):
                    self._fail([sampled.task], sampled.error)
                    continue
                task, candidate = sampled.task, sampled.candidate
                self._candidates[task][candidate.index] = candidate
                self._usage[task] += sampled.usage
                self._watch(task, candidate)
                if candidate.finish_reason == "pruned":
                    reason = f"not needed: a reward of {self._boards[task].best} was reached"
                    self._scores[task][candidate.index] = Score(candidate.index, None, "pruned", reason=reason)
                elif candidate.finish_reason == "error":
                    reason = f"not sampled: {candidate.error}"
                    self._scores[task][candidate.index] = Score(candidate.index, None, "failed", reason=reason)
                elif not candidate.text.strip():
                    self._scores[task][candidate.index] = Score(candidate.index, None, "empty", reason="no text")
                elif self._first[task].setdefault(candidate.text, candidate.index) == candidate.index:
                    yield task, Item(self._tasks[task], candidate, self._boards[task])

    async def score(self, items: Sequence[tuple[int, Item]]) -> None:
        """Score candidates and record each score as it comes.

        Raises:
            BonError: no task is left that could have a result.
        """
        items = [(t, i) for t, i in items if t not in self._errors and i.candidate.index not in self._scores[t]]
        if not items:
            return
        tasks = list(dict.fromkeys(task for task, _ in items))
        try:
            await self._score(items)
        except InputError as error:
            if len(tasks) == 1:
                self._fail(tasks, error)
            for task in tasks if len(tasks) > 1 else ():  # whose fault it is shows when each is scored by itself
                await self.score([(t, item) for t, item in items if t == task])
        except EngineError as error:
            for task, item in items if error.retryable else ():
                self._unscored[task] = error
                failed = Score(item.candidate.index, None, "failed", reason=f"not scored: {error}")
                if self._scores[task].setdefault(item.candidate.index, failed) is failed:
                    self._watch(task, failed)
            if not error.retryable:
                self._fail({t for t, item in items if item.candidate.index not in self._scores[t]} or tasks, error)

    async def _score(self, items: Sequence[tuple[int, Item]]) -> None:
        started = self._now()
        async with aclosing(self._scorer.score([item for _, item in items])) as scores:  # type: ignore[type-var]
            async for scored in scores:
                task, item = items[scored.item]
                if self._scores[task].setdefault(item.candidate.index, scored.score) is not scored.score:
                    raise EngineError(f"{self._scorer.name} scored candidate {item.candidate.index} twice.")
                stamped = replace(scored.score, candidate=item.candidate.index, started=started, finished=self._now())
                self._scores[task][item.candidate.index] = stamped
                self._usage[task] += scored.usage
                self._watch(task, stamped)
        for task, item in items:
            if item.candidate.index not in self._scores[task]:
                raise EngineError(f"{self._scorer.name} did not score candidate {item.candidate.index}.")

    def _fail(self, tasks: Iterable[int], error: BonError) -> None:
        """Note why tasks have no result; the run ends when there is nothing else to come."""
        for task in tasks:
            self._errors.setdefault(task, error)
        if len(self._errors) == len(self._tasks):
            raise error

    @contextmanager
    def ended(self, n: int, deadline: float | None) -> Iterator[None]:
        """Take in how it ends. At a deadline what is missing of the n candidates and their scores is late."""
        try:
            yield
        except TimeoutError:  # of asyncio.timeout: whatever scorers and engines raise arrives in an exception group
            passed = f"the deadline of {deadline:g} s passed before it was"
            for candidates, scores, first in zip(self._candidates, self._scores, self._first, strict=True):
                for index in set(range(n)) - candidates.keys():
                    candidates[index] = Candidate(index, "", "pruned", finished=self._now())
                    scores[index] = Score(index, None, "late", reason=f"{passed} finished")
                for index in first.values():
                    scores.setdefault(index, Score(index, None, "late", reason=f"{passed} scored"))
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            if not isinstance(error, BonError):
                raise error from error.__cause__
            for task in range(len(self._tasks)):
                self._errors.setdefault(task, error)

    def outcomes(self, selector: Selector) -> list[Result | BonError]:
        """Select a winner for each task and close the books; a task that has none for an error gets that."""
        total = self._now()
        sample = max((c.finished for of_task in self._candidates for c in of_task.values()), default=0.0)
        timed = [s for of_task in self._scores for s in of_task.values() if s.finished]
        score = max(s.finished for s in timed) - min(s.started for s in timed) if timed else 0.0
        timing = Timing(sample, score, total, started=self._started)
        for task, error in self._unscored.items():
            if all(score.reward is None for score in self._scores[task].values()):
                self._errors.setdefault(task, error)
        return [self._errors.get(task) or self._result(task, selector, timing) for task in range(len(self._tasks))]

    def _result(self, task: int, selector: Selector, timing: Timing) -> Result:
        candidates = tuple(self._candidates[task][i] for i in sorted(self._candidates[task]))
        scores = tuple(self._score_of(task, candidate) for candidate in candidates)
        started = self._now()
        selection = select(selector, scores, candidates)
        timing = replace(timing, select=self._now() - started)
        return Result(self._tasks[task], candidates, scores, selection, timing, self._usage[task])

    def _score_of(self, task: int, candidate: Candidate) -> Score:
        if candidate.index in self._scores[task]:
            return self._scores[task][candidate.index]
        first = self._first[task][candidate.text]
        return replace(self._scores[task][first], candidate=candidate.index, same_as=first)

    def _now(self) -> float:
        return perf_counter() - self._start
