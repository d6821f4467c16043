"""Rewards for callers that ask about one answer at a time: what is asked at the same time is scored in one batch."""

from __future__ import annotations

import asyncio
import pickle
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from bon import portal
from bon.errors import InputError, user_error
from bon.models import ModelPool
from bon.pipeline import score
from bon.scorers.base import Scorer
from bon.task import Task
from bon.types import Score

WAIT_S = 0.01
"""Seconds in which calls gather before they are scored."""

Asked = tuple[Task, str, "asyncio.Future[Score]"]


class Batches:
    """A scorer that is asked about single answers, from any thread or event loop; its models are loaded once.

    Where the scorer wants whole batches, what comes while one is scored makes the next.

    Args:
        scorer: as for ``BestOfN``; one that rates each answer by itself.

    Attributes:
        sizes: how many answers each batch had.
    """

    def __init__(self, scorer: Any) -> None:
        self.sizes: list[int] = []
        self._given = scorer
        self._pool = ModelPool()
        self._scorer: Scorer | None = None
        self._waiting: list[Asked] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy = asyncio.Lock()

    async def rate(self, task: Task, text: str) -> Score:
        """The score of an answer, which may have no reward.

        Raises:
            InputError: no such scorer, one that compares answers with each other, or one that cannot score this task.
            EngineError: the scorer's model failed, or cannot be reached.
        """
        return await portal.there(self._rate(task, text))

    async def aclose(self) -> None:
        """Free the scorer's models; what is asked later loads them again."""
        self._scorer = None
        await portal.there(self._pool.aclose())

    async def _rate(self, task: Task, text: str) -> Score:
        future: asyncio.Future[Score] = asyncio.get_running_loop().create_future()
        self._waiting.append((task, text, future))
        if len(self._waiting) == 1:
            self._tasks.add(work := asyncio.create_task(self._work()))
            work.add_done_callback(self._tasks.discard)
        return await future

    async def _work(self) -> None:
        """Score what has gathered by the time that the scorer is free."""
        asked = self._waiting
        try:
            await asyncio.sleep(WAIT_S)
            scorer = await self._ready()
            async with nullcontext() if scorer.concurrent else self._busy:
                asked, self._waiting = self._waiting, []
                await self._score(scorer, asked)
        except Exception as error:
            if asked is self._waiting:
                self._waiting = []
            for *_, future in asked:
                if not future.done():
                    future.set_exception(user_error("the scorer", error))

    async def _ready(self) -> Scorer:
        async with self._busy:
            if self._scorer is None:
                scorer = await asyncio.to_thread(self._pool.scorer, self._given)
                if scorer.needs.group:
                    raise InputError(
                        f"the scorer {scorer.name!r} compares the answers to a prompt with each other, and here they "
                        "come one by one. Take one that rates each by itself: flip:MODEL, likelihood:MODEL, "
                        "judge:MODEL, reward-model:NAME or head:FILE."
                    )
                self._scorer = scorer
            return self._scorer

    async def _score(self, scorer: Scorer, asked: list[Asked]) -> None:
        groups: dict[Any, list[Asked]] = {}
        for one in asked:
            groups.setdefault(_key(one[0]), []).append(one)
        pairs = [(some[0][0], [text for _, text, _ in some]) for some in groups.values()]
        self.sizes.append(len(asked))
        for some, group in zip(groups.values(), await score(scorer, pairs, pool=self._pool), strict=True):
            for place, (*_, future) in enumerate(some):
                if future.done():  # whoever asked has gone
                    continue
                error = group.error or group.scores[place].error
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(group.scores[place])


def _key(task: Task) -> tuple[Task, bytes | int]:
    """The same for tasks that are the same, the caller's own columns too: a scorer may read them."""
    try:
        columns: bytes | int = pickle.dumps(dict(task.metadata))
    except Exception:  # whatever a column's own type raises: then it is the same as itself
        columns = id(task)
    return replace(task, metadata={}), columns


def reward_of(rated: Score, remedy: str) -> float:
    """The reward of a score.

    Raises:
        InputError: it has none; a number in its place would be made up.
    """
    if rated.reward is None:
        raise InputError(f"an answer has no reward: {rated.reason or rated.status}. {remedy}")
    return rated.reward
