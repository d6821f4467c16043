"""A reward function of the user's as a scorer."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, ClassVar

from bon.errors import BonError, InputError
from bon.scorers.base import Needs, Pending, Scorer, by_group
from bon.types import Score, as_reward
from bon.usercode import UserFunction


class RewardFunction(Scorer):
    """Rewards from a function of (prompt, responses).

    Args:
        function: called once for each task as ``function(prompt, responses)`` with all responses of it, copies
            included; returns one number for each, or None where it has none; or with each number a text that explains
            it: ``(0.5, "too long")``, ``{"score": 0.5, "why": "too long"}``. ``prompt`` is the text when the
            conversation is a single user message, else the list of role-and-content dicts. A function that has a
            parameter ``task`` gets the ``Task`` as well (its reference, its metadata). Functions that are not async run
            on a thread of their own, one call at a time.
        name: shown in tables and errors; the function's own name by default.

    Raises:
        InputError: it is no function of two arguments.
    """

    needs: ClassVar[Needs] = Needs(group=True, all_rewards=True)
    concurrent = True

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        if not callable(function):
            raise InputError(f"a reward function is a function of (prompt, responses), not {function!r:.80}.")
        self._call = UserFunction(function, "scorer", name)
        self._takes_task = False
        with contextlib.suppress(ValueError):  # some builtins have no signature
            signature = inspect.signature(function)
            self._takes_task = "task" in [*signature.parameters][2:]
            try:
                signature.bind("", [], **({"task": None} if self._takes_task else {}))
            except TypeError as error:
                said = f"a reward function is called with (prompt, responses), and {self.name} takes {signature}"
                raise InputError(f"{said}; it returns one number for each response.") from error

    @property
    def name(self) -> str:
        """The function's name."""
        return self._call.name

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``.

        A task for which the function raises, or does not return one number or None for each response, has failed.
        """
        for positions in by_group(pending):
            responses = [pending[i].candidate.text for i in positions]
            task = pending[positions[0]].task
            messages = [message.to_dict() for message in task.asked]
            try:
                given = await self._call(messages, responses, **({"task": task} if self._takes_task else {}))
                rewards = self._check(given, len(responses))
            except BonError as error:  # of this task alone, and the function is not called for it again
                pending[positions[0]].group.fail(error)
                continue
            for position, (reward, why) in zip(positions, rewards, strict=True):
                gave_none = Score(None, "failed", f"{self.name} gave no reward", why)
                yield position, gave_none if reward is None else Score(reward, explanation=why)

    def _check(self, rewards: Any, expected: int) -> list[tuple[float | None, str | None]]:
        try:
            values = [_read(reward) for reward in rewards]
        except (TypeError, KeyError, InputError) as error:
            raise self._call.error(f"must return numbers, but returned {rewards!r:.80}.") from error
        if len(values) != expected:
            raise self._call.error(f"must return {expected} rewards, but returned {len(values)}.")
        if any(value is not None and not math.isfinite(value) for value, _ in values):
            raise self._call.error(f"must return finite numbers, but returned {rewards!r:.80}.")
        return values

    async def aclose(self) -> None:
        """Let the function's thread go."""
        self._call.close()


def _read(given: Any) -> tuple[float | None, str | None]:
    """A reward and what explains it."""
    why = None
    if isinstance(given, Mapping):
        rest = dict(given)
        given = rest.pop("score")
        why = "; ".join(f"{name}: {value}" for name, value in rest.items()) or None
    elif isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], str):
        given, why = given
    return None if given is None else as_reward(given), why
