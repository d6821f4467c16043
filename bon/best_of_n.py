"""Best-of-N: sample, score, select. The file to read first.

``BestOfN._stages`` is the table of contents: candidates come from ``bon.sampler``, rewards from ``bon.scorers``, the
choice from ``bon.selectors``. Everything else (command line, batch runs, evaluations, benchmarks) calls it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Self, TypeVar

from bon import portal
from bon.engines.base import Engine, Partial
from bon.errors import BonError, InputError, UnknownNameError
from bon.resolve import as_policy, as_scorer, load_both
from bon.run import Run, Watch
from bon.sampler import SCHEDULES, Failed, Sampled, Schedule, given, in_batches, sample
from bon.scorers.base import Board, Scorer
from bon.selectors import Selector, as_selector, only_the_best_counts
from bon.task import Conversation, Task
from bon.types import Candidate, Result, Sampling, Score

T = TypeVar("T")
_Asked = tuple[Conversation | Task, Sequence[str | Candidate] | None]  # a prompt, and its candidates if they are there

# Candidates that go through a one-batch-at-a-time engine together: enough to fill its batches, few enough that results
# keep coming and memory stays flat over a long file.
WAVE = 256


class BestOfN:
    """Sample n candidates of a prompt, score them all, return the best with the evidence.

    Args:
        policy: what writes candidates: a model name or folder, an ``Engine``, a function that returns one text or n
            texts, or None for the embedded mini model.
        flip: what scores them: a model name or folder, an engine or a function to be asked for the instruction
            (``Flip``), or any ``Scorer``; None scores with the policy's own model.
        n: candidates for each prompt.
        sampling: how the policy samples; a ``Sampling`` or a mapping with its fields.
        selector: "best", or one of ``bon.selectors``.
        min_reward: abstain when the best reward is below this.
        prune: stop scoring a candidate as soon as it provably cannot win; False gives every reward, as do selectors
            that look at more than the best one (top-k, softmax, votes).
        stop_at: stop everything for a prompt once a candidate has this reward. At the maximum reward (1.0 for F1)
            the winner's reward stays what it would have been. None scores all n.
        engine: which back end loads models given by name; None chooses.
        schedule: when candidates are handed to the scorer: "each" as it finishes, "ready" those that are there whenever
            the scorer is free, "all" together at the end; None chooses, see ``schedule_for``.

    Raises:
        InputError: n < 1, an unknown name or option, a model that cannot be loaded.
    """

    def __init__(
        self,
        policy: str | Path | Engine | Callable[..., Any] | None = None,
        flip: str | Path | Engine | Scorer | Callable[..., Any] | None = None,
        *,
        n: int = 8,
        sampling: Sampling | Mapping[str, Any] | None = None,
        selector: str | Selector = "best",
        min_reward: float | None = None,
        prune: bool = True,
        stop_at: float | None = None,
        engine: str | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        if schedule is not None and schedule not in SCHEDULES:
            raise UnknownNameError("schedule", schedule, SCHEDULES)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n must be a whole number of at least 1, got {n!r}.")
        self.n = n
        self.sampling = Sampling.of(sampling)
        self.selector = as_selector(selector, min_reward)
        self.prune, self.stop_at = prune and only_the_best_counts(self.selector), stop_at
        self._schedule = schedule
        policy, flip = load_both(policy, flip, engine)
        self.policy = as_policy(policy, engine)
        self.scorer = as_scorer(flip, policy, self.policy, engine)

    def replace(
        self,
        *,
        n: int | None = None,
        sampling: Sampling | None = None,
        scorer: Scorer | None = None,
        min_reward: float | None = None,
        **changes: Any,
    ) -> BestOfN:
        """Return a copy with some settings changed, on the same engines; nothing is loaded.

        Args:
            n, sampling, scorer: None keeps what there is.
            min_reward: a minimum beside the one that the selector may have.
            changes: ``prune``, ``stop_at`` or ``schedule``, where None means None.

        Raises:
            InputError: what the constructor says of them.
        """
        return BestOfN(
            self.policy,
            scorer or self.scorer,
            n=self.n if n is None else n,
            sampling=sampling or self.sampling,
            selector=self.selector,
            min_reward=min_reward,
            **{"prune": self.prune, "stop_at": self.stop_at, "schedule": self._schedule, **changes},
        )

    def __call__(self, prompt: Conversation, *, instruction: str | None = None) -> Result:
        """Return the best of n for one prompt; blocks (see ``run`` inside an event loop).

        Args:
            prompt: text, or a list of messages that ends with the user's.
            instruction: the part of the last user message that is the instruction; the rest of it is context.
        """
        return portal.run(self.run(prompt, instruction=instruction))

    def map(self, prompts: Iterable[Conversation | Task]) -> Iterator[Result]:
        """Yield one result for each prompt, in order; prompts run together where the engines allow it.

        Raises:
            BonError: of the first prompt that fails; results before it have been yielded.
        """
        for _, outcome in portal.iterate(in_order(self.stream(prompts))):
            if isinstance(outcome, BonError):
                raise outcome
            yield outcome

    def rerank(
        self, prompt: Conversation, candidates: Sequence[str | Candidate], *, instruction: str | None = None
    ) -> Result:
        """Score and rank responses that came from elsewhere; blocks."""
        return portal.run(self.run_rerank(Task.of(prompt, instruction), candidates))

    async def run(
        self,
        prompt: Conversation | Task,
        *,
        instruction: str | None = None,
        watch: Callable[[Candidate | Score], None] | None = None,
        deadline: float | None = None,
    ) -> Result:
        """Return the best of n for one prompt.

        Args:
            prompt, instruction: as for ``__call__``.
            watch: told of each candidate and score as it comes.
            deadline: seconds after which the best so far is returned; the rest is aborted and has the status "late".
        """
        told = None if watch is None else lambda task, event: watch(event)
        [outcome] = await self._together([Task.of(prompt, instruction)], None, told, deadline)
        if isinstance(outcome, BonError):
            raise outcome
        return outcome

    async def run_rerank(self, task: Task, candidates: Sequence[str | Candidate]) -> Result:
        """Score and rank responses that came from elsewhere."""
        [outcome] = await self._together([task], [candidates])
        if isinstance(outcome, BonError):
            raise outcome
        return outcome

    def stream(self, prompts: Iterable[Conversation | Task]) -> AsyncIterator[tuple[int, Result | BonError]]:
        """Yield (position, result) for many prompts as they finish.

        A prompt that fails yields its error in place of a result, and the others go on. Prompts are read when they are
        needed, on a thread of their own: they may take their time.
        """
        overlaps = self.policy.overlaps and self.scorer.overlaps
        return self._waves(((prompt, None) for prompt in prompts), overlaps)

    def stream_ranked(
        self, rows: Iterable[tuple[Conversation | Task, Sequence[str | Candidate]]]
    ) -> AsyncIterator[tuple[int, Result | BonError]]:
        """Yield (position, result) for many prompts whose candidates came from elsewhere, otherwise as ``stream``."""
        return self._waves(rows, self.scorer.overlaps)

    async def _waves(self, asked: Iterable[_Asked], overlaps: bool) -> AsyncIterator[tuple[int, Result | BonError]]:
        """Run one prompt beside the other where requests join a running batch, else wave after wave."""

        def size(item: tuple[int, _Asked]) -> int:
            candidates = item[1][1]
            return self.n if candidates is None else len(candidates)

        running: dict[asyncio.Future[Any], int] = {}  # and how many candidates each has
        reading: set[asyncio.Future[Any]] = set()
        more = True
        waves = _chunks(enumerate(asked), 1 if overlaps else WAVE, size)
        async with aclosing(portal.pull(waves)) as chunks:  # type: ignore[type-var]
            try:
                while more or running:
                    if more and not reading and sum(running.values()) < (WAVE if overlaps else 1):
                        reading = {asyncio.ensure_future(anext(chunks, []))}
                    done, _ = await asyncio.wait({*running, *reading}, return_when=asyncio.FIRST_COMPLETED)
                    for read in done & reading:
                        reading, chunk = set(), read.result()
                        more = bool(chunk)
                        if chunk:
                            running[asyncio.create_task(self._wave(chunk))] = sum(map(size, chunk)) or 1
                    for wave in done & running.keys():
                        del running[wave]
                        for outcome in wave.result():
                            yield outcome
            finally:
                for task in {*running, *reading}:
                    task.cancel()
                await asyncio.gather(*running, *reading, return_exceptions=True)

    async def _wave(self, asked: Sequence[tuple[int, _Asked]]) -> list[tuple[int, Result | BonError]]:
        """Outcomes of prompts that run together."""
        outcomes: dict[int, Result | BonError] = {}
        tasks: dict[int, Task] = {}
        for position, (prompt, _) in asked:
            try:
                tasks[position] = Task.of(prompt)
            except InputError as error:
                outcomes[position] = error
        if tasks:
            lists = [candidates for position, (_, candidates) in asked if position in tasks and candidates is not None]
            outcomes.update(zip(tasks, await self._together(list(tasks.values()), lists or None), strict=True))
        return sorted(outcomes.items(), key=lambda item: item[0])

    async def _together(
        self,
        tasks: Sequence[Task],
        candidates: Sequence[Sequence[str | Candidate]] | None,
        watch: Watch | None = None,
        deadline: float | None = None,
    ) -> list[Result | BonError]:
        """Run tasks at the same time; their candidates are sampled unless they are given."""
        boards = [Board(self.prune, self.stop_at) for _ in tasks]
        if candidates is not None:
            return await self._stages(tasks, boards, given(candidates), watch, deadline)

        def wanted(partial: Partial) -> bool:
            return not boards[partial.prompt_index].reached

        keep = None if self.stop_at is None else wanted
        source = sample(self.policy, tasks, self.sampling, self.n, keep=keep)
        return await self._stages(tasks, boards, source, watch, deadline)

    async def _stages(
        self,
        tasks: Sequence[Task],
        boards: Sequence[Board],
        source: AsyncIterator[Sampled | Failed],
        watch: Watch | None,
        deadline: float | None,
    ) -> list[Result | BonError]:
        """Sample, score, select: the whole of best-of-N."""
        run = Run(tasks, boards, self.scorer, watch)
        schedule = self.schedule_for(live=watch is not None or deadline is not None)
        with run.ended(self.n, deadline):
            async with (
                asyncio.timeout(deadline),
                asyncio.TaskGroup() as scoring,
                aclosing(in_batches(run.admit(source), schedule)) as batches,  # type: ignore[type-var]
            ):
                async for batch in batches:
                    score = scoring.create_task(run.score(batch))
                    if schedule != "each":
                        await score
        return run.outcomes(self.selector)

    def schedule_for(self, *, live: bool = False) -> Schedule:
        """When candidates are handed to the scorer, unless the user said so.

        A scorer whose requests join a running batch gets each at once: a reward that is there early lets others be
        pruned or stopped. Where nothing can be skipped and one engine does both, reading candidates only holds up those
        that are still written, so they are scored together at the end; unless somebody waits for single scores
        (``live``). A scorer that wants whole batches gets what is ready whenever it is free, or everything at the end
        where the policy wants the machine for itself as well. ``benchmarks/latency.py --engine vllm`` measures it.
        """
        if self._schedule is not None:
            return self._schedule
        if not self.scorer.overlaps:
            return "ready" if self.policy.overlaps else "all"
        skips = self.prune or self.stop_at is not None
        one_engine = getattr(self.scorer, "engine", None) is self.policy
        return "all" if one_engine and not skips and not live else "each"

    async def aclose(self) -> None:
        """Free the models."""
        await self.scorer.aclose()
        await self.policy.aclose()

    def close(self) -> None:
        """Free the models; blocks."""
        portal.run(self.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


async def in_order(outcomes: AsyncIterator[tuple[int, T]]) -> AsyncIterator[tuple[int, T]]:
    """The same (position, outcome) by position, each as soon as those before it have been."""
    waiting: dict[int, T] = {}
    following = 0
    async with aclosing(outcomes):  # type: ignore[type-var]
        async for position, outcome in outcomes:
            waiting[position] = outcome
            while following in waiting:
                yield following, waiting.pop(following)
                following += 1


def _chunks(items: Iterable[T], enough: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in lists whose sizes add up to ``enough``."""
    chunk: list[T] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += size(item)
        if total >= enough:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk
