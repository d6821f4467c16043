"""One event loop on one daemon thread, for callers that have none.

The core is async; ``BestOfN.__call__`` and ``BestOfN.map`` run it here, so there are no sync twins to keep in step.
Ctrl-C cancels what runs here once, waits for its clean-up, and raises KeyboardInterrupt; a second one does not wait.

Not anyio's portal: it cancels at every await until the task is over, so a clean-up that awaits (the abort of a
request) is cancelled too, and it gives the caller control back before that clean-up is done.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from bon.errors import InputError

T = TypeVar("T")

_END: Any = object()
_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""Process id -> its loop. After a fork the parent's stays referenced: to close it would close it for the parent too."""


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end.

    Raises:
        InputError: this is the portal's own thread, which would wait for itself.
    """
    try:
        _refuse_inside()
    except InputError:
        coroutine.close()
        raise
    work = _Work(coroutine)
    try:
        return work.start().result()
    except BaseException:
        work.end()
        raise


def iterate(items: AsyncGenerator[T, None]) -> Generator[T, None, None]:
    """Iterate over an async generator; leaving early closes it.

    Raises:
        InputError: this is the portal's own thread, which would wait for itself.
    """
    _refuse_inside()
    steps = _Steps(items)
    try:
        steps.work.start()
        while (item := steps.ask().result()) is not _END:
            yield item
    finally:
        steps.work.end()


async def there(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine that has to run on the portal's loop, from whatever loop this is."""
    if _inside():
        return await coroutine
    work = _Work(coroutine)
    try:
        return await asyncio.wrap_future(work.start())
    except asyncio.CancelledError:
        await work.ended()
        raise


async def across(items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Iterate over what has to run on the portal's loop, from whatever loop this is; leaving closes it there."""
    if _inside():
        async with aclosing(items):
            async for item in items:
                yield item
        return
    steps = _Steps(items)
    try:
        steps.work.start()
        while (item := await asyncio.wrap_future(steps.ask())) is not _END:
            yield item
    finally:
        await steps.work.ended()


async def pull(items: Iterable[T]) -> AsyncGenerator[T, None]:
    """Iterate over what may block, each item when it is asked for, on a thread of its own.

    Leaving does not wait for an item that is still to come.
    """
    asked: SimpleQueue[Future[T] | None] = SimpleQueue()

    def read() -> None:
        iterator: Iterator[T] | None = None
        while (future := asked.get()) is not None:
            try:
                iterator = iter(items) if iterator is None else iterator
                item = next(iterator, _END)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(item)

    threading.Thread(target=read, name="bon-read", daemon=True).start()
    try:
        while True:
            asked.put(future := _promise())
            if (item := await asyncio.wrap_future(future)) is _END:
                return
            yield item
    finally:
        asked.put(None)


def _loop() -> asyncio.AbstractEventLoop:
    pid = os.getpid()
    if pid not in _loops:
        loop = asyncio.new_event_loop()
        if _loops.setdefault(pid, loop) is loop:
            threading.Thread(target=_serve, args=(loop,), name="bon", daemon=True).start()
        else:  # another thread was faster
            loop.close()
    return _loops[pid]


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        # A task that calls sys.exit() stops the loop. Its caller gets the SystemExit; the other tasks go on.
        with suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


def _inside() -> bool:
    try:
        return asyncio.get_running_loop() is _loop()
    except RuntimeError:
        return False


def _refuse_inside() -> None:
    if _inside():
        raise InputError(
            "a blocking call was made on bon's own event loop, where it would wait for itself for ever. In an async "
            "function write 'await bon.run(prompt)' in place of 'bon(prompt)', and 'async for' over bon.stream(...) "
            "in place of bon.map(...)."
        )


def _promise() -> Future[Any]:
    """A future that whoever waits for it cannot cancel, so that setting its result never fails."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


class _Work(Generic[T]):
    """A coroutine as a task of the portal's loop, held from another thread; ``done`` is set after its clean-up.

    Made and started in two steps: a Ctrl-C that comes with the start is inside the ``try`` that ends it.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self.loop = _loop()
        self.done: Future[T] = _promise()
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None

    def start(self) -> Future[T]:
        """Start the task."""
        self.loop.call_soon_threadsafe(self._started)
        return self.done

    def _started(self) -> asyncio.Task[T]:
        if self._task is None:
            self._task = self.loop.create_task(self._coroutine)
            self._task.add_done_callback(self._settle)
        return self._task

    def _settle(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.done.set_exception(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(task.result())

    def _cancel(self) -> bool:
        """Cancel the task where it still runs; return whether its end can be waited for."""
        # When Python ends, the loop's thread has stopped. A forked child holds a copy; the work is the parent's.
        if self.done.done() or sys.is_finalizing() or self.loop is not _loop():
            return False
        self.loop.call_soon_threadsafe(lambda: self._started().cancel())
        return not _inside()  # the garbage collector may close an iterator on any thread

    def end(self) -> None:
        """Cancel the task and wait for its clean-up, whose error is raised."""
        if self._cancel():
            with suppress(asyncio.CancelledError):
                self.done.result()

    async def ended(self) -> None:
        """Cancel the task and wait for its clean-up, whose error is raised; from another loop."""
        if self._cancel():
            done = asyncio.wrap_future(self.done)
            await asyncio.wait([done])
            with suppress(asyncio.CancelledError):
                done.result()


class _Steps(Generic[T]):
    """An async generator whose steps one single task makes, so that it may hold a task group or a timeout open."""

    def __init__(self, items: AsyncGenerator[T, None]) -> None:
        self._items = items
        self._asked: asyncio.Queue[Future[T]] = asyncio.Queue()
        self.work = _Work(self._drive())

    def ask(self) -> Future[T]:
        """Have the next step made; its future holds the item, the error, or ``_END``."""
        future = _promise()
        self.work.loop.call_soon_threadsafe(self._asked.put_nowait, future)
        return future

    async def _drive(self) -> None:
        async with aclosing(self._items):
            cancelled = asyncio.current_task().cancelling  # type: ignore[union-attr]
            while not cancelled():  # a generator may take the cancellation for itself and go on
                future = await self._asked.get()
                try:
                    future.set_result(await anext(self._items, _END))
                except BaseException as error:
                    future.set_exception(error)
                    if not isinstance(error, Exception):
                        raise
