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
from bon.engines.base import Engine
from bon.errors import BonError
from bon.scorers.base import Board, Item, Scorer
from bon.scorers.drafting import Drafting
from bon.scorers.flip import Flip
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
        informed: tokens the scorer decodes for each prompt when pruning knows the winner's reward from the start.
        sampled: whether each way sampled the candidates itself, so that times and stops include the sampling.
    """

    n: int
    results: Mapping[str, Sequence[Result]]
    seconds: Mapping[str, Sequence[float]]
    informed: Sequence[int]
    sampled: bool = False

    def tokens(self, side: str) -> list[int]:
        """Tokens the scorer decoded, for each prompt; those read as a draft are not among them."""
        return [_decoded(result.usage) for result in self.results[side]]

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
                "possible_in_step": None if self.sampled else self.possible_in_step,
                "possible_informed": self.possible_informed,
                "saved_on_duplicates": self.saved_on_duplicates,
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
        in_step = (
            f"Without drafts the best possible bound saves {self.possible_in_step:.1%} while rows decode in step.\n"
        )
        headers = ["scoring", "tokens", "saved", "pruned", "same reward", "ms", "time ratio"]
        count = len(self.results[PRUNED])
        notes = (
            f"{count} prompts, {self.n} candidates each.\n"
            f"{'' if self.sampled else in_step}"
            f"Drafts and a bound that knows the winner's reward save {self.possible_informed:.1%}.\n"
            f"Scoring identical candidates once had saved {self.saved_on_duplicates:.1%} before."
        )
        return f"{table(headers, rows)}\n{notes}"

    def equal(self, side: str) -> int:
        """On how many prompts the winner's reward is what it is with nothing skipped."""
        pairs = zip(self.results[EVERYTHING], self.results[side], strict=True)
        return sum(full.reward == less.reward for full, less in pairs)

    @property
    def possible_in_step(self) -> float:
        """Share of decode tokens that the best possible bound could save while all rows decode in step.

        A reconstruction can only lose against one that ended before: at best it is given up at the first step at which
        a higher reward than its own final one is known.
        """
        saved = 0
        for result in self.results[EVERYTHING]:
            ended = [(s.tokens, -1.0 if s.reward is None else s.reward) for s in result.scores if s.same_as is None]
            for tokens, reward in ended:
                known = min((at for at, better in ended if better > reward), default=tokens)
                saved += max(0, tokens - known)
        return saved / max(1, sum(self.tokens(EVERYTHING)))

    @property
    def possible_informed(self) -> float:
        """Share of decode tokens that pruning saves when it knows the winner's reward before it starts.

        No schedule does better with the same bound; one that scores the winner first comes near.
        """
        return 1 - sum(self.informed) / max(1, sum(self.tokens(EVERYTHING)))

    @property
    def saved_on_duplicates(self) -> float:
        """Share of decode tokens that scoring identical candidates once saves, before anything is pruned."""
        every = [
            result.scores[index if score.same_as is None else score.same_as].tokens
            for result in self.results[EVERYTHING]
            for index, score in enumerate(result.scores)
        ]
        return 1 - sum(self.tokens(EVERYTHING)) / max(1, sum(every))

    def _pairs(self, side: str) -> Pairs:
        sizes = {"n": self.n, "scoring": side}
        return Pairs("pruning", sizes, (EVERYTHING, side), self.seconds[EVERYTHING], self.seconds[side])


def measure_pruning(
    policy: Engine,
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
        STOPPED: {"stop_at": 1.0},
    }
    scorers = {name: _undrafted(scorer) if name == EVERYTHING else scorer for name in options}
    ways = {name: BestOfN(policy, scorers[name], n=n, sampling=sampling, **options[name]) for name in options}
    overlapped = scorer.overlaps
    given = [] if overlapped else [result.candidates for result in ways[EVERYTHING].map(tasks)]

    def side(bon: BestOfN) -> Callable[[int], Result]:
        def run(round_: int) -> Result:
            at = max(round_, 0)
            return portal.run(bon.run(tasks[at]) if overlapped else bon.run_rerank(tasks[at], given[at]))

        return run

    timed = interleave({name: side(bon) for name, bon in ways.items()}, len(tasks), label="pruning", before=before)
    measured = Pruning(
        n,
        {name: [t.value for t in ts] for name, ts in timed.items()},
        {name: [t.seconds for t in ts] for name, ts in timed.items()},
        portal.run(_informed(scorer, [t.value for t in timed[EVERYTHING]])),
        overlapped,
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


def _decoded(usage: Usage) -> int:
    return usage.scorer_completion_tokens - usage.drafted_tokens


async def _informed(scorer: Scorer, results: Sequence[Result]) -> list[int]:
    """Tokens decoded for each result's candidates when its reward is on the board before anything is scored."""
    tokens = []
    for result in results:
        board = Board(best=result.reward)
        scored = [s.candidate for s in result.scores if s.same_as is None and s.status != "empty"]
        items = [Item(result.task, result.candidates[index], board) for index in scored]
        tokens.append(sum([_decoded(s.usage) async for s in scorer.score(items)]))
    return tokens


def _check(measured: Pruning) -> None:
    for name in LESS:
        for index, (full, less) in enumerate(zip(measured.results[EVERYTHING], measured.results[name], strict=True)):
            if full.reward != less.reward or (name != STOPPED and full.best != less.best):
                raise WinnerChangedError(
                    f"with {name}, candidate {less.best} won prompt {index} with reward {less.reward}; "
                    f"without, candidate {full.best} with {full.reward}."
                )
