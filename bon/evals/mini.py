"""Does the reward pick better answers? Measured on the mini world, where a verifier knows the truth.

Every instruction gets `max_n` candidates at temperature 1, scored and ranked by the same `BestOfN` that users call.
Best-of-N for smaller N is the exact expectation over all subsets of N of those candidates, so it needs no more samples
and adds no noise. Intervals are over instructions: 95%, normal approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import comb, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from bon import portal
from bon.best_of_n import BestOfN
from bon.engines.base import Engine
from bon.errors import InputError
from bon.mini.tasks import Split, Task, instruction, sample_tasks, verify
from bon.resolve import as_policy, as_scorer
from bon.sampler import Failed, sample
from bon.scorers import BackwardLikelihood
from bon.task import Task as Request
from bon.types import Candidate, Sampling

MAX_TOKENS = 96  # the longest right answer has about 50
RULES = ("flip", "likelihood", "random", "oracle", "longest", "shortest")

Rates = npt.NDArray[np.float64]
"""Probability of passing, one for each instruction: shape [instructions]."""


def evaluate_mini(
    *,
    n_instructions: int = 500,
    max_n: int = 16,
    seed: int = 0,
    policy: Any = None,
    flip: Any = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Pass rates of best-of-N under each rule, on held-out instructions and on unseen wordings.

    Args:
        n_instructions: how many of each of the two sets.
        max_n: candidates for each instruction; N runs over the powers of two up to it.
        seed: of the instructions and of the sampling.
        policy: as in ``BestOfN``; None for the embedded model.
        flip: as in ``BestOfN``; None for ``Flip`` on the policy's own model.
        progress: show a progress bar on stderr.

    Returns:
        ``n_instructions``, ``greedy``, ``best_of`` (N as text -> rule -> rate from 0 to 1) and ``intervals`` (the same
        shape, [low, high]) for the held-out instructions; the same keys again under ``unseen_wordings``; and the
        conditions.

    Raises:
        InputError: a number below 1, or what ``BestOfN`` says of policy and flip.
    """
    for name, value in (("n_instructions", n_instructions), ("max_n", max_n)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}.")
    engine = as_policy(policy)
    scorer = as_scorer(flip, policy, engine)
    sampling = Sampling(temperature=1.0, max_tokens=MAX_TOKENS, seed=seed)
    by_flip = BestOfN(engine, scorer, n=max_n, sampling=sampling, prune=False)
    by_likelihood = BestOfN(engine, BackwardLikelihood(getattr(scorer, "engine", None) or engine), n=max_n)

    def report(split: Split) -> dict[str, Any]:
        tasks = sample_tasks(n_instructions, seed, split)
        rates = _best_of_rates(tasks, by_flip, by_likelihood, _bar(split, progress, n_instructions))
        greedy = np.array([verify(task, text) for task, text in zip(tasks, _greedy(engine, tasks), strict=True)], float)
        return {
            "n_instructions": n_instructions,
            "greedy": float(greedy.mean()),
            "best_of": {n: {rule: float(rate.mean()) for rule, rate in row.items()} for n, row in rates.items()},
            "intervals": {
                "greedy": interval(greedy),
                "best_of": {n: {rule: interval(rate) for rule, rate in row.items()} for n, row in rates.items()},
            },
        }

    return {
        **report("heldout"),
        "unseen_wordings": report("unseen_wording"),
        "policy": engine.name,
        "scorer": scorer.name,
        "temperature": sampling.temperature,
        "seed": seed,
    }


