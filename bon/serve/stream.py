"""Server-sent events: open at once, alive while candidates are made, then the winner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from time import perf_counter

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bon.serve.answers import Answer, failure
from bon.serve.failures import ClientGone, api_error
from bon.serve.job import Job, unless_gone

HEARTBEAT = b": still here\n\n"


class EventStream(Response):
    """Streams a job's progress and its answer; a client that leaves takes the job with it.

    Args:
        job: the work.
        heartbeat_s: send a comment when nothing was sent for so long.
        status_s: tell of the progress so often at most.
    """

    media_type = "text/event-stream"

    def __init__(self, job: Job, heartbeat_s: float, status_s: float) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._job, self._answer = job, Answer(job.plan)
        self._heartbeat_s, self._status_s = heartbeat_s, status_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop when the client is gone."""
        try:
            await unless_gone(disconnected(Request(scope, receive)), self._send(send))
        except ClientGone:
            pass
        finally:
            await self._job.abort()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._chunks()) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[bytes]:
        yield self._answer.opening()
        async with aclosing(self._while_working()) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk
        try:
            result = self._job.task.result()
            closing = list(self._answer.closing(result, self._job.ticket.queue_s))
        except Exception as error:  # the response has begun: what went wrong can only be said inside it
            yield failure(api_error(error, self._job.plan.passed))
            return
        yield b"".join(closing[:1])
        yield b"".join(closing[1:])

    async def _while_working(self) -> AsyncIterator[bytes]:
        """Every event where the client wants all candidates, else now and then how far the work is."""
        job, told = self._job, -self._status_s
        if job.ticket.position:
            yield self._answer.progress(job.progress())
        while True:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    event = await job.events.get()
            except TimeoutError:
                yield self._answer.progress(job.progress()) if job.ticket.position else HEARTBEAT
                continue
            if event is None:
                return
            if job.plan.return_candidates:
                yield self._answer.progress(self._answer.news(event))
            elif perf_counter() - told >= self._status_s:
                told = perf_counter()
                yield self._answer.progress(job.progress())


async def disconnected(request: Request) -> None:
    """Return once the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
