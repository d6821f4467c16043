"""Which reward pays on real text? Share of the way from a random pick to the best candidate, set by set.

The sets bring real answers of many models, labelled; BON_DATA names the folder that holds their files (`bon eval SET`
does one of them). Rules without a model, and ``default``, which seldom reads, are measured on all rows and candidates;
scorers that read each candidate (--scorer) on the first --rows of a seeded shuffle and --candidates of each. Every
other row is there to choose by ("choose"), the rest to report on ("report"). --record keeps a file and a plot for each
set, to which a later run adds other scorers. Kept are figures and no texts: some sets' licences forbid copies.

    BON_DATA=DIR python benchmarks/real_text.py --model smollm2-135m --store scores.db
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from bon.bench.harness import Report, conditions, table
from bon.evals.dataset import Dataset, Example, as_dataset
from bon.evals.harness import evaluate
from bon.evals.report import write_plots
from lib.scripts import parser, script
from lib.shares import cell

SETS = ("ifeval", "arena-early", "gsm8k", "alpaca-eval", "llmbar-natural", "llmbar-adversarial", "crux")
PARTS = ("choose", "report", "all")
CHEAP = ("default:{model}", "consensus:chrf")
"""Scorers for all rows: these read few candidates or none."""
RULES = ("longest", "shortest", "majority")
KEPT = ("kind", "score", "share", "minus_random", "minus_longest", "same_strength", "tied", "failed")
SPENT = ("tokens", "seconds")
MOST_WORDS = 200  # of an instruction


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    report = Report("real_text", conditions(seed=options.seed, max_words=options.max_words))
    shown = []
    for name in options.sets:
        for run in _runs(options):
            for part in PARTS:
                selected = Selected(name, part, options.max_words, run.candidates, run.rows)
                common = {"seed": options.seed, "store": options.store, "progress": sys.stderr.isatty()}
                found = evaluate(selected, scorers=run.scorers, **common)
                for rule, figures in found["scorers"].items():
                    sizes = {"rows": found["rows"], "candidates": run.candidates}
                    kept = {key: figures[key] for key in (*KEPT, *SPENT)}
                    report.rows.append({"case": name, "part": part, "scorer": rule, **sizes, **kept})
                    if figures["kind"] == "scorer" or (rule in RULES and run.candidates is None):
                        shown.append([name, rule[:40], part, str(found["rows"]), cell(figures["share"])])
                if options.record and part == "all" and run.candidates is None:
                    _plot(found, options.record / f"eval_{name}.png")
        if options.record:
            _keep(options.record / f"eval_{name}.json", name, report)
    report.text.append(table(["set", "pick by", "rows", "", "share of the way [95%]"], shown))
    report.emit(options.out)


@dataclass(frozen=True)
class Run:
    """Scorers that see the same rows.

    Args:
        scorers: their specs.
        rows, candidates: see ``Selected``.
    """

    scorers: Sequence[str]
    rows: int | None = None
    candidates: int | None = None


def _runs(options: argparse.Namespace) -> list[Run]:
    specs = [spec.format(model=options.model) for spec in CHEAP if options.model or "{model}" not in spec]
    runs = [Run(specs, 20 if options.quick else None)]
    if options.scorer:
        reading = [spec.replace("{model}", str(options.model)) for spec in options.scorer]
        runs.append(Run(reading, 4 if options.quick else options.rows, options.candidates))
    return runs


@dataclass
class Selected(Dataset):
    """Rows of a published dataset that can show a difference.

    Args:
        source: its name; "llmbar-natural" and "llmbar-adversarial" are parts of one.
        part: every other row ("choose"), the others ("report"), or "all".
        words: of a candidate at most.
        candidates: of a row at most, drawn by the seed; None for all.
        rows_at_most: before they are parted; None for all.
    """

    source: str
    part: str
    words: int
    candidates: int | None
    rows_at_most: int | None

    @property
    def name(self) -> str:
        """The set's."""
        return self.source

    def rows(self, limit: int | None = None, seed: int = 0) -> Iterable[Example]:
        """See ``Dataset.rows``."""
        name, _, subset = self.source.partition("-") if self.source.startswith("llmbar") else (self.source, "", "")
        examples: list[Example] = [
            example
            for example in as_dataset(name).rows(None, seed)
            if not subset or ("natural" in example.subset.lower()) == (subset == "natural")
        ]
        random.Random(seed).shuffle(examples)  # LLMBar's file has one subset after the other
        found = [row for i, row in enumerate(examples) for row in self._selected(row, random.Random(seed + i))]
        found = found[: self.rows_at_most]
        return {"choose": found[::2], "report": found[1::2], "all": found}[self.part][:limit]

    def _selected(self, row: Example, rng: random.Random) -> Iterator[Example]:
        fits = [i for i, text in enumerate(row.candidates) if text.strip() and len(text.split()) <= self.words]
        rng.shuffle(fits)
        kept = sorted(fits[: self.candidates])
        labels = [row.labels[i] for i in kept]
        if len(set(labels)) > 1 and len(row.task.instruction.split()) <= MOST_WORDS:
            generators = [row.generators[i] for i in kept] if row.generators else ()
            yield replace(row, candidates=[row.candidates[i] for i in kept], labels=labels, generators=generators)


def _plot(found: dict[str, Any], path: Path) -> None:
    with TemporaryDirectory() as folder:
        paths = {written.name: written for written in write_plots(found, folder)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(paths["share.png"].read_bytes())


def _keep(path: Path, name: str, report: Report) -> None:
    """Write the rows of a set; those of other scorers that the file has stay."""
    rows = [row for row in report.rows if row["case"] == name]
    ours = {(row["part"], row["scorer"], row["candidates"]) for row in rows}
    before = orjson.loads(path.read_bytes())["rows"] if path.is_file() else []
    others = [row for row in before if (row["part"], row["scorer"], row["candidates"]) not in ours]
    kept = {"dataset": name, "conditions": report.conditions, "rows": others + rows}
    path.write_bytes(orjson.dumps(kept, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--sets", nargs="+", default=[*SETS], choices=[*SETS], help="which")
    options.add_argument("--model", help="what reads; without one rules alone")
    options.add_argument("--scorer", action="append", help="that reads each candidate, with {model} in it")
    options.add_argument("--rows", type=int, default=40, help="of each set for scorers that read each candidate")
    options.add_argument("--candidates", type=int, default=6, help="of a row, for them")
    options.add_argument("--max-words", type=int, default=150, help="of a candidate")
    options.add_argument("--store", type=Path, help="SQLite file that keeps scores")
    options.add_argument("--record", type=Path, help="folder for eval_SET.json and eval_SET.png")
    chosen = options.parse_args(argv)
    if chosen.model is None and any("{model}" in spec for spec in chosen.scorer or ()):
        options.error("a scorer with {model} in it needs --model, for example --model smollm2-135m")
    return chosen


if __name__ == "__main__":
    script(main)
