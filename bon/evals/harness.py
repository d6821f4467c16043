"""Does a reward pick better answers? Any dataset, several scorers, and what picks without a model beside them.

Candidates are those of the dataset, or a policy's samples, which the dataset checks. All scorers rate the same ones.
``bon.evals.summary`` makes the figures.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tqdm import tqdm

from bon import portal
from bon.best_of_n import BestOfN
from bon.budget import Fixed
from bon.engines.base import Generates
from bon.errors import BonError, EngineError, InputError, several, user_error, whole_number
from bon.evals.baselines import BASELINES
from bon.evals.budgets import compare, settings
from bon.evals.dataset import Dataset, Example, as_dataset
from bon.evals.replay import Samples
from bon.evals.rows import Row, ScoredRow
from bon.evals.store import Store, Stored, stored
from bon.evals.summary import Summary
from bon.group import Group
from bon.mini.tasks import knows
from bon.models import ModelPool, as_scorer
from bon.pipeline import Pipeline
from bon.scorers.base import Pending, Scorer
from bon.selectors import Best
from bon.spec import SCORERS as REGISTERED
from bon.types import Candidate, Result, Sampling, Score

log = logging.getLogger("bon")

SCORERS = ("flip", "likelihood")
_LEAST = 8  # candidates of a row, for rules for stopping


def evaluate(
    dataset: str | Dataset,
    *,
    policy: Any = None,
    bigger: Any = None,
    scorers: Sequence[Any] = SCORERS,
    n: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    max_words: int | None = None,
    sampling: Sampling | Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    progress: bool = False,
    threads: int | None = None,
    budgets: bool = False,
) -> dict[str, Any]:
    """Measure scorers on a dataset, beside the baselines; blocks.

    Args:
        dataset: a ``Dataset`` or its spec ("mini").
        policy: what writes the candidates, as in ``BestOfN``; None takes those of the dataset, and where it has none
            the embedded model, if its small world is what is asked about.
        bigger: another model, one greedy answer of which is what best-of-N is compared with at equal time.
        scorers: as in ``BestOfN``, each; those that name no model run on the policy's own.
        n: candidates that a policy writes for each row, 16 unless said otherwise.
        limit: rows at most; None leaves it to the dataset.
        seed: of the choice of rows, of the sampling and of the intervals.
        max_words: candidates with more words are left out, and rows that then have fewer than two.
        sampling: of the candidates; the model's defaults and the dataset's ``max_tokens`` where it says nothing.
        store: a file that keeps the scores of scorers that have a spec: what it has is not scored again.
        progress: show progress bars on stderr.
        threads: as in ``BestOfN``.
        budgets: whether to find out which rule for stopping pays, and to run what is recommended; for a policy.

    Returns:
        ``dataset``, ``rows``, ``left_out`` (rows about which something could not be sampled, checked or scored),
        ``policy`` and ``sampling`` (None without one), ``seed``, ``seconds``, what ``Summary.report`` says, ``scorers``
        by name first of all, ``budgets`` by scorer (see ``_Evaluation._compared``), and ``parts``: the same again for
        each of the dataset's parts.

    Raises:
        InputError: a number below 1, a scorer given twice, a bigger model without a policy, a policy whose answers the
            dataset cannot check, no policy for a dataset without candidates, or what ``BestOfN`` says of policy and
            scorers.
        BonError: of the first row, where none could be evaluated.
    """
    for name, number in (("n", n), ("limit", limit), ("max_words", max_words)):
        if number is not None:
            whole_number(name, number, 1)
    found = as_dataset(dataset)
    sections = {key: (part, list(part.rows(limit, seed))) for key, part in {"": found, **found.parts}.items()}
    for part, examples in sections.values():
        if not examples:
            raise InputError(f"the dataset {part.name!r} has no rows.")
    samples = _samples(found, sections[""][1], policy, n)
    if bigger is not None and samples is None:
        raise InputError("a bigger model is compared with a policy: name one (--policy MODEL), or leave it out.")
    if budgets and (samples is None or samples < _LEAST):
        raise InputError(
            f"budgets are compared on a policy's candidates, at least {_LEAST} for each row: say --policy, -n."
        )
    given = sampling if isinstance(sampling, Sampling) else {"max_tokens": found.max_tokens, **(sampling or {})}
    pool = ModelPool(threads)
    with ExitStack() as opened:
        opened.callback(lambda: portal.run(pool.aclose()))
        engine, ready = _load(pool, policy, scorers, samples=samples is not None)
        other = None if bigger is None else pool.policy(bigger)
        if budgets and (whole := [name for name, scorer in ready.items() if scorer.needs.group]):
            why = "its rewards are those of the whole group, and of fewer candidates they are not known"
            raise InputError(f"budgets cannot be compared for the scorer {whole[0]!r}: {why}. Leave it out.")
        how = Sampling.of(given).replace(seed=seed)
        for scorer in ready.values():
            how = scorer.needs.asked(how)
        if store is not None:
            kept = opened.enter_context(Store(store))
            ready = {name: _kept(scorer, kept) for name, scorer in ready.items()}
        evaluation = _Evaluation(engine, other, ready, samples or 0, how, max_words, seed, progress, budgets)
        reports = {key: portal.run(evaluation.report(*section)) for key, section in sections.items()}
    return {**reports.pop(""), "parts": reports}


def _samples(dataset: Dataset, examples: Sequence[Example], policy: Any, n: int | None) -> int | None:
    """How many candidates the policy writes for each row; None where the rows' own are taken."""
    if policy is None and any(example.candidates for example in examples):
        if n is not None:
            raise InputError(
                f"n is how many candidates a policy writes, and the rows of {dataset.name!r} bring theirs."
            )
        return None
    if policy is None and not all(knows(example.task.instruction) for example in examples):
        raise InputError(
            f"the rows of {dataset.name!r} have no candidates: name a policy that writes them (--policy MODEL)."
        )
    if any(example.passes is None for example in examples):
        raise InputError(
            f"answers of a policy cannot be checked: {dataset.name!r} has labels of its own candidates only. "
            "Leave the policy out."
        )
    return 16 if n is None else n


