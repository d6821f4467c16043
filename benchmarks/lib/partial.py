"""Do rewards of unfinished candidates tell those of the finished ones? What it would cost to give up the worse half."""

from __future__ import annotations

import argparse
import re
from math import comb
from statistics import fmean
from typing import Any

import numpy as np

from bon import BestOfN, portal
from bon.bench.harness import Report, Spread, conditions, table
from bon.evals.dataset import as_dataset
from bon.evals.metrics import Floats, spearman
from bon.pipeline import score

SHARES = (0.25, 0.5, 0.75)
"""Of the words of a candidate."""


def measure(options: argparse.Namespace) -> Report:
    """Score candidates as they were at 25, 50 and 75% of their words, and at the end."""
    count, n = options.prompts or (12 if options.quick else 60), options.n or 16
    dataset = as_dataset(options.dataset)
    examples = list(dataset.rows(count, options.seed))
    sampling = {"seed": options.seed, "max_tokens": dataset.max_tokens}
    with BestOfN(options.policy, options.scorer, n=n, prune=False, sampling=sampling) as bon:
        if all(example.candidates for example in examples):
            texts = [[*example.candidates] for example in examples]
        else:
            results = bon.map(example.task for example in examples)
            texts = [[candidate.text for candidate in result.candidates] for result in results]
        tasks = [example.task for example in examples]
        final, *partial = (_rewards(bon.scorer, tasks, texts, share) for share in (1.0, *SHARES))
    names = ("dataset", "policy", "scorer", "seed")
    report = Report("partial", conditions(**{name: getattr(options, name) for name in names}, prompts=len(examples)))
    shown = []
    for share, rewards in zip(SHARES, partial, strict=True):
        found = [value for a, b in zip(rewards, final, strict=True) if (value := spearman(a, b)) is not None]
        kept = [_kept(a, b) for a, b in zip(rewards, final, strict=True)]
        percent = round(100 * share)
        report.ratios[f"rank_correlation_{percent}"] = Spread.of(found)
        report.ratios[f"best_kept_{percent}"] = Spread.of([fmean(kept)])
        shown.append(
            [f"{percent}%", f"{fmean(found):.2f}", f"{Spread.of(found):.2f}", str(len(found)), f"{fmean(kept):.2f}"]
        )
    report.ratios["best_kept_by_chance"] = Spread.of([fmean(map(_by_chance, final))])
    shown.append(["a random half", "", "", "", f"{fmean(map(_by_chance, final)):.2f}"])
    columns = [
        "of the words",
        "rank correlation",
        "median (quartiles)",
        "rows that differ",
        "the best is in the better half",
    ]
    report.text.append(table(columns, shown))
    return report


def _rewards(scorer: Any, tasks: list[Any], texts: list[list[str]], share: float) -> list[Floats]:
    pairs = [(task, [_cut(text, share) for text in some]) for task, some in zip(tasks, texts, strict=True)]
    groups = portal.run(score(scorer, pairs))
    return [np.array([np.nan if reward is None else reward for reward in group.rewards]) for group in groups]


def _by_chance(final: Floats) -> float:
    """How often a half that is drawn has a candidate with the largest reward."""
    n, best = len(final), int((final == np.nanmax(final, initial=-np.inf)).sum())
    return 1 - comb(n - best, -(-n // 2)) / comb(n, -(-n // 2))


def _cut(text: str, share: float) -> str:
    words = re.findall(r"\s*\S+", text)
    return "".join(words[: max(1, round(share * len(words)))])


def _kept(partial: Floats, final: Floats) -> bool:
    """Whether a candidate with the largest reward is among the better half by the rewards of the parts."""
    better = np.argsort(-np.nan_to_num(partial, nan=-np.inf), kind="stable")[: -(-len(partial) // 2)]
    return bool(np.nanmax(final, initial=-np.inf) == np.nanmax(final[better], initial=-np.inf))
