"""Load a server beyond its capacity and look for lost or crossed answers, growing memory and slow percentiles.

    python benchmarks/serve_soak.py --seconds 600 --connections 200

A server with the scripted engine runs in a process of its own. Clients keep all connections busy, half of them with
streams; every request carries a token of its own that its answer must hold. One client in fifty leaves early. Requests
that get 429 are tried again after a while, as the official client does. Then one client alone measures what the server
adds to a call of the library. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TextIO

import httpx

SERVER = """
import sys
from bon import BestOfN
from bon.engines.scripted import ScriptedEngine
from bon.serve import Settings
from bon.serve.process import serve

STEP = float(sys.argv[1])
settings = Settings(port=0, max_running=int(sys.argv[2]), max_waiting=int(sys.argv[3]))
serve(BestOfN(ScriptedEngine(step_seconds=STEP), n=4), settings)
"""


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    streamed: int = 0
    busy: int = 0
    left: int = 0
    lost: list[str] = field(default_factory=list)
    crossed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_byte: list[float] = field(default_factory=list)


def body(token: str, stream: bool) -> dict:
    content = f"{token} write a few words about a red fox in the snow"
    return {"messages": [{"role": "user", "content": content}], "stream": stream, "best_of_n": {"stop_at": 1.0}}


def start(step: float, running: int, waiting: int) -> tuple[subprocess.Popen, str]:
    with open(os.devnull, "w") as nowhere:
        read, write = os.pipe()
        command = [sys.executable, "-c", SERVER, str(step), str(running), str(waiting)]
        process = subprocess.Popen(command, stderr=write, stdout=nowhere)
    os.close(write)
    lines = os.fdopen(read)
    for line in lines:
        if "running on" in line:
            url = "http://127.0.0.1:" + json.loads(line)["message"].split("127.0.0.1:")[1].split()[0]
            break
    threading.Thread(target=show_problems, args=(lines,), daemon=True).start()
    return process, url


def show_problems(lines: TextIO) -> None:
    """Read the server's log, or its pipe would fill up; what is not of level info is shown."""
    for line in lines:
        if '"level":"info"' not in line:
            print("server:", line.rstrip()[:2000], file=sys.stderr)


