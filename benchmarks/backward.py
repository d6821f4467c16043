"""Does a model that was trained to read backwards pay? Rewards side by side on real rows that it never saw.

Rows as in ``real_text.py``, of the half that is reported on; the other half is for training. A part of their candidates
is drawn by the seed, so that all scorers see the same few. For each set and over the sets, which count alike: share of
the way from a random pick to the best candidate, with paired 95% intervals; for FLIP also how often it echoes the
response, and how often a prompt is found among 64 by what was inferred from its answer. --rows-for-training DIR writes
both halves as files, for bon pairs (SET.choose.jsonl, and SET.report.jsonl to hold out), and ends.

    BON_DATA=DIR python benchmarks/backward.py --store scores.db --record benchmarks/results
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from bon import portal
from bon.bench.harness import Report, conditions
from bon.evals.dataset import Example
from bon.evals.inversion import inversion
from bon.evals.metrics import Floats, bootstrap, expected_best, interval
from bon.evals.store import Store, stored
from bon.group import Group
from bon.models import ModelPool
from bon.pipeline import score
from bon.scorers.base import Scorer
from bon.scorers.ensemble import Ensemble
from bon.scorers.guard import Guard
from bon.spec import SCORERS
from lib.scripts import parser, script
from lib.shares import over_sets, shares_table
from real_text import SETS, Selected

JUDGED = SETS[:-1]  # the last one is a control
ENSEMBLE = 'ensemble:"flip:flip-135m + likelihood:flip-135m + consensus:chrf",weights=[1, 1, 2],normalise=rank'
SCORED = (
    "flip:flip-135m",
    "likelihood:flip-135m",
    "flip:smollm2-135m",
    "likelihood:smollm2-135m",
    "default:smollm2-135m",
    "consensus:word_f1",
    "consensus:chrf",
    "longest",
    "shortest",
    ENSEMBLE,
    f'guard:"{ENSEMBLE.replace(chr(34), chr(92) + chr(34))}"',
)


def main(argv: list[str] | None = None) -> None:
    """Score, compare; print a table and one JSON object."""
    options = _options(argv)
    if options.rows_for_training:
        _write_halves(options)
        return
    sizes = {name: getattr(options, name) for name in ("rows", "candidates", "max_words", "seed")}
    report = Report("backward", conditions(**sizes))
    over: dict[str, list[tuple[Floats, float]]] = {}
    pool = ModelPool()
    try:
        for name in options.sets:
            rows = _rows(name, options)
            draws = bootstrap(len(rows), options.seed)
            best = np.array([max(row.labels) - np.mean(row.labels) for row in rows])
            for spec in options.scorer or SCORED:
                groups = _scored(spec, rows, options.store, pool)
                won = np.array([_won(row, group) for row, group in zip(rows, groups, strict=True)])
                over.setdefault(spec, []).append(((draws @ won) / (draws @ best), won.sum() / best.sum()))
                failed = sum(one.reward is None for group in groups for one in group.scores)
                figures = {
                    "share": interval(draws, won, best),
                    "failed": failed,
                    **_read_back(rows, groups, options.seed),
                }
                report.rows.append({"case": name, "scorer": spec, "rows": len(rows), **figures})
    finally:
        portal.run(pool.aclose())
    for spec, found in over.items():
        report.rows.append({"case": "mean", "scorer": spec, "share": over_sets(found)})
    report.text.append(shares_table(report.rows, "scorer"))
    report.emit(options.record / "backward.json" if options.record else options.out)


def _half(name: str, part: str, options: argparse.Namespace) -> list[Example]:
    return list(Selected(name, part, options.max_words, None, None).rows(seed=options.seed))


def _rows(name: str, options: argparse.Namespace) -> list[Example]:
    """Rows to report on, with some of their candidates, which have different labels still."""
    found = []
    for at, row in enumerate(_half(name, "report", options)):
        count = len(row.candidates)
        kept = sorted(random.Random(options.seed + at).sample(range(count), min(options.candidates, count)))
        labels = [row.labels[i] for i in kept]
        if len(set(labels)) > 1:
            found.append(replace(row, candidates=[row.candidates[i] for i in kept], labels=labels, generators=()))
    return found[: 3 if options.quick else options.rows]


def _scored(spec: str, rows: Sequence[Example], path: Path, pool: ModelPool) -> list[Group]:
    with Store(path) as store:
        groups = [(row.task, row.candidates) for row in rows]
        return portal.run(score(_kept(SCORERS.make(spec), store), groups, pool=pool))


def _kept(scorer: Scorer, store: Store) -> Scorer:
    """A scorer whose parts, or which itself, is scored once: an ensemble shares what was scored without it."""
    if not isinstance(scorer, Ensemble | Guard):
        return stored(scorer, store, SCORERS.spec_of(scorer))
    scorer.parts = [_kept(part, store) for part in scorer.parts]
    return scorer


def _won(row: Example, group: Group) -> float:
    """What the pick has beyond a random one; candidates that share the best reward share the pick."""
    none = (float("-inf"), 0.0)
    keys = [none if one.reward is None else (one.reward, one.tie_break or 0.0) for one in group.scores]
    ranks = np.array([sum(other < key for other in keys) for key in keys], float)
    return expected_best(np.array(row.labels, float), ranks, len(keys)) - float(np.mean(row.labels))


def _read_back(rows: Sequence[Example], groups: Sequence[Group], seed: int) -> dict[str, Any]:
    """Whose prompt was inferred, for scorers that infer one."""
    inferred = [
        (at, one.details.inferred, row.candidates[i])
        for at, (row, group) in enumerate(zip(rows, groups, strict=True))
        for i, one in enumerate(group.scores)
        if getattr(one.details, "inferred", None)
    ]
    return inversion([row.task.instruction for row in rows], inferred, seed) if inferred else {}


def _write_halves(options: argparse.Namespace) -> None:
    options.rows_for_training.mkdir(parents=True, exist_ok=True)
    for name in options.sets:
        for part in ("choose", "report"):
            rows = [
                {
                    "messages": [message.to_dict() for message in row.task.messages],
                    "candidates": row.candidates,
                    "grade": row.labels,
                }
                for row in _half(name, part, options)
            ]
            path = options.rows_for_training / f"{name}.{part}.jsonl"
            path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--sets", nargs="+", default=[*JUDGED], choices=[*SETS], help="which")
    options.add_argument(
        "--scorer", action="append", help="what picks; by default a trained model, and others beside it"
    )
    options.add_argument("--rows", type=int, default=40, help="of each set")
    options.add_argument("--candidates", type=int, default=4, help="of a row")
    options.add_argument("--max-words", type=int, default=150, help="of a candidate")
    options.add_argument("--store", type=Path, required=True, help="SQLite file that keeps scores")
    options.add_argument("--record", type=Path, help="folder for backward.json")
    options.add_argument("--rows-for-training", type=Path, metavar="DIR", help="write the halves of the sets there")
    return options.parse_args(argv)


if __name__ == "__main__":
    script(main)