def _best_of_rates(
    tasks: Sequence[Task], by_flip: BestOfN, by_likelihood: BestOfN, bar: Callable[[Iterable[Any]], Iterable[Any]]
) -> dict[str, dict[str, Rates]]:
    """N (as text) -> rule -> probability, for each task, that what the rule picks among N candidates passes."""
    n = by_flip.n
    sizes = [2**power for power in range(n.bit_length())]
    rates = {str(size): {rule: np.zeros(len(tasks)) for rule in RULES} for size in sizes}
    results = by_flip.map(map(instruction, tasks))
    for index, (task, result) in enumerate(zip(tasks, bar(results), strict=True)):
        passed = [verify(task, candidate.text) for candidate in result.candidates]
        orders = {
            "flip": result.selection.ranking,
            "likelihood": by_likelihood.rerank(instruction(task), result.candidates).selection.ranking,
            "oracle": sorted(range(n), key=lambda i: not passed[i]),
            "longest": _by_length(result.candidates, longest=True),
            "shortest": _by_length(result.candidates, longest=False),
        }
        for size in sizes:
            row = rates[str(size)]
            row["random"][index] = sum(passed) / n
            for rule, order in orders.items():
                row[rule][index] = expected_pass(passed, order, size)
    return rates


def expected_pass(passed: Sequence[bool], order: Sequence[int], size: int) -> float:
    """Chance that the first in order passes, over all subsets of ``size`` candidates.

    Args:
        passed: which candidates are right.
        order: all candidate indices, most preferred first.
        size: candidates in a subset.
    """
    # The candidate at a rank wins the subsets whose other members all come after it.
    wins = [comb(len(order) - 1 - rank, size - 1) for rank in range(len(order))]
    return sum(win for win, index in zip(wins, order, strict=True) if passed[index]) / comb(len(order), size)


def interval(rates: Rates) -> list[float]:
    """95% interval of the mean over instructions, within [0, 1]."""
    spread = 1.96 * float(rates.std(ddof=1)) / sqrt(len(rates)) if len(rates) > 1 else 1.0
    mean = float(rates.mean())
    return [max(0.0, mean - spread), min(1.0, mean + spread)]


def _by_length(candidates: Sequence[Candidate], *, longest: bool) -> list[int]:
    sign = -1 if longest else 1
    return sorted(range(len(candidates)), key=lambda i: sign * len(candidates[i].text))


def _greedy(engine: Engine, tasks: Sequence[Task]) -> list[str]:
    """One greedily decoded answer for each task."""
    requests = [Request.of(instruction(task)) for task in tasks]

    async def decode() -> list[str]:
        sampling = Sampling(temperature=0.0, max_tokens=MAX_TOKENS)
        found: dict[int, str] = {}
        async for each in sample(engine, requests, sampling, 1):
            if isinstance(each, Failed):
                raise each.error
            found[each.task] = each.candidate.text
        return [found[index] for index in range(len(tasks))]

    return portal.run(decode())


def _bar(split: str, progress: bool, total: int) -> Callable[[Iterable[Any]], Iterable[Any]]:
    from tqdm import tqdm

    return lambda items: tqdm(items, desc=split.replace("_", " "), total=total, unit="prompt", disable=not progress)


def format_table(report: dict[str, Any]) -> str:
    """The report as text of at most 80 columns: pass rates in percent, plus or minus half the 95% interval."""
    return "\n\n".join(
        [
            _section("instructions with held-out combinations", report),
            _section("instructions in unseen wordings", report["unseen_wordings"]),
        ]
    )


def _section(title: str, report: dict[str, Any]) -> str:
    intervals = report["intervals"]
    lines = [
        f"{report['n_instructions']} {title}: pass rate in %, 95% interval",
        f"greedy decoding: {_cell(report['greedy'], intervals['greedy'])}",
        "",
        "  N" + "".join(f"{rule:>12}" for rule in RULES),
    ]
    for n, row in report["best_of"].items():
        cells = (_cell(row[rule], intervals["best_of"][n][rule]) for rule in RULES)
        lines.append(f"{n:>3}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _cell(rate: float, limits: Sequence[float]) -> str:
    return f"{100 * rate:.1f} ±{50 * (limits[1] - limits[0]):.1f}"
