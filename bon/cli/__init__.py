"""The command line: ``bon run``, ``rerank``, ``eval``, ``models``, ``bench``, ``pairs``, ``train``, ``export``, ...

Results go to standard output, everything else to standard error. Exit codes: 0; 2 for bad usage or input; 130 after
Ctrl-C; 1 otherwise. Commands import what they need when they run, so ``bon --help`` loads no model library.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from bon import __version__
from bon.cli import bench, doctor, evaluate, export, models, pairs, rerank, run, serve, tasks, train
from bon.cli.terminal import INTERRUPTED, StoppedError, say, sentence, shown_log
from bon.errors import BonError, InputError

app = typer.Typer(
    name="bon",
    help="Best-of-N for language models: sample N answers, infer the instruction back from each, keep the best.",
    epilog="Exit codes: 0; 2 bad usage or input; 130 Ctrl-C; 1 anything else. --debug shows tracebacks.",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"bon {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


app.command("run")(run.run)
app.command("rerank")(rerank.rerank)
app.command("eval")(evaluate.evaluate)
app.command("models")(models.models)
app.command("fetch")(models.fetch)
app.command("tasks")(tasks.tasks)
app.command("pairs")(pairs.pairs)
app.command("bench")(bench.bench)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.add_typer(train.app, name="train")
app.add_typer(export.app, name="export")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; no exception but a debugged one leaves it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("BON_DEBUG", "") not in ("", "0")
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" in options:
        arguments.remove("--debug")
        debug = True
    if not debug:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with shown_log():
            code = app(arguments or ["--help"], prog_name="bon", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # newer versions of typer turn KeyboardInterrupt into this number
            raise StoppedError
        return code if isinstance(code, int) else 0
    except BaseException as error:
        if debug and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exc()
        return _explain(error)


def _explain(error: BaseException) -> int:
    """Print one line about an error, and return the exit code it stands for."""
    if isinstance(error, BonError):
        say(f"error: {sentence(error)}")
        return 2 if isinstance(error, InputError) else 1
    if isinstance(error, (StoppedError, KeyboardInterrupt, typer.Abort)):
        say(str(error) or "interrupted.")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        return 1
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if hasattr(error, "format_message"):  # the errors of click, which newer versions of typer bring along
        say(f"error: {_usage(error)}")
        return 2
    say(f"error: {type(error).__name__}: {error} (--debug shows where)")
    return 1


def _usage(error: Any) -> str:
    """What is wrong with the arguments; with the value, and without click's two ways of guessing what was meant."""
    context = getattr(error, "ctx", None)
    if close := getattr(error, "possibilities", None):
        short = getattr(error, "option_name", "")[1:]  # "-n" of "--n"
        known = [name for option in context.command.params for name in option.opts] if context else []
        message = f"{error.message.rstrip('.')}. Did you mean {short if short in known else close[0]!r}?"
    else:
        message = error.format_message().rstrip(".")
        message += "" if message.endswith("?") else "."
    details: list[dict[str, Any]] = getattr(error.__cause__ or error.__context__, "errors", list)()
    if details:
        message = f"{message.rstrip('.')}, got {details[0].get('input')!r}."
    return f"{message} Type: {context.command_path if context else 'bon'} --help"
