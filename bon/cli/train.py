"""``bon train head``: a reward head from labelled candidates."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bon.cli.options import JSON, Setup, configured, grouped
from bon.errors import InputError

app = typer.Typer(help="Train a reward of your own.", no_args_is_help=True)


@app.callback()
def _root() -> None: ...


@app.command("head")
@grouped
def head(
    rows: Annotated[
        str, typer.Argument(metavar="ROWS", help="Labelled candidates, as for bon eval: FILE.jsonl or a dataset.")
    ],
    *,
    setup: Setup,
    model: Annotated[
        str | None, typer.Option("--model", "--policy", metavar="MODEL", help="Whose hidden states the head knows.")
    ] = None,
    kind: Annotated[
        str, typer.Option("--kind", metavar="KIND", help="probe (linear), or bnrm (non-negative and Bayesian).")
    ] = "probe",
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where the head goes.")],
    states: Annotated[
        Path | None,
        typer.Option("--states", metavar="FILE", help="Keep hidden states here, and take those that are there."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="S", help="Of folds and initial weights.")] = 0,
    as_json: JSON = False,
) -> int:
    """Train a head on the hidden states of a model, and say by cross-validation whether it pays."""
    config = configured(setup, policy=model)

    from tqdm import tqdm

    from bon import portal
    from bon.cli.options import threads_for
    from bon.cli.terminal import print_json
    from bon.engines.base import Reads
    from bon.evals.dataset import as_dataset
    from bon.heads.training import train
    from bon.models import Model, ModelPool

    for path in (output, *([states] if states else [])):
        if not path.absolute().parent.is_dir():
            raise InputError(f"there is no folder {str(path.parent)!r} for {path.name}. Make it first.")
    spec, dataset = Model.of(config.policy), as_dataset(rows)
    pool = ModelPool(threads_for(config.changed(scorer="random")))
    try:
        engine = pool.engine(spec)
        if not isinstance(engine, Reads):
            raise InputError(
                f"{engine.name!r} shows no hidden states; a model of the torch engine does (engine=torch)."
            )
        with tqdm(desc="read", unit="candidate", disable=not sys.stderr.isatty()) as bar:

            def progress(done: int, of: int) -> None:
                bar.total = of
                bar.update(done - bar.n)

            made = train(dataset, engine, spec.text, kind, seed=seed, kept=states, progress=progress)
    finally:
        portal.run(pool.aclose())
    made.save(output)
    if as_json:
        print_json(dataclasses.asdict(made.header))
    else:
        print(_table(made.header.report, f"{kind} head of {spec.text}, {dict(made.header.settings)}: {output}"))
    return 0


def _table(report: Mapping[str, Any], title: str) -> str:
    lines = [title, f"on left-out rows of {report['rows']} with {report['candidates']} candidates, 95% intervals:"]
    lines.append(f"{'':<20}{'head':<24}longest candidate")
    for name in ("pairs_in_order", "share_of_the_way"):
        shown = [_interval(report[rule][name]) for rule in ("head", "longest")]
        lines.append(f"{name.replace('_', ' '):<20}{shown[0]:<24}{shown[1]}")
    lines.append("pairs in order by rows: " + ", ".join(f"{n}: {at:.3f}" for n, at in report["curve"].items()))
    pays = report["head"]["pairs_in_order"]["low"] > 0.5
    beyond, doubling = report["beyond_longest"], report["last_doubling"]
    lines.append("It pays: better than chance." if pays else "Not shown to pay: no better than chance.")
    lines.append(f"Beyond the longest candidate: {_interval(beyond)}{'' if beyond['low'] > 0 else ', not shown'}.")
    more = "more labels would pay" if doubling["low"] > 0 else "that more labels would pay is not shown"
    lines.append(f"Twice the rows brought {_interval(doubling)}: {more}.")
    return "\n".join(lines)


def _interval(of: dict[str, float]) -> str:
    return f"{of['mean']:+.3f} [{of['low']:+.3f}, {of['high']:+.3f}]"
