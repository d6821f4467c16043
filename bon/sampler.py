"""Prompt to candidates: exactly n for each task, each as it finishes.

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

from bon.engines.base import Completion, Engine, Keep, Prompt
from bon.errors import EngineError, InputError
from bon.types import Candidate, Sampling, Task, Usage

T = TypeVar("T")

# How candidates reach the scorer: each as it finishes, all that are ready whenever the scorer is free, or all at once.
Schedule = Literal["each", "ready", "all"]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A candidate, which of the tasks it answers, and what it cost."""

    task: int
    candidate: Candidate
    usage: Usage


async def sample(
    engine: Engine, tasks: Sequence[Task], sampling: Sampling, n: int, *, keep: Keep | None = None
) -> AsyncIterator[Sampled]:
    """Yield n candidates of every task, in any order; times are relative to this call's start.

    Raises:
        EngineError: the engine returned a sample twice or fewer than n, or not a single one could be made.
        InputError: what the engine says of the prompts and options.
    """
    start = perf_counter()
    missing = {(task, index) for task in range(len(tasks)) for index in range(n)}
    made, error = 0, None
    prompts = [Prompt.of(task.messages) for task in tasks]
    async with aclosing(engine.generate(prompts, sampling, n, keep=keep)) as completions:  # type: ignore[type-var]
        async for completion in completions:
            place = (completion.prompt_index, completion.sample_index)
            if place not in missing:
                raise EngineError(f"{engine.name} returned sample {place[1]} of prompt {place[0]} twice or unasked.")
            missing.remove(place)
            made, error = made + (completion.error is None), completion.error or error
            yield Sampled(place[0], _candidate(completion, perf_counter() - start), _usage(completion))
    if error and not made:
        raise error
    if missing:
        raise EngineError(f"{engine.name} returned {len(tasks) * n - len(missing)} of {len(tasks) * n} completions.")


async def given(candidates: Sequence[Sequence[str | Candidate]]) -> AsyncIterator[Sampled]:
    """Yield candidates that came from elsewhere, one list for each task, as if they had just been sampled.

    Raises:
        InputError: something that is neither text nor a ``Candidate``.
    """
    for task, answers in enumerate(candidates):
        for index, answer in enumerate(answers):
            if isinstance(answer, Candidate):
                answer = replace(answer, index=index, started=0.0, finished=0.0)
            elif isinstance(answer, str):
                answer = Candidate(index, answer)
            else:
                raise InputError(f"candidate {index} must be text, not {type(answer).__name__}.")
            yield Sampled(task, answer, Usage())


def _candidate(completion: Completion, finished: float) -> Candidate:
    return Candidate(
        index=completion.sample_index,
        text=completion.text,
        finish_reason=completion.finish_reason,
        tokens=completion.tokens,
        cumulative_logprob=completion.cumulative_logprob,
        completion_tokens=completion.completion_tokens or None,
        finished=finished,
        error=None if completion.error is None else str(completion.error),
        tool_calls=completion.tool_calls,
    )


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
