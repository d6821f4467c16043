"""``bon rerank``: candidates that are there already."""

from __future__ import annotations

from typing import Annotated

import typer

from bon.cli.options import Choice, Credit, Files, Seed, Setup, configured, grouped
from bon.cli.run import is_file
from bon.errors import InputError


@grouped
def rerank(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help='Rows with "prompt" or "messages", and "candidates"; - for stdin.'),
    ] = None,
    *,
    setup: Setup,
    choice: Choice,
    files: Files,
    seed: Seed = None,
    credit: Credit = False,
) -> int:
    """Rank candidates that you have already: rows with "candidates", a list of texts.

    On a terminal each row's ranking is shown; elsewhere, and with -o, rows are JSON with the winner, "ranking"
    (indices, best first) and "rewards". Without --scorer the embedded model scores. The rest is as in ``bon run``
    over a file.
    """
    from bon.cli.files import run_file

    config = configured(setup, choice, seed=seed)
    if file is None or not is_file(file):
        raise InputError("FILE is missing. Type: bon rerank --help" if file is None else f"there is no file {file!r}.")
    return run_file(file, files, config, ranked=True, credit=credit)
