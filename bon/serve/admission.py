"""How many requests run, how many wait, and what happens to the next one."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from time import perf_counter

from bon.serve.failures import ApiError


class Admission:
    """A bounded queue in front of a bounded number of running requests, first come, first served.

    Args:
        max_running: requests that run at the same time.
        max_waiting: requests that wait for their turn.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running, self.max_waiting = max_running, max_waiting
        self.draining = False
        self.running = 0
        self._queue: deque[Ticket] = deque()
        self._seconds = 1.0  # how long a request runs, smoothed

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    def ticket(self) -> Ticket:
        """Admit a request.

        Raises:
            ApiError: 429 when the queue is full, 503 while the server drains.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down.", "draining", headers={"retry-after": "5"})
        if self.running >= self.max_running and self.waiting >= self.max_waiting:
            seconds = max(1, math.ceil(self._seconds * (self.waiting + 1) / self.max_running))
            said = f"the server is busy: {self.running} requests run and {self.waiting} wait. Try again in {seconds} s."
            raise ApiError(429, said, "overloaded", headers={"retry-after": str(seconds)})
        ticket = Ticket(self)
        self._queue.append(ticket)
        self._start()
        return ticket

    def _start(self) -> None:
        while self._queue and self.running < self.max_running:
            self.running += 1
            self._queue.popleft().called.set()

    def _left(self, ticket: Ticket, ran: float | None) -> None:
        if not ticket.called.is_set():
            self._queue.remove(ticket)
            return
        self.running -= 1
        if ran is not None:
            self._seconds += 0.2 * (ran - self._seconds)
        self._start()


class Ticket:
    """A request's place, from admission until ``leave``; ``called`` is set when it is its turn."""

    def __init__(self, admission: Admission) -> None:
        self.called = asyncio.Event()
        self._admission, self._entered = admission, perf_counter()
        self._started: float | None = None
        self._gone = False

    @property
    def position(self) -> int:
        """Place in the queue, from 1; 0 when it runs or has left."""
        queue = self._admission._queue
        return queue.index(self) + 1 if self in queue else 0

    @property
    def queue_s(self) -> float:
        """Seconds spent waiting."""
        return (self._started or perf_counter()) - self._entered

    async def turn(self) -> None:
        """Wait for this request's turn."""
        await self.called.wait()
        self._started = perf_counter()

    def leave(self) -> None:
        """Make room for the next request; a second call does nothing."""
        if not self._gone:
            self._gone = True
            self._admission._left(self, None if self._started is None else perf_counter() - self._started)
