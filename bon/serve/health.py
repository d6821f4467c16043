"""Whether the models answer.

Ready is about the models, not about a request: when a request fails for a reason that may be a model's, the models are
asked something of the server's own, and that decides. While they fail they are asked again and again, so a model behind
HTTP recovers by itself; one inside this process, once dead, does not: restart the process when ``/ready`` keeps failing
(``/health`` only says that the process answers). Servers behind this one are asked at start as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from bon.best_of_n import BestOfN
from bon.engines.base import Remote
from bon.errors import InputError
from bon.serve.admission import Admission
from bon.serve.failures import BROKEN, ApiError
from bon.types import Result

log = logging.getLogger("bon.serve")
PROBE_EVERY_S = 5.0
PROBE_TAKES_S = 30.0
START_TAKES_S = 5.0
Question = Callable[[], Awaitable[None]]


class Health:
    """Watches outcomes, and asks the models after a failure.

    Args:
        bon: what to ask.
        admission: questions take their turn like any request.

    Attributes:
        reason: why no model answers; None when all is well.
    """

    def __init__(self, bon: BestOfN, admission: Admission) -> None:
        self._bon = bon.replace(n=1, sampling=bon.sampling.replace(max_tokens=1))
        self._admission = admission
        self._asking: asyncio.Task[None] | None = None
        self.reason: str | None = None

    async def start(self) -> None:
        """Ask the servers behind this one whether they are there; goes on doing so where they take too long."""
        remote = [engine for engine in (self._bon.policy, *self._bon.scorer.engines) if isinstance(engine, Remote)]
        if remote:
            self.reason = "the model's server has not answered yet"

            async def check() -> None:
                for engine in remote:
                    async with asyncio.timeout(PROBE_TAKES_S):
                        await engine.check()

            with suppress(TimeoutError):
                async with asyncio.timeout(START_TAKES_S):
                    await self._try(check)
            if self.reason is not None:
                self._ask(check)

    def saw(self, outcome: Result | BaseException) -> None:
        """Take the outcome of a run into account."""
        if isinstance(outcome, BROKEN):
            self._ask(self._probe)
        elif isinstance(outcome, Result) and set(outcome.counts) != {"late"}:
            self._say(None)

    async def aclose(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    def _ask(self, question: Question) -> None:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._until_well(question))

    async def _until_well(self, question: Question) -> None:
        while True:
            if await self._try(question):
                return
            await asyncio.sleep(PROBE_EVERY_S)

    async def _try(self, question: Question) -> bool:
        try:
            await question()
            self._say(None)
        except ApiError:  # no room for a question now; the requests that are in it will tell
            pass
        except Exception as error:  # one of a function of the user's says nothing about a model
            users = isinstance(error, InputError) and not isinstance(error, BROKEN)
            self._say(None if users else str(error) or type(error).__name__)
        return self.reason is None

    async def _probe(self) -> None:
        ticket = self._admission.ticket()
        try:
            await ticket.turn()
            async with asyncio.timeout(PROBE_TAKES_S):
                await self._bon.run("Say yes.")
        finally:
            ticket.leave()

    def _say(self, reason: str | None) -> None:
        if reason is None and self.reason is not None:
            log.info("engine works again", extra={"fields": {"event": "ready"}})
        elif reason is not None and reason != self.reason:
            log.error("engine failed", extra={"fields": {"event": "unready", "reason": reason}})
        self.reason = reason