def _load(
    pool: ModelPool, policy: Any, scorers: Sequence[Any], *, samples: bool
) -> tuple[Generates | None, dict[str, Scorer]]:
    """The policy, and the scorers by name: as they were written, or what they call themselves."""
    engine: Generates | None = None
    ready: dict[str, Scorer] = {}
    listed = [*several("scorers are a list of scorers", scorers)]
    models = [model for given in listed for model in as_scorer(given).models if model is not None]
    pool.load([model for model in models if model.base != model])  # a base may have to know of all its adapters at once
    for given in listed:
        if samples and engine is None:
            engine, scorer = pool.both(policy, given)
        else:
            scorer = pool.scorer(given, engine)
        name = given if isinstance(given, str) else scorer.name
        if name in ready or name in BASELINES:
            why = "is given twice" if name in ready else "is measured always, as a rule without a model; leave it out"
            raise InputError(f"the scorer {name!r} {why}.")
        ready[name] = scorer
    return engine or (pool.policy(policy) if samples else None), ready


def _kept(scorer: Scorer, store: Store) -> Scorer:
    """The scorer with a store; as it is where it has no spec: what a function does may change under its name."""
    try:
        return stored(scorer, store, REGISTERED.spec_of(scorer))
    except InputError:
        return scorer


@dataclass(frozen=True)
class _Evaluation:
    """A policy and scorers at work on one dataset after the other."""

    policy: Generates | None
    bigger: Generates | None
    scorers: Mapping[str, Scorer]
    n: int
    sampling: Sampling
    max_words: int | None
    seed: int
    progress: bool
    budgets: bool

    async def report(self, dataset: Dataset, examples: Sequence[Example]) -> dict[str, Any]:
        """The report on one dataset."""
        started = perf_counter()
        rows: list[Row | BonError]
        policy: tuple[int, float] | None = None
        bigger: tuple[str, int, float] | None = None
        if self.policy is None:
            rows = [_made(self._given, i, example) for i, example in enumerate(examples)]
        else:
            greedy = self.sampling.replace(temperature=0.0)
            singles = {"greedy": (await self._sampled(self.policy, examples, 1, greedy, "greedy"))[0]}
            sampled, tokens, spent_s = await self._sampled(self.policy, examples, self.n, self.sampling, "sampling")
            policy = tokens, spent_s
            if self.bigger is not None:
                singles["bigger"], tokens, spent_s = await self._sampled(self.bigger, examples, 1, greedy, "bigger")
                bigger = self.bigger.name, tokens, spent_s
            alone = [dict(zip(singles, row, strict=True)) for row in zip(*singles.values(), strict=True)]
            rows = [_made(self._checked, i, *row) for i, row in enumerate(zip(examples, sampled, alone, strict=True))]
        scored: dict[str, list[Result | BonError]] = {}
        seconds: dict[str, float] = {}
        for name, scorer in self.scorers.items():
            begun = _seconds(scorer)
            scored[name] = await self._scored(name, scorer, rows)
            seconds[name] = _seconds(scorer) - begun
        done = [
            row if isinstance(row, BonError) else _made(_joined, row, {name: all_[i] for name, all_ in scored.items()})
            for i, row in enumerate(rows)
        ]
        good = [row for row in done if isinstance(row, ScoredRow)]
        errors = [row for row in done if isinstance(row, BonError)]
        if not good:
            raise errors[0]
        if errors:
            log.warning("%d of %d rows are left out; the first: %s", len(errors), len(done), errors[0])
        spent = {name: (_tokens(some), seconds[name]) for name, some in scored.items()}
        report = Summary(good, dataset, spent, policy, bigger, self.seed).report()
        return {
            "dataset": dataset.name,
            "left_out": len(errors),
            "policy": None if self.policy is None else self.policy.name,
            "sampling": None if self.policy is None else self.sampling.to_dict(),
            "seed": self.seed,
            "budgets": {name: await self._compared(name, good) for name in self.scorers if self.budgets},
            **report,
            **dataset.figures(report),
            "seconds": perf_counter() - started,
        }

    async def _compared(self, name: str, rows: Sequence[ScoredRow]) -> dict[str, Any]:
        """Fixed numbers of samples and rules for stopping: replayed, then the best of each run.

        Returns:
            What ``compare`` says; and ``ran``, by spec the mean ``label``, ``samples`` and ``tokens`` of the policy for
            a row and the ``seconds`` for all rows: of the largest number, and of what is recommended in its place.
        """
        scorer = self.scorers[name]
        written = [[c for c in row.row.candidates if isinstance(c, Candidate)] for row in rows]
        samples = [
            Samples(candidates, row.scores[name], row.labels, scorer.range)
            for candidates, row in zip(written, rows, strict=True)
        ]
        most = min(len(row.labels) for row in samples)
        sizes = sorted({n for n in (8, 16, 32, most) if n <= most})
        found = compare(samples, settings(most, bounded=scorer.range is not None), sizes, seed=self.seed)
        ran = {spec: await self._ran(scorer, spec, rows) for spec in (str(most), found["recommended"][str(most)])}
        return {**found, "ran": ran}

    async def _ran(self, scorer: Scorer, spec: str, rows: Sequence[ScoredRow]) -> dict[str, float]:
        started, spent = perf_counter(), []
        bon = BestOfN(self.policy, scorer, n=spec, sampling=self.sampling)
        async with aclosing(bon.stream([row.row.example.task for row in rows])) as outcomes:
            async for position, outcome in outcomes:
                result, example = _need(outcome), rows[position].row.example
                right = result.text is not None and example.passes is not None and example.passes(result.text)
                spent.append((float(right), len(result.candidates), result.usage.policy_completion_tokens))
        means = dict(zip(("label", "samples", "tokens"), np.mean(spent, axis=0).tolist(), strict=True))
        return {**means, "seconds": perf_counter() - started}

    def _given(self, position: int, example: Example) -> Row:
        return Row.given(position, example).within(self.max_words)

    def _checked(
        self, position: int, example: Example, sampled: Result | BonError, alone: Mapping[str, Result | BonError]
    ) -> Row:
        singles = {name: _need(result).candidates[0] for name, result in alone.items()}
        return Row.sampled(position, example, _need(sampled).candidates, singles).within(self.max_words)

    async def _sampled(
        self, engine: Generates, examples: Sequence[Example], n: int, sampling: Sampling, label: str
    ) -> tuple[list[Result | BonError], int, float]:
        """Results, tokens and seconds."""
        started, groups = perf_counter(), [Group(example.task) for example in examples]
        results = await self._run(Pipeline(_Unscored(), engine, Fixed(n), sampling), groups, label)
        return results, _tokens(results), perf_counter() - started

    async def _scored(self, name: str, scorer: Scorer, rows: Sequence[Row | BonError]) -> list[Result | BonError]:
        groups = [
            row if isinstance(row, BonError)
            else _made(Group.of, row.example.task, row.candidates, prune=False, whole=scorer.needs.group)
            for row in rows
        ]  # fmt: skip
        return await self._run(Pipeline(scorer), groups, name)

    async def _run(self, pipeline: Pipeline, groups: Sequence[Group | BonError], label: str) -> list[Result | BonError]:
        bar = tqdm(total=len(groups), desc=label, unit="row", leave=False, disable=not self.progress)
        with bar:
            async with aclosing(pipeline.stream(groups)) as finished:
                async for _ in finished:
                    bar.update()
        return [_result(group) for group in groups]


class _Unscored(Scorer):
    """Leaves candidates without a reward: each scorer of an evaluation gets the same ones, afterwards."""

    concurrent = True

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        for position, _ in enumerate(pending):
            yield position, Score(None, "failed", "not scored yet")


def _seconds(scorer: Scorer) -> float:
    """A clock that for scores from a store goes on by what they took when they were made."""
    return scorer.seconds if isinstance(scorer, Stored) else perf_counter()


def _tokens(results: Sequence[Result | BonError]) -> int:
    return sum(result.usage.total_tokens for result in results if isinstance(result, Result))


def _joined(row: Row, results: Mapping[str, Result | BonError]) -> ScoredRow:
    return ScoredRow.of(row, {name: _need(result).scores for name, result in results.items()})


def _made(make: Any, *args: Any, **options: Any) -> Any:
    """What ``make`` returns, or the error that belongs in its place."""
    try:
        return make(*args, **options)
    except Exception as error:
        return user_error("the dataset", error)


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
