"""``bon eval``: measured quality."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bon.cli.options import JSON, Policy, Scorer, Setup, configured, grouped

app = typer.Typer(help="Measure how much best-of-N gains.", no_args_is_help=True)


@app.callback()
def _root() -> None: ...


@app.command()
@grouped
def mini(
    *,
    setup: Setup,
    policy: Policy = None,
    scorer: Scorer = None,
    n_instructions: Annotated[int, typer.Option("--n-instructions", min=1, help="Held-out instructions.")] = 500,
    max_n: Annotated[int, typer.Option("--max-n", min=1, help="The largest N.")] = 16,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the instructions and of sampling.")] = 0,
    as_json: JSON = False,
) -> int:
    """Pass rates on held-out instructions of the embedded model's world, for N = 1, 2, 4, 8, 16, against baselines."""
    config = configured(setup, policy=policy, scorer=scorer)

    from bon.cli.options import loaded
    from bon.cli.terminal import print_json
    from bon.evals.mini import evaluate_mini, format_table

    with loaded(config) as (engine, judge):
        report = evaluate_mini(
            n_instructions=n_instructions,
            max_n=max_n,
            seed=seed,
            policy=engine,
            scorer=judge,
            progress=sys.stderr.isatty(),
        )
    if as_json:
        print_json(report)
    else:
        print(format_table(report))
    return 0
