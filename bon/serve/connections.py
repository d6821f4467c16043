"""What a connection may cost before it has brought a request, and after its client has stopped to read.

uvicorn waits for ever for the rest of a request's head, and takes connections until the process has no file descriptor
left, which it needs for the models' servers as well.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

MOST = 4096


class Connection(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """A connection whose client must send a head, and read what it gets, in time.

    Where there are too many, the one that has been without a request for the longest makes room.
    """

    head_s: float
    stall_s: float
    most: int
    idle: dict[Connection, None]  # without a request under way, the oldest first

    def connection_made(self, transport: Any) -> None:
        """Take its place."""
        super().connection_made(transport)
        self._timers = dict[str, asyncio.TimerHandle]()
        self.idle[self] = None
        self._after("head", self.head_s)
        if len(self.connections) > self.most:
            oldest = next(iter(self.idle))
            del self.idle[oldest]
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take bytes; a head begins with the first after a request."""
        if self._at_rest and "head" not in self._timers:
            self._after("head", self.head_s)
        super().data_received(data)
        if not self._at_rest:
            self._no_longer("head")
            self.idle.pop(self, None)

    def on_response_complete(self) -> None:
        """Be idle again."""
        super().on_response_complete()
        if self._at_rest and not self.transport.is_closing():
            self.idle[self] = None

    def pause_writing(self) -> None:
        """Give the client some time to read."""
        super().pause_writing()
        self._after("stall", self.stall_s)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        self._no_longer("stall")

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave."""
        super().connection_lost(exc)
        self.idle.pop(self, None)
        for name in [*self._timers]:
            self._no_longer(name)

    @property
    def _at_rest(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _after(self, name: str, seconds: float) -> None:
        self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _no_longer(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()


def connections(head_s: float, stall_s: float, most: int | None) -> type[Connection]:
    """The protocol of one server.

    Args:
        head_s: seconds for the head of a request.
        stall_s: seconds in which a client must read what it was sent.
        most: connections at the same time; None takes half of the file descriptors that the process may have, as it
            needs as many for the models' servers.
    """
    if most is None:
        most = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2, MOST)
    return type("Connection", (Connection,), {"head_s": head_s, "stall_s": stall_s, "most": most, "idle": {}})
