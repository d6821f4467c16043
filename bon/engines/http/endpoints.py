"""All addresses of one model: which to ask next, when to ask again, and what an error of theirs means.

Retries are written here and not with tenacity: each try picks its replica, and waits only where no other one is ready.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import TypeVar

import aiohttp

from bon.engines.http.link import Endpoint, Link
from bon.engines.http.wire import BadAnswerError, RequestRefusedError, StatusError
from bon.errors import BonError, EngineError, ModelNotFoundError, RefusedError, UnavailableError

T = TypeVar("T")
log = logging.getLogger("bon")

RETRYABLE = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
LONGEST_RETRY_AFTER_S = 60.0
CONNECT_S = 10.0
# Below the 5 s after which uvicorn (vLLM, SGLang) drops an idle connection, so that none is used as it is dropped.
KEEPALIVE_S = 3.0


@dataclass(eq=False)
class Endpoints:
    """All addresses of one model; every request goes to the least busy one that is well.

    The arguments are ``HTTPEngine``'s. A session belongs to one event loop, so each loop has links of its own, and a
    generator that closes them.
    """

    all: Sequence[Endpoint]
    api_key: str | None
    max_concurrency: int
    timeout_s: float
    retries: int
    cooldown_s: float
    loops: dict[asyncio.AbstractEventLoop, tuple[list[Link], AsyncGenerator[None, None]]] = field(default_factory=dict)
    closed: bool = False

    def learn(self, endpoint: Endpoint, field: str, said: str) -> None:
        """Note that an address refuses something, and say so once."""
        if field not in endpoint.refused:
            endpoint.refused.add(field)
            log.warning("%s refuses %s (%.200s): bon does without it there.", endpoint.url, field, self._redact(said))

    def share(self, items: int, most: int) -> int:
        """How many of some items to send with one request, so that every replica gets its part."""
        return min(-(-items // len(self.all)), most)

    async def call(self, send: Callable[[Link], Awaitable[T]], until: float | None = None) -> T:
        """Send a request where it is best sent, again where that may help, until some loop time.

        Raises:
            UnavailableError: every try failed, or time was up.
            RefusedError, InputError: a retry would not help.
        """
        failures: list[UnavailableError] = []
        if until is None:
            return await self._call(send, failures)
        try:
            async with asyncio.timeout_at(until):
                return await self._call(send, failures)
        except TimeoutError as error:
            seen = f" Last: {failures[-1]}" if failures else ""
            raise UnavailableError(f"{self} did not answer before the deadline.{seen}") from error

    async def _call(self, send: Callable[[Link], Awaitable[T]], failures: list[UnavailableError]) -> T:
        while True:
            link = await self._take()
            try:
                answer = await send(link)
            except Exception as error:
                failure = self._explain(error, link.endpoint)
                if failure is not error:
                    failure.__cause__ = error
                if not isinstance(failure, UnavailableError):
                    raise failure from failure.__cause__
                link.endpoint.failed(self.cooldown_s, failure.retry_after)
            else:
                link.endpoint.answered()
                return answer
            finally:
                link.slots.release()
                link.outstanding -= 1
            failures.append(failure)
            if len(failures) > self.retries:
                tries = f" ({len(failures)} tries)" if self.retries else ""
                raise UnavailableError(f"{failure}{tries}", failure.retry_after) from failure.__cause__
            if failure.retry_after is not None and failure.retry_after > LONGEST_RETRY_AFTER_S:
                raise failure
            if not any(other.ready for other in await self._links() if other is not link):
                await asyncio.sleep(pause(len(failures), failure.retry_after))

    async def _take(self) -> Link:
        """Wait for room at the best link; whoever waited at one that has failed meanwhile goes elsewhere."""
        links = await self._links()
        while True:
            ready = [link for link in links if link.ready]
            if ready:
                link = min(ready, key=lambda link: (link.outstanding, link.served))
            else:
                link = min(links, key=lambda link: link.endpoint.aside_until)
            link.outstanding += 1
            try:
                await link.slots.acquire()
            except BaseException:
                link.outstanding -= 1
                raise
            if link.endpoint.aside_until <= monotonic() or not any(other.ready for other in links):
                link.served += 1
                return link
            link.slots.release()
            link.outstanding -= 1

    async def _links(self) -> list[Link]:
        if self.closed:
            raise EngineError(f"the engine for {self} has been closed.")
        loop = asyncio.get_running_loop()
        if loop not in self.loops:
            for old in [loop for loop in [*self.loops] if loop.is_closed()]:
                self.loops.pop(old, None)
            session = self._session()
            links = [Link(endpoint, session, self.max_concurrency) for endpoint in self.all]
            self.loops[loop] = links, guard = links, self._guard(session)
            await anext(guard)
        return self.loops[loop][0]

    async def _guard(self, session: aiohttp.ClientSession) -> AsyncGenerator[None, None]:
        """Close a session when its loop ends: ``asyncio.run`` shuts down suspended generators, and this is one."""
        try:
            yield
        finally:
            self.loops.pop(asyncio.get_running_loop(), None)
            await session.close()

    def _session(self) -> aiohttp.ClientSession:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "bon"}
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),  # ``Link.slots`` is the limit
            timeout=aiohttp.ClientTimeout(total=self.timeout_s, sock_connect=min(CONNECT_S, self.timeout_s)),
            headers={**headers, "Authorization": f"Bearer {self.api_key}"} if self.api_key else headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def aclose(self) -> None:
        """Close every connection; later calls are refused."""
        self.closed = True
        for loop, (_, guard) in [*self.loops.items()]:
            if loop is asyncio.get_running_loop():
                await guard.aclose()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_close(guard), loop))
        self.loops.clear()

    def __str__(self) -> str:
        return self.all[0].url + (f" (and {len(self.all) - 1} more)" if len(self.all) > 1 else "")

    def _explain(self, error: Exception, endpoint: Endpoint) -> Exception:
        """The bon error for what went wrong; the error itself where nobody foresaw it."""
        url = endpoint.url
        if isinstance(error, StatusError):
            return self._explain_status(error, endpoint)
        if isinstance(error, BadAnswerError):
            return BadAnswerError(f"{url} {self._redact(str(error))}")
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return UnavailableError(f"cannot reach {url}: {_said(error)}. Is a server running there?")
        if isinstance(error, TimeoutError):
            return UnavailableError(f"{url} did not answer within {self.timeout_s:g} s.")
        if isinstance(error, aiohttp.ClientError | OSError):
            return UnavailableError(f"{url} broke off: {self._redact(_said(error))}.")
        return error

    def _explain_status(self, error: StatusError, endpoint: Endpoint) -> BonError:
        status, url, said = error.status, endpoint.url, self._redact(error.message)
        said = said if len(said) <= 400 else said[:400] + "…"
        if status < 400:
            there = error.headers.get("Location", "").partition("?")[0][:200]
            return RequestRefusedError(f"{url} redirects to {there!r} ({status}). Give that address if you trust it.")
        if status in RETRYABLE and error.code != "insufficient_quota":
            wait = retry_after(error.headers)
            asks = "" if wait is None else f" and asks to wait {wait:g} s"
            return UnavailableError(f"{url} answers {status}{asks}: {said}", wait)
        if status == 401:
            remedy = "Pass api_key= or api_key_env=, or set BON_UPSTREAM_API_KEY or OPENAI_API_KEY."
            what = "does not accept the API key" if self.api_key else "wants an API key"
            return RefusedError(f"{url} {what} (401: {said}). {remedy}")
        if status == 403:
            return RequestRefusedError(f"{url} forbids this (403: {said}). Check what the API key may use.")
        if status == 404 and "model" in f"{said} {error.code}".lower():
            return ModelNotFoundError(f"{url} has no such model: {said} {url}/models lists those it has.")
        if status == 404:
            return RefusedError(f"{url} has no such page (404: {said}). Does the base URL end as it should, in /v1?")
        return RequestRefusedError(f"{url} refuses the request ({status}): {said}")

    def _redact(self, text: str) -> str:
        for secret in [self.api_key, *(secret for endpoint in self.all for secret in endpoint.secrets)]:
            if secret:  # its beginning is enough, because an excerpt may end inside it
                text = re.sub(re.escape(secret[:6]) + r"\S*", "***", text)
        return text


def pause(failures: int, retry_after: float | None = None, jitter: Callable[[], float] = random.random) -> float:
    """Seconds before the next try: doubling, half of it random, and never less than the server asked for."""
    longest: float = min(FIRST_PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S)
    return max(longest * (0.5 + 0.5 * jitter()), retry_after or 0.0)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to be left alone; a date (which nobody sends here) is ignored."""
    try:
        seconds = float(headers["retry-after"])
    except (KeyError, ValueError):
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _said(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or getattr(error, "message", None) or error
    return str(text).rstrip(".") or type(error).__name__


async def _close(guard: AsyncGenerator[None, None]) -> None:
    await guard.aclose()
