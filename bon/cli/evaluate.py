"""``bon eval``: does the reward pay?"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bon.cli.options import JSON, Policy, Setup, configured, grouped, threads_for


@grouped
def evaluate(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="mini, or another registered dataset (bon doctor lists them).")
    ],
    *,
    setup: Setup,
    policy: Policy = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option("--scorer", metavar="SCORER", help="What rewards; repeatable. flip and likelihood by default."),
    ] = None,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="The largest N.")] = 16,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="ROWS", min=1, help="Examples at most; 500 in mini.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0, help="Of examples and sampling.")] = 0,
    as_json: JSON = False,
) -> int:
    """Pass rates of best-of-N for N = 1, 2, 4, ..., for each scorer, beside random, longest, shortest and oracle."""
    config = configured(setup, policy=policy)

    from bon.cli.terminal import print_json
    from bon.evals.harness import SCORERS, format_table
    from bon.evals.harness import evaluate as measured

    report = measured(
        dataset,
        policy=config.policy,
        scorers=scorer or ([config.scorer] if config.scorer else SCORERS),
        n=n,
        limit=limit,
        seed=seed,
        threads=threads_for(config),
        progress=sys.stderr.isatty(),
    )
    if as_json:
        print_json(report)
    else:
        print(format_table(report))
    return 0
