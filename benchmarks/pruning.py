"""Pruning: how many of the scorer's decode steps need not be taken, with the same winner.

Claims: at n=16 on the mini world at least a tenth of the scorer's decode tokens is saved (`pruning_saved`), and on
every prompt the winner and its reward are what they are without pruning. Rows decode in step here, so a candidate can
only be given up against rewards of reconstructions that ended earlier in the same batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bon.bench.harness import Report, conditions, parser
from bon.bench.models import describe, open_engine
from bon.bench.pruning import PRUNED, STOPPED, measure_pruning
from bon.mini.tasks import sample_instructions
from bon.scorers import Flip
from bon.types import Sampling, Task


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    count = options.prompts or (6 if options.quick else 100)
    tasks = [Task.of(text) for text in sample_instructions(count, options.seed)]
    policy = open_engine(options.policy, options)
    judge = policy if options.flip is None else open_engine(options.flip, options)
    scorer = Flip(judge, sampling=Sampling(temperature=0.0, max_tokens=options.max_tokens))
    sampling = Sampling(max_tokens=options.max_tokens, seed=options.seed)
    facts = {"policy": describe(options.policy), "scorer": describe(options.flip or options.policy)}
    card = conditions(seed=options.seed, dtype=options.dtype, engine=options.engine, prompts=count, **facts)
    measured = measure_pruning(policy, scorer, tasks, options.n, sampling, exact=options.dtype == "float32")
    report = Report("pruning", {**card, "n": options.n, "max_tokens": options.max_tokens}, rows=measured.rows())
    report.ratios = {
        "pruning_saved": measured.saved(PRUNED),
        "pruning_saved_stopping": measured.saved(STOPPED),
        "pruning_time": measured.time(PRUNED),
        "pruning_time_stopping": measured.time(STOPPED),
    }
    report.text.append(measured.text())
    report.emit(options.out)


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--engine", default="torch", choices=["torch"], help="what runs the models")
    options.add_argument("--policy", type=Path, help="folder of the policy; the mini model when not given")
    options.add_argument("--flip", type=Path, help="folder of the scorer; the policy when not given")
    options.add_argument("--prompts", type=int, metavar="COUNT", help="from the mini world; 100, or 6 with --quick")
    options.add_argument("--n", type=int, default=16, help="candidates for each prompt")
    options.add_argument("--max-tokens", type=int, default=96, help="of a response and of a reconstruction")
    return options.parse_args(argv)


if __name__ == "__main__":
    main()
