"""``bon run``: a prompt, or each prompt of a file."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bon.cli.cluster import Cluster
from bon.cli.options import (
    JSON,
    Choice,
    Credit,
    Files,
    Number,
    Policy,
    SamplingOptions,
    Setup,
    configured,
    embedded,
    grouped,
    starting,
    threads_for,
)
from bon.errors import InputError

if TYPE_CHECKING:
    from bon.best_of_n import BestOfN
    from bon.config import Config
    from bon.task import Task
    from bon.types import Result


@grouped
def run(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT|FILE",
            help="A prompt; a file of prompts (.jsonl, .json, .txt, .csv, .parquet); - for stdin.",
        ),
    ] = None,
    *,
    setup: Setup,
    policy: Policy = None,
    choice: Choice,
    number: Number,
    sampling: SamplingOptions,
    files: Files,
    cluster: Cluster,
    total_samples: Annotated[
        int | None,
        typer.Option(
            "--total-samples",
            metavar="M",
            min=1,
            help="For a file: samples of all prompts together, in place of -n; each goes where it promises most. All "
            "rows are read first, and written at the end; or after Ctrl-C, each with the best so far.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="System message, for prompts that have none of their own."),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", metavar="TEXT", help="The part of the prompt that is to be inferred back."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show the candidates while they are written, on a terminal.")
    ] = False,
    credit: Credit = False,
    as_json: JSON = False,
) -> int:
    """Sample N candidates for a prompt, or for each prompt of a file, and pick the best.

    A row has "prompt" or "messages" and whatever else: all fields are kept. A .txt file has a prompt a line. Rows are
    written as they finish. After Ctrl-C (exit code 130) every finished row is in the file, and --resume goes on.
    """
    config = configured(setup, number, sampling, choice, policy=policy)
    if prompt is None:
        raise InputError("PROMPT|FILE is missing. Type: bon run --help")
    many = {f"--{name.replace('_', '-')}": value is not None for name, value in asdict(cluster).items()}
    if is_file(prompt, or_folder=cluster.ray is not None):
        from bon.budget import as_budget
        from bon.cli.files import run_file

        given = {"--json": as_json, "--stream": stream, "--instruction": instruction is not None}
        _refuse(given, _FOR_ONE_PROMPT)
        if cluster.ray is not None:
            from bon.cli.cluster import run_on_ray

            _refuse({"--total-samples": total_samples is not None}, _ON_ONE_MACHINE)
            return run_on_ray(prompt, files, config, cluster, system=system, credit=credit)
        _refuse(many, dict.fromkeys(many, "{} says what a worker of a Ray cluster gets: give --ray ADDRESS or local."))
        if total_samples is not None and number.n is not None and not hasattr(as_budget(number.n), "gain"):
            raise InputError(f"--total-samples takes the place of -n {number.n}: leave it out, or say -n adaptive:...")
        return run_file(prompt, files, config, system=system, credit=credit, total=total_samples)
    only_files = {"--output": files.output is not None, "--all": files.everything, "--skip-bad": files.skip_bad}
    only_files |= {"--resume": files.resume, "--overwrite": files.overwrite, "--limit": files.limit is not None}
    only_files |= {"--total-samples": total_samples is not None, **many}
    _refuse({**only_files, "--prompt-field": files.prompt_field is not None}, _FOR_FILES)
    if stream and not sys.stderr.isatty():
        raise InputError("--stream shows candidates on a terminal, and standard error is none.")
    return _run_prompt(prompt, system, instruction, config, stream, credit, as_json, files.trace)


_FOR_ONE_PROMPT = {
    "--json": "--json is for a single prompt: the rows of a file are JSON already, and --all writes everything.",
    "--stream": "--stream is for a single prompt.",
    "--instruction": "--instruction is for a single prompt: the rows of a file have a field 'instruction'.",
}
_FOR_FILES = {
    "--output": "--output is for files of prompts. For a single prompt write: bon run PROMPT --json > FILE.",
    "--all": "--all is for files of prompts: a single prompt shows everything.",
}


_ON_ONE_MACHINE = {"--total-samples": "--total-samples looks at all prompts together, on one machine: leave out --ray."}


def _refuse(given: dict[str, bool], reasons: dict[str, str]) -> None:
    for name, is_given in given.items():
        if is_given:
            raise InputError(reasons.get(name, "{} is for files of prompts.").format(name))


def is_file(argument: str, *, or_folder: bool = False) -> bool:
    """Whether an argument is a file of rows and not a prompt.

    Args:
        argument: of the command line.
        or_folder: whether a folder of files will do.

    Raises:
        InputError: a folder otherwise, or what looks like a file's name and is not there.
    """
    if argument == "-" or (os.path.exists(argument) and (or_folder or not os.path.isdir(argument))):
        return True
    if os.path.isdir(argument):
        raise InputError(f"{argument!r} is a folder. Give a file, or a prompt of more than one word.")
    # In ASCII only: whole sentences of Chinese and Japanese have no white space, and may have a slash.
    path = argument.isascii() and (os.sep in argument or re.search(r"\.[A-Za-z]\w{1,7}$", argument))
    if argument.endswith(".jsonl") or (path and not re.search(r"\s", argument)):
        raise InputError(f"there is no file {argument!r}. If it is a prompt, put a space in front of it.")
    return False


def _run_prompt(
    prompt: str,
    system: str | None,
    instruction: str | None,
    config: Config,
    stream: bool,
    credit: bool,
    as_json: bool,
    trace: Path | None,
) -> int:
    from bon import portal
    from bon.cli.terminal import INTERRUPTED, print_json, say, say_off_world
    from bon.credit import refuse
    from bon.task import Message, Task
    from bon.trace import Trace

    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not UTF-8. Set the terminal to UTF-8, or use a file.") from error
    code = 0
    messages = (*([Message("system", system)] if system is not None else []), Message("user", prompt))
    task = Task.of(messages, instruction)
    with nullcontext() if trace is None else Trace(trace) as traced:
        if sys.stderr.isatty() and not embedded(config):
            say(f"loading {config.policy}" + (f" and {config.scorer}" if config.scorer else ""))
        with starting():
            built = config.changed(threads=threads_for(config)).build()
        with built as bon:
            if credit:
                refuse(bon.scorer)
            if embedded(config):
                from bon.mini.tasks import knows

                if not knows(prompt):
                    say_off_world()
            result = portal.run(bon.run(task)) if not sys.stderr.isatty() else _watched(bon, task, stream)
            if credit:
                try:
                    result = bon.credit(result)
                except KeyboardInterrupt:  # the result is there
                    code = INTERRUPTED
        if traced is not None:
            traced.add(result)
    if as_json:
        identity = hashlib.blake2b(repr(task).encode(), digest_size=8).hexdigest()
        print_json({"id": identity, **result.to_dict()})
    else:
        from bon.cli.show import show

        show(result)
    return code


def _watched(bon: BestOfN, task: Task, stream: bool) -> Result:
    """Run while somebody looks on. Tokens are counted where that costs nothing, or where their text is to be shown."""
    from bon import portal
    from bon.cli.live import view

    with view(bon.n, stream) as seen:
        follow = seen.follow if stream or not bon.policy.concurrent else None
        return portal.run(bon.run(task, callback=seen.heard, follow=follow))
