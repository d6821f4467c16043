"""Wall-clock of adaptive N beside a fixed N: over a list of prompts, and of a server's answers under load."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median

from bon import BestOfN, portal
from bon.bench.harness import Pairs, Report, conditions, interleave, milliseconds, table
from bon.evals.dataset import Example, as_dataset
from bon.models import ModelPool
from bon.scorers.flip import Flip
from serve_soak import JSON, PATH, Server

SERVER = """
from bon import BestOfN
from bon.serve import Settings
from bon.serve.process import serve

serve(BestOfN({policy!r}), Settings(port=0, max_running={running}))
"""
CLIENTS = 8


@dataclass(frozen=True, slots=True)
class Ran:
    """One round of a side: its seconds or the median of its answers', tokens for each prompt, share that is right."""

    seconds: float
    tokens: float
    passed: float


def measure(options: argparse.Namespace) -> Report:
    """Time both, on the engine that is named and, for the embedded model on torch, behind a server."""
    count, n = options.prompts or (16 if options.quick else 200), options.n or 16
    policy = options.policy or "mini"
    report = Report("wall", conditions(policy=policy, seed=options.seed, prompts=count, n=n, adaptive=options.budget))
    rounds = 1 if options.quick else 5
    examples = list(
        as_dataset("mini").rows(count * (rounds + 1), options.seed)
    )  # new ones in each round: some stay read
    pool = ModelPool()
    engine = pool.engine(policy)
    bon = BestOfN(engine, Flip(engine), sampling={"seed": options.seed, "max_tokens": as_dataset("mini").max_tokens})
    sides = {
        name: partial(_run, bon.replace(n=n), examples, count)
        for name, n in (("fixed", n), ("adaptive", options.budget))
    }
    shown = _compare(report, f"run_{policy.partition('=')[2] or 'torch'}", sides, rounds)
    portal.run(pool.aclose())
    if "engine=" not in policy:
        asked = examples[: (4 if policy == "mini" else 1) * CLIENTS]
        at_once, in_turn = (SERVER.format(policy=policy, running=running) for running in (None, 1))
        with Server(script=at_once) as server, Server(script=in_turn) as other:
            load = partial(_load, server, asked)
            sides = {"fixed": partial(load, n), "adaptive": partial(load, options.budget)}
            shown += _compare(report, f"server_p50_{CLIENTS}_clients", sides, min(rounds, 3))
            sides = {"in turn": partial(_load, other, asked, n), "at once": partial(load, n)}
            shown += _compare(report, f"server_p50_{CLIENTS}_clients", sides, min(rounds, 3))
    report.text.append(table(["", "before", "after", "ratio", "tokens", "pass rate"], shown))
    return report


def _compare(report: Report, key: str, sides: dict[str, Callable[[int], Ran]], rounds: int) -> list[list[str]]:
    timed = interleave(sides, rounds, warmup=1, label=key)
    found = {name: [one.value for one in values] for name, values in timed.items()}
    seconds = {name: [ran.seconds for ran in rans] for name, rans in found.items()}
    before, after = sides
    pairs = Pairs(key, {}, (after, before), seconds[after], seconds[before])
    report.ratios[f"{after}_vs_{before}_{key}".replace(" ", "_")] = pairs.ratio
    facts = {
        what: {name: fmean(getattr(ran, what) for ran in rans) for name, rans in found.items()}
        for what in ("tokens", "passed")
    }
    report.rows.append({"case": key, "seconds": seconds, **facts})
    both = [
        " / ".join(f"{facts[what][name]:{form}}" for name in sides)
        for what, form in (("tokens", ".0f"), ("passed", ".3f"))
    ]
    return [
        [
            f"{key}: {after} / {before}",
            *(milliseconds(median(seconds[name])) for name in sides),
            f"{pairs.ratio:.2f}",
            *both,
        ]
    ]


def _run(bon: BestOfN, examples: list[Example], count: int, number: int) -> Ran:
    """What ``bon run FILE`` does."""
    examples = examples[(number + 1) * count :][:count]
    started = time.perf_counter()
    results = [*bon.map(example.task for example in examples)]
    seconds = time.perf_counter() - started
    tokens = sum(result.usage.policy_completion_tokens for result in results) / len(results)
    return Ran(
        seconds, tokens, fmean(e.passes(r.text or "") for e, r in zip(examples, results, strict=True) if e.passes)
    )


def _load(server: Server, examples: list[Example], n: int | str, number: int) -> Ran:
    """Clients that ask one after another, all at once."""

    def ask(example: Example) -> tuple[float, int, bool]:
        body = {"messages": [{"role": "user", "content": example.task.instruction}], "max_tokens": 96, "seed": number}
        started = time.perf_counter()
        with server.connection() as connection:
            connection.request("POST", PATH, json.dumps({**body, "best_of_n": {"n": n}}), JSON)
            answer = json.loads(connection.getresponse().read())
        seconds = time.perf_counter() - started
        assert example.passes is not None
        passed = example.passes(answer["choices"][0]["message"]["content"])
        return seconds, answer["usage"]["completion_tokens"], passed

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = [*clients.map(ask, examples)]
    seconds, tokens, passed = zip(*answers, strict=True)
    return Ran(median(seconds), fmean(tokens), fmean(passed))
