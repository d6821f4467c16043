"""One event loop on one daemon thread, for callers that have none.

The core is async; ``BestOfN.__call__`` and ``BestOfN.map`` run it here, so there are no sync twins to keep in step.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="bon", daemon=True).start()
    return loop


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end; Ctrl-C cancels it and waits until it has cleaned up."""
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return future.result()
    except BaseException:
        if not future.done():
            future.cancel()
        raise


def iterate(items: AsyncIterator[T]) -> Iterator[T]:
    """Iterate over an async iterator; leaving the loop early closes it."""

    async def step() -> tuple[bool, T | None]:
        try:
            return True, await anext(items)
        except StopAsyncIteration:
            return False, None

    try:
        while True:
            more, item = run(step())
            if not more:
                return
            yield item  # type: ignore[misc]
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            run(close())
