"""One thread runs the model; event loops listen to it.

Everything that computes runs in the worker thread, one call after another, so nothing there needs a lock. What belongs
to the caller (``keep``, the queue of results) is touched in the caller's event loop only. The few facts that both sides
read are here, behind one lock.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

from bon.errors import EngineError

T = TypeVar("T")

_DONE = object()
_PATIENCE_S = 0.1  # between two looks whether the call that an answer is awaited for has been stopped


class StoppedError(Exception):
    """Ends the work of a call that was stopped; never reaches a caller."""


class Call:
    """One call under way, as its work in the worker thread sees it.

    Args:
        loop: the caller's event loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._stopped = threading.Event()
        self.failure: BaseException | None = None
        self.results: asyncio.Queue[Any] = asyncio.Queue()

    def check(self) -> None:
        """Raise StoppedError where the work shall end."""
        if self._stopped.is_set():
            raise StoppedError

    def stop(self) -> None:
        """Let the work end after its current step."""
        self._stopped.set()

    def emit(self, item: Any) -> None:
        """Hand a result to the caller."""
        self._post(lambda: self.results.put_nowait(item))

    def ask(self, function: Callable[[], T]) -> T:
        """Call ``function`` in the caller's event loop, and wait for what it returns.

        Raises:
            StoppedError: it raised, and its caller gets that error as it is; or the call was stopped in the meantime.
        """
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except BaseException as error:
                self.failure = error
                self.stop()

        self._post(run)
        while not answer.done():
            self.check()
            concurrent.futures.wait([answer], _PATIENCE_S)
        return answer.result()

    def _post(self, function: Callable[[], object]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the event loop is closed: nobody listens any more
            self.stop()


class Worker:
    """The thread that runs one model.

    Args:
        name: of the engine, for messages.
        start: called in the thread before anything else.
    """

    def __init__(self, name: str, start: Callable[[], object]) -> None:
        self._name = name
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="bon-torch", initializer=start)
        self._lock = threading.Lock()
        self._calls: set[Call] = set()
        self._closed = False

    async def stream(self, work: Callable[[Call], object]) -> AsyncGenerator[Any, None]:
        """Run ``work`` in the thread and yield what it emits; closing the generator stops it.

        Raises:
            EngineError: the engine is closed, or was closed before the work was done.
        """
        call = Call(asyncio.get_running_loop())

        def run() -> None:
            outcome: object = _DONE
            try:
                call.check()
                work(call)
            except StoppedError:
                outcome = call.failure or _DONE
            except BaseException as error:
                outcome = error
            if self._closed and outcome is _DONE:
                outcome = EngineError(f"the engine {self._name!r} was closed.")
            call.emit(outcome)

        with self._lock:
            if self._closed:
                raise EngineError(f"the engine {self._name!r} is closed.")
            self._calls.add(call)
            self._thread.submit(run)
        try:
            while (item := await call.results.get()) is not _DONE:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            call.stop()
            with self._lock:
                self._calls.discard(call)

    async def aclose(self) -> None:
        """Stop every call after its current step and end the thread."""
        with self._lock:
            self._closed = True
            for call in self._calls:
                call.stop()
        await asyncio.to_thread(self._thread.shutdown)
