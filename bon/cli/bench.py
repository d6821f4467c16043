"""``bon bench``: what best-of-N costs and saves on this machine, with the user's own models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bon.cli.options import JSON, Policy, Scorer, Setup, configured, grouped, loaded, plain_number
from bon.errors import InputError

if TYPE_CHECKING:
    from bon.task import Task

EXAMPLES = 16
"""Instructions of the mini world that are taken when no file is given."""


@grouped
def bench(
    *,
    setup: Setup,
    policy: Policy = None,
    scorer: Scorer = None,
    n: Annotated[str, typer.Option("-n", "--n", metavar="N", help="Candidates for each prompt.")] = "16",
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help=f"Prompts in JSONL; {EXAMPLES} of bon tasks by default."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, metavar="M", help="Length limit of answers and reconstructions.")
    ] = 96,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="S", help="Of prompts and sampling.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds and sizes: roughly what comes.")] = False,
    as_json: JSON = False,
) -> int:
    """Time best-of-N: what scoring adds to sampling, what pruning saves, what sharing prefixes saves.

    The scorer's model is timed with FLIP and by likelihood. The last line of the output is one JSON object with all
    figures and the conditions they were measured under.
    """
    config, samples = configured(setup, policy=policy, scorer=scorer), plain_number(n)

    from bon.bench.command import bench as measure
    from bon.engines.base import Generates

    tasks = _tasks(prompts, seed)
    with loaded(config) as (engine, judge):
        model = next(iter(judge.engines), None)
        if not isinstance(model, Generates):
            raise InputError(f"bon bench times a scorer that runs a model; {judge.name!r} runs none.")
        report = measure(engine, model, tasks, n=samples, max_tokens=max_tokens, seed=seed, quick=quick)
    report.emit(only_json=as_json)
    return 0


def _tasks(prompts: Path | None, seed: int) -> list[Task]:
    from bon.data.formats import read_file
    from bon.data.rows import BadRow, read_rows
    from bon.mini.tasks import sample_instructions
    from bon.task import Task

    if prompts is None:
        return [Task.of(text) for text in sample_instructions(EXAMPLES, seed)]
    rows = list(read_rows(read_file(str(prompts))))
    for row in rows:
        if isinstance(row, BadRow):
            raise InputError(f"{prompts}:{row.line}: {row.error}")
    if not rows:
        raise InputError(f'{prompts} is empty. Each line must be an object such as {{"prompt": "Write a haiku."}}.')
    return [row.task for row in rows if not isinstance(row, BadRow)]
