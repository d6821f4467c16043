"""Whether the models answer.

An error of an engine makes ``/ready`` fail. It recovers with the next request that works, or with a probe: while it
fails, asking ``/ready`` samples one token now and then. A model behind HTTP therefore recovers by itself. One inside
this process, once dead, does not: restart the process when ``/ready`` keeps failing (``/health`` only says that the
process answers). What a function of the user's raises concerns its request alone.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from time import monotonic

from bon.best_of_n import BestOfN
from bon.errors import RefusedError
from bon.serve.admission import Admission
from bon.serve.failures import BROKEN, ApiError
from bon.types import Result

log = logging.getLogger("bon.serve")
PROBE_EVERY_S = 5.0
PROBE_TAKES_S = 30.0


class Health:
    """Watches outcomes, and probes after a failure.

    Args:
        bon: what to probe.
        admission: probes take their turn like any request.

    Attributes:
        reason: why no model answers; None when all is well.
    """

    def __init__(self, bon: BestOfN, admission: Admission) -> None:
        self._probe = bon.replace(n=1, sampling=bon.sampling.replace(max_tokens=1))
        self._admission = admission
        self._running: asyncio.Task[None] | None = None
        self._probed = -PROBE_EVERY_S
        self.reason: str | None = None

    def saw(self, outcome: Result | BaseException, *, probed: bool = False) -> None:
        """Take the outcome of a run into account.

        What a server behind this one refuses may be the request's own fault; a probe finds out.
        """
        if isinstance(outcome, RefusedError) and not probed:
            self._start_probe()
        elif isinstance(outcome, BROKEN):
            if self.reason is None:
                log.error("engine failed", extra={"fields": {"event": "unready", "reason": str(outcome)}})
            self.reason = str(outcome)
        elif isinstance(outcome, Result) and set(outcome.counts) != {"late"}:
            if self.reason is not None:
                log.info("engine works again", extra={"fields": {"event": "ready"}})
            self.reason = None

    def probe(self) -> None:
        """Try the models in the background if they failed and were not tried just now."""
        if self.reason is not None and monotonic() - self._probed >= PROBE_EVERY_S:
            self._start_probe()

    def _start_probe(self) -> None:
        if self._running is None or self._running.done():
            self._probed = monotonic()
            self._running = asyncio.create_task(self._try())

    async def _try(self) -> None:
        with suppress(ApiError):  # no room for a probe now
            ticket = self._admission.ticket()
            try:
                async with asyncio.timeout(PROBE_TAKES_S):
                    await ticket.turn()
                    self.saw(await self._probe.run("Say yes."))
            except BROKEN as error:
                self.saw(error, probed=True)
            except Exception as error:
                log.warning("probe failed", exc_info=error, extra={"fields": {"event": "probe_failed"}})
            finally:
                ticket.leave()
