"""One request's work, from its place in the queue to its result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from bon.serve.admission import Ticket
from bon.serve.failures import ApiError, ClientGone
from bon.serve.plan import Plan
from bon.types import Candidate, Result, Score

T = TypeVar("T")


class Job:
    """Waits for its turn, then runs; it has begun once it exists, and its place is given back when it ends.

    Args:
        plan: what to run.
        ticket: its place.
        ended: told of the outcome, a result or what was raised.

    Attributes:
        events: candidates and scores as they come, and None when the work has ended.
        task: ends with the ``Result``.
    """

    def __init__(self, plan: Plan, ticket: Ticket, ended: Callable[[Job, Result | BaseException], None]) -> None:
        self.plan, self.ticket = plan, ticket
        self.events: asyncio.Queue[Candidate | Score | None] = asyncio.Queue()
        self.sampled, self.scored = 0, 0
        self.best: float | None = None
        self.task = asyncio.create_task(self._work())
        self.task.add_done_callback(self._done)
        self._ended = ended
        self._stopped: ApiError | None = None

    async def _work(self) -> Result:
        try:
            return await self._run()
        except asyncio.CancelledError:
            if self._stopped is None:
                raise
            raise self._stopped from None

    async def _run(self) -> Result:
        deadline = self.plan.deadline_s
        try:
            async with asyncio.timeout(deadline):
                await self.ticket.turn()
        except TimeoutError:
            said = f"the deadline of {deadline:g} s passed before it was this request's turn."
            raise ApiError(408, said, "deadline_exceeded", "best_of_n.deadline_s") from None
        left = None if deadline is None else max(0.0, deadline - self.ticket.queue_s)
        return await self.plan.bon.run(self.plan.task, watch=self._tell, deadline=left)

    def _done(self, task: asyncio.Task[Result]) -> None:
        self.ticket.leave()
        self.events.put_nowait(None)
        self._ended(self, ClientGone() if task.cancelled() else task.exception() or task.result())

    def _tell(self, event: Candidate | Score) -> None:
        if isinstance(event, Candidate):
            self.sampled += 1
        else:
            self.scored += 1
            if event.reward is not None and (self.best is None or event.reward > self.best):
                self.best = event.reward
        self.events.put_nowait(event)

    def progress(self) -> dict[str, object]:
        """How far it is, for a stream."""
        if place := self.ticket.position:
            return {"event": "queued", "position": place}
        return {
            "event": "progress",
            "sampled": self.sampled,
            "scored": self.scored,
            "n": self.plan.bon.n,
            "best_reward": self.best,
        }

    def stop(self, error: ApiError) -> None:
        """Stop all of it; the client is told why."""
        self._stopped = error
        self.task.cancel()

    async def abort(self) -> None:
        """Stop all of it and wait until it has stopped."""
        self.task.cancel()
        await asyncio.wait([self.task])


async def unless_gone(gone: Awaitable[None], work: Awaitable[T]) -> T:
    """Await ``work`` for as long as the client is there.

    Args:
        gone: ends when the client has closed the connection.
        work: is cancelled then.

    Raises:
        ClientGone: the client closed the connection; ``work`` has stopped.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for future in (working, watching):
            future.cancel()
        await asyncio.wait([working, watching])
