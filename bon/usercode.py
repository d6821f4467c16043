"""A function of the user's, sync or async, as the event loop calls it; what it raises is mapped here, once."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from bon.errors import BonError, UserCodeError


def is_async(function: Callable[..., Any]) -> bool:
    """Whether it is an async function, an object with an async ``__call__``, or a partial of either."""
    function = _whole(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class UserFunction:
    """A function of a conversation and perhaps more.

    One that is not async runs on a thread of its own, one call at a time and in the order of the calls: it need not
    be thread-safe, and it takes no thread from anything else.

    Args:
        function: called with the text where the conversation is a single message, else with role-and-content dicts.
        what: "function", "scorer"; for errors.
        name: shown in tables and errors; the function's own name by default.
    """

    def __init__(self, function: Callable[..., Any], what: str, name: str | None = None) -> None:
        whole = _whole(function)
        self.name: str = name or getattr(whole, "__name__", None) or type(whole).__name__
        self._function, self._what = function, what
        self._is_async = is_async(function)
        self._threads: dict[int, ThreadPoolExecutor] = {}  # process id -> thread: a forked child's copy would not run

    async def __call__(self, messages: Sequence[Mapping[str, Any]], *args: Any, **named: Any) -> Any:
        """Call the function.

        Raises:
            UserCodeError: it raised something; a ``BonError`` that it raised stays what it is.
        """
        prompt = messages[0]["content"] if len(messages) == 1 else list(messages)
        with self._mapped():
            if self._is_async:
                result = self._function(prompt, *args, **named)
            else:
                call = functools.partial(copy_context().run, self._blocking, prompt, *args, **named)
                result = await asyncio.get_running_loop().run_in_executor(self._thread(), call)
            return await result if inspect.isawaitable(result) else result

    def _thread(self) -> ThreadPoolExecutor:
        if os.getpid() not in self._threads:
            self._threads[os.getpid()] = ThreadPoolExecutor(1, f"bon-{self.name}")
        return self._threads[os.getpid()]

    def _blocking(self, *args: Any, **named: Any) -> Any:
        with self._mapped():  # here already: a StopIteration cannot be an asyncio future's error
            return self._function(*args, **named)

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except BonError:
            raise
        except Exception as error:
            raise self.error(f"raised {type(error).__name__}: {error}") from error

    def error(self, did: str) -> UserCodeError:
        """An error that names the function."""
        return UserCodeError(f"the {self._what} {self.name!r} {did}")

    def close(self) -> None:
        """Let the thread go; a call under way is not waited for."""
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)
        self._threads.clear()


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, functools.partial):
        function = function.func
    return function
