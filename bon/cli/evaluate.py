"""``bon eval``: measured quality."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(help="Measure how much best-of-N gains.", no_args_is_help=True)


@app.callback()
def _root() -> None: ...


@app.command()
def mini(
    n_instructions: Annotated[int, typer.Option("--n-instructions", min=1, help="Held-out instructions.")] = 500,
    max_n: Annotated[int, typer.Option("--max-n", min=1, help="The largest N.")] = 16,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the instructions and of sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Pass rates of the embedded model on held-out instructions, for N = 1, 2, 4, 8, 16, against its baselines."""
    from bon.cli.console import one_thread, print_bytes, quiet_libraries
    from bon.evals.mini import evaluate_mini, format_table
    from bon.data.sink import to_json

    quiet_libraries(False)
    one_thread()
    report = evaluate_mini(n_instructions=n_instructions, max_n=max_n, seed=seed, progress=sys.stderr.isatty())
    if as_json:
        print_bytes(to_json(report))
    else:
        print(format_table(report))
    return 0
