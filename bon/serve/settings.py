"""What can be set about a server."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from bon.errors import InputError


@dataclass(frozen=True, slots=True)
class Settings:
    """How the server behaves; the models and defaults of best-of-N are those of its ``BestOfN``.

    Args:
        host, port: where it listens.
        model_names: names that clients may ask for, the policy's name if there are none.
        scorers: specs of further scorers that requests may name, each by the name before the first "=", else by the
            spec's own ("consensus:chrf" is "consensus").
        api_keys: if there are any, requests to /v1 need one of them as a bearer token.
        max_n: candidates that a request may ask for.
        max_running: requests that run at the same time; None means 64 for engines whose requests join a running batch,
            8 where an engine in this process samples for them together and scores them in turn, and 1 for a scorer
            that says itself that it takes one call at a time.
        max_waiting: requests that may wait for their turn; the next one gets 429.
        deadline_s: seconds a request may take, waiting included; requests may ask for less. None sets no limit.
        max_connections: at the same time; beyond them the one without a request for the longest is closed. None takes
            half of the open files that the process may have, and 4,096 at most.
        head_timeout_s: seconds a client may take to send the head of a request.
        stall_timeout_s: seconds in which it must read what it was sent.
        max_body_bytes: size of a request.
        body_timeout_s: seconds a client may take to send it.
        heartbeat_s: a stream on which nothing happened for so long gets a comment.
        status_s: a stream reports its progress so often at most.
        drain_s: seconds that running requests have to finish after SIGTERM.
        cors_origins: origins whose pages may call the API; none by default.
        allowed_hosts: values of the Host header to answer; None means loopback names when listening on loopback (so
            that a foreign page cannot reach the server through DNS rebinding), else any.
        playground: whether to serve the page at /; None means on loopback only.
        log_prompts: whether prompts and winning texts are written to the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_names: tuple[str, ...] = ()
    scorers: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    max_n: int = 64
    max_running: int | None = None
    max_waiting: int = 256
    deadline_s: float | None = 600.0
    max_connections: int | None = None
    head_timeout_s: float = 10.0
    stall_timeout_s: float = 60.0
    max_body_bytes: int = 4 * 1024 * 1024
    body_timeout_s: float = 30.0
    heartbeat_s: float = 10.0
    status_s: float = 0.25
    drain_s: float = 30.0
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    playground: bool | None = None
    log_prompts: bool = False

    def __post_init__(self) -> None:
        least = {"max_n": 1, "max_running": 1, "max_waiting": 0, "max_connections": 1, "max_body_bytes": 1, "port": 0}
        seconds = ("deadline_s", "head_timeout_s", "stall_timeout_s", "body_timeout_s", "heartbeat_s", "drain_s")
        for name in (*least, *seconds):
            value = getattr(self, name)
            if value is not None and not (value >= least[name] if name in least else value > 0):
                wanted = f"at least {least[name]}" if name in least else "above 0"
                raise InputError(f"{name} must be {wanted}, got {value}.")
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise InputError("an API key must be non-empty ASCII text.")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def hosts(self) -> frozenset[str] | None:
        """Host names to answer to, without port; None for any."""
        if self.allowed_hosts is not None:
            return frozenset(host.lower() for host in self.allowed_hosts)
        return frozenset({"localhost", "127.0.0.1", "[::1]", self.host.lower()}) if self.loopback else None

    @property
    def shows_playground(self) -> bool:
        """Whether / is the playground."""
        return self.loopback if self.playground is None else self.playground
