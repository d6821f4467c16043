"""``bon eval``: measured quality."""

from __future__ import annotations

import sys
from pathlib import Path
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
    bigger: Annotated[
        str | None,
        typer.Option("--bigger", metavar="MODEL", help="Compare with one answer of a bigger model, at equal time."),
    ] = None,
    scorers: Annotated[
        list[str] | None,
        typer.Option("--scorer", metavar="SCORER", help="What is measured; repeatable. By default flip, likelihood."),
    ] = None,
    n: Annotated[
        str | None, typer.Option("-n", metavar="N", help="Candidates that the policy writes, 16 by default.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="L", min=1, help="Rows at most; else the dataset says it.")
    ] = None,
    max_words: Annotated[
        int | None, typer.Option("--max-words", metavar="W", min=1, help="Leave out candidates that are longer.")
    ] = None,
    budgets: Annotated[
        bool, typer.Option("--budgets", help="Which rule for stopping pays? Replayed, and what is recommended is run.")
    ] = False,
    store: Annotated[
        Path | None, typer.Option("--store", metavar="FILE", help="Keep scores here, and take those that are there.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write a page that shows the results (HTML).")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", metavar="DIR", help="Write the plots as PNG files into this folder.")
    ] = None,
    sampling: SamplingOptions,
    as_json: JSON = False,
) -> int:
    """Measure which reward picks better answers, of a dataset's candidates or a policy's, beside rules without a model.

    Without --policy the candidates are those of the dataset; for mini the embedded model writes them.
    """
    config = configured(setup, sampling, policy=policy)

    from bon.cli.terminal import print_json
    from bon.data.sink import check_replaceable
    from bon.evals.harness import SCORERS, evaluate
    from bon.evals.table import format_table

    if report is not None:
        check_replaceable(report, "report", b"<!doctype html>")
    measured = scorers or ([config.scorer] if config.scorer else SCORERS)
    threads = {threads_for(config.changed(scorer=scorer), ranked=config.policy is None) for scorer in measured}
    found = evaluate(
        dataset,
        policy=config.policy,
        bigger=bigger,
        scorers=measured,
        n=None if n is None else plain_number(n),
        limit=limit,
        seed=config.sampling.get("seed", 0),
        max_words=max_words,
        sampling=config.sampling,
        store=store,
        budgets=budgets,
        progress=sys.stderr.isatty(),
        threads=threads.pop() if len(threads) == 1 else None,
    )
    if as_json:
        print_json(found)
    else:
        print(format_table(found))
    if report is not None or plots is not None:
        from bon.evals.report import write_plots, write_report

        if report is not None:
            write_report(found, report)
        if plots is not None:
            write_plots(found, plots)
    return 0
