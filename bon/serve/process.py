"""The process: uvicorn, and a drain on SIGTERM.

After the first SIGTERM or Ctrl-C running and waiting requests are finished; new ones get 503 and ``/ready`` fails, so
that a load balancer goes elsewhere. A second one, or ``drain_s`` seconds, end the process: what still runs gets 503.
"""

from __future__ import annotations

import logging
import socket
from contextlib import ExitStack
from time import monotonic
from types import FrameType

import uvicorn
from fastapi import FastAPI

from bon.best_of_n import BestOfN
from bon.errors import InputError
from bon.serve.app import Server, create_app
from bon.serve.connections import connections
from bon.serve.logs import log_json
from bon.serve.settings import Settings

log = logging.getLogger("bon.serve")
_BACKLOG = 128  # connections that asyncio may take at once, before any of them can be closed
_CLOSE_S = 2  # seconds for responses that are being written when the drain ends


class DrainingServer(uvicorn.Server):
    """uvicorn, except that it goes on listening while it drains."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server
        self._give_up_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        where = {"url": f"{url}/v1"} | ({"playground": url} if self._server.settings.shows_playground else {})
        log.info("serving %s at %s", self._server.bon, url, extra={"fields": {"event": "start", **where}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, end the second time, and at once the third."""
        if self.should_exit:
            super().handle_exit(sig, frame)
        draining, self._server.admission.draining = self._server.admission.draining, True
        self._give_up_at = 0.0 if draining else monotonic() + self._server.settings.drain_s

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
    settings = server.settings
    config = uvicorn.Config(
        app,
        http=connections(settings.head_timeout_s, settings.stall_timeout_s, settings.max_connections),
        ws="none",
        backlog=_BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_S,
        timeout_keep_alive=75,
    )
    return DrainingServer(config, server)


def bind(host: str, port: int) -> socket.socket:
    """Take an address before any model is loaded; nobody is answered yet.

    Raises:
        InputError: it cannot be had.
    """
    with ExitStack() as undo:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
            taken = undo.enter_context(socket.socket(family, kind, protocol))
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except OSError as error:
            said = f"cannot listen on port {port} of {host!r}: {error.strerror or error}."
            raise InputError(f"{said} Give another --host or --port; --port 0 takes any free one.") from error
        undo.pop_all()
        return taken


def serve(bon: BestOfN, settings: Settings, listening: socket.socket | None = None) -> None:
    """Serve until a signal ends it, then close ``bon``; blocks.

    Args:
        bon: models and defaults.
        settings: limits and names.
        listening: of ``bind``; None binds now.

    Raises:
        InputError: the address cannot be had.
    """
    log_json()
    if not settings.loopback and not settings.api_keys:
        log.warning("whoever reaches this server may use its models: no API key is set (--api-key, BON_API_KEY)")
    build(create_app(bon, settings)).run([listening or bind(settings.host, settings.port)])
