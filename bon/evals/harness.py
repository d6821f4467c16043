"""Does a reward pick better answers? Any dataset with a verifier, any policy, several scorers.

Every example gets n candidates, which all scorers rate. Best-of-N for smaller N is the exact expectation over all
subsets of N of those candidates, so it needs no more samples and adds no noise. Intervals are over examples.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from bon import portal
from bon.budget import Fixed
from bon.engines.base import Generates
from bon.errors import BonError, EngineError, InputError, user_error, whole_number
from bon.evals.dataset import Dataset, Example, as_dataset
from bon.evals.metrics import Rates, expected_pass, interval
from bon.group import Group
from bon.models import ModelPool
from bon.pipeline import Pipeline
from bon.scorers.base import Pending, Scorer
from bon.selectors import Best
from bon.types import Candidate, Result, Sampling, Score

log = logging.getLogger("bon")

SCORERS = ("flip", "likelihood")
BASELINES = ("random", "oracle", "longest", "shortest")


def evaluate(
    dataset: str | Dataset,
    *,
    policy: Any = None,
    scorers: Sequence[Any] = SCORERS,
    n: int = 16,
    limit: int | None = None,
    seed: int = 0,
    sampling: Sampling | Mapping[str, Any] | None = None,
    progress: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Pass rates of best-of-N under each scorer and each baseline; blocks.

    Args:
        dataset: a ``Dataset`` or its spec ("mini").
        policy: as in ``BestOfN``; None for the embedded model.
        scorers: as in ``BestOfN``, each; those that name no model run on the policy's own.
        n: candidates for each example; the report's N runs over the powers of two up to it.
        limit: examples at most; None leaves it to the dataset.
        seed: of the examples and of the sampling.
        sampling: of the candidates; temperature 1 and the dataset's ``max_tokens`` where it says nothing.
        progress: show progress bars on stderr.
        threads: as in ``BestOfN``.

    Returns:
        ``n_instructions`` (examples), ``failed`` (examples left out, because something about them could not be sampled,
        scored or verified), ``greedy``, ``best_of`` (N as text -> scorer or baseline -> rate from 0 to 1) and
        ``intervals`` (the same shape, [low, high]); the same keys again under the name of each of the dataset's
        ``parts``; and the conditions.

    Raises:
        InputError: a number below 1, a scorer given twice, or what ``BestOfN`` says of policy and scorers.
        BonError: of the first example, where none could be evaluated.
    """
    whole_number("n", n, 1)
    if limit is not None:
        whole_number("limit", limit, 1)
    found = as_dataset(dataset)
    given = sampling if isinstance(sampling, Sampling) else {"max_tokens": found.max_tokens, **(sampling or {})}
    how = Sampling.of(given).replace(seed=seed)
    pool = ModelPool(threads)
    try:
        engine, ready = _load(pool, policy, scorers)
        evaluation = _Evaluation(engine, ready, n, how, progress)
        sections = {"": found, **found.parts}
        reports = {key: portal.run(evaluation.report(part, limit, seed)) for key, part in sections.items()}
    finally:
        portal.run(pool.aclose())
    return {
        **reports.pop(""),
        **reports,
        "dataset": dataset if isinstance(dataset, str) else found.name,
        "policy": engine.name,
        "scorers": {name: scorer.name for name, scorer in ready.items()},
        "n": n,
        "temperature": how.temperature,
        "max_tokens": how.max_tokens,
        "seed": seed,
    }


def _load(pool: ModelPool, policy: Any, scorers: Sequence[Any]) -> tuple[Generates, dict[str, Scorer]]:
    """The policy, and the scorers by name: as they were written, or what they call themselves."""
    engine: Generates | None = None
    ready: dict[str, Scorer] = {}
    for given in scorers:
        if engine is None:
            engine, scorer = pool.both(policy, given)
        else:
            scorer = pool.scorer(given, engine)
        name = given if isinstance(given, str) else scorer.name
        if name in ready or name in BASELINES:
            raise InputError(f"the scorer {name!r} is given twice, or has the name of a baseline.")
        ready[name] = scorer
    return engine or pool.policy(policy), ready


