"""What the HTTP engine costs: CPU of this process for each request, against a bare aiohttp session doing the same.

Both sides ask a stub server on loopback (a process of its own, which only sends a fixed answer) for the best of N:
N requests at the same time, each with its JSON written and read by orjson. The engine adds bodies with seeds, replicas,
retries, limits, checks and completions; the ratio says how much that is.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Coroutine
from time import process_time
from typing import Any

import aiohttp
import orjson

from bon.bench.harness import Pairs, Report, conditions, interleave, table
from bon.engines.base import Prompt, Request
from bon.engines.http.engine import HTTPEngine
from bon.task import Message
from bon.types import Sampling
from lib.scripts import parser, script

N = 32
TEXT = "The rain falls softly on the red maple, and the garden listens. " * 10
PROMPT = "Write a haiku about autumn rain. Keep it short, and name a tree that grows in Japan. " * 4
STUB = "--stub"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--calls", type=int, default=None, help="best-of-N calls in each round; chosen when not given")
    chosen = options.parse_args()
    calls, rounds = chosen.calls or (10 if chosen.quick else 30), 5 if chosen.quick else 21
    stub = subprocess.Popen([sys.executable, __file__, STUB], stdout=subprocess.PIPE, text=True)
    try:
        assert stub.stdout is not None
        url = f"http://127.0.0.1:{int(stub.stdout.readline())}/v1"
        with asyncio.Runner() as runner:
            _measure(runner, url, calls, rounds, chosen)
    finally:
        stub.kill()
        stub.wait()


def _measure(runner: asyncio.Runner, url: str, calls: int, rounds: int, chosen: Namespace) -> None:
    engine = HTTPEngine(url, model="stub")
    session = runner.run(_session())
    requests = [Request(Prompt.of([Message("user", PROMPT)]), Sampling(seed=chosen.seed, max_tokens=256), N)]

    async def bon() -> None:
        for _ in range(calls):
            done = [completion.text async for completion in engine.generate(requests)]
            assert done == [TEXT] * N

    async def plain() -> None:
        for _ in range(calls):
            texts = await asyncio.gather(*(_ask(session, f"{url}/chat/completions", seed) for seed in range(N)))
            assert texts == [TEXT] * N

    def timed(side: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[int], float]:
        def run(round_: int) -> float:
            started = process_time()
            runner.run(side())
            return (process_time() - started) / (calls * N)

        return run

    taken = interleave({"bon": timed(bon), "aiohttp": timed(plain)}, rounds, warmup=2, label="http")
    runner.run(engine.aclose())
    runner.run(session.close())
    first, second = ([one.value for one in taken[name]] for name in ("bon", "aiohttp"))
    pairs = Pairs("best_of_n", {"n": N, "calls": calls}, ("bon", "aiohttp"), first, second)
    report = Report("http_overhead", conditions(aiohttp=aiohttp.__version__), {"http_cpu_vs_aiohttp": pairs.ratio})
    report.rows.append(pairs.to_dict())
    microseconds = [f"{seconds * 1e6:.0f}" for seconds in pairs.to_dict()["medians"]]
    report.text.append(
        table(
            ["CPU time of one request", "bon, µs", "aiohttp, µs", "ratio"],
            [[f"best of {N}", *microseconds, f"{pairs.ratio:.2f}"]],
        )
    )
    report.emit(chosen.out)


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers={"Content-Type": "application/json"})


async def _ask(session: aiohttp.ClientSession, url: str, seed: int) -> str:
    body = {
        "model": "stub",
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 1.0,
        "max_tokens": 256,
        "seed": seed,
    }
    async with session.post(url, data=orjson.dumps(body)) as response:
        response.raise_for_status()
        text: str = orjson.loads(await response.read())["choices"][0]["message"]["content"]
        return text


async def _stub() -> None:
    """A server that reads a request and sends always the same answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 80, "completion_tokens": 150, "total_tokens": 230}
    body = orjson.dumps({"id": "1", "object": "chat.completion", "model": "stub", "choices": [choice], "usage": usage})
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := await _head(reader):
            length = next(
                int(line[15:]) for line in request.split(b"\r\n") if line.lower().startswith(b"content-length")
            )
            await reader.readexactly(length)
            writer.write(head + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""


if __name__ == "__main__":
    if STUB in sys.argv:
        asyncio.run(_stub())
    else:
        script(main)
