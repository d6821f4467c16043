"""Server-sent events: open at once, alive while candidates are made, then the winner.

Not sse-starlette: its pings come at fixed intervals, busy or not, and its clean-up after a client left runs in a
cancelled scope, where the abort of the work cannot be awaited.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from time import perf_counter
from typing import Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bon.serve.answers import Answer, failure
from bon.serve.failures import ClientGone, api_error
from bon.serve.job import Job, while_connected
from bon.types import Candidate, Score

HEARTBEAT = b": still here\n\n"


class EventStream(Response):
    """Streams a job's progress and its answer; when the client leaves, the job is aborted.

    Args:
        job: the work.
        heartbeat_s: send a comment when nothing was sent for so long.
        status_s: report the progress so often at most.
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
            with suppress(ClientGone):
                await while_connected(Request(scope, receive), self._send(send))
        finally:
            await self._job.abort()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        yield self._answer.opening()
        async with aclosing(self._while_working()) as chunks:
            async for chunk in chunks:
                yield chunk
        try:
            result = self._job.task.result()
            first, *rest = self._answer.closing(result, self._job.ticket.queue_s)
        except Exception as error:  # the response has begun: the error can only be sent inside it
            yield failure(api_error(error, self._job.plan.passed))
            return
        yield first
        yield b"".join(rest)

    async def _while_working(self) -> AsyncGenerator[bytes, None]:
        """Every event and how texts grow where the client wants all candidates, else now and then how far it all is."""
        job, answer, everything = self._job, self._answer, self._job.plan.request.options.return_candidates
        pause = min(max(0.01, self._status_s), self._heartbeat_s) if everything else self._heartbeat_s
        said, told = perf_counter(), -self._status_s  # when anything was sent, and when how far the work is
        if job.ticket.position:
            yield answer.progress(job.progress())
        while True:
            event: Candidate | Score | Literal["pause"] | None = "pause"
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    event = await job.events.get()
            if event is None:
                return
            news = [answer.news(event)] if everything and event != "pause" else []
            if perf_counter() - told >= self._status_s and (everything or event != "pause"):
                told = perf_counter()
                news += answer.growth(job.texts) if everything else [job.progress()]
            for about in news:
                yield answer.progress(about)
            if news or perf_counter() - said >= self._heartbeat_s:
                if not news:
                    yield answer.progress(job.progress()) if job.ticket.position else HEARTBEAT
                said = perf_counter()
