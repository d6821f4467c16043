"""Best-of-N: sample, score, select. The file to read first.

``BestOfN._stages`` is the table of contents: candidates come from ``bon.sampler``, rewards from ``bon.scorers``, the
choice from ``bon.selectors``. Everything else (command line, batch runs, evaluations, benchmarks) calls it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeVar

from bon import background
from bon.engines.base import Engine, Partial
from bon.errors import BonError, InputError, PromptTooLongError
from bon.resolve import as_policy, as_scorer, load_both
from bon.run import Run, Watch, one_error
from bon.sampler import Sampled, Schedule, given, in_batches, sample
from bon.scorers.base import Board, Scorer
from bon.selectors import Selector, as_selector, only_the_best_counts
from bon.types import Candidate, Conversation, Result, Sampling, Score, Task

T = TypeVar("T")

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
    ) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n must be a whole number of at least 1, got {n!r}.")
        self.n = n
        self.sampling = Sampling.of(sampling)
        self.selector = as_selector(selector, min_reward)
        self.prune, self.stop_at = prune and only_the_best_counts(self.selector), stop_at
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
            changes: ``prune`` or ``stop_at``, where None means None.

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
            **{"prune": self.prune, "stop_at": self.stop_at, **changes},
        )

    def __call__(self, prompt: Conversation, *, instruction: str | None = None) -> Result:
        """Return the best of n for one prompt; blocks (see ``run`` inside an event loop).

        Args:
            prompt: text, or a list of messages that ends with the user's.
            instruction: the part of the last message that is the instruction; the rest of it is context.
        """
        return background.run(self.run(prompt, instruction=instruction))

    def map(self, prompts: Iterable[Conversation | Task]) -> Iterator[Result]:
        """Yield one result for each prompt, in order; prompts run together where the engines allow it.

        Raises:
            BonError: of the first prompt that fails; results before it have been yielded.
        """
        waiting: dict[int, Result | BonError] = {}
        position = 0
        for index, outcome in background.iterate(self.stream(prompts)):
            waiting[index] = outcome
            while position in waiting:
                ready = waiting.pop(position)
                if isinstance(ready, BonError):
                    raise ready
                yield ready
                position += 1

    def rerank(
        self, prompt: Conversation, candidates: Sequence[str | Candidate], *, instruction: str | None = None
    ) -> Result:
        """Score and rank responses that came from elsewhere; blocks."""
        return background.run(self.run_rerank(Task.of(prompt, instruction), candidates))

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
        [result] = await self._sample_and_score([Task.of(prompt, instruction)], told, deadline)
        return result

    async def run_rerank(self, task: Task, candidates: Sequence[str | Candidate]) -> Result:
        """Score and rank responses that came from elsewhere."""
        if not candidates:
            raise InputError("there are no candidates to rank.")
        [result] = await self._stages([task], [Board(self.prune, self.stop_at)], given([candidates]))
        return result

    async def stream(self, prompts: Iterable[Conversation | Task]) -> AsyncIterator[tuple[int, Result | BonError]]:
        """Yield (position, result) for many prompts as they finish.

        A prompt that fails yields its error in place of a result, and the others go on.
        """
        overlaps = self.policy.overlaps and self.scorer.overlaps
        wave = max(1, WAVE // self.n)
        together, at_a_time = (1, wave) if overlaps else (wave, 1)
        waves = _chunks(enumerate(prompts), together)
        running: set[asyncio.Task[list[tuple[int, Result | BonError]]]] = set()
        try:
            while True:
                while len(running) < at_a_time and (chunk := next(waves, None)):
                    running.add(asyncio.create_task(self._outcomes(chunk)))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for outcome in [outcome for task in done for outcome in task.result()]:
                    yield outcome
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _outcomes(
        self, prompts: Sequence[tuple[int, Conversation | Task]]
    ) -> list[tuple[int, Result | BonError]]:
        """Results of prompts that run together; one that cannot run is set apart and the rest run without it."""
        outcomes: dict[int, Result | BonError] = {}
        tasks: dict[int, Task] = {}
        for index, prompt in prompts:
            try:
                tasks[index] = Task.of(prompt)
            except InputError as error:
                outcomes[index] = error
        while tasks:
            try:
                results = await self._sample_and_score(list(tasks.values()))
                outcomes.update(zip(tasks, results, strict=True))
                break
            except PromptTooLongError as error:
                positions = list(tasks)
                for position in error.indices or range(len(positions)):
                    outcomes[positions[position]] = error
                    del tasks[positions[position]]
            except BonError as error:
                outcomes.update(dict.fromkeys(tasks, error))
                break
        return sorted(outcomes.items())

    async def _sample_and_score(
        self, tasks: Sequence[Task], watch: Watch | None = None, deadline: float | None = None
    ) -> list[Result]:
        boards = [Board(self.prune, self.stop_at) for _ in tasks]

        def wanted(partial: Partial) -> bool:
            return not boards[partial.prompt_index].reached

        keep = None if self.stop_at is None else wanted
        source = sample(self.policy, tasks, self.sampling, self.n, keep=keep)
        return await self._stages(tasks, boards, source, watch, deadline)

    async def _stages(
        self,
        tasks: Sequence[Task],
        boards: Sequence[Board],
        source: AsyncIterator[Sampled],
        watch: Watch | None = None,
        deadline: float | None = None,
    ) -> list[Result]:
        """Sample, score, select: the whole of best-of-N."""
        run = Run(tasks, boards, self.scorer, watch)
        with one_error(), run.best_so_far(self.n, deadline):
            async with (
                asyncio.timeout(deadline),
                asyncio.TaskGroup() as scoring,
                aclosing(in_batches(run.admit(source), self.schedule)) as batches,  # type: ignore[type-var]
            ):
                async for batch in batches:
                    score = scoring.create_task(run.score(batch))
                    if self.schedule != "each":
                        await score
        return run.results(self.selector)

    @property
    def schedule(self) -> Schedule:
        """When candidates are handed to the scorer.

        A scorer whose requests join a running batch gets each at once. One that wants whole batches gets what is ready
        whenever it is free, or everything at the end where the policy wants the machine for itself as well.
        """
        if self.scorer.overlaps:
            return "each"
        return "ready" if self.policy.overlaps else "all"

    async def aclose(self) -> None:
        """Free the models."""
        await self.scorer.aclose()
        await self.policy.aclose()

    def close(self) -> None:
        """Free the models; blocks."""
        background.run(self.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
