"""What many prompts will take: a cost model of best-of-N, and the rates that it needs, measured on a few prompts.

A prompt takes a worker the time to read it and to write N candidates, and to score them: tokens that are read by the
rate of prefill, tokens that are written by the rate of decoding, of the policy and of the scorer apart. More candidates
of a prompt are more often copies, which are scored once: those that are scored grow as a power of N. Rates are those of
batches as they are in a run, since a worker measures whole blocks of rows, all workers at the same time. What the model
does not know: that longer contexts decode slower, and what else changes with N; so measure near what is to be run.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from statistics import fmean, median
from time import perf_counter
from typing import Any

from bon import portal
from bon.bench.harness import forget
from bon.config import Config
from bon.data.ray import How, Worker, Workers, room, sendable
from bon.data.rows import Row
from bon.data.sink import to_json
from bon.engines.base import Completion, Engine, Generates, Prompt, Request
from bon.errors import BonError, InputError
from bon.types import Result, Usage

ROUNDS = 5
"""Blocks that are measured, unless the time is over before."""

ENOUGH_S = 60.0
"""No round is begun after this time."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What one role does for a prompt, and how fast.

    Args:
        read: tokens that it reads and computes: for a prompt, or for each candidate of it.
        written: tokens that it decodes for each candidate.
        prefill, decode: tokens a second; None where it reads or decodes none, or they are not known.
        rest: seconds for each candidate that no tokens explain.
    """

    read: float
    written: float
    prefill: float | None
    decode: float | None
    rest: float = 0.0

    @classmethod
    def of(
        cls, seconds: float, count: float, read: float, written: float, prefill: float | None, reads: float
    ) -> Stage:
        """Divide the time of some prompts between reading, writing and what is neither.

        Args:
            seconds: that all of it took.
            count: candidates.
            read, written: tokens of all of them.
            prefill: tokens a second where that is known from elsewhere; else reading took all that writing did not.
            reads: how often it read: prompts, or candidates.
        """
        if not read and not written:
            return cls(0.0, 0.0, None, None, seconds / count)
        if not written or (read and prefill is None):
            return cls(read / reads, 0.0, read / seconds, None)
        reading = min(read / prefill, 0.9 * seconds) if prefill else 0.0  # measured apart, it cannot be all the time
        decode = written / (seconds - reading)
        return cls(read / reads, written / count, read / reading if read else None, decode)

    def seconds(self, n: float, *, each: bool, longer: float = 1.0) -> float:
        """Time for a prompt.

        Args:
            n: candidates.
            each: whether it reads for each candidate.
            longer: how much longer the prompts are than those that were measured.
        """
        reading = self.read * longer * (n if each else 1) / self.prefill if self.prefill else 0.0
        return reading + n * (self.written / self.decode if self.decode else 0.0) + n * self.rest


@dataclass(frozen=True, slots=True)
class Cost:
    """What a prompt costs one worker.

    Args:
        policy, scorer: the two roles.
        n: candidates of a prompt, as measured.
        prompts: how many were measured.
        setup: seconds until the worker was ready.
        growth: the power of n by which candidates that are no copies grow; 1 where there are no copies.
    """

    policy: Stage
    scorer: Stage
    n: float
    prompts: int
    setup: float
    growth: float = 1.0

    def seconds(self, n: float | None = None, longer: float = 1.0) -> float:
        """Time for a prompt with n candidates (as measured, where it is not given)."""
        n = self.n if n is None else n
        return self.policy.seconds(n, each=False, longer=longer) + self.scorer.seconds(self._scored(n), each=True)

    def tokens(self, n: float | None = None, longer: float = 1.0) -> dict[str, float]:
        """Tokens for a prompt that each role reads and writes."""
        n = self.n if n is None else n
        return {
            "policy_read": self.policy.read * longer,
            "policy_written": self.policy.written * n,
            "scorer_read": self.scorer.read * self._scored(n),
            "scorer_written": self.scorer.written * self._scored(n),
        }

    def _scored(self, n: float) -> float:
        """As many candidates of those that were measured as n take the scorer."""
        return float(self.n * (n / self.n) ** self.growth)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a number of prompts takes.

    Args:
        costs: of each worker that was measured; all at once, if they are several.
        workers: that will run; where they are more than were measured, each is as fast as those.
        block: rows that a worker does together.
        longer: how much longer the prompts are than those that were measured.
    """

    costs: tuple[Cost, ...]
    workers: int
    block: int
    longer: float = 1.0

    def rate(self, n: float | None = None) -> float:
        """Prompts a second of all workers."""
        return self.workers * fmean(1 / cost.seconds(n, self.longer) for cost in self.costs)

    def seconds(self, prompts: int, n: float | None = None) -> float:
        """Time for some prompts once the workers are ready: the last blocks do not keep all of them busy."""
        blocks = -(-prompts // self.block)
        alone = self.workers / self.rate(n)
        return min(-(-blocks // self.workers) * self.block, prompts) * alone

    @property
    def setup(self) -> float:
        """Seconds until the last worker is ready."""
        return max(cost.setup for cost in self.costs)


def measure(worker: Worker, rows: Sequence[Row], size: int, setup: float = 0.0) -> Cost:
    """Measure what a prompt costs a worker: sampling alone and the whole in turn, on block after block.

    Args:
        worker: with its models.
        rows: a sample of those to come.
        size: of a block.
        setup: seconds that it took to be ready.

    Raises:
        BonError: a worker that could not be set up, or a row that cannot be done.
    """
    if worker.error is not None:
        raise worker.error
    policy, scorer = worker.bon.policy, worker.bon.scorer
    reader = next((engine for engine in scorer.engines if isinstance(engine, Generates)), None)
    engines: list[Engine] = [policy, *scorer.engines]
    _whole(worker, rows[:8])  # the first call pays for what the others find
    rounds: list[tuple[Stage, Stage, float]] = []
    results: list[Result] = []
    ends = perf_counter() + ENOUGH_S
    for start in range(0, len(rows), size):
        if rounds and (perf_counter() > ends or len(rows) - start < size):
            break
        block = rows[start : start + size]
        forget(*engines)
        reading, completions = _sampled(policy, block, 1, max_tokens=1, of=worker)
        prefill = sum(c.prompt_tokens - c.cached_tokens for c in completions) / reading or None
        forget(*engines)
        whole, made = _whole(worker, block)
        results += made
        usage, count = sum((each.usage for each in made), Usage()), sum(len(each.candidates) for each in made)
        forget(*engines)
        sampling, completions = _sampled(policy, block, max(1, round(count / len(block))), of=worker)
        read = sum(c.prompt_tokens - c.cached_tokens for c in completions)
        cached = sum(c.cached_tokens for c in completions)
        written = sum(c.completion_tokens for c in completions)
        first = Stage.of(sampling, len(completions), read, written, prefill, len(block))
        if reader is not None and reader is not policy:
            reading, completions = _sampled(reader, block, 1, max_tokens=1, of=worker)
            prefill = sum(c.prompt_tokens - c.cached_tokens for c in completions) / reading or None
        read = usage.scorer_prompt_tokens - max(0, usage.cached_tokens - cached) + usage.drafted_tokens
        written = usage.scorer_completion_tokens - usage.drafted_tokens
        left = max(whole - sampling, 1e-6 * whole)  # where both overlap, what scoring adds
        second = Stage.of(left, count, read, written, prefill, count)
        rounds.append((first, second, count / len(block)))
    roles = _median([first for first, _, _ in rounds]), _median([second for _, second, _ in rounds])
    return Cost(*roles, fmean(n for *_, n in rounds), len(results), setup, growth_of(results))


def _median(stages: Sequence[Stage]) -> Stage:
    """Lengths are means; rates, which a busy machine disturbs, are medians."""

    def rate(name: str) -> float | None:
        known = [value for stage in stages if (value := getattr(stage, name)) is not None]
        return median(known) if known else None

    read, written = (fmean(getattr(stage, name) for stage in stages) for name in ("read", "written"))
    return Stage(read, written, rate("prefill"), rate("decode"), rate("rest") or 0.0)


def _whole(worker: Worker, rows: Sequence[Row]) -> tuple[float, list[Result]]:
    """Best-of-n of some rows as a run does it: seconds, results."""
    started = perf_counter()
    outcomes = worker.outcomes(rows)
    for row, outcome in zip(rows, outcomes, strict=True):
        to_json(worker.written(row, outcome))
    seconds = perf_counter() - started
    results = []
    for row, outcome in zip(rows, outcomes, strict=True):
        if isinstance(outcome, BonError):
            raise InputError(f"line {row.line}, which was to be measured, cannot be done: {outcome}") from outcome
        results.append(outcome)
    return seconds, results


def growth_of(results: Sequence[Result]) -> float:
    """The power of n by which distinct candidates grow, from all of a prompt's and from the mean of its halves.

    It is 1 where the scorer scores copies as well, or where there are none.
    """
    whole = half = 0.0
    ratios = []
    for result in results:
        n = len(result.candidates)
        times = [1] * n
        if any(score.same_as is not None for score in result.scores):
            times = [*Counter(candidate.text for candidate in result.candidates).values()]
        if n > 1:
            drawn = n // 2
            whole += len(times)
            half += sum(1 - math.comb(n - each, drawn) / math.comb(n, drawn) for each in times)
            ratios.append(n / drawn)
    return math.log(whole / half) / math.log(median(ratios)) if half else 1.0


def _sampled(
    engine: Generates, rows: Sequence[Row], n: int, *, of: Worker, **changes: Any
) -> tuple[float, list[Completion]]:
    """Sample n completions for each row and do nothing else: seconds, completions."""
    sampling = replace(of.bon.scorer.needs.asked(of.bon.sampling), **changes)
    requests = [Request(Prompt.of(row.task.messages), sampling, n, together=True) for row in rows]

    async def collect() -> list[Completion]:
        async with aclosing(engine.generate(requests)) as completions:
            return [completion async for completion in completions]

    started = perf_counter()
    completions = portal.run(collect())
    return perf_counter() - started, completions


class Meter(Worker):
    """A worker that measures itself; an actor of Ray's."""

    def __init__(self, config: Config, folder: str) -> None:
        started = perf_counter()
        super().__init__(config, How(), folder)
        self.setup = perf_counter() - started

    def ready(self) -> None:
        """Return once the models are loaded."""

    def cost(self, rows: Sequence[Row], size: int) -> Cost | BonError:
        """What a prompt costs, or why it cannot be said."""
        try:
            return measure(self, rows, size, self.setup)
        except BonError as error:
            return sendable(error)


def measure_on_ray(config: Config, rows: Sequence[Row], size: int, workers: Workers) -> tuple[Cost, ...]:
    """Measure as many workers as there is room for at the same time, on the cluster that is connected.

    Raises:
        BonError: as ``measure``.
    """
    import ray

    kind = ray.remote(Meter).options(num_cpus=workers.cpus, num_gpus=workers.gpus)
    meters = [kind.remote(config, os.getcwd()) for _ in range(min(workers.count, room(workers)))]
    ray.get([meter.ready.remote() for meter in meters])
    costs = []
    for cost in ray.get([meter.cost.remote(rows, size) for meter in meters]):
        if isinstance(cost, BonError):
            raise cost
        costs.append(cost)
    return tuple(costs)