@dataclass(frozen=True)
class _Evaluation:
    """A policy and scorers at work on one dataset after the other."""

    policy: Generates
    scorers: Mapping[str, Scorer]
    n: int
    sampling: Sampling
    progress: bool

    async def report(self, dataset: Dataset, limit: int | None, seed: int) -> dict[str, Any]:
        """The figures of one dataset."""
        examples = list(dataset.rows(limit, seed))
        if not examples:
            raise InputError(f"the dataset {dataset.name!r} has no examples.")
        greedy = await self._sampled(examples, 1, self.sampling.replace(temperature=0.0), "greedy")
        sampled = await self._sampled(examples, self.n, self.sampling, "sampling")
        rankings = {name: await self._scored(name, examples, sampled) for name in self.scorers}
        outcomes: list[_Outcome | BonError] = []
        for i, example in enumerate(examples):
            try:
                ranked = {name: _need(results[i]).selection.ranking for name, results in rankings.items()}
                [answer] = _need(greedy[i]).candidates
                outcomes.append(_Outcome.of(example, answer, _need(sampled[i]).candidates, ranked))
            except Exception as error:
                outcomes.append(user_error("the dataset", error))
        return self._figures(dataset.name, outcomes)

    async def _sampled(
        self, examples: Sequence[Example], n: int, sampling: Sampling, label: str
    ) -> list[Result | BonError]:
        groups = [Group(example.task) for example in examples]
        return await self._run(Pipeline(_Unscored(), self.policy, Fixed(n), sampling), groups, label)

    async def _scored(
        self, name: str, examples: Sequence[Example], sampled: Sequence[Result | BonError]
    ) -> list[Result | BonError]:
        scorer = self.scorers[name]
        groups = [
            each if isinstance(each, BonError) else Group.of(example.task, each.candidates, whole=scorer.needs.group)
            for example, each in zip(examples, sampled, strict=True)
        ]
        return await self._run(Pipeline(scorer), groups, name)

    async def _run(self, pipeline: Pipeline, groups: Sequence[Group | BonError], label: str) -> list[Result | BonError]:
        bar = tqdm(total=len(groups), desc=label, unit="example", leave=False, disable=not self.progress)
        with bar:
            async with aclosing(pipeline.stream(groups)) as finished:
                async for _ in finished:
                    bar.update()
        return [_result(group) for group in groups]

    def _figures(self, title: str, outcomes: Sequence[_Outcome | BonError]) -> dict[str, Any]:
        good = [outcome for outcome in outcomes if isinstance(outcome, _Outcome)]
        errors = [outcome for outcome in outcomes if isinstance(outcome, BonError)]
        if not good:
            raise errors[0]
        if errors:
            log.warning("%d of %d examples are left out; the first: %s", len(errors), len(outcomes), errors[0])
        greedy = np.array([outcome.greedy for outcome in good], float)
        sizes = [2**power for power in range(self.n.bit_length())]
        rates = {str(size): self._rates(good, size) for size in sizes}
        return {
            "title": title,
            "n_instructions": len(good),
            "failed": len(errors),
            "greedy": float(greedy.mean()),
            "best_of": {n: {rule: float(rate.mean()) for rule, rate in row.items()} for n, row in rates.items()},
            "intervals": {
                "greedy": interval(greedy),
                "best_of": {n: {rule: interval(rate) for rule, rate in row.items()} for n, row in rates.items()},
            },
        }

    def _rates(self, outcomes: Sequence[_Outcome], size: int) -> dict[str, Rates]:
        return {
            rule: np.array([outcome.rate(rule, size) for outcome in outcomes]) for rule in (*self.scorers, *BASELINES)
        }


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One example: which answers pass, and in which order each rule prefers the candidates."""

    greedy: bool
    passed: Sequence[bool]
    orders: Mapping[str, Sequence[int]]

    @classmethod
    def of(
        cls, example: Example, greedy: Candidate, candidates: Sequence[Candidate], ranked: Mapping[str, Sequence[int]]
    ) -> _Outcome:
        assert example.passes is not None
        passed = [example.passes(candidate.text) for candidate in candidates]

        def by(key: Callable[[int], int]) -> list[int]:
            return sorted(range(len(candidates)), key=key)

        baselines = {
            "oracle": by(lambda i: not passed[i]),
            "longest": by(lambda i: -len(candidates[i].text)),
            "shortest": by(lambda i: len(candidates[i].text)),
        }
        return cls(example.passes(greedy.text), passed, {**ranked, **baselines})

    def rate(self, rule: str, size: int) -> float:
        """Chance that what the rule picks among ``size`` of the candidates passes."""
        if rule == "random":
            return sum(self.passed) / len(self.passed)
        return expected_pass(self.passed, self.orders[rule], size)


class _Unscored(Scorer):
    """Leaves candidates without a reward: each scorer of an evaluation gets the same ones, afterwards."""

    concurrent = True

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        for position, _ in enumerate(pending):
            yield position, Score(None, "failed", "not scored yet")


def _result(group: Group | BonError) -> Result | BonError:
    if isinstance(group, BonError):
        return group
    try:
        result = group.result(Best())
    except BonError as error:
        return error
    return EngineError(result.errors[0]) if result.errors else result


def _need(result: Result | BonError) -> Result:
    if isinstance(result, BonError):
        raise result
    return result


def format_table(report: Mapping[str, Any]) -> str:
    """The report as text: pass rates in percent, plus or minus half the 95% interval."""
    parts = [part for part in report.values() if isinstance(part, Mapping) and "intervals" in part]
    return "\n\n".join(map(_section, [report, *parts]))


def _section(report: Mapping[str, Any]) -> str:
    intervals, best_of = report["intervals"], report["best_of"]
    rules = list(next(iter(best_of.values())))
    width = max(map(len, rules))
    left_out = f" ({report['failed']} left out)" if report["failed"] else ""
    lines = [
        f"{report['n_instructions']} {report['title']}{left_out}: pass rate in %, 95% interval",
        f"greedy decoding: {_cell(report['greedy'], intervals['greedy'])}",
        "",
        " " * width + "".join(f"{f'N = {n}':>11}" for n in best_of),
    ]
    for rule in rules:
        cells = (_cell(row[rule], intervals["best_of"][n][rule]) for n, row in best_of.items())
        lines.append(rule.ljust(width) + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def _cell(rate: float, limits: Sequence[float]) -> str:
    return f"{100 * rate:.1f} ±{50 * (limits[1] - limits[0]):.1f}"
