"""One event loop on one daemon thread, for callers that have none.

The core is async; ``BestOfN.__call__`` and ``BestOfN.map`` run it here, so there are no sync twins to keep in step.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from contextlib import aclosing, suppress
from functools import cache
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="bon", daemon=True).start()
    return loop


async def there(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine that has to run on the background loop, from whatever loop this is."""
    if asyncio.get_running_loop() is _loop():
        return await coroutine
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, _loop()))


async def across(items: AsyncIterator[T]) -> AsyncIterator[T]:
    """Iterate over what has to run on the background loop, from whatever loop this is; leaving closes it there."""
    here, loop = asyncio.get_running_loop(), _loop()
    if here is loop:
        async with aclosing(items) as own:  # type: ignore[type-var]
            async for item in own:
                yield item
        return
    arrived: asyncio.Queue[tuple[bool, T | BaseException | None]] = asyncio.Queue()
    pumps: list[asyncio.Task[None]] = []

    def send(ended: bool, value: T | BaseException | None) -> None:
        with suppress(RuntimeError):  # the caller's loop is gone: nobody listens any more
            here.call_soon_threadsafe(arrived.put_nowait, (ended, value))

    async def pump() -> None:
        async with aclosing(items) as source:  # type: ignore[type-var]
            async for item in source:
                send(False, item)

    def start() -> None:
        task = loop.create_task(pump())
        task.add_done_callback(lambda t: send(True, None if t.cancelled() else t.exception()))
        pumps.append(task)

    loop.call_soon_threadsafe(start)
    ended = False
    try:
        while True:
            ended, value = await arrived.get()
            if isinstance(value, BaseException) and ended:
                raise value
            if ended:
                return
            yield value  # type: ignore[misc]
    finally:
        loop.call_soon_threadsafe(lambda: pumps[0].cancel())
        while not ended:
            ended, _ = await arrived.get()


async def pull(items: Iterable[T]) -> AsyncIterator[T]:
    """Iterate over what may block, each item when it is asked for, on a thread of its own.

    Leaving does not wait for an item that is still to come.
    """
    loop, iterator, end = asyncio.get_running_loop(), iter(items), object()
    asked: SimpleQueue[asyncio.Future[Any] | None] = SimpleQueue()

    def settle(future: asyncio.Future[Any], item: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_result(item) if error is None else future.set_exception(error)

    def read() -> None:
        while (future := asked.get()) is not None:
            item: Any = end
            error = None
            try:
                item = next(iterator, end)
            except BaseException as raised:
                error = raised
            with suppress(RuntimeError):  # the caller's loop is gone: nobody listens any more
                loop.call_soon_threadsafe(settle, future, item, error)

    threading.Thread(target=read, name="bon-read", daemon=True).start()
    try:
        while True:
            asked.put(future := loop.create_future())
            if (item := await future) is end:
                return
            yield item
    finally:
        asked.put(None)


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
