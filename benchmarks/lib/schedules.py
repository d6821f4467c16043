"""What the order of work costs on vLLM: sampling alone, a barrier and then the scores, and bon.

All sides do the same jobs on the same engine in turn, with the same candidates token for token. Before each, outside
its time, the prefix cache is emptied, so that none finds there what another one computed.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bon import portal
from bon.bench.harness import Pairs, Spread, Timed, interleave, milliseconds, table
from bon.best_of_n import BestOfN
from bon.budget import Budget, StopAt
from lib.opening import Models
from lib.plain import Job, Outcome, Plain, policy_of

ALONE, TOGETHER = "sampling alone", "sampling alone, one request"
ONE_BY_ONE, GATHER = "barrier, one by one", "barrier, gather"
BON, EVERYTHING, STOPPING = "bon", "bon, every reward", "bon, stop at 1.0"

Way = Callable[[Job], Coroutine[Any, Any, Outcome]]


@dataclass(frozen=True, slots=True)
class Schedules:
    """Times and outcomes of some sides over the same jobs.

    Args:
        workload: what the jobs are.
        n: candidates of each.
        timed: side -> one measurement for each job.
    """

    workload: str
    n: int
    timed: Mapping[str, Sequence[Timed[Outcome]]]

    def ratio(self, side: str, other: str) -> Spread:
        """Time of a side / time of another."""
        return self._pairs(side, other).ratio

    def to_bound(self, side: str) -> Spread:
        """Time of a side / the least that any schedule could take, see ``bound``."""
        pairs = zip(self.timed[side], self.bound, strict=True)
        return Spread.of([timed.seconds / bound for timed, bound in pairs])

    @property
    def bound(self) -> list[float]:
        """Seconds for each job: the last of the candidates, each scored from when it is there, as if it were alone.

        When a candidate is there comes from sampling alone, and how long its score takes from scoring one by one, both
        in the same round: overlapping would have to cost nothing.
        """
        bounds = []
        for alone, single in zip(self.timed[ALONE], self.timed[ONE_BY_ONE], strict=True):
            pairs = zip(alone.value.ready, single.value.scoring, strict=True)
            bounds.append(max(ready + scoring for ready, scoring in pairs))
        return bounds

    def same_rewards(self, side: str, other: str) -> int:
        """On how many jobs two sides' winners have the same reward; FLIP leaves the last digit out, others may not."""
        pairs = zip(self.timed[side], self.timed[other], strict=True)
        return sum(_rounded(a.value.reward) == _rounded(b.value.reward) for a, b in pairs)

    def rows(self) -> list[dict[str, Any]]:
        """A row of the report for each side."""
        return [self._row(side) for side in self.timed]

    def _row(self, side: str) -> dict[str, Any]:
        timed = self.timed[side]
        seconds = [t.seconds for t in timed]
        outcomes = [t.value for t in timed]
        prompt, scorer = (sum(getattr(o, f) for o in outcomes) for f in ("prompt_tokens", "scorer_tokens"))
        row: dict[str, Any] = {
            "workload": self.workload,
            "side": side,
            **self._pairs(side, ALONE).to_dict(),
            "p50": float(np.quantile(seconds, 0.5)),
            "p95": float(np.quantile(seconds, 0.95)),
            "tokens_per_s": Spread.of(
                [(t.value.policy_tokens + t.value.scorer_tokens) / t.seconds for t in timed]
            ).median,
            "policy_tokens": float(np.mean([o.policy_tokens for o in outcomes])),
            "scorer_tokens": scorer / len(outcomes),
            "cached_share": sum(o.cached_tokens for o in outcomes) / prompt if prompt else None,
        }
        if GATHER in self.timed and scorer:
            row["to_gather"] = self.ratio(side, GATHER).median
            row["scorer_tokens_saved"] = 1 - scorer / sum(t.value.scorer_tokens for t in self.timed[GATHER])
            row["same_rewards"] = self.same_rewards(side, GATHER)
            row["mean_best_reward"] = float(np.mean([o.reward or 0.0 for o in outcomes]))
        if ALONE in self.timed and ONE_BY_ONE in self.timed and side != ALONE:
            row["to_bound"] = self.to_bound(side).median
        return row

    def _pairs(self, side: str, other: str) -> Pairs:
        first, second = ([t.seconds for t in self.timed[name]] for name in (side, other))
        return Pairs("schedule", {"n": self.n}, (side, other), first, second)


def measure_schedules(models: Models, workload: str, jobs: Sequence[Job], n: int, sides: Sequence[str]) -> Schedules:
    """Run every side on every job.

    Args:
        models: on vLLM.
        workload: name of the jobs, for the report.
        jobs: one round for each; the first also warms up.
        n: candidates.
        sides: which of this module's names.
    """
    plain = Plain(models.policy)
    one_engine = models.policy is models.scorer
    ways: dict[str, Way] = {
        ALONE: lambda job: plain.sample(job, n),
        TOGETHER: lambda job: plain.sample_together(job, n),
        ONE_BY_ONE: lambda job: plain.one_by_one(job, n),
        GATHER: lambda job: plain.gather(job, n),
        BON: lambda job: _with_bon(models, job, n),
        # What bon chooses where nothing can be skipped; drawn lengths hide from it whether one engine does both.
        EVERYTHING: lambda job: _with_bon(models, job, n, prune=False, schedule="all" if one_engine else "each"),
        STOPPING: lambda job: _with_bon(models, job, StopAt(1.0, most=n)),
    }

    def side(way: Way) -> Callable[[int], Outcome]:
        return lambda round_: portal.run(way(jobs[max(round_, 0)]))

    timed = interleave({s: side(ways[s]) for s in sides}, len(jobs), label=f"{workload} n={n}", before=models.forget)
    return Schedules(workload, n, timed)


async def _with_bon(models: Models, job: Job, n: int | Budget, **options: Any) -> Outcome:
    policy = policy_of(models.policy, job)
    bon = BestOfN(policy, job.scorer, n=n, sampling=job.sampling, **options)
    return Outcome.of(await bon.run(job.task))


def schedules_table(measured: Sequence[Schedules]) -> str:
    """Times, rates and shares for each n and side."""

    def shown(row: Mapping[str, Any], key: str, form: str) -> str:
        value = row.get(key)
        return "" if value is None else format(value, form)

    rows = [
        [
            f"{row['n']} {row['side']}",
            milliseconds(row["p50"]),
            milliseconds(row["p95"]),
            shown(row, "ratio", ".2f"),
            shown(row, "to_gather", ".2f"),
            shown(row, "to_bound", ".2f"),
            shown(row, "tokens_per_s", ".0f"),
            shown(row, "cached_share", ".0%"),
            shown(row, "scorer_tokens_saved", ".0%"),
        ]
        for schedules in measured
        for row in schedules.rows()
    ]
    headers = ["n, side", "p50", "p95", "/ alone", "/ gather", "/ bound", "tok/s", "cached", "saved"]
    return f"{measured[0].workload}; milliseconds, and medians of ratios within a round\n" + table(headers, rows)


def _rounded(reward: float | None) -> float | None:
    return None if reward is None else round(reward, 12)
