"""``bon eval``: measured quality."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bon.cli.options import JSON, Policy, SamplingOptions, Setup, configured, grouped, plain_number, threads_for


@grouped
def evaluate(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="mini, or another that bon doctor lists; or module:Class.")
    ],
    *,
    setup: Setup,
    policy: Policy = None,
    scorers: Annotated[
        list[str] | None,
        typer.Option("--scorer", metavar="SCORER", help="What is measured; repeatable. By default flip, likelihood."),
    ] = None,
    n: Annotated[str, typer.Option("-n", metavar="N", help="The largest number of candidates.")] = "16",
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="L", min=1, help="Examples at most; else the dataset says it.")
    ] = None,
    sampling: SamplingOptions,
    as_json: JSON = False,
) -> int:
    """Measure how much best-of-N gains: pass rates for N = 1, 2, 4, ... under each scorer and under baselines."""
    config = configured(setup, sampling, policy=policy)

    from bon.cli.terminal import print_json
    from bon.evals.harness import SCORERS, evaluate, format_table

    report = evaluate(
        dataset,
        policy=config.policy,
        scorers=scorers or ([config.scorer] if config.scorer else SCORERS),
        n=plain_number(n),
        limit=limit,
        seed=config.sampling.get("seed", 0),
        sampling=config.sampling,
        progress=sys.stderr.isatty(),
        threads=threads_for(config),
    )
    if as_json:
        print_json(report)
    else:
        print(format_table(report))
    return 0
