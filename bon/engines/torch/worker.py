"""One thread runs the model; event loops listen to it.

Everything that computes runs in the worker thread, one call after another, so nothing there needs a lock; the work of
one call may take along what the next one wants. What belongs to the caller (``keep``, the queue of results) is touched
in the caller's event loop only. The few facts that both sides read are here, behind one lock.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import deque
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
        work: what to run in the worker thread.
        plan: what the call wants, for the work of another that may take it along.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Callable[[Call], object], plan: Any = None) -> None:
        self._loop, self.work, self.plan = loop, work, plan
        self._stopped = threading.Event()
        self.ended = False
        self.failure: BaseException | None = None
        self.results: asyncio.Queue[Any] = asyncio.Queue()

    @property
    def stopped(self) -> bool:
        """Whether the work shall end."""
        return self._stopped.is_set()

    def check(self) -> None:
        """Raise StoppedError where the work shall end."""
        if self.stopped:
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
        self._waiting: deque[Call] = deque()
        self._closed = False

    async def stream(self, work: Callable[[Call], object], plan: Any = None) -> AsyncGenerator[Any, None]:
        """Run ``work`` in the thread and yield what it emits; closing the generator stops it.

        Args:
            work: gets the call.
            plan: see ``Call``; None for work that nothing takes along.

        Raises:
            EngineError: the engine is closed, or was closed before the work was done.
        """
        call = Call(asyncio.get_running_loop(), work, plan)
        with self._lock:
            if self._closed:
                raise EngineError(f"the engine {self._name!r} is closed.")
            self._calls.add(call)
            self._waiting.append(call)
            self._thread.submit(self._run)
        try:
            while (item := await call.results.get()) is not _DONE:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            call.stop()
            with self._lock:
                self._calls.discard(call)

    def _run(self) -> None:
        with self._lock:
            call = self._waiting.popleft() if self._waiting else None
        if call is not None:  # else the work of another took it along
            failure = None
            try:
                call.check()
                call.work(call)
            except BaseException as error:
                failure = error
            self.end(call, failure)

    def along(self, fits: Callable[[Any], bool]) -> Call | None:
        """Take the call that waits first, where its plan fits; called by the work under way."""
        with self._lock:
            return self._waiting.popleft() if self._waiting and fits(self._waiting[0].plan) else None

    def end(self, call: Call, error: BaseException | None = None) -> None:
        """Tell the caller that its call is over, once; called in the worker thread."""
        if call.ended:
            return
        call.ended = True
        outcome = _DONE if error is None or isinstance(error, StoppedError) else error
        if outcome is _DONE and call.failure is not None:
            outcome = call.failure
        if outcome is _DONE and self._closed:
            outcome = EngineError(f"the engine {self._name!r} was closed.")
        call.emit(outcome)

    async def aclose(self) -> None:
        """Stop every call after its current step and end the thread."""
        with self._lock:
            self._closed = True
            for call in self._calls:
                call.stop()
        await asyncio.to_thread(self._thread.shutdown)
