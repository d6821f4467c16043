"""Prefixes computed once: prefill, decode steps, memory and scoring, shared against plain transformers.

Claims: rows with a common prefix are prefilled and decoded faster when the prefix is read once (`prefill_shared`,
`decode_shared`, `decode_shared_2048`), its keys and values take one row's memory (`prefix_memory`), and scoring 32
candidates in one batch beats one at a time (`score_fused`) and, with a context that all share, the same batch without
sharing (`score_shared`). Plain is transformers' own forward over all rows in one batch, not a loop.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bon.bench.forward import PLAIN, SHARED, forward_table, measure_forward
from bon.bench.harness import Pairs, Report, conditions, milliseconds, table
from bon.engines.loading import load
from bon.models import ModelPool
from bon.scorers.flip import Flip
from bon.scorers.likelihood import BackwardLikelihood
from bon.task import Message, Task
from bon.types import Sampling
from lib.models import Filler, describe, model_of, random_model
from lib.scoring import FUSED, FUSED_SHARED, ONE_BY_ONE, measure_scoring
from lib.scripts import parser, script

PREFIXES = (64, 128, 256, 512, 1024, 2048, 4096)  # at 32 rows
ROWS = (1, 2, 4, 8, 16, 32, 64)  # at a prefix of 512
QUICK = ((64, 32), (512, 4), (512, 32), (2048, 32))
CONTEXT, INSTRUCTION = 512, 24  # scoring: tokens


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    with TemporaryDirectory() as folder:
        model = options.model or random_model(Path(folder) / "random-llama", seed=options.seed)
        report = Report(
            "prefix_sharing",
            conditions(
                seed=options.seed, dtype=options.dtype, forward_and_scoring=describe(model), scoring_too=describe(None)
            ),
        )
        _forward(report, model, options)
        _scoring(report, model, "", options)
        if options.model is None:
            _scoring(report, None, "_mini", options)
    report.emit(options.out)


def _forward(report: Report, model: Path, options: argparse.Namespace) -> None:
    network, _ = load(model, device=options.device, dtype=options.dtype)
    measured = []
    for prefix, rows, rounds in _sizes(options.sizes, options.quick):
        cases = measure_forward(
            network,
            prefix=prefix,
            rows=rows,
            rounds=rounds,
            steps=8 if options.quick else 32,
            seed=options.seed,
            exact=options.dtype == "float32",
        )
        measured.append(cases)
        report.rows += [pairs.to_dict() for pairs in cases.values()]
        if (prefix, rows) == (512, 32):
            report.ratios["prefill_shared"] = cases["prefill"].ratio
            report.ratios["decode_shared"] = cases["decode"].ratio
            report.ratios["prefix_memory"] = cases["memory"].ratio
        if (prefix, rows) == (2048, 32):
            report.ratios["decode_shared_2048"] = cases["decode"].ratio
    report.text.append(forward_table(measured))


def _sizes(chosen: list[tuple[int, int]] | None, quick: bool) -> Iterator[tuple[int, int, int]]:
    """Prefix, rows and rounds of every case; the long ones take long and vary little."""
    grid = {*((prefix, 32) for prefix in PREFIXES), *((512, rows) for rows in ROWS)}
    for prefix, rows in chosen or (QUICK if quick else sorted(grid)):
        long = prefix * rows > 512 * 32
        yield prefix, rows, (1 if long else 2) if quick else (3 if long else 7)


def _scoring(report: Report, model: Path | None, suffix: str, options: argparse.Namespace) -> None:
    pool = ModelPool()
    engines: dict[str, Any] = {
        PLAIN: pool.engine(model_of(model, options, share_prefix=False)),
        SHARED: pool.engine(model_of(model, options, share_prefix=True)),
    }
    filler = Filler(engines[PLAIN].renderer.tokenizer, options.seed)
    instruction, history = filler(INSTRUCTION).strip(), filler(CONTEXT).strip()
    tasks = {
        0: Task.of(instruction),
        CONTEXT: Task.of([Message("user", history), Message("assistant", "Yes."), Message("user", instruction)]),
    }
    lengths = random.Random(options.seed)

    def candidates(count: int) -> list[str]:
        return [filler(lengths.randint(16, 64)).strip() for _ in range(count)]

    rounds = 2 if options.quick else 7
    texts = [candidates(options.candidates) for _ in range(rounds + 1)]
    greedy = Sampling(temperature=0.0, max_tokens=INSTRUCTION)
    makers: dict[str, Any] = {
        "FLIP direct": lambda engine: Flip(engine, sampling=greedy, draft=False),
        "likelihood": lambda engine: BackwardLikelihood(engine),
    }
    lines = []
    for name, make in makers.items():
        for context, task in tasks.items():
            scorers = {side: make(engine) for side, engine in engines.items()}
            seconds = measure_scoring(scorers, task, lambda round_: texts[round_], rounds)
            sizes = {
                "model": describe(model)["model"],
                "scorer": name,
                "context": context,
                "candidates": options.candidates,
            }
            fused = Pairs("score_fused", sizes, (ONE_BY_ONE, FUSED_SHARED), seconds[ONE_BY_ONE], seconds[FUSED_SHARED])
            shared = Pairs("score_shared", sizes, (FUSED, FUSED_SHARED), seconds[FUSED], seconds[FUSED_SHARED])
            report.rows += [fused.to_dict(), shared.to_dict()]
            kind = suffix + ("_likelihood" if name == "likelihood" else "")
            if context == 0:
                report.ratios[f"score_fused{kind}"] = fused.ratio
            else:
                report.ratios[f"score_shared{kind}"] = shared.ratio
            medians = [fused.to_dict()["medians"][0], *shared.to_dict()["medians"]]
            ratios = [f"{fused.ratio.median:.1f}", f"{shared.ratio.median:.2f}"]
            lines.append([name, context, *map(milliseconds, medians), *ratios])
    headers = ["scorer", "context", ONE_BY_ONE, FUSED, "fused, shared", "vs one", "vs fused"]
    title = f"scoring {options.candidates} candidates of 16 to 64 tokens, {describe(model)['model']}; ms"
    report.text.append(f"{title}\n{table(headers, lines)}")


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="folder of another model than the random 4.7M-parameter Llama")
    options.add_argument("--sizes", type=_size, nargs="+", metavar="PREFIXxROWS", help="of the forward passes: 512x32")
    options.add_argument("--candidates", type=int, default=32, help="that are scored together")
    return options.parse_args(argv)


def _size(text: str) -> tuple[int, int]:
    prefix, rows = map(int, text.split("x"))
    return prefix, rows


if __name__ == "__main__":
    script(main)
