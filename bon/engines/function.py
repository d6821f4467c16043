"""A plain function as an engine: wrap any generator, sync or async.

The function is called as ``f(prompt)`` and returns one text, or as ``f(prompt, n)`` where it takes ``n`` (by that name,
or as its second positional parameter) and returns a list of n texts. ``prompt`` is the text when the conversation is a
single user message, else the list of role-and-content dicts. A function that is not async runs in a thread, one call
at a time.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from bon.engines.base import Completion, Keep, Prompt, Request
from bon.errors import BonError, UserCodeError


class FunctionEngine:
    """An engine around a function; it can be sampled and cannot rate.

    How a function samples is its own business: temperature, seed and the like do not reach it.

    Args:
        function: see the module's docstring.
        name: shown in tables and errors; the function's own name by default.
    """

    max_model_len: int | None = None
    concurrent = True

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name: str = name or getattr(function, "__name__", None) or type(function).__name__
        self._takes_n = _takes_n(function)
        self._one_at_a_time = threading.Lock()

    def generate(self, requests: Sequence[Request], *, keep: Keep | None = None) -> AsyncGenerator[Completion, None]:
        return self._generate(requests)

    async def _generate(self, requests: Sequence[Request]) -> AsyncGenerator[Completion, None]:
        for index, request in enumerate(requests):
            texts = await self._texts(request.prompt, request.n)
            for sample, text in zip(request.samples, texts, strict=True):
                yield Completion(index, sample, text, "stop")

    async def _texts(self, prompt: Prompt, n: int) -> list[str]:
        if self._takes_n:
            return self._check(await self._call(prompt, n), n)
        first = await self._call(prompt)
        if not isinstance(first, str):
            return self._check(first, n)
        if is_async(self.function):
            rest = await asyncio.gather(*(self._call(prompt) for _ in range(n - 1)))
        else:  # one call at a time, and the samples in the order of the calls
            rest = [await self._call(prompt) for _ in range(n - 1)]
        return self._check([first, *rest], n)

    async def _call(self, prompt: Prompt, *args: Any) -> Any:
        argument: Any = [turn.to_dict() for turn in prompt.turns]
        if len(argument) == 1:
            argument = argument[0]["content"]
        try:
            if is_async(self.function):
                return await self.function(argument, *args)
            return await asyncio.to_thread(self._call_alone, argument, *args)
        except BonError:
            raise
        except Exception as error:
            raise UserCodeError(f"the function {self.name!r} raised {type(error).__name__}: {error}") from error

    def _call_alone(self, *args: Any) -> Any:
        with self._one_at_a_time:
            return self.function(*args)

    def _check(self, texts: Any, n: int) -> list[str]:
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise UserCodeError(f"the function {self.name!r} must return {n} texts, but returned {texts!r:.80}.")
        if len(texts) != n:
            raise UserCodeError(f"the function {self.name!r} must return {n} texts, but returned {len(texts)}.")
        for text in texts:
            if not isinstance(text, str):
                raise UserCodeError(f"the function {self.name!r} must return texts, but returned {text!r:.80}.")
        return list(texts)

    async def aclose(self) -> None:
        """Nothing to free."""


def is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _takes_n(function: Callable[..., Any]) -> bool:
    """Whether the function wants to know how many texts to return."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (positional[1].name == "n" or positional[1].default is inspect.Parameter.empty)
