"""One address of a model: what was learned about it, and requests to it from inside one event loop.

Bytes go out; JSON or server-sent events come in, never more than the limits below. Nothing here is tried twice.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncGenerator
from io import BytesIO
from time import monotonic
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
import orjson
from yarl import URL

from bon.engines.http.wire import BadAnswerError, StatusError
from bon.errors import InputError

MOST_BODY, MOST_LIST, MOST_ERROR = 64 << 20, 8 << 20, 1 << 20  # bytes of an answer, of a list of models, of an error
MOST_FIXED, BYTES_PER_TOKEN = 1 << 20, 4 << 10  # of an answer: with 20 other likely tokens a token is 2 KiB of JSON
LONGEST_COOLDOWN_S = 60.0


class Endpoint:
    """One address, and what was learned about it.

    Args:
        address: base URL; one without a path gets ``/v1``, and ``#name`` at its end names the model.

    Attributes:
        url: the address for people to read, without credentials and query.
        named, model: the model that the address names, and what its server calls its model, once it was asked.
        max_model_len: tokens of prompt and completion together, once it said so.
        refused: optional request fields that it does not take.
        failures: failures in a row, those of requests under way at the same time counted once.
        aside_until: asked again after this moment (``time.monotonic``) while others are well.

    Raises:
        InputError: not an http(s) URL, or one that only an unsupported proxy leads to.
    """

    def __init__(self, address: str) -> None:
        try:
            url = URL(address.strip())
        except ValueError:
            url = URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise InputError(f"a base URL looks like http://127.0.0.1:8000/v1, not {shown(address)!r}.")
        self.base = url.with_user(None).with_fragment(None).with_path(url.path.rstrip("/") or "/v1")
        self.query, self.url, self.named = url.query, str(self.base), url.fragment or None
        self.proxy = _proxy(self.base)
        login = b64encode(f"{url.user}:{url.password or ''}".encode()).decode()
        self.headers = None if url.user is None else {"Authorization": f"Basic {login}"}
        self.secrets = [secret for secret in (url.password, *url.query.values()) if secret and len(secret) > 3]
        self.model: str | None = None
        self.max_model_len: int | None = None
        self.refused: set[str] = set()
        self.failures, self.aside_until = 0, 0.0

    def failed(self, cooldown_s: float, retry_after: float | None = None) -> None:
        """Set it aside, for longer each time."""
        now = monotonic()
        if self.aside_until <= now:
            self.failures += 1
        pause = min(cooldown_s * 2.0 ** min(self.failures - 1, 10), LONGEST_COOLDOWN_S)
        self.aside_until = max(self.aside_until, now + max(pause, retry_after or 0.0))

    def answered(self) -> None:
        """Forget its failures."""
        self.failures, self.aside_until = 0, 0.0


class Link:
    """An endpoint from inside one event loop, whose session it uses; ``slots`` bounds the requests under way."""

    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession, max_concurrency: int) -> None:
        self.endpoint, self._session = endpoint, session
        self.slots, self.asking_for_model = asyncio.Semaphore(max_concurrency), asyncio.Lock()
        self.outstanding = 0  # under way, or waiting for a slot
        self.served = 0
        self._urls: dict[str, URL] = {}

    @property
    def ready(self) -> bool:
        """Whether to send it more: it is well, or its time has come and nothing is trying it yet."""
        endpoint = self.endpoint
        return endpoint.aside_until <= monotonic() and (not endpoint.failures or not self.outstanding)

    async def fetch(self, path: str, body: bytes | None = None, *, most: int = MOST_LIST) -> dict[str, Any]:
        """Send a request, a GET where there is no body, and wait for the JSON object that answers it."""
        response = await self.open(path, body)
        try:
            return _json_object(await _read(response, most))
        finally:
            response.close()  # aborts what was not read to its end; a connection that was is back in the pool by now

    async def open(self, path: str, body: bytes | None = None) -> aiohttp.ClientResponse:
        """Send a request and wait for the head of its answer; closing the response aborts the rest.

        Raises:
            StatusError: the answer is no success.
        """
        if path not in self._urls:
            self._urls[path] = (self.endpoint.base / path).with_query(self.endpoint.query)
        response = await self._session.request(
            "GET" if body is None else "POST",
            self._urls[path],
            data=BytesIO(body) if body and len(body) > 1 << 20 else body,  # aiohttp warns of larger bytes
            headers=self.endpoint.headers,
            proxy=self.endpoint.proxy,
            allow_redirects=False,
        )
        try:
            encoding = response.headers.get("Content-Encoding", "identity")
            if response.status >= 300:
                text = await _read(response, MOST_ERROR) if encoding == "identity" else b""
                reason = str(response.reason).encode(errors="replace")
                raise StatusError(response.status, text or reason, response.headers)
            if encoding != "identity":  # a few bytes may unpack to gigabytes
                raise BadAnswerError(f"sent an answer compressed with {encoding[:20]!r}, which was not asked for.")
        except BaseException:
            response.close()
            raise
        return response


def room(tokens: int) -> int:
    """Bytes that an answer of some tokens may have: parsed, JSON takes thirty times the memory."""
    return min(MOST_FIXED + BYTES_PER_TOKEN * tokens, MOST_BODY)


async def events(response: aiohttp.ClientResponse, most: int) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON objects of a stream of server-sent events; from a server that does not stream, its whole answer."""
    if response.content_type.endswith("json"):
        yield _json_object(await _read(response, most))
        return
    buffer, scanned, size = bytearray(), 0, 0
    async for chunk in response.content.iter_any():
        buffer += chunk
        size += len(chunk)
        while (end := buffer.find(b"\n", scanned)) >= 0:
            line, scanned = bytes(buffer[:end]).strip(), 0
            del buffer[: end + 1]
            if line.startswith(b"data:"):  # these servers write each event on one line
                if (event := line[5:].strip()) == b"[DONE]":
                    return
                yield _json_object(event)
        scanned = len(buffer)
        if size > most:
            raise BadAnswerError(f"sent a stream of more than {most} bytes.")


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    parts, size = [], 0
    while part := await response.content.readany():
        parts.append(part)
        size += len(part)
        if size > most:
            raise BadAnswerError(f"sent an answer of more than {most} bytes.")
    return b"".join(parts)


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadAnswerError(f"sent something that is not JSON: {text[:80]!r}") from error
    if not isinstance(data, dict):
        raise BadAnswerError(f"sent JSON that is not an object: {text[:80]!r}")
    return data


def shown(address: str) -> str:
    """An address without credentials, query and fragment, for people to read."""
    return re.sub(r"^(\w*:?//)?.*@", r"\1", re.split(r"[?#]", address, maxsplit=1)[0])


def _proxy(url: URL) -> str | None:
    """The proxy that the environment names for an address."""
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy is None or proxy_bypass(url.authority):
        return None
    if not proxy.startswith(("http://", "https://")):
        raise InputError(f"the environment's proxy {shown(proxy)!r} is no HTTP proxy; unset it or set NO_PROXY.")
    return proxy
