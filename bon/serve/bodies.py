"""The bytes of a request: JSON, of bounded size, in bounded time, and not too many of all clients together."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from bon.serve.failures import ApiError, ClientGone, api_error
from bon.serve.settings import Settings

# What is read and thrown away of a request that is too large, so that the client is there to read why.
MOST_DISCARDED = 64 * 1024 * 1024
# Requests of the greatest size whose bytes may be here at the same time before they have been understood.
MOST_BODIES = 32


class Bodies:
    """Reads the bodies of requests.

    Args:
        settings: limits.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.held = 0  # bytes of all requests that are arriving

    async def read(self, request: Request) -> bytes:
        """Read a body.

        Raises:
            ApiError: 415 for another content type (which keeps pages of other origins from sending forms here), 413,
                408, 429 when others have sent too much.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise ApiError(415, "send the header 'Content-Type: application/json'.", "unsupported_media_type")
        seconds, body = self._settings.body_timeout_s, bytearray()
        try:
            async with asyncio.timeout(seconds):
                await self._read(request, body)
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {seconds:g} s.", "timeout") from None
        except ClientDisconnect as error:
            raise api_error(ClientGone()) from error
        finally:
            self.held -= len(body)
        return bytes(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        most, size = self._settings.max_body_bytes, 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= most:
                body += chunk
                self.held += len(chunk)
            elif size > MOST_DISCARDED:
                break
            if self.held > MOST_BODIES * most:
                said = "others are sending too much at the moment."
                raise ApiError(429, said, "overloaded", headers={"retry-after": "5", "connection": "close"})
        if size > most:
            said = f"the request has more than the {most} bytes that this server takes."
            raise ApiError(413, said, "request_too_large", headers={"connection": "close"})
