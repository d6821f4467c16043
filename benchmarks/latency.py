"""Latency of best-of-N, one prompt at a time: what scoring adds to sampling.

Claims: best-of-16 takes at most twice as long as sampling 16 alone with FLIP `direct`, although the mini model's
reconstructions are as long as its responses (`overhead_bon16`), and at most 1.3 times with the likelihood scorer, which
decodes nothing (`overhead_bon16_likelihood`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bon.bench.harness import Report, conditions, parser
from bon.bench.latency import latency_table, measure_latency
from bon.bench.models import describe, open_engine
from bon.mini.tasks import sample_instructions
from bon.scorers import BackwardLikelihood, Flip
from bon.types import Sampling, Task

NS = (1, 2, 4, 8, 16, 32)
FLIP, LIKELIHOOD = "FLIP direct", "likelihood"


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    count = options.prompts or (5 if options.quick else 40)
    ns = options.n or ((1, 16) if options.quick else NS)
    sampling = Sampling(max_tokens=options.max_tokens, seed=options.seed)
    tasks = [Task.of(text) for text in sample_instructions(count, options.seed)]
    policy = open_engine(options.policy, options)
    judge = policy if options.flip is None else open_engine(options.flip, options)
    scorers = {
        FLIP: Flip(judge, sampling=Sampling(temperature=0.0, max_tokens=options.max_tokens)),
        LIKELIHOOD: BackwardLikelihood(judge),
    }
    facts = {"policy": describe(options.policy), "scorer": describe(options.flip or options.policy)}
    card = conditions(seed=options.seed, dtype=options.dtype, engine=options.engine, prompts=count, **facts)
    latencies = measure_latency(policy, scorers, tasks, ns, sampling)
    report = Report("latency", {**card, "max_tokens": options.max_tokens, "temperature": sampling.temperature})
    for latency in latencies:
        report.rows += latency.rows()
        if latency.n == 16:
            report.ratios["overhead_bon16"] = latency.overhead(FLIP)
            report.ratios["overhead_bon16_likelihood"] = latency.overhead(LIKELIHOOD)
    report.text.append(latency_table(latencies))
    report.emit(options.out)


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--engine", default="torch", choices=["torch"], help="what runs the models")
    options.add_argument("--policy", type=Path, help="folder of the policy; the mini model when not given")
    options.add_argument("--flip", type=Path, help="folder of the scorer; the policy when not given")
    options.add_argument("--prompts", type=int, metavar="COUNT", help="from the mini world; 40, or 5 with --quick")
    options.add_argument("--n", type=int, nargs="+", help="candidates; 1 to 32, or 1 and 16 with --quick")
    options.add_argument("--max-tokens", type=int, default=96, help="of a response and of a reconstruction")
    return options.parse_args(argv)


if __name__ == "__main__":
    main()
