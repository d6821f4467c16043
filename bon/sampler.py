"""Prompt to candidates: exactly n for each task, each as it finishes, or the error that is that task's alone.

What a policy returns is checked here and nowhere else. Empty and truncated completions are candidates like any other;
what becomes of them is the scoring stage's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal, TypeVar

from bon.engines.base import Completion, Engine, Keep, Partial, Prompt
from bon.errors import BonError, EngineError, InputError, PromptTooLongError
from bon.task import Task
from bon.types import Candidate, Sampling, Usage

T = TypeVar("T")

# How candidates reach the scorer: each as it finishes, all that are ready whenever the scorer is free, or all at once.
Schedule = Literal["each", "ready", "all"]
SCHEDULES: tuple[Schedule, ...] = ("each", "ready", "all")


@dataclass(frozen=True, slots=True)
class Sampled:
    """A candidate, which of the tasks it answers, and what it cost."""

    task: int
    candidate: Candidate
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failed:
    """A task whose candidates cannot be had, and why."""

    task: int
    error: BonError


async def sample(
    engine: Engine, tasks: Sequence[Task], sampling: Sampling, n: int, *, keep: Keep | None = None
) -> AsyncIterator[Sampled | Failed]:
    """Yield n candidates of every task, in any order; times are relative to this call's start.

    Of several tasks, one for which the engine fails is reported as such, and the others go on. An engine whose requests
    join a running batch is asked for each task by itself, so that it is known whose an error is.

    Raises:
        EngineError: the engine returned a sample twice or fewer than n.
        BonError: what the engine says of the only task.
    """
    start = perf_counter()
    missing = {(task, index) for task in range(len(tasks)) for index in range(n)}
    made: set[int] = set()
    prompts = [Prompt.of(task.messages) for task in tasks]
    together = [[task] for task in range(len(tasks))] if engine.overlaps else [list(range(len(tasks)))]
    calls = [_call(engine, prompts, group, sampling, n, keep) for group in together]
    async with aclosing(calls[0] if len(calls) == 1 else _merged(calls)) as events:  # type: ignore[type-var]
        async for task, event in events:
            error = event if isinstance(event, BonError) else event.error
            if not isinstance(event, BonError):
                if (task, event.sample_index) not in missing:
                    raise EngineError(
                        f"{engine.name} returned sample {event.sample_index} of a prompt twice or unasked."
                    )
                missing.remove((task, event.sample_index))
                yield Sampled(task, _candidate(event, perf_counter() - start), _usage(event))
                if error is None:
                    made.add(task)
                if task in made or any(left == task for left, _ in missing):
                    continue
            if error is not None:  # and with it the whole task
                if len(tasks) == 1:
                    raise error
                missing -= {(task, index) for index in range(n)}
                yield Failed(task, error)
    if missing:
        raise EngineError(f"{engine.name} returned {len(tasks) * n - len(missing)} of {len(tasks) * n} completions.")


async def _call(
    engine: Engine, prompts: Sequence[Prompt], group: Sequence[int], sampling: Sampling, n: int, keep: Keep | None
) -> AsyncIterator[tuple[int, Completion | BonError]]:
    """Completions of some of the prompts, each with its prompt's index, or the error of those left without.

    Prompts that are too long are taken out, and asked for one by one to hear what each has to be told.
    """
    index_of = dict(enumerate(group))
    left = dict.fromkeys(group, n)

    def keep_it(partial: Partial) -> bool:
        return keep is None or keep(replace(partial, prompt_index=index_of[partial.prompt_index]))

    try:
        asked = [prompts[index] for index in group]
        stream = engine.generate(asked, sampling, n, keep=keep and keep_it)
        async with aclosing(stream) as completions:  # type: ignore[type-var]
            async for completion in completions:
                index = index_of.get(completion.prompt_index, -1)
                left[index] = left.get(index, 0) - 1
                yield index, completion
    except BonError as error:
        if not isinstance(error, PromptTooLongError) or not error.indices or len(group) == 1:
            for index in (index for index, count in left.items() if count > 0):
                yield index, error
            return
        too_long = [group[position] for position in error.indices]
        fitting = [index for index in group if index not in too_long]
        for part in ([fitting] if fitting else []) + [[index] for index in too_long]:
            async with aclosing(_call(engine, prompts, part, sampling, n, keep)) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event


async def given(candidates: Sequence[Sequence[str | Candidate]]) -> AsyncIterator[Sampled | Failed]:
    """Yield candidates that came from elsewhere, one list for each task, as if they had just been sampled.

    A task with no candidates, or with one that is neither text nor a ``Candidate``, fails.
    """
    for task, answers in enumerate(candidates):
        if not answers:
            yield Failed(task, InputError("there are no candidates to rank."))
        for index, answer in enumerate(answers):
            if isinstance(answer, Candidate):
                answer = replace(answer, index=index, started=0.0, finished=0.0)
            elif isinstance(answer, str):
                answer = Candidate(index, answer)
            else:
                yield Failed(task, InputError(f"candidate {index} must be text, not {type(answer).__name__}."))
                break
            yield Sampled(task, answer, Usage())


def _candidate(completion: Completion, finished: float) -> Candidate:
    return Candidate(
        index=completion.sample_index,
        text=completion.text,
        finish_reason=completion.finish_reason,
        tokens=completion.tokens,
        cumulative_logprob=completion.cumulative_logprob,
        logprobs=_with_text(completion.pieces, completion.logprobs),
        completion_tokens=completion.completion_tokens or None,
        finished=finished,
        error=None if completion.error is None else str(completion.error),
        tool_calls=completion.tool_calls,
    )


def _with_text(pieces: Sequence[str] | None, logprobs: Sequence[float] | None) -> tuple[tuple[str, float], ...] | None:
    if pieces is None or logprobs is None or len(pieces) != len(logprobs):
        return None
    return tuple(zip(pieces, logprobs, strict=True))


def _usage(completion: Completion) -> Usage:
    """The prompt counts once, with the first of its samples."""
    first = completion.sample_index == 0
    return Usage(
        policy_prompt_tokens=completion.prompt_tokens if first else 0,
        policy_completion_tokens=completion.completion_tokens,
        cached_tokens=completion.cached_tokens if first else 0,
    )


async def in_batches(source: AsyncIterator[T], schedule: Schedule) -> AsyncIterator[list[T]]:
    """Group what a source yields; with "ready" the source keeps running while the consumer is busy."""
    if schedule == "ready":
        async with aclosing(_ready(source)) as batches:  # type: ignore[type-var]
            async for batch in batches:
                yield batch
        return
    async with aclosing(source):  # type: ignore[type-var]
        if schedule == "all":
            yield [item async for item in source]
        else:
            async for item in source:
                yield [item]


async def _merged(sources: Sequence[AsyncIterator[T]]) -> AsyncIterator[T]:
    """Items of all sources as they come; the first error ends it."""
    arrived: asyncio.Queue[tuple[bool, T | Exception | None]] = asyncio.Queue()

    async def pump(source: AsyncIterator[T]) -> None:
        error = None
        try:
            async with aclosing(source) as items:  # type: ignore[type-var]
                async for item in items:
                    arrived.put_nowait((False, item))
        except Exception as raised:
            error = raised
        arrived.put_nowait((True, error))

    running = [asyncio.create_task(pump(source)) for source in sources]
    try:
        left = len(running)
        while left:
            ended, item = await arrived.get()
            left -= ended
            if ended and isinstance(item, Exception):
                raise item
            if not ended:
                yield item  # type: ignore[misc]
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _ready(source: AsyncIterator[T]) -> AsyncIterator[list[T]]:
    queue: asyncio.Queue[T | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async with aclosing(source):  # type: ignore[type-var]
                async for item in source:
                    queue.put_nowait(item)
        finally:
            queue.put_nowait(None)

    running = asyncio.create_task(pump())
    try:
        ended = False
        while not ended:
            arrived = [await queue.get()]
            while not queue.empty():
                arrived.append(queue.get_nowait())
            ended = arrived[-1] is None
            if batch := [item for item in arrived if item is not None]:
                yield batch
        await running
    finally:
        running.cancel()
        await asyncio.wait([running])
