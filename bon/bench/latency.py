"""What best-of-N costs beyond sampling: one prompt at a time, end to end.

Sampling n candidates alone and the whole of best-of-n run in turn on the same prompt with the same seed, so both sample
the same candidates; the overhead is the ratio of the two times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from bon import portal
from bon.bench.harness import Pairs, Spread, Timed, interleave, milliseconds, table
from bon.best_of_n import BestOfN
from bon.engines.base import Generates, Prompt, Request
from bon.scorers.base import Scorer
from bon.task import Task
from bon.types import Result, Sampling

ALONE = "sampling alone"


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of one n, over all prompts: sampling alone, and best-of-n with each scorer.

    Args:
        n: candidates for each prompt.
        alone: seconds for each prompt.
        total: scorer -> seconds for each prompt.
        results: scorer -> what came out, for each prompt.
    """

    n: int
    alone: Sequence[float]
    total: Mapping[str, Sequence[float]]
    results: Mapping[str, Sequence[Result]]

    def overhead(self, scorer: str) -> Spread:
        """Best-of-n total / sampling alone."""
        return self._pairs(scorer).ratio

    def rows(self) -> list[dict[str, Any]]:
        """A row of the report for each scorer."""
        return [self._row(scorer) for scorer in self.total]

    def _pairs(self, scorer: str) -> Pairs:
        return Pairs("overhead", {"n": self.n, "scorer": scorer}, ("total", ALONE), self.total[scorer], self.alone)

    def _row(self, scorer: str) -> dict[str, Any]:
        results = self.results[scorer]
        stages = {
            stage: float(np.median([getattr(r.timing, stage) for r in results]))
            for stage in ("sample", "score", "overlap")
        }
        tokens = {
            "policy_tokens": float(np.mean([r.usage.policy_completion_tokens for r in results])),
            "scorer_tokens": float(np.mean([r.usage.scorer_completion_tokens for r in results])),
            "policy_steps": float(np.mean([_longest(c.completion_tokens for c in r.candidates) for r in results])),
            "scorer_steps": float(np.mean([_longest(s.tokens for s in r.scores) for r in results])),
        }
        quantiles = {
            f"{name}_{q}": float(np.quantile(seconds, quantile))
            for name, seconds in (("total", self.total[scorer]), ("alone", self.alone))
            for q, quantile in (("p50", 0.5), ("p95", 0.95))
        }
        return {**self._pairs(scorer).to_dict(), **quantiles, **stages, **tokens}


def measure_latency(
    policy: Generates,
    scorers: Mapping[str, Scorer],
    tasks: Sequence[Task],
    ns: Sequence[int],
    sampling: Sampling,
    *,
    before: Callable[[], object] | None = None,
) -> list[Latency]:
    """Time every n on every task.

    Args:
        policy: what samples.
        scorers: name -> scorer; each runs on every task.
        tasks: one round for each; the first also warms up.
        ns: numbers of candidates.
        sampling: should have a seed, or the sides sample different candidates.
        before: called before each measurement, outside its time.
    """
    return [_measure(policy, scorers, tasks, n, sampling, before) for n in ns]


def _measure(
    policy: Generates,
    scorers: Mapping[str, Scorer],
    tasks: Sequence[Task],
    n: int,
    sampling: Sampling,
    before: Callable[[], object] | None,
) -> Latency:
    def alone(round_: int) -> None:
        portal.run(_sample_only(policy, tasks[max(round_, 0)], sampling, n))

    def best_of(scorer: Scorer) -> Callable[[int], Result]:
        bon = BestOfN(policy, scorer, n=n, sampling=sampling)
        return lambda round_: portal.run(bon.run(tasks[max(round_, 0)]))

    sides = {ALONE: alone, **{name: best_of(scorer) for name, scorer in scorers.items()}}
    timed: dict[str, list[Timed[Any]]] = interleave(sides, len(tasks), label=f"latency n={n}", before=before)
    return Latency(
        n,
        [t.seconds for t in timed[ALONE]],
        {name: [t.seconds for t in timed[name]] for name in scorers},
        {name: [t.value for t in timed[name]] for name in scorers},
    )


async def _sample_only(policy: Generates, task: Task, sampling: Sampling, n: int) -> None:
    async with aclosing(policy.generate([Request(Prompt.of(task.messages), sampling, n)])) as completions:
        async for _ in completions:
            pass


def latency_table(latencies: Sequence[Latency]) -> str:
    """Milliseconds for each n and scorer."""
    rows = [
        [
            row["n"],
            row["scorer"],
            milliseconds(row["alone_p50"]),
            milliseconds(row["sample"]),
            milliseconds(row["score"]),
            milliseconds(row["overlap"]),
            milliseconds(row["total_p50"]),
            milliseconds(row["total_p95"]),
            f"{latency.overhead(row['scorer']):.2f}",
        ]
        for latency in latencies
        for row in latency.rows()
    ]
    headers = ["n", "scorer", "alone", "sample", "score", "overlap", "p50", "p95", "total / alone"]
    return "milliseconds; ratio: median (quartiles)\n" + table(headers, rows)


def _longest(counts: Any) -> int:
    return max((count or 0 for count in counts), default=0)
