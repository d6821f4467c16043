"""A reward function of the user's as a scorer."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from bon.errors import BonError, UserCodeError
from bon.scorers.base import Item, Scored
from bon.task import Task
from bon.types import Score


class RewardFunction:
    """Rewards from a function of (prompt, responses).

    Args:
        function: called once for each task as ``function(prompt, responses)``; returns one number for each response,
            or None where it has none. ``prompt`` is the text when the conversation is a single user message, else the
            list of role-and-content dicts. Sync functions run in a thread.
        name: shown in tables and errors; the function's own name by default.
    """

    overlaps = False

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name: str = name or getattr(function, "__name__", None) or type(function).__name__

    async def score(self, items: Sequence[Item]) -> AsyncIterator[Scored]:
        """Score every item; see ``Scorer.score``.

        Raises:
            UserCodeError: the function raised, or did not return one number or None for each response.
        """
        by_task: dict[int, list[int]] = {}
        for index, item in enumerate(items):
            by_task.setdefault(id(item.task), []).append(index)
        for indices in by_task.values():
            responses = [items[i].candidate.text for i in indices]
            rewards = self._check(await self._call(items[indices[0]].task, responses), len(responses))
            for index, reward in zip(indices, rewards, strict=True):
                candidate = items[index].candidate.index
                items[index].board.post(reward)
                if reward is None:
                    yield Scored(index, Score(candidate, None, "failed", reason=f"{self.name} gave no reward"))
                else:
                    yield Scored(index, Score(candidate, reward))

    async def _call(self, task: Task, responses: list[str]) -> Any:
        messages: Any = [message.to_dict() for message in task.messages]
        prompt = messages[0]["content"] if len(messages) == 1 else messages
        try:
            if inspect.iscoroutinefunction(self.function):
                return await self.function(prompt, responses)
            return await asyncio.to_thread(self.function, prompt, responses)
        except BonError:
            raise
        except Exception as error:
            raise UserCodeError(f"the scorer {self.name!r} raised {type(error).__name__}: {error}") from error

    def _check(self, rewards: Any, expected: int) -> list[float | None]:
        try:
            values = [None if reward is None else float(reward) for reward in rewards]
        except (TypeError, ValueError) as error:
            raise UserCodeError(
                f"the scorer {self.name!r} must return numbers, but returned {rewards!r:.80}."
            ) from error
        if len(values) != expected:
            raise UserCodeError(f"the scorer {self.name!r} must return {expected} rewards, but returned {len(values)}.")
        if any(value is not None and not math.isfinite(value) for value in values):
            raise UserCodeError(f"the scorer {self.name!r} must return finite numbers, but returned {values!r:.80}.")
        return values

    async def aclose(self) -> None:
        """Nothing to free."""
