"""The outermost layer: checks hosts and keys, adds security headers, writes one log line per request."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
from hashlib import sha256
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bon.serve.failures import ApiError, api_error
from bon.serve.metrics import Metrics
from bon.serve.settings import Settings

log = logging.getLogger("bon.serve")
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Edge:
    """Wraps an ASGI application.

    Args:
        app: the application.
        settings: keys and host names.
        metrics: counts requests.
        paths: paths with a label of their own in the metrics; others are counted as "other", so that labels stay few.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths
        self._hosts = settings.hosts
        self._keys = [sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), perf_counter()
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = "req-" + secrets.token_hex(12)
        fields: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = fields
        status, first_byte = 0, None

        async def guarded(message: Message) -> None:
            nonlocal status, first_byte
            if message["type"] == "http.response.start":
                status = message["status"]
                outgoing = MutableHeaders(scope=message)
                outgoing["x-request-id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    outgoing.setdefault(name, value)
            elif first_byte is None:
                first_byte = perf_counter() - started
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, receive, guarded)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("request failed", extra={"fields": {"event": "error", "request_id": request_id}})
            if status == 0:
                await api_error(error).response()(scope, receive, guarded)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.http.labels(path, str(status or 499)).inc()
            if first_byte is not None and scope["path"].startswith("/v1/"):
                self._metrics.first_byte.observe(first_byte)
            line = {
                "event": "request",
                "request_id": request_id,
                "method": scope["method"][:20],
                "path": scope["path"][:200],
                "status": status or 499,
                "duration_ms": round((perf_counter() - started) * 1000, 2),
                **fields,
            }
            log.info("%s %s", scope["method"][:20], path, extra={"fields": line})

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = re.sub(r":\d*$", "", headers.get("host", "").lower())
        if self._hosts is not None and host not in self._hosts:
            raise ApiError(403, f"this server does not answer to the host name {host[:100]!r}.", "host_not_allowed")
        if self._keys and scope["path"].startswith("/v1/"):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = sha256(key.strip().encode("utf-8", "replace")).digest()
            matches = [hmac.compare_digest(given, known) for known in self._keys]  # all of them, in constant time
            if scheme.lower() != "bearer" or not any(matches):
                said = "a valid API key is needed: send the header 'Authorization: Bearer <key>'."
                raise ApiError(401, said, "invalid_api_key", headers={"www-authenticate": "Bearer"})
