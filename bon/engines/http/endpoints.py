"""Addresses at which one model is served: which to ask next, when to ask again, and what each was found to refuse.

It moves requests and answers and knows nothing of sampling (``bon.engines.http.wire`` has the bodies). A client belongs to
the event loop that made it, so there is one for each loop and address.
"""

from __future__ import annotations

import asyncio
import importlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
import orjson

from bon.engines.http.wire import BadAnswerError, server_message
from bon.errors import BonError, EngineError, InputError, ModelNotFoundError, RefusedError, UnavailableError

T = TypeVar("T")

RETRYABLE = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
LONGEST_RETRY_AFTER_S = 60.0
LONGEST_COOLDOWN_S = 60.0
CONNECT_S = 10.0
# Below the 5 s after which uvicorn (vLLM, SGLang) drops an idle connection, so that none is used as it is dropped.
KEEPALIVE_S = 3.0


@dataclass(eq=False)
class Endpoint:
    """One address, and what was found out about it.

    Args:
        url: base URL, as the openai client wants it.
        model: what it calls its model, once it was asked.
        max_model_len: tokens of prompt and completion together, once it was heard.
        refused: optional request fields that it does not take.
        failures: failures in a row, those of requests under way at the same time counted once.
        aside_until: asked again after this moment (``time.monotonic``) while others are well.
    """

    url: str
    model: str | None = None
    max_model_len: int | None = None
    refused: set[str] = field(default_factory=set)
    failures: int = 0
    aside_until: float = 0.0

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
    """An endpoint from inside one event loop.

    Args:
        endpoint: where it leads.
        client: sends, without retries of its own.
        max_concurrency: requests under way at most.
        keyed: whether the client's API key is a real one, to be sent.
    """

    def __init__(self, endpoint: Endpoint, client: openai.AsyncOpenAI, max_concurrency: int, *, keyed: bool) -> None:
        self.endpoint, self.client = endpoint, client
        self._options: openai.RequestOptions = {} if keyed else {"headers": {"Authorization": openai.Omit()}}
        self.slots = asyncio.Semaphore(max_concurrency)
        self.asking_for_model = asyncio.Lock()
        self.outstanding = 0  # under way, or waiting for a slot
        self.served = 0

    @property
    def ready(self) -> bool:
        """Whether to send it more: it is well, or its time has come and nothing is trying it yet."""
        endpoint = self.endpoint
        return endpoint.aside_until <= monotonic() and (not endpoint.failures or not self.outstanding)

    async def get(self, path: str) -> Mapping[str, Any]:
        """Fetch a JSON object."""
        return _json_object(await self.client.get(path, cast_to=str, options=self._options))

    async def post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Send a request and wait for the whole answer."""
        return _json_object(await self.client.post(path, body=dict(body), cast_to=str, options=self._options))

    async def stream(self, path: str, body: Mapping[str, Any]) -> openai.AsyncStream[object]:
        """Send a request whose answer comes as server-sent events; closing the stream aborts it."""
        return await self.client.post(
            path,
            body=dict(body),
            cast_to=object,
            options=self._options,
            stream=True,
            stream_cls=openai.AsyncStream[object],
        )


@dataclass
class _Loop:
    links: list[Link]
    guard: Any = None


class Endpoints:
    """All addresses of one model; every request goes to the least busy one that is well.

    Args:
        urls: base URLs.
        api_key: sent as bearer token; None sends none. It appears in no message.
        max_concurrency: requests under way at each address.
        timeout_s: seconds for one request.
        retries: how often a request that failed for a passing reason is made again.
        cooldown_s: how long a failing address is set aside at first; it doubles each time.

    Raises:
        InputError: something that is not an http(s) URL, or no URL.
    """

    def __init__(
        self,
        urls: Iterable[str],
        api_key: str | None,
        *,
        max_concurrency: int,
        timeout_s: float,
        retries: int,
        cooldown_s: float,
    ) -> None:
        self.all = [Endpoint(base_url(url)) for url in urls]
        if not self.all:
            raise InputError("give at least one base URL, such as http://127.0.0.1:8000/v1.")
        self._api_key = api_key
        self.max_concurrency, self.timeout_s = max_concurrency, timeout_s
        self.retries, self.cooldown_s = retries, cooldown_s
        self._loops: dict[asyncio.AbstractEventLoop, _Loop] = {}
        self._closed = False

    async def call(self, send: Callable[[Link], Awaitable[T]], until: float | None = None) -> T:
        """Send a request where it is best sent, again where that may help.

        Args:
            send: makes the request; may be called several times.
            until: loop time at which to give up.

        Raises:
            UnavailableError: every try failed, or time was up.
            RefusedError, InputError: a retry would not help.
        """
        last: list[UnavailableError] = []
        try:
            async with asyncio.timeout_at(until):
                return await self._call(send, last)
        except TimeoutError as error:
            seen = f" Last: {last[-1]}" if last else ""
            raise UnavailableError(f"{self._name()} did not answer before the deadline.{seen}") from error

    async def _call(self, send: Callable[[Link], Awaitable[T]], failures: list[UnavailableError]) -> T:
        while True:
            async with self._slot() as link:
                try:
                    async with asyncio.timeout(self.timeout_s):
                        answer = await send(link)
                except Exception as error:
                    failure = self._explain(error, link.endpoint)
                    if failure is None:
                        raise
                    if failure is not error:
                        failure.__cause__ = error
                    if not isinstance(failure, UnavailableError):
                        raise failure from failure.__cause__
                    link.endpoint.failed(self.cooldown_s, failure.retry_after)
                else:
                    link.endpoint.answered()
                    return answer
            failures.append(failure)
            if len(failures) > self.retries:
                tries = f" ({len(failures)} tries)" if self.retries else ""
                raise UnavailableError(f"{failure}{tries}", failure.retry_after) from failure.__cause__
            if failure.retry_after is not None and failure.retry_after > LONGEST_RETRY_AFTER_S:
                raise failure
            if not any(other.ready for other in await self._links() if other is not link):
                await asyncio.sleep(pause(len(failures), failure.retry_after))

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[Link]:
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
                async with link.slots:
                    now = monotonic()
                    if link.endpoint.aside_until <= now or not any(other.ready for other in links):
                        link.served += 1
                        yield link
                        return
            finally:
                link.outstanding -= 1

    async def _links(self) -> list[Link]:
        if self._closed:
            raise EngineError(f"the engine for {self._name()} has been closed.")
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            for old in [old for old in self._loops if old.is_closed()]:
                del self._loops[old]
            links = [
                Link(endpoint, self._client(endpoint), self.max_concurrency, keyed=bool(self._api_key))
                for endpoint in self.all
            ]
            self._loops[loop] = _Loop(links, guard := self._guard(loop, links))
            await anext(guard)
        return self._loops[loop].links

    async def _guard(self, loop: asyncio.AbstractEventLoop, links: Sequence[Link]) -> AsyncIterator[None]:
        """Close a loop's clients when it ends: ``asyncio.run`` shuts down suspended generators, and this is one."""
        try:
            yield
        finally:
            self._loops.pop(loop, None)
            for link in links:
                await link.client.close()

    def _client(self, endpoint: Endpoint) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=self._api_key or "none",
            max_retries=0,
            timeout=openai.Timeout(self.timeout_s, connect=min(CONNECT_S, self.timeout_s), pool=None),
            http_client=openai.DefaultAsyncHttpxClient(limits=_limits(self.max_concurrency)),
        )

    async def aclose(self) -> None:
        """Close every connection; later calls are refused."""
        self._closed = True
        for loop, state in list(self._loops.items()):
            if loop is asyncio.get_running_loop():
                await state.guard.aclose()
            elif loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_close(state.guard), loop))
        self._loops.clear()

    def _name(self) -> str:
        return self.all[0].url + (f" (and {len(self.all) - 1} more)" if len(self.all) > 1 else "")

    def _explain(self, error: Exception, endpoint: Endpoint) -> BonError | None:
        """The bon error for what went wrong; None for what nobody foresaw."""
        if isinstance(error, BonError):
            return error if not isinstance(error, BadAnswerError) else BadAnswerError(f"{endpoint.url} {error}")
        if isinstance(error, openai.APIStatusError):
            return self._explain_status(error, endpoint)
        if isinstance(error, TimeoutError | openai.APITimeoutError):
            return UnavailableError(f"{endpoint.url} did not answer within {self.timeout_s:g} s.")
        if isinstance(error, openai.APIConnectionError) or _from_http_client(error):
            causes = _causes(error)
            if not any(type(cause).__name__ in ("ConnectError", "ConnectTimeout") for cause in causes):
                return UnavailableError(f"{endpoint.url} broke off: {_said(causes[-1])}.")
            return UnavailableError(f"cannot reach {endpoint.url}: {_said(causes[-1])}. Is a server running there?")
        if isinstance(error, openai.APIError):  # an error event inside a stream
            return UnavailableError(f"{endpoint.url} broke off: {self._redact(error.message)}")
        if isinstance(error, ValueError) and "JSON" in type(error).__name__:
            return BadAnswerError(f"{endpoint.url} sent something that is not JSON: {error}")
        if isinstance(error, UnicodeEncodeError):
            return InputError(f"the prompt has a character that is no Unicode text (an unpaired surrogate): {error}")
        return None

    def _explain_status(self, error: openai.APIStatusError, endpoint: Endpoint) -> BonError:
        status, url = error.status_code, endpoint.url
        said = self._redact(server_message(error))
        if status in RETRYABLE and error.code != "insufficient_quota":
            wait = retry_after(error.response.headers)
            asks = "" if wait is None else f" and asks to wait {wait:g} s"
            return UnavailableError(f"{url} answers {status}{asks}: {said}", wait)
        if status == 401:
            remedy = "Pass api_key=, or set BON_UPSTREAM_API_KEY or OPENAI_API_KEY."
            what = "does not accept the API key" if self._api_key else "wants an API key"
            return RefusedError(f"{url} {what} (401: {said}). {remedy}")
        if status == 403:
            return RefusedError(f"{url} forbids this (403: {said}). Check what the API key may use.")
        if status == 404 and "model" in f"{said} {error.code}".lower():
            return ModelNotFoundError(f"{url} has no such model: {said} {url}/models lists those it has.")
        if status == 404:
            return RefusedError(f"{url} has no such page (404: {said}). Does the base URL end as it should, in /v1?")
        return RefusedError(f"{url} refuses the request ({status}): {said}")

    def _redact(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


def base_url(url: object) -> str:
    """Check a base URL; one without a path gets ``/v1``."""
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"a base URL looks like http://127.0.0.1:8000/v1, not {url!r}.")
    if parts.path in ("", "/"):
        parts = parts._replace(path="/v1")
    return parts._replace(fragment="").geturl().rstrip("/")


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


def _json_object(text: str) -> Mapping[str, Any]:
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadAnswerError(f"sent something that is not JSON: {text[:80]!r}") from error
    if not isinstance(data, dict):
        raise BadAnswerError(f"sent JSON that is not an object: {text[:80]!r}")
    return data


def _limits(connections: int) -> Any:
    # The SDK brings httpx 1 or 2, depending on its version; the limits must be that one's.
    http = importlib.import_module(openai.DefaultAsyncHttpxClient.__bases__[0].__module__.partition(".")[0])
    return http.Limits(max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEPALIVE_S)


def _from_http_client(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0].rstrip("12") in ("httpx", "httpcore")


def _causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return causes


def _said(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__


async def _close(generator: Any) -> None:
    await generator.aclose()
