"""A small OpenAI-compatible server on loopback that misbehaves on demand; raw asyncio, so that it can break HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FAULTS = ("hang", "reset", "reset mid-body")


@dataclass
class Seen:
    """A request, and whether its sender went away before the answer was complete."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    aborted: threading.Event = field(default_factory=threading.Event)


@dataclass
class Reply:
    status: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Raw:
    """An answer whose head is of the test's own making; ``endless`` is repeated until the client goes away."""

    start: bytes
    endless: bytes = b""


@dataclass
class Stream:
    """An answer of server-sent events, each given as the bytes after ``data:``."""

    events: list[bytes]


def error(status: int, message: str, headers: dict[str, str] | None = None, **fields: Any) -> Reply:
    return Reply(status, {"error": {"message": message, **fields}}, headers or {})


HOLD_AT_MOST = 10.0  # seconds


class FakeServer:
    """Answers every completion with ``text(seen, draw)``, after the faults in ``faults`` are used up.

    A fault is a ``Reply``, a ``Raw``, a ``Stream``, one of ``FAULTS``, bytes (sent as a 200), or a dict (sent as JSON).
    ``refuse`` may look at any request and return a fault or None. ``hold`` holds answers back until that many requests
    wait at the same time.
    """

    def __init__(self, text: Callable[[Seen, int], str] | None = None) -> None:
        self.text = text or (lambda seen, draw: f"answer {draw}")
        self.faults: deque[Any] = deque()
        self.refuse: Callable[[Seen], Any] = lambda seen: None
        self.models: list[dict[str, Any]] = [{"id": "fake-model", "object": "model"}]
        self.honours_n = True
        self.takes_batches = False  # several conversations in one request, as vLLM does
        self.hold = 0
        self.pace = 0.0  # seconds between the events of a stream
        self.seen: list[Seen] = []
        self.under_way = self.peak = self.draws = self.port = 0
        self.sent = 0  # bytes of endless answers
        self._server: asyncio.Server | None = None
        self._waiting: asyncio.Condition | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def posts(self) -> list[Seen]:
        return [seen for seen in self.seen if seen.method == "POST"]

    def listen(self) -> None:
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def die(self) -> None:
        asyncio.run_coroutine_threadsafe(self._die(), self._loop).result()

    async def _listen(self) -> None:
        self._waiting = asyncio.Condition()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _die(self) -> None:
        if self._server is not None:
            self._server.close()
        for _ in range(4):  # a task that is cancelled before its first step leaves the connection it is for open
            await asyncio.sleep(0)
        for writer in [*self._connections]:
            writer.transport.abort()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        early = b""
        try:
            while seen := await _read(reader, early):
                self.seen.append(seen)
                self.under_way += 1
                self.peak = max(self.peak, self.under_way)
                # Nothing comes while an answer is awaited, except the end of the connection.
                more = asyncio.create_task(reader.read(1))
                work = asyncio.create_task(self.answer(seen, writer))
                try:
                    await asyncio.wait([more, work], return_when=asyncio.FIRST_COMPLETED)
                    if not work.done():
                        seen.aborted.set()
                        return
                    if not await work:
                        return
                finally:
                    self.under_way -= 1
                    for task in (more, work):
                        task.cancel()
                    early = (await asyncio.gather(more, work, return_exceptions=True))[0]
                    early = early if isinstance(early, bytes) else b""
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(writer)
            writer.transport.abort()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await writer.wait_closed()

    async def answer(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to be dropped."""
        if seen.method == "GET":
            return await send(writer, Reply(200, {"object": "list", "data": self.models}))
        if self.hold:
            assert self._waiting is not None
            async with self._waiting:
                self._waiting.notify_all()
                with contextlib.suppress(TimeoutError):  # a test then fails and does not hang
                    async with asyncio.timeout(HOLD_AT_MOST):
                        await self._waiting.wait_for(lambda: self.under_way >= self.hold)
                self.hold = 0
        fault = self.refuse(seen)
        if fault is None and seen.path.endswith("/batch") and not self.takes_batches:
            fault = Reply(404, {"detail": "Not Found"})
        if fault is None and self.faults:
            fault = self.faults.popleft()
        if fault == "hang":
            await asyncio.Event().wait()
        if fault == "reset":
            return False
        if isinstance(fault, Raw):
            writer.write(fault.start)
            await writer.drain()
            while fault.endless:
                writer.write(fault.endless)
                self.sent += len(fault.endless)
                await writer.drain()
            return False
        if fault == "reset mid-body":
            writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{"choi')
            await writer.drain()
            return False
        if isinstance(fault, Stream):
            start_stream(writer)
            writer.write(b"".join(b"data: " + event + b"\n\n" for event in fault.events))
            await writer.drain()
            return False
        if fault is not None:
            return await send(writer, fault if isinstance(fault, Reply) else Reply(200, fault))
        if seen.body.get("stream"):
            return await self._stream(seen, writer)
        return await send(writer, Reply(200, self.completion(seen)))

    def _draw(self, seen: Seen) -> str:
        self.draws += 1
        return self.text(seen, self.draws - 1)

    def completion(self, seen: Seen) -> dict[str, Any]:
        batch = seen.path.endswith("/batch")
        n = len(seen.body["messages"]) if batch else seen.body.get("n", 1) if self.honours_n else 1
        texts = [self._draw(seen) for _ in range(n)]
        tokens = [len(text.split()) + 1 for text in texts]
        choices: list[dict[str, Any]] = []
        for i, text in enumerate(texts):
            choice: dict[str, Any] = {"index": i, "finish_reason": "stop"}
            values = [-0.5] * tokens[i]
            if "/chat/completions" in seen.path:
                choice["message"] = {"role": "assistant", "content": text}
                if seen.body.get("logprobs"):
                    choice["logprobs"] = {"content": [{"token": "x", "logprob": v} for v in values]}
            else:
                choice["text"] = text
                if seen.body.get("logprobs") is not None:
                    choice["logprobs"] = {"token_logprobs": values}
            choices.append(choice)
        return {
            "object": "chat.completion",
            "model": "fake-model",
            "choices": choices,
            "usage": {
                "prompt_tokens": 7 * n if batch else 7,
                "completion_tokens": sum(tokens),
                "prompt_tokens_details": {"cached_tokens": 4},
            },
        }

    async def _stream(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        start_stream(writer)
        words = self._draw(seen).split(" ")
        for i, word in enumerate(words):
            if word == "<cut>":
                return False
            delta = {"content": word if i == 0 else " " + word}
            logprobs = {"content": [{"token": word, "logprob": -0.5}]} if seen.body.get("logprobs") else None
            await send_event(
                writer, choices=[{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}]
            )
            await asyncio.sleep(self.pace)
        await send_event(writer, choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        if "stream_options" in seen.body:
            await send_event(writer, choices=[], usage={"prompt_tokens": 7, "completion_tokens": len(words) + 1})
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        return False


async def _read(reader: asyncio.StreamReader, early: bytes) -> Seen | None:
    line = early + await reader.readline()
    if not line:
        return None
    method, path, _ = line.decode().split(" ")
    headers = {}
    while (header := (await reader.readline()).decode().strip()) != "":
        name, _, value = header.partition(":")
        headers[name.lower()] = value.strip()
    length = int(headers.get("content-length", 0))
    body = json.loads(await reader.readexactly(length)) if length else {}
    return Seen(method, path, headers, body)


def start_stream(writer: asyncio.StreamWriter) -> None:
    """Send the head of a stream, which ends with the connection."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")


async def send(writer: asyncio.StreamWriter, reply: Reply) -> bool:
    body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **reply.headers}
    lines = [f"HTTP/1.1 {reply.status} Whatever", *(f"{k}: {v}" for k, v in headers.items())]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    await writer.drain()
    return True


async def send_event(writer: asyncio.StreamWriter, **fields: Any) -> None:
    writer.write(b"data: " + json.dumps({"object": "chat.completion.chunk", **fields}).encode() + b"\n\n")
    await writer.drain()
