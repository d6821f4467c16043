"""A load above capacity on `bon serve`: what is lost, crossed or leaked, and what the server adds to the library.

Claims: no request is lost, no answer is crossed, memory is flat, every client that leaves takes its work with it, and
for a request that is not queued the server adds less than 5 ms to a call of the library (`added_ms`).

A server with the scripted engine runs in a process of its own. Clients keep all connections busy, half of them with
streams; every request carries a token of its own that its answer must hold. One request in fifty is given up by its
client. What gets 429 is tried again after a while. Then one client alone, against a server whose engine takes no time,
takes turns with the library. The clients speak HTTP through bare sockets: at 200 connections a client library would be
what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bon import BestOfN
from bon.bench.harness import Report, Spread, conditions, interleave, table
from bon.engines.scripted import ScriptedEngine
from lib.scripts import parser, warn

SERVER = """
import sys
from bon import BestOfN
from bon.engines.scripted import ScriptedEngine
from bon.serve import Settings
from bon.serve.process import serve

settings = Settings(port=0, max_running=int(sys.argv[2]), max_waiting=int(sys.argv[3]))
serve(BestOfN(ScriptedEngine(step_seconds=float(sys.argv[1])), "flip", n="stop-at:1.0,most=4"), settings)
"""
PATH = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
GIVEN_UP = 0.02  # of the requests


def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    seconds = options.seconds or (10.0 if options.quick else 600.0)
    calls = 50 if options.quick else 500
    facts = {name: getattr(options, name) for name in ("seed", "connections", "step", "running", "waiting")}
    report = Report("serve_soak", conditions(engine="scripted", seconds=seconds, n=4, **facts))
    with Server(options.step, options.running, options.waiting) as server:
        soaked = asyncio.run(soak(server, seconds, options.connections, options.seed))
    with Server(0.0, options.running, options.waiting) as idle:
        report.ratios["added_ms"], alone = added_latency(idle, calls)
    row = {"case": "soak", **soaked, "exit_code": server.exit_code, "complaints": len(server.complaints)}
    report.rows += [row, {"case": "one client", **alone}]
    report.text.append(table(["soak", ""], [[name, value] for name, value in row.items() if name != "case"]))
    report.text.append(table(["one client, ms", ""], list(alone.items())))
    report.emit(options.out)
    for line in server.complaints[:10]:
        warn(line[:2000])
    return 0 if holds(row) else 1


def holds(row: dict[str, Any]) -> bool:
    """Whether the server did what is claimed; memory is for a reader to judge."""
    clean = not (row["lost"] or row["crossed"] or row["complaints"])
    return clean and row["running_at_the_end"] == 0 and row["exit_code"] == 0


class Server:
    """``bon serve``, with the scripted engine by default, in a process of its own with a file as its log."""

    def __init__(self, *arguments: float, script: str = SERVER) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-c", script, *map(str, arguments)]
        self.process = subprocess.Popen(command, stderr=self._log, stdout=subprocess.DEVNULL)
        self.exit_code: int | None = None
        self.complaints: list[str] = []

    def __enter__(self) -> Server:
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", self._read())):
            if self.process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{self._read()}")
            time.sleep(0.05)
        self.port = int(found[1])
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.exit_code = self.process.wait(60)
        self.complaints = [line for line in self._read().splitlines() if '"level":"info"' not in line]
        self._log.close()

    def _read(self) -> str:
        # Through a handle of its own: the server writes at the position of the one that it was given.
        with open(f"/proc/self/fd/{self._log.fileno()}") as file:
            return file.read()

    @property
    def resident_mib(self) -> float:
        """Memory in use."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    @property
    def cpu_seconds(self) -> float:
        """CPU time so far."""
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def metric(self, name: str) -> float:
        """The value of one line of /metrics."""
        with self.connection() as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
        return float(found[1]) if found else 0.0

    def connection(self) -> AbstractContextManager[http.client.HTTPConnection]:
        """A plain HTTP connection."""
        return closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60))


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    streamed: int = 0
    busy: int = 0
    given_up: int = 0
    lost: list[str] = field(default_factory=list)
    crossed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_byte: list[float] = field(default_factory=list)  # of streams


@dataclass(frozen=True)
class Reply:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes
    first_byte: float