def resident_mib(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def client(number: int, http: httpx.AsyncClient, leaving: httpx.AsyncClient, tally: Tally, until: float) -> None:
    draw = random.Random(number)
    serial = 0
    while time.perf_counter() < until:
        serial += 1
        token = f"token-{number}-{serial}-{draw.getrandbits(32):08x}"
        began = time.perf_counter()
        try:
            if draw.random() < 0.02:
                try:
                    await leaving.post(
                        "/v1/chat/completions", json=body(token, False), timeout=draw.uniform(0.005, 0.1)
                    )
                except httpx.TimeoutException:
                    tally.left += 1
                continue
            stream = number % 2 == 1
            async with http.stream("POST", "/v1/chat/completions", json=body(token, stream)) as response:
                first, parts = None, []
                async for part in response.aiter_bytes():
                    first = first or time.perf_counter() - began
                    parts.append(part)
            text = b"".join(parts).decode()
            if response.status_code == 429:
                tally.busy += 1
                await asyncio.sleep(draw.uniform(0.2, 1.0))
                continue
            check(tally, token, response.status_code, text, stream)
            tally.seconds.append(time.perf_counter() - began)
            tally.first_byte.append(first or 0.0)
        except httpx.HTTPError as error:
            took = time.perf_counter() - began
            problem = f"{token}: {error!r} from {error.__cause__!r} after {took:.2f} s"
            print(problem, file=sys.stderr)
            tally.lost.append(problem)


def check(tally: Tally, token: str, status: int, text: str, stream: bool) -> None:
    if status != 200:
        tally.lost.append(f"{token}: {status} {text[:200]}")
        return
    if stream:
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
        if not text.endswith("data: [DONE]\n\n"):
            tally.lost.append(f"{token}: the stream broke off")
            return
        said = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
        tally.streamed += 1
    else:
        said = json.loads(text)["choices"][0]["message"]["content"]
    tally.answered += 1
    if said.split()[0] != token or said.count("token-") != 1:
        tally.crossed.append(f"{token}: {said[:100]}")


async def soak(url: str, pid: int, seconds: float, connections: int) -> tuple[Tally, list[float]]:
    tally, memory = Tally(), []
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    common = {"base_url": url, "limits": limits, "trust_env": False}
    async with httpx.AsyncClient(timeout=120, **common) as http, httpx.AsyncClient(**common) as leaving:
        until = time.perf_counter() + seconds
        clients = [asyncio.create_task(client(i, http, leaving, tally, until)) for i in range(connections)]
        while not all(task.done() for task in clients):
            await asyncio.wait(clients, timeout=max(1.0, seconds / 20))
            memory.append(resident_mib(pid))
            print(f"{tally.answered} answered, {tally.busy} told to wait, {memory[-1]:.0f} MiB", file=sys.stderr)
        await asyncio.gather(*clients)
    return tally, memory


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def added_latency(url: str, pid: int, calls: int) -> dict[str, float]:
    """One client, nothing queued: the server's call less the library's, over engines that take no time.

    The CPU time of both says the same on a machine that has other things to do.
    """
    from bon import BestOfN
    from bon.engines.scripted import ScriptedEngine

    async def library() -> list[float]:
        bon, taken = BestOfN(ScriptedEngine(), n=4, stop_at=1.0), []
        for i in range(calls):
            began = time.perf_counter()
            await bon.run(body(f"token-{i}", False)["messages"])
            taken.append(time.perf_counter() - began)
        return taken

    def served() -> list[float]:
        taken = []
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            for i in range(calls):
                began = time.perf_counter()
                http.post("/v1/chat/completions", json=body(f"token-{i}", False)).raise_for_status()
                taken.append(time.perf_counter() - began)
        return taken

    asyncio.run(library()), served()  # warm up
    cpu = time.process_time()
    ours = asyncio.run(library())
    library_cpu, cpu = time.process_time() - cpu, cpu_seconds(pid)
    through = served()
    server_cpu = cpu_seconds(pid) - cpu
    p50 = (statistics.median(through) - statistics.median(ours)) * 1000
    return {
        "library_p50_ms": round(statistics.median(ours) * 1000, 2),
        "server_p50_ms": round(statistics.median(through) * 1000, 2),
        "added_p50_ms": round(p50, 2),
        "library_cpu_ms": round(library_cpu / calls * 1000, 2),
        "server_cpu_ms": round(server_cpu / calls * 1000, 2),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {f"p{p}": round(ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 3) for p in (50, 95, 99)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--step", type=float, default=0.01, help="seconds that the scripted engine takes for a word")
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--waiting", type=int, default=64)
    parser.add_argument("--calls", type=int, default=300, help="calls that measure the added latency")
    options = parser.parse_args()

    process, url = start(options.step, options.running, options.waiting)
    try:
        tally, memory = asyncio.run(soak(url, process.pid, options.seconds, options.connections))
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        idle = "bon_running_requests 0.0" in metrics and "bon_waiting_requests 0.0" in metrics
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
    process, url = start(0.0, options.running, options.waiting)
    try:
        latency = added_latency(url, process.pid, options.calls)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    third = max(1, len(memory) // 3)
    report = {
        "benchmark": "serve_soak",
        "seconds": options.seconds,
        "connections": options.connections,
        "answered": tally.answered,
        "streamed": tally.streamed,
        "requests_per_s": round(tally.answered / options.seconds, 1),
        "told_to_wait_429": tally.busy,
        "clients_that_left": tally.left,
        "lost": len(tally.lost),
        "crossed": len(tally.crossed),
        "latency_s": percentiles(tally.seconds),
        "first_byte_s": percentiles(tally.first_byte),
        "memory_mib_after_a_third": round(memory[third - 1], 1),
        "memory_mib_at_the_end": round(memory[-1], 1),
        "nothing_left_running": idle,
        "exit_code": code,
        **latency,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }
    for problem in (tally.lost + tally.crossed)[:10]:
        print(problem, file=sys.stderr)
    print(json.dumps(report))
    return 0 if not (tally.lost or tally.crossed) and idle and code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
