"""Which reward pays on real text? Share of the way from a random pick to the best candidate, set by set.

The sets bring real answers of many models, labelled (`bon eval SET` does one of them; BON_DATA names the folder that
holds their files). Rules without a model are measured on all rows, scorers that run one on the first --rows of a seeded
shuffle, candidates of at most --max-words words. Kept are figures and no texts: some sets' licences forbid copies.

    BON_DATA=DIR python benchmarks/real_text.py --scorer default:smollm2-135m --store scores.db
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bon.bench.harness import Report, conditions, table
from bon.evals.harness import evaluate
from bon.evals.report import write_plots
from lib.scripts import parser, script

SETS = {"llmbar": 100, "gsm8k": 48, "arena-early": 70, "ifeval": 15, "alpaca-eval": 15, "crux": 12}
"""And how many rows a model of 135M parameters reads in a few minutes."""
RULES = ("consensus", "longest", "shortest", "majority")
FREE = "ensemble:consensus"  # runs no model, and shows what the rules do
KEPT = ("kind", "score", "share", "minus_random", "minus_longest", "same_strength", "tokens", "seconds")


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    scorers = options.scorer or []
    report = Report("real_text", conditions(seed=options.seed, max_words=options.max_words, scorers=scorers))
    shown = []
    for name in options.sets:
        runs = [([FREE], RULES, 20 if options.quick else None)]
        if scorers:
            runs.append((scorers, scorers, 4 if options.quick else options.rows or SETS[name]))
        for measured, told, rows in runs:
            common = {"seed": options.seed, "max_words": options.max_words, "store": options.store, "progress": True}
            found = evaluate(name, scorers=measured, limit=rows, **common)
            if options.plots:
                write_plots(found, options.plots / name)
            for scorer, figures in found["scorers"].items():
                kept = {key: figures.get(key) for key in KEPT}
                report.rows.append({"case": name, "scorer": scorer, "rows": found["rows"], **kept})
                if scorer in told:
                    shown.append([name, scorer, str(found["rows"]), _cell(figures["share"])])
    report.text.append(table(["set", "pick by", "rows", "share of the way [95%]"], shown))
    report.emit(options.out)


def _cell(share: dict[str, Any] | None) -> str:
    return "-" if share is None else f"{share['mean']:+.2f} [{share['low']:+.2f}, {share['high']:+.2f}]"


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--sets", nargs="+", default=[*SETS], choices=[*SETS], help="which")
    options.add_argument("--scorer", action="append", help="that runs a model; without one rules alone")
    options.add_argument("--rows", type=int, help="for scorers that run a model; else a number for each set")
    options.add_argument("--max-words", type=int, default=150, help="of a candidate")
    options.add_argument("--store", type=Path, help="SQLite file that keeps scores")
    options.add_argument("--plots", type=Path, help="folder for a folder of plots of each set")
    return options.parse_args(argv)


if __name__ == "__main__":
    script(main)
