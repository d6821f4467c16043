"""``bon train``: a reward head from labelled candidates, or an adapter for backward inference from pairs."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bon.cli.options import JSON, Setup, configured, grouped
from bon.errors import InputError

_LINES = 20  # that a training prints where there is no terminal for a bar

app = typer.Typer(help="Train a reward of your own.")


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


@app.command("flip")
@grouped
def flip(
    *,
    setup: Setup,
    model: Annotated[
        str | None, typer.Option("--model", "--policy", metavar="MODEL", help="Which model learns to read backwards.")
    ] = None,
    pairs: Annotated[
        str, typer.Option("--pairs", metavar="FILE", help="Instructions with good answers, as bon pairs writes them.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where the adapter goes.")],
    rows: Annotated[
        list[str] | None,
        typer.Option("--rows", metavar="ROWS", help="What it is judged on, as for bon eval; repeatable. Else pairs."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="L", min=1, help="Rows of each, at most.")] = None,
    style: Annotated[str, typer.Option("--style", metavar="STYLE", help="Prompt of the scorer: direct, turns, ...")] = (
        "direct"
    ),
    epochs: Annotated[int, typer.Option("--epochs", metavar="E", help="How often each pair is read.")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate", metavar="R", help="Its peak.")] = 5e-4,
    rank: Annotated[int, typer.Option("--rank", metavar="R", help="Of the adapter's matrices.")] = 16,
    dropout: Annotated[float, typer.Option("--dropout", metavar="D", help="Of the adapter's inputs.")] = 0.0,
    batch: Annotated[int, typer.Option("--batch", metavar="B", help="Pairs of a step.")] = 16,
    contrast: Annotated[
        float, typer.Option("--contrast", metavar="W", help="Weight of the contrast with other instructions.")
    ] = 0.0,
    preference: Annotated[
        float, typer.Option("--preference", metavar="W", help="Weight of the preference over rejected answers.")
    ] = 0.0,
    rivals: Annotated[int, typer.Option("--rivals", metavar="K", help="Other instructions for each response.")] = 3,
    temperature: Annotated[
        float,
        typer.Option("--contrast-temperature", metavar="T", help="Of contrast and preference, in nats per token."),
    ] = 0.2,
    max_tokens: Annotated[
        int | None, typer.Option("--pass-tokens", metavar="T", help="Of one pass; longer pairs are left out.")
    ] = None,
    checkpoint_s: Annotated[
        float, typer.Option("--checkpoint-every", metavar="S", help="Seconds between two checkpoints.")
    ] = 60.0,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Of weights, order and dropout.")] = 0,
    as_json: JSON = False,
) -> int:
    """Train a LoRA adapter to find the instruction behind an answer; goes on where it was broken off.

    It is used as flip:MODEL,adapter=DIR and likelihood:MODEL,adapter=DIR. The table compares the model without the
    adapter and with it, on rows that are not trained on.
    """
    config = configured(setup, policy=model)

    from tqdm import tqdm

    from bon.cli.options import threads_for
    from bon.cli.terminal import StoppedError, print_json, say
    from bon.evals.dataset import as_dataset
    from bon.models import Model
    from bon.tuning import checkpoint
    from bon.tuning.flip import table, train
    from bon.tuning.pairs import read_pairs
    from bon.tuning.settings import Settings

    settings = Settings(
        style=style,
        epochs=epochs,
        learning_rate=learning_rate,
        rank=rank,
        dropout=dropout,
        batch=batch,
        contrast=contrast,
        preference=preference,
        rivals=rivals,
        temperature=temperature,
        max_tokens=max_tokens,
        checkpoint_s=checkpoint_s,
        seed=seed,
    )
    if not output.absolute().parent.is_dir():
        raise InputError(f"there is no folder {str(output.parent)!r} for {output.name}. Make it first.")
    show = sys.stderr.isatty()
    with tqdm(desc="train", unit="step", disable=not show) as bar:

        def progress(done: int, of: int, loss: float) -> None:
            bar.total = of
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(done - bar.n)
            if not show and done * _LINES // of != (done - 1) * _LINES // of:
                say(f"step {done} of {of}, loss {loss:.3f} per token")

        try:
            record = train(
                base := Model.of(config.policy),
                read_pairs(pairs),
                output,
                settings,
                judged=[as_dataset(each) for each in rows or ()],
                limit=limit,
                threads=threads_for(config.changed(scorer="random")),
                progress=progress,
                show=show,
            )
        except KeyboardInterrupt:
            there = (output / checkpoint.NAME).exists()
            raise StoppedError(
                f"interrupted: the same command goes on from the last checkpoint in {output}."
                if there
                else "interrupted before the first checkpoint: nothing is kept. --checkpoint-every S writes more."
            ) from None
    if as_json:
        print_json(record)
    else:
        print(table(record))
        spec = shlex.quote(f"flip:{Model.of(base, adapter=str(output)).text}")
        print(f"The adapter, its record and its loss are in {output}: --scorer {spec}")
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
