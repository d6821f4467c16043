"""Adaptive N: what rules for stopping save beside a fixed N, at the same pass rate, on candidates that are there.

A table has candidates of a dataset's rows with rewards, labels and tokens. It is made once, which takes a policy and a
scorer (the embedded model and FLIP on the mini world unless others are named), and stays in `--table FILE`; replaying
budgets on it takes neither. Rows are split into halves: what a rule may choose is chosen on one half and judged on the
other (`bon.evals.budgets`). Beside the rules stand every fixed N, and the oracle, which knows the labels.

    python benchmarks/adaptive.py --table mini.jsonl --plot adaptive.png
    python benchmarks/adaptive.py --partial --dataset gsm8k --scorer likelihood:smollm2-135m --prompts 6
    python benchmarks/adaptive.py --wall                        # and --policy mini,engine=vllm
    python benchmarks/adaptive.py --dataset crux --votes '"answer"\\s*:\\s*"([^"]*)"' --n 16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bon import BestOfN
from bon.adaptive import Adaptive
from bon.bench.harness import Report, Spread, conditions, table
from bon.evals.budgets import ANY, compare, front, settings
from bon.evals.dataset import Example, as_dataset
from bon.evals.replay import Samples
from bon.evals.report import budget_plot
from bon.group import Group
from bon.selectors import WeightedVote
from bon.task import Task
from bon.types import Candidate, Score
from lib import partial, wall
from lib.scripts import parser, script


def main(argv: list[str] | None = None) -> None:
    """Make the table if it is not there, replay, print a table and one JSON object."""
    options = _options(argv)
    if options.partial or options.wall:
        (partial if options.partial else wall).measure(options).emit(options.out)
        return
    rows = _rows(options)
    most = min(len(row.labels) for row in rows)
    sizes = [*(size for size in (8, 16) if size < most), most]
    selector = None if options.votes is None else WeightedVote(options.votes)
    tried = settings(most, bounded=rows[0].range is not None, extract=options.votes)
    found = compare(rows, tried, sizes, selector, options.seed)
    facts = {name: getattr(options, name) for name in ("dataset", "policy", "scorer", "votes", "seed")}
    report = Report("adaptive", conditions(**facts, prompts=len(rows), candidates=most), rows=[found])
    for judged in found["halves"]:
        n = judged["n"]
        if judged["rule"] == ANY and n < most:
            for key, name, times in (("saved", "tokens_saved", 1), ("lost", "points_lost", 100)):
                mean, low, high = (times * judged[key][end] for end in ("mean", "low", "high"))
                report.ratios[f"{name}_{n}"] = Spread(mean, low, high)
            most_saved = 1 - found["oracle"][str(n)]["tokens"] / _fixed(found, n)["tokens"]
            report.ratios[f"oracle_saved_{n}"] = Spread.of([most_saved])
            gained = found["allocated"][str(n)]["label"] - _fixed(found, n)["label"]
            report.ratios[f"points_gained_by_allocation_{n}"] = Spread.of([100 * gained])
        elif judged["rule"] == ANY:
            report.ratios[f"samples_to_best_{n}"] = Spread.of([judged["samples"]])
            report.ratios[f"points_lost_{n}"] = Spread.of([100 * judged["lost"]["mean"]])
    for rule in tried:
        report.ratios[f"ms_a_round_{rule.partition(':')[0]}"] = Spread.of([_overhead(rule, most)])
    report.text += [_curve(found), _judgements(found)]
    if options.plot is not None:
        rules = {rule[:20]: front(tried) for rule, tried in found["tried"].items()}
        budget_plot(
            {"fixed N": front(found["fixed"]), **rules, "oracle": front([*found["oracle"].values()])}, options.plot
        )
    report.emit(options.out)


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--table", type=Path, metavar="FILE", help="JSON Lines; made if it is not there")
    options.add_argument("--dataset", default="mini", help="with a way to check answers, or with candidates and labels")
    options.add_argument("--policy", help="what writes; the embedded model if not given")
    options.add_argument("--scorer", help="what rewards; FLIP on the embedded model if not given")
    options.add_argument("--prompts", type=int, metavar="COUNT", help="rows; 120, or 12 with --quick")
    options.add_argument("--n", type=int, help="candidates of each; 64, or 24 with --quick")
    options.add_argument("--votes", metavar="EXTRACT", help="let answers vote, with no rewards: number, boxed, REGEX")
    options.add_argument(
        "--partial", action="store_true", help="how rewards of unfinished candidates tell the final ones"
    )
    options.add_argument("--wall", action="store_true", help="time a list of prompts, and a server's answers")
    options.add_argument("--budget", default="adaptive", help="what --wall times beside N")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw pass rate against tokens (PNG)")
    return options.parse_args(argv)


def _rows(options: argparse.Namespace) -> list[Samples]:
    """The rows of the table, which is made if it is not there."""
    if options.table is None or not options.table.exists():
        made = _made(options)
        if options.table is None:
            return [_read(row) for row in made]
        with options.table.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
    with options.table.open(encoding="utf-8") as file:
        return [_read(json.loads(line)) for line in file]


def _made(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    count, n = options.prompts or (12 if options.quick else 120), options.n or (24 if options.quick else 64)
    dataset = as_dataset(options.dataset)
    examples = list(dataset.rows(count, options.seed))
    if options.votes is not None and options.policy is None and all(e.candidates for e in examples):
        yield from (_given(example) for example in examples)
        return
    sampling = {"seed": options.seed, "max_tokens": dataset.max_tokens}
    with BestOfN(options.policy, options.scorer, n=n, prune=False, sampling=sampling) as bon:
        for example, result in zip(examples, bon.map(example.task for example in examples), strict=True):
            assert example.passes is not None
            yield {
                "rewards": [score.reward for score in result.scores],
                "ties": [score.tie_break for score in result.scores],
                "labels": [float(example.passes(candidate.text)) for candidate in result.candidates],
                "tokens": [candidate.completion_tokens for candidate in result.candidates],
                "texts": [candidate.text for candidate in result.candidates],
                "range": bon.scorer.range,
            }


def _given(example: Example) -> dict[str, Any]:
    """A row with the candidates that it brings, all with the same reward; words stand for tokens."""
    texts = list(example.candidates)
    same = [1.0] * len(texts)
    words = [len(text.split()) for text in texts]
    return {"rewards": same, "ties": same, "labels": [*example.labels], "tokens": words, "texts": texts, "range": None}


def _read(row: dict[str, Any]) -> Samples:
    of = zip(row["texts"], row["tokens"], row["rewards"], row["ties"], strict=True)
    candidates, scores = [], []
    for index, (text, tokens, reward, tie) in enumerate(of):
        candidates.append(Candidate(index, text, completion_tokens=tokens))
        scores.append(Score(reward, "failed" if reward is None else "ok", tie_break=tie))
    return Samples(candidates, scores, np.array(row["labels"]), row["range"] and tuple(row["range"]))


def _overhead(rule: str, n: int) -> float:
    """Milliseconds that a rule takes for its decision when n candidates are there."""
    group = Group(Task.of("timed"))
    group.range = (0.0, 1.0)
    group.ask(n)
    for index, reward in enumerate(np.random.default_rng(0).uniform(0, 0.9, n)):
        group.admit(Candidate(index, f"answer {index}", completion_tokens=20))
        group.post(group.candidates[index], Score(float(reward)))
    budget, times = Adaptive(rule=rule, most=n + 1), []
    for _ in range(100):
        started = perf_counter()
        budget.more(group)
        times.append(perf_counter() - started)
    return 1e3 * median(times)


def _fixed(found: dict[str, Any], n: int) -> dict[str, float]:
    return next(each for each in found["fixed"] if each["n"] == n)


def _curve(found: dict[str, Any]) -> str:
    lines = [[f"fixed, n={each['n']}", *_cells(each)] for each in found["fixed"]]
    lines += [[f"{n} a prompt, allocated", *_cells(each)] for n, each in found["allocated"].items()]
    lines += [[f"oracle, n={n}", *_cells(each)] for n, each in found["oracle"].items()]
    return table(["", "pass rate", "samples", "tokens", "rounds"], lines)


def _judgements(found: dict[str, Any]) -> str:
    lines = []
    for each in found["halves"]:
        saved = "{:.0%} [{:.0%}, {:.0%}]".format(*each["saved"].values())
        lost = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * end for end in each["lost"].values()))
        lines.append([f"{each['rule'][:12]}, n={each['n']}", *_cells(each), saved, lost])
    return table(["chosen on a half", "pass", "samples", "tokens", "rounds", "saved", "points lost"], lines)


def _cells(each: dict[str, float]) -> list[str]:
    return [f"{each['label']:.3f}", f"{each['samples']:.1f}", f"{each['tokens']:.0f}", f"{each['rounds']:.1f}"]


if __name__ == "__main__":
    script(main)
