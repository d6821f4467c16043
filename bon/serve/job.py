"""One request's work, from its place in the queue to its result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request

from bon.engines.base import Partial
from bon.serve.admission import Ticket
from bon.serve.failures import ApiError, ClientGone, bad
from bon.serve.plan import Plan
from bon.types import Candidate, Result, Score

T = TypeVar("T")


class Job:
    """Waits for its turn, then runs; it starts when it is made and leaves the queue when it ends.

    Args:
        plan: what to run.
        ticket: its place.
        ended: called with the outcome, a result or what was raised.

    Attributes:
        events: candidates and scores as they come, and None when the work has ended.
        texts: of the candidates that are being written, where the client wants to see all.
        task: ends with the ``Result``.
    """

    def __init__(self, plan: Plan, ticket: Ticket, ended: Callable[[Job, Result | BaseException], None]) -> None:
        self.plan, self.ticket, self._ended = plan, ticket, ended
        self.events: asyncio.Queue[Candidate | Score | None] = asyncio.Queue()
        self.texts: dict[int, str] = {}
        self._sampled, self._scored = set[int](), set[int]()
        self._best: float | None = None
        self._stopped: ApiError | None = None
        self.task = asyncio.create_task(self._work())
        self.task.add_done_callback(self._done)

    async def _work(self) -> Result:
        try:
            return await self._run()
        except asyncio.CancelledError:
            raise self._stopped or asyncio.CancelledError from None

    async def _run(self) -> Result:
        deadline = self.plan.deadline_s
        try:
            async with asyncio.timeout(deadline):
                await self.ticket.turn()
        except TimeoutError:
            said = f"the deadline of {deadline:g} s passed before it was this request's turn."
            raise ApiError(408, said, "deadline_exceeded", "best_of_n.deadline_s") from None
        left = None if deadline is None else max(0.0, deadline - self.ticket.queue_s)
        follow = self._follow if self.plan.request.stream and self.plan.request.options.return_candidates else None
        return await self.plan.bon.run(self.plan.task, callback=self._tell, follow=follow, deadline=left)

    def _done(self, task: asyncio.Task[Result]) -> None:
        self.ticket.leave()
        self.events.put_nowait(None)
        self._ended(self, ClientGone() if task.cancelled() else task.exception() or task.result())

    def _follow(self, partial: Partial) -> None:
        self.texts[partial.sample_index] = partial.text

    def _tell(self, event: Candidate | Score) -> None:
        if isinstance(event, Candidate):
            self._sampled.add(event.index)
            self.texts.pop(event.index, None)
            if self.plan.bon.sampling.logprobs and event.text and event.logprobs is None:
                # Nor will the others have any.
                self.stop(bad("logprobs", "the policy does not have them.", "unsupported_parameter"))
        else:
            self._scored.add(event.candidate)
            if event.reward is not None and (self._best is None or event.reward > self._best):
                self._best = event.reward
        self.events.put_nowait(event)

    def progress(self) -> dict[str, object]:
        """How far the work is, for a stream."""
        if place := self.ticket.position:
            return {"event": "queued", "position": place}
        done = {"sampled": len(self._sampled), "scored": len(self._scored), "n": self.plan.bon.n}
        return {"event": "progress", **done, "best_reward": self._best}

    def stop(self, error: ApiError) -> None:
        """Stop the work; the client gets the error."""
        self._stopped = error
        self.task.cancel()

    async def abort(self) -> None:
        """Stop the work and wait until it has stopped."""
        self.task.cancel()
        await asyncio.wait([self.task])


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Await ``work``, which is cancelled when the client closes the connection.

    Raises:
        ClientGone: the client closed the connection, and ``work`` has stopped.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for future in (working, watching):
            future.cancel()
        await asyncio.wait([working, watching])
