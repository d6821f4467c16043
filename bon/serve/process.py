"""The process: uvicorn, and a drain on SIGTERM.

After the first SIGTERM or Ctrl-C running and waiting requests are finished; new ones get 503 and ``/ready`` fails, so
that a load balancer goes elsewhere. A second one, or ``drain_s`` seconds, end the process.
"""

from __future__ import annotations

import logging
from time import monotonic
from types import FrameType

import uvicorn
from fastapi import FastAPI

from bon.best_of_n import BestOfN
from bon.serve.app import Server, create_app
from bon.serve.logs import log_json
from bon.serve.settings import Settings

log = logging.getLogger("bon.serve")
_CLOSE_S = 2  # seconds for responses that are being written when the drain ends


class DrainingServer(uvicorn.Server):
    """uvicorn, except that it goes on listening while it drains."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._give_up_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at once the second time."""
        if self._server.admission.draining:
            super().handle_exit(sig, frame)
            return
        self._server.admission.draining = True
        self._give_up_at = monotonic() + self._server.settings.drain_s

    async def on_tick(self, counter: int) -> bool:
        """End when no request is left; stop those that are left when the time is up."""
        admission = self._server.admission
        left = admission.running + admission.waiting
        if self._give_up_at is not None and monotonic() > self._give_up_at:
            log.warning("drain cut off", extra={"fields": {"event": "drain_cut_off", "stopped": left}})
            self._server.stop()
            self.should_exit = True
        elif admission.draining and not left and not self.should_exit:
            log.info("drained", extra={"fields": {"event": "drained"}})
            self.should_exit = True
        return await super().on_tick(counter)


def build(app: FastAPI) -> DrainingServer:
    """A uvicorn server for an application."""
    server: Server = app.state.server
    config = uvicorn.Config(
        app,
        host=server.settings.host,
        port=server.settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_S,
        timeout_keep_alive=75,
    )
    return DrainingServer(config, server)


def serve(bon: BestOfN, settings: Settings) -> None:
    """Serve until a signal ends it, then close ``bon``; blocks."""
    log_json()
    build(create_app(bon, settings)).run()
