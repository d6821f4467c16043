"""The books of one run: what was sampled, what it scored, when, and what it cost.

Identical candidates of a task are scored once. Candidates without text are not scored at all (status "empty"), and
neither are those whose sampling was stopped because a good enough one had been found (status "pruned"). Truncated
candidates are scored like any other; their finish_reason says what they are. A deadline leaves the rest "late".
A sample that could not be made and a score that could not be had (an error that a retry may help against) are
"failed", with the reason, and the others count; only when nothing at all is left is the error raised.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from time import perf_counter, time

from bon.errors import EngineError
from bon.sampler import Sampled
from bon.scorers.base import Board, Item, Scorer
from bon.selectors import Selector, select
from bon.types import Candidate, Result, Score, Task, Timing, Usage

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
        self._error: EngineError | None = None
        self._start, self._started = perf_counter(), time()

    async def admit(self, source: AsyncIterator[Sampled]) -> AsyncIterator[tuple[int, Item]]:
        """Record candidates as they come; yield those that need a score of their own, with the index of their task."""
        async with aclosing(source):  # type: ignore[type-var]
            async for sampled in source:
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
            EngineError: the scorer left one out or scored one twice, or failed in a way that a retry does not help.
        """
        if not items:
            return
        try:
            await self._score(items)
        except EngineError as error:
            if not error.retryable:
                raise
            self._error = error
            for task, item in items:
                failed = Score(item.candidate.index, None, "failed", reason=f"not scored: {error}")
                if self._scores[task].setdefault(item.candidate.index, failed) is failed:
                    self._watch(task, failed)

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

    @contextmanager
    def best_so_far(self, n: int, deadline: float | None) -> Iterator[None]:
        """At a timeout keep what there is, and mark as late what is missing of the n candidates and their scores."""
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

    def results(self, selector: Selector) -> list[Result]:
        """Select a winner for each task and close the books.

        Raises:
            EngineError: the scorer's, when it left no reward at all.
        """
        if self._error and all(s.reward is None for of_task in self._scores for s in of_task.values()):
            raise self._error
        total = self._now()
        sample = max((c.finished for of_task in self._candidates for c in of_task.values()), default=0.0)
        timed = [s for of_task in self._scores for s in of_task.values() if s.finished]
        score = max(s.finished for s in timed) - min(s.started for s in timed) if timed else 0.0
        return [
            self._result(task, selector, Timing(sample, score, total, started=self._started))
            for task in range(len(self._tasks))
        ]

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


@contextmanager
def one_error() -> Iterator[None]:
    """Raise the first error of a task group by itself: callers catch ``BonError``, not exception groups."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__
