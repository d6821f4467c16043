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
        self._queue: deque[asyncio.Future[None]] = deque()
        self._seconds = 1.0  # how long a request runs, smoothed

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    def ticket(self) -> Ticket:
        """Let a request in.

        Raises:
            ApiError: 429 when the queue is full, 503 while the server drains.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down.", "draining", headers={"retry-after": "5"})
        if self.running >= self.max_running and self.waiting >= self.max_waiting:
            seconds = max(1, math.ceil(self._seconds * (self.waiting + 1) / self.max_running))
            raise ApiError(
                429,
                f"the server is busy: {self.running} requests run and {self.waiting} wait. Try again in {seconds} s.",
                "overloaded",
                headers={"retry-after": str(seconds)},
            )
        return Ticket(self)

    def _enter(self) -> asyncio.Future[None]:
        turn = asyncio.get_running_loop().create_future()
        if self.running < self.max_running:
            self.running += 1
            turn.set_result(None)
        else:
            self._queue.append(turn)
        return turn

    def _leave(self, turn: asyncio.Future[None], ran: float | None) -> None:
        if turn in self._queue:
            self._queue.remove(turn)
        else:
            self.running -= 1
            if ran is not None:
                self._seconds += 0.2 * (ran - self._seconds)
        while self._queue and self.running < self.max_running:
            self.running += 1
            self._queue.popleft().set_result(None)


class Ticket:
    """A request's place, from admission until ``leave``; ``queue_s`` is how long it waited."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._entered = perf_counter()
        self._turn: asyncio.Future[None] | None = admission._enter()
        self._started: float | None = None

    @property
    def position(self) -> int:
        """Place in the queue, from 1; 0 when it runs or has left."""
        queue = self._admission._queue
        return queue.index(self._turn) + 1 if self._turn is not None and self._turn in queue else 0

    @property
    def queue_s(self) -> float:
        """Seconds spent waiting."""
        return (self._started or perf_counter()) - self._entered

    async def turn(self) -> None:
        """Wait for this request's turn."""
        assert self._turn is not None
        await asyncio.shield(self._turn)  # a cancelled wait leaves the place in the queue for ``leave`` to give back
        self._started = perf_counter()

    def leave(self) -> None:
        """Give the place to the next one; a second call does nothing."""
        turn, self._turn = self._turn, None
        if turn is not None:
            self._admission._leave(turn, None if self._started is None else perf_counter() - self._started)
