"""What drafts, pruning and stopping save, and that they change nothing that matters.

The same candidates are scored four times: with every token decoded, with drafts, with pruning as well, and with a stop
at the maximum reward besides. The winner's reward must be the same each time, on every prompt, and but for the stop so
must the winner; a benchmark that finds otherwise fails instead of reporting a saving.

Where each candidate is scored as it finishes (vLLM), what is saved depends on when it does, so they are sampled each
time as well, with the same seed. A stop then also saves the candidates that were still being sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bon import portal
from bon.bench.harness import Pairs, Spread, interleave, milliseconds, table
from bon.best_of_n import BestOfN
from bon.budget import StopAt
from bon.engines.base import Generates
from bon.errors import BonError
from bon.scorers.base import Scorer
from bon.scorers.flip import Flip
from bon.scorers.flip.drafting import Drafting
from bon.task import Task
from bon.types import Result, Sampling, Usage

EVERYTHING, DRAFTED = "everything", "drafts"
PRUNED, STOPPED = "drafts, pruning", "drafts, pruning, stop at 1.0"
LESS = (DRAFTED, PRUNED, STOPPED)


class WinnerChangedError(BonError):
    """Skipping work changed which reward won: a bug in bon."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """Scoring each prompt's candidates with every token decoded, and with less and less of it.

    Args:
        n: candidates for each prompt.
        results: side -> one result for each prompt.
        seconds: side -> scoring time for each prompt.
        sampled: whether each way sampled the candidates itself, so that times and stops include the sampling.
    """

    n: int
    results: Mapping[str, Sequence[Result]]
    seconds: Mapping[str, Sequence[float]]
    sampled: bool = False

    def tokens(self, side: str) -> list[int]:
        """Tokens the scorer decoded, for each prompt."""
        return [decoded(result.usage) for result in self.results[side]]

    def saved(self, side: str) -> Spread:
        """Share of all scorer decode tokens that were not decoded; the quartiles are over prompts."""
        spent, full = self.tokens(side), self.tokens(EVERYTHING)
        each = Spread.of([1 - a / b for a, b in zip(spent, full, strict=True) if b] or [0.0])
        return Spread(1 - sum(spent) / max(1, sum(full)), each.low, each.high)

    def time(self, side: str) -> Spread:
        """Scoring time with everything / with less, prompt by prompt."""
        return self._pairs(side).ratio

    def rows(self) -> list[dict[str, Any]]:
        """A row of the report for each way of skipping."""
        return [
            {
                **self._pairs(side).to_dict(),
                "prompts": len(self.results[side]),
                "tokens_everything": sum(self.tokens(EVERYTHING)),
                "tokens": sum(self.tokens(side)),
                "saved": self.saved(side).median,
                "scores_pruned": sum(result.counts.get("pruned", 0) for result in self.results[side]),
                "winner_rewards_equal": self.equal(side),
            }
            for side in LESS
        ]

    def text(self) -> str:
        """A table of what was saved."""
        rows = [
            [
                side,
                sum(self.tokens(side)),
                f"{self.saved(side).median:.1%}",
                sum(result.counts.get("pruned", 0) for result in self.results[side]),
                self.equal(side),
                milliseconds(Spread.of(self.seconds[side]).median),
                f"{self.time(side):.2f}",
            ]
            for side in (EVERYTHING, *LESS)
        ]
        headers = ["scoring", "tokens", "saved", "pruned", "same reward", "ms", "time ratio"]
        return f"{table(headers, rows)}\n{len(self.results[PRUNED])} prompts, {self.n} candidates each."

    def equal(self, side: str) -> int:
        """On how many prompts the winner's reward is what it is with nothing skipped."""
        pairs = zip(self.results[EVERYTHING], self.results[side], strict=True)
        return sum(full.reward == less.reward for full, less in pairs)

    def _pairs(self, side: str) -> Pairs:
        sizes = {"n": self.n, "scoring": side}
        return Pairs("pruning", sizes, (EVERYTHING, side), self.seconds[EVERYTHING], self.seconds[side])


def measure_pruning(
    policy: Generates,
    scorer: Scorer,
    tasks: Sequence[Task],
    n: int,
    sampling: Sampling,
    *,
    exact: bool = True,
    before: Callable[[], object] | None = None,
) -> Pruning:
    """Sample once, score four times; or do both four times, where they overlap.

    Args:
        policy: what samples.
        scorer: what is timed.
        tasks: one round for each.
        n: candidates for each task.
        sampling: of the candidates.
        exact: fail when a winner changes. In half precision one may without any fault of pruning: rows that leave
            change the shape of a batch, and with it the rounding of its arithmetic.
        before: called before each measurement, outside its time.

    Raises:
        WinnerChangedError: a winner's reward, or under pruning alone a winner, is not what it was.
    """
    options: dict[str, dict[str, Any]] = {
        EVERYTHING: {"prune": False},
        DRAFTED: {"prune": False},
        PRUNED: {},
        STOPPED: {"n": StopAt(1.0, most=n)},
    }
    scorers = {name: _undrafted(scorer) if name == EVERYTHING else scorer for name in options}
    ways = {name: BestOfN(policy, scorers[name], sampling=sampling, **{"n": n, **options[name]}) for name in options}
    concurrent = scorer.concurrent
    sampled = [] if concurrent else ways[EVERYTHING].map(tasks)
    given = [result.candidates for result in sampled if isinstance(result, Result)]

    def side(bon: BestOfN) -> Callable[[int], Result]:
        def run(round_: int) -> Result:
            at = max(round_, 0)
            return portal.run(bon.run(tasks[at]) if concurrent else bon.run_rerank(tasks[at], given[at]))

        return run

    timed = interleave({name: side(bon) for name, bon in ways.items()}, len(tasks), label="pruning", before=before)
    measured = Pruning(
        n,
        {name: [t.value for t in ts] for name, ts in timed.items()},
        {name: [t.seconds for t in ts] for name, ts in timed.items()},
        concurrent,
    )
    if exact:
        _check(measured)
    return measured


def _undrafted(scorer: Scorer) -> Scorer:
    """The same scorer without drafts."""
    if not isinstance(scorer, Flip):
        return scorer
    plain = copy.copy(scorer)
    plain._drafting = Drafting(False)
    return plain


def decoded(usage: Usage) -> int:
    """Tokens the scorer decoded; those read as a draft are not among them."""
    return usage.scorer_completion_tokens - usage.drafted_tokens


def _check(measured: Pruning) -> None:
    for name in LESS:
        for index, (full, less) in enumerate(zip(measured.results[EVERYTHING], measured.results[name], strict=True)):
            if full.reward != less.reward or (name != STOPPED and full.best != less.best):
                raise WinnerChangedError(
                    f"with {name}, candidate {less.best} won prompt {index} with reward {less.reward}; "
                    f"without, candidate {full.best} with {full.reward}."
                )
