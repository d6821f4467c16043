"""``bon bench``: what best-of-N costs and saves on this machine, with the user's own models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bon.cli import run

if TYPE_CHECKING:
    from bon.task import Task

EXAMPLES = 16
"""Instructions of the mini world that are taken when no file is given."""


def bench(
    n: Annotated[int, typer.Option("-n", "--n", min=1, metavar="N", help="Candidates for each prompt.")] = 16,
    policy: Annotated[
        str | None, typer.Option("--policy", metavar="MODEL", help="What writes; the embedded model by default.")
    ] = None,
    flip: run.Flip = None,
    engine: run.Engine = None,
    device: run.Device = None,
    dtype: run.Dtype = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help=f"Prompts in JSONL; {EXAMPLES} of bon tasks by default."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="M", help="Length limit of answers and reconstructions.")
    ] = 96,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="S", help="Of prompts and sampling.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds and sizes: roughly what comes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> int:
    """Time best-of-N: what scoring adds to sampling, what pruning saves, what sharing prefixes saves.

    The last line of the output is one JSON object with all figures and the conditions they were measured under.
    """
    from bon import portal
    from bon.bench.command import bench as measure
    from bon.cli.build import Options, build
    from bon.errors import InputError
    from bon.scorers.flip import Flip

    tasks = _tasks(prompts, seed)
    built = build(Options(n=n, policy=policy, flip=flip, engine=engine, device=device, dtype=dtype))
    try:
        scorer = built.bon.scorer
        judge = scorer.engine if isinstance(scorer, Flip) else None
        if judge is None:
            raise InputError(f"bon bench times FLIP with a model; {scorer.name!r} is something else.")
        report = measure(built.bon.policy, judge, tasks, n=n, max_tokens=max_tokens, seed=seed, quick=quick)
    finally:
        portal.run(built.aclose())
    report.emit(only_json=as_json)
    return 0


def _tasks(prompts: Path | None, seed: int) -> list[Task]:
    from bon.data.rows import BadRow, read_rows
    from bon.errors import InputError
    from bon.mini.tasks import sample_instructions
    from bon.task import Task

    if prompts is None:
        return [Task.of(text) for text in sample_instructions(EXAMPLES, seed)]
    try:
        with prompts.open("rb") as lines:
            rows = list(read_rows(lines))
    except OSError as error:
        raise InputError(f"cannot read {prompts}: {error.strerror}.") from error
    for row in rows:
        if isinstance(row, BadRow):
            raise InputError(f"{prompts}:{row.line}: {row.error}")
    if not rows:
        raise InputError(f'{prompts} is empty. Each line must be an object such as {{"prompt": "Write a haiku."}}.')
    return [row.task for row in rows if not isinstance(row, BadRow)]
