"""A reward function of the user's as a scorer."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, ClassVar

from bon.engines.function import is_async
from bon.errors import InputError, UserCodeError, user_error
from bon.scorers.base import Needs, Pending, Scorer
from bon.task import Task
from bon.types import Score


class RewardFunction(Scorer):
    """Rewards from a function of (prompt, responses).

    Args:
        function: called once for each task as ``function(prompt, responses)`` with all responses of it, copies
            included; returns one number for each, or None where it has none. ``prompt`` is the text when the
            conversation is a single user message, else the list of role-and-content dicts. A function with a parameter
            ``task`` gets the ``Task`` as well (its reference, its metadata). Functions that are not async run in a
            thread, one call at a time.
        name: shown in tables and errors; the function's own name by default.
    """

    needs: ClassVar[Needs] = Needs(group=True, all_rewards=True)
    concurrent = True

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        if not callable(function):
            raise InputError(f"a reward function is a function of (prompt, responses), not {function!r:.80}.")
        self.function = function
        self._name: str = name or getattr(function, "__name__", None) or type(function).__name__
        self._takes_task = _has_parameter(function, "task")
        self._one_at_a_time = threading.Lock()

    @property
    def name(self) -> str:
        """The function's name."""
        return self._name

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``.

        Raises:
            UserCodeError: the function raised, or did not return one number or None for each response.
        """
        by_group: dict[int, list[int]] = {}
        for position, each in enumerate(pending):
            by_group.setdefault(id(each.group), []).append(position)
        for positions in by_group.values():
            responses = [pending[i].candidate.text for i in positions]
            rewards = self._check(await self._call(pending[positions[0]].task, responses), len(responses))
            for position, reward in zip(positions, rewards, strict=True):
                gave_none = Score(None, "failed", f"{self.name} gave no reward")
                yield position, gave_none if reward is None else Score(reward)

    async def _call(self, task: Task, responses: list[str]) -> Any:
        messages: Any = [message.to_dict() for message in task.messages]
        prompt = messages[0]["content"] if len(messages) == 1 else messages
        more = {"task": task} if self._takes_task else {}
        try:
            if is_async(self.function):
                return await self.function(prompt, responses, **more)
            return await asyncio.to_thread(self._call_alone, prompt, responses, more)
        except Exception as error:
            raise user_error(f"the scorer {self.name!r}", error) from error

    def _call_alone(self, prompt: Any, responses: list[str], more: dict[str, Any]) -> Any:
        with self._one_at_a_time:
            return self.function(prompt, responses, **more)

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


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return False