class Connection:
    """One connection that is kept open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._pair: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, body: bytes) -> asyncio.StreamReader:
        """Send a request."""
        if self._pair is None:
            self._pair = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._pair
        head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\n{lines(JSON)}content-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return reader

    async def post(self, body: bytes) -> Reply:
        """Send a request and read all of the response."""
        began = time.perf_counter()
        reader = await self.send(body)
        status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[:-1]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in fields)}
        if "content-length" in headers:
            content = await reader.readexactly(int(headers["content-length"]))
            first = time.perf_counter() - began
        else:
            content, first = b"", 0.0
            while size := int(await reader.readline(), 16):
                content += (await reader.readexactly(size + 2))[:-2]
                first = first or time.perf_counter() - began
            await reader.readline()
        return Reply(int(status.split()[1]), headers, content, first)

    def close(self) -> None:
        """Close it at once."""
        if self._pair is not None:
            self._pair[1].transport.abort()
            self._pair = None


def lines(headers: dict[str, str]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items())


def request(token: str, stream: bool = False) -> dict[str, Any]:
    content = f"{token} write a few words about a red fox in the snow"
    return {"messages": [{"role": "user", "content": content}], "stream": stream}


async def soak(server: Server, seconds: float, connections: int, seed: int) -> dict[str, Any]:
    """Keep all connections busy for so long, then say what came of it."""
    tally, memory, cpu = Tally(), list[float](), server.cpu_seconds
    until = time.perf_counter() + seconds
    clients = [asyncio.create_task(client(i, server.port, tally, until, seed)) for i in range(connections)]
    while not all(task.done() for task in clients):
        await asyncio.wait(clients, timeout=max(0.5, seconds / 20))
        memory.append(server.resident_mib)
        warn(f"{tally.answered} answered, {tally.busy} told to wait, {memory[-1]:.0f} MiB")
    await asyncio.gather(*clients)
    for problem in (tally.lost + tally.crossed)[:10]:
        warn(problem)
    return {
        "answered": tally.answered,
        "streamed": tally.streamed,
        "answered_per_s": round(tally.answered / seconds, 1),
        "told_to_wait_429": tally.busy,
        "given_up_by_clients": tally.given_up,
        "client_gone_in_metrics": int(server.metric('bon_runs_total{outcome="client_gone"}')),
        "lost": len(tally.lost),
        "crossed": len(tally.crossed),
        **{f"latency_{p}_s": v for p, v in percentiles(tally.seconds).items()},
        **{f"stream_first_byte_{p}_s": v for p, v in percentiles(tally.first_byte).items()},
        "memory_mib_after_a_third": round(memory[max(0, len(memory) // 3 - 1)], 1),
        "memory_mib_at_the_end": round(memory[-1], 1),
        "server_cpu": round((server.cpu_seconds - cpu) / seconds, 2),
        "running_at_the_end": int(server.metric("bon_running_requests") + server.metric("bon_waiting_requests")),
    }


async def client(number: int, port: int, tally: Tally, until: float, seed: int) -> None:
    """One request after the other over one connection."""
    draw, serial = random.Random(f"{seed} {number}"), 0
    connection, stream = Connection(port), number % 2 == 1
    while time.perf_counter() < until:
        serial += 1
        token = f"token-{number}-{serial}-{draw.getrandbits(32):08x}"
        body = json.dumps(request(token, stream)).encode()
        began = time.perf_counter()
        try:
            if draw.random() < GIVEN_UP:
                await connection.send(body)
                await asyncio.sleep(draw.uniform(0.005, 0.1))
                connection.close()
                tally.given_up += 1
                continue
            reply = await connection.post(body)
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            tally.lost.append(f"{token}: {error!r} after {time.perf_counter() - began:.2f} s")
            connection.close()
            continue
        if reply.status == 429 and "retry-after" in reply.headers:
            tally.busy += 1
            await asyncio.sleep(draw.uniform(0.2, 1.0))
            continue
        check(tally, token, reply, stream)
        tally.seconds.append(time.perf_counter() - began)
        if stream:
            tally.first_byte.append(reply.first_byte)
    connection.close()


def check(tally: Tally, token: str, reply: Reply, stream: bool) -> None:
    """Whether an answer is whole, and the answer to this request."""
    text = reply.body.decode()
    if reply.status != 200 or (stream and not text.endswith("data: [DONE]\n\n")):
        tally.lost.append(f"{token}: {reply.status} {text[-200:]}")
        return
    if stream:
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
        tally.streamed += 1
    else:
        said = json.loads(text)["choices"][0]["message"]["content"]
    tally.answered += 1
    if said.split()[0] != token or said.count("token-") != 1:
        tally.crossed.append(f"{token}: {said[:100]}")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values or [0.0], p)), 3) for p in (50, 95, 99)}


def added_latency(server: Server, calls: int) -> tuple[Spread, dict[str, float]]:
    """One client, nothing queued, an engine that takes no time: a call of the server less a call of the library.

    The CPU time of the server says the same on a machine that has other things to do.
    """
    bon = BestOfN(ScriptedEngine(), "flip", n="stop-at:1.0,most=4")
    with asyncio.Runner() as runner, server.connection() as connection:

        def library(call: int) -> None:
            runner.run(bon.run(request(f"token-{call}")["messages"]))

        def served(call: int) -> None:
            connection.request("POST", PATH, json.dumps(request(f"token-{call}")), JSON)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            response.read()

        cpu = server.cpu_seconds
        timed = interleave({"library": library, "server": served}, calls, warmup=20)
        cpu = (server.cpu_seconds - cpu) / (calls + 20)
    ours, theirs = ([1000 * call.seconds for call in timed[side]] for side in ("library", "server"))
    added = Spread.of([b - a for a, b in zip(ours, theirs, strict=True)])
    alone = {"library_p50_ms": np.median(ours), "server_p50_ms": np.median(theirs), "server_cpu_ms": 1000 * cpu}
    alone["added_p95_ms"] = np.percentile([b - a for a, b in zip(ours, theirs, strict=True)], 95)
    return added, {name: round(float(value), 2) for name, value in alone.items()}


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, help="600, or 10 with --quick")
    options.add_argument("--connections", type=int, default=200, help="clients, each with one connection")
    options.add_argument("--step", type=float, default=0.01, help="seconds that the scripted engine takes for a word")
    options.add_argument("--running", type=int, default=64, help="requests that the server runs at the same time")
    options.add_argument("--waiting", type=int, default=64, help="requests that may wait for their turn")
    return options.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
