"""The options that commands share, and how they become a configuration.

A group of options is a dataclass, whose fields become options of every command that takes it (``grouped``). Fields
that ``Config`` or ``Sampling`` have under the same name are settings, in a file as well: see ``configured``.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from bon.errors import InputError

if TYPE_CHECKING:
    from bon.config import Config
    from bon.models import Model
    from bon.scorers.base import Scorer as RewardSource

CONFIG = "bon.toml"
"""Read from the current folder unless ``--config`` names another file."""

_MODELS, _SAMPLING, _SCORING, _FILES = "Models and settings", "Sampling", "Scoring and choice", "Files of prompts"


def option(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    """An option of a command, in a panel of its help."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


Policy = Annotated[
    str | None,
    option(
        _MODELS,
        "--policy",
        metavar="MODEL",
        help="What writes: model, folder or URL, with options of its engine (NAME,dtype=bfloat16), or module:object. "
        "By default the embedded model, which knows a small world only (bon tasks).",
    ),
]
Scorer = Annotated[
    str | None,
    option(
        _MODELS,
        "--scorer",
        metavar="SCORER",
        help="What rewards: flip:MODEL,samples=4, likelihood:MODEL, ... (bon doctor lists them), or module:object. "
        "By default the scorer default, and flip for the embedded model.",
    ),
]
Seed = Annotated[
    int | None,
    option(_SAMPLING, "--seed", metavar="S", help="The same seed, the same candidates; by default new ones."),
]
Credit = Annotated[
    bool,
    option(_SCORING, "--credit", help="Rate the winner again without each of its sentences: what does each one earn?"),
]
JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@dataclass(frozen=True)
class Setup:
    """Where settings come from."""

    config: Annotated[
        Path | None,
        option(_MODELS, "--config", metavar="FILE", help=f"Settings in TOML; {CONFIG} by default. Options win."),
    ] = None
    print_config: Annotated[
        bool, option(_MODELS, "--print-config", help="Print the settings in the form that --config reads, and exit.")
    ] = False
    threads: Annotated[
        int | None, option(_MODELS, "--threads", metavar="T", help="Threads of each model on the CPU; else chosen.")
    ] = None


@dataclass(frozen=True)
class Choice:
    """What rewards and who wins."""

    scorer: Scorer = None
    selector: Annotated[
        str | None,
        option(
            _SCORING,
            "--selector",
            metavar="SELECTOR",
            help="best (the default), top-k:3, softmax:0.5, vote:REGEX, lcb:1.",
        ),
    ] = None
    min_reward: Annotated[
        float | None,
        option(_SCORING, "--min-reward", metavar="R", help="Pick nothing below this reward; by default no minimum."),
    ] = None
    prune: Annotated[
        bool | None, option(_SCORING, "--prune/--no-prune", help="Give up what provably cannot win; on by default.")
    ] = None
    schedule: Annotated[
        str | None, option(_SCORING, "--schedule", metavar="WHEN", help="When to score: each, ready, all; else chosen.")
    ] = None


@dataclass(frozen=True)
class Number:
    """How many candidates."""

    n: Annotated[
        str | None,
        option(
            _SAMPLING,
            "-n",
            metavar="N",
            help="Candidates for each prompt, 8 by default; or stop-at:0.9,most=16, adaptive.",
        ),
    ] = None


@dataclass(frozen=True)
class SamplingOptions:
    """How the policy samples."""

    temperature: Annotated[
        float | None,
        option(_SAMPLING, "--temperature", metavar="T", help="0 is greedy; by default 1, behind HTTP its own."),
    ] = None
    top_p: Annotated[float | None, option(_SAMPLING, "--top-p", metavar="P", help="Nucleus mass; 1 by default.")] = None
    top_k: Annotated[
        int | None, option(_SAMPLING, "--top-k", metavar="K", help="Likeliest tokens kept; by default all.")
    ] = None
    min_p: Annotated[
        float | None, option(_SAMPLING, "--min-p", metavar="P", help="Least share of the top; 0 by default.")
    ] = None
    max_tokens: Annotated[
        int | None, option(_SAMPLING, "--max-tokens", metavar="M", help="Tokens of a candidate; 1024 by default.")
    ] = None
    stop: Annotated[
        list[str] | None, option(_SAMPLING, "--stop", metavar="TEXT", help="Where a candidate ends; repeatable.")
    ] = None
    seed: Seed = None


@dataclass(frozen=True)
class Rows:
    """How a file of rows is read, and written to."""

    output: Annotated[
        Path | None, option(_FILES, "--output", "-o", metavar="FILE", help="Where rows go; standard output by default.")
    ] = None
    skip_bad: Annotated[bool, option(_FILES, "--skip-bad", help="Report bad rows and go on.")] = False
    resume: Annotated[bool, option(_FILES, "--resume", help="Add the rows that the output does not have yet.")] = False
    overwrite: Annotated[bool, option(_FILES, "--overwrite", help="Replace an output that exists.")] = False
    prompt_field: Annotated[
        str | None,
        option(_FILES, "--prompt-field", metavar="NAME", help="What is asked, where it is not in prompt or messages."),
    ] = None
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="L", min=1, help="Rows at most.", rich_help_panel=_FILES)
    ] = None


@dataclass(frozen=True)
class Files(Rows):
    """What to do with a file of rows."""

    everything: Annotated[bool, option(_FILES, "--all", help="Write every candidate and score.")] = False
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Write what happened when, for ui.perfetto.dev."),
    ] = None


def plain_number(n: str) -> int:
    """``-n`` of a command that takes no other budget.

    Raises:
        InputError: it is no whole number of at least 1.
    """
    from bon.budget import as_budget

    number: int | None = getattr(as_budget(n), "n", None)
    if number is None:
        raise InputError(f"-n is a plain number for this command, got {n!r}.")
    return number


def grouped(command: Callable[..., int]) -> Callable[..., int]:
    """Let a command take groups of options: each field of a parameter that is a dataclass becomes an option."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[type, list[str]]] = {}
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind, kind=parameter.KEYWORD_ONLY))
            continue
        assert isinstance(kind, type)
        types = get_type_hints(kind, include_extras=True)
        groups[parameter.name] = kind, [field.name for field in dataclasses.fields(kind)]
        parameters += [
            parameter.replace(name=field.name, default=field.default, annotation=types[field.name])
            for field in dataclasses.fields(kind)
        ]

    @functools.wraps(command)
    def flat(**values: Any) -> int:
        for name, (kind, names) in groups.items():
            values[name] = kind(**{field: values.pop(field) for field in names})
        return command(**values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def configured(setup: Setup, *groups: Any, **settings: Any) -> Config:
    """The settings of a file with those of the command line over them.

    Args:
        setup: which file.
        groups, settings: options; None means that the command line says nothing.

    Raises:
        InputError: a setting that cannot be; where it is in a file the message names that.
        typer.Exit: the settings were to be printed, and are.
    """
    from bon.cli.terminal import quiet_libraries
    from bon.config import Config
    from bon.types import Sampling

    path = setup.config
    if path is None and Path(CONFIG).is_file():
        path = Path(CONFIG)
        logging.getLogger("bon").info("settings come from %s in this folder", CONFIG)
    for group in groups:
        settings |= dataclasses.asdict(group)
    given = {name: value for name, value in {**settings, "threads": setup.threads}.items() if value not in (None, [])}
    if isinstance(n := given.get("n"), str) and n.strip().lstrip("-").isdigit():
        given["n"] = int(n)
    of_sampling = {field.name for field in dataclasses.fields(Sampling)}
    sampling = {name: given.pop(name) for name in list(given) if name in of_sampling}
    config = (Config() if path is None else Config.read(path)).changed(**given, sampling=sampling)
    if setup.print_config:
        print(config.to_toml(), end="")
        raise typer.Exit
    quiet_libraries()
    return config


@contextmanager
def loaded(config: Config, *, ranked: bool = False) -> Iterator[tuple[Any, RewardSource]]:
    """Policy and scorer with their models, which are freed at the end.

    Args:
        config: what names them.
        ranked: whether candidates are there already, so that there is no policy.
    """
    from bon import portal
    from bon.models import ModelPool

    pool = ModelPool(threads_for(config, ranked=ranked))
    try:
        yield (None, pool.scorer(config.scorer)) if ranked else pool.both(config.policy, config.scorer)
    finally:
        portal.run(pool.aclose())


@contextmanager
def starting() -> Iterator[None]:
    """Meanwhile collect no garbage: among the 2,500 modules of torch and transformers there is none to find.

    They are never looked at afterwards either. Of 6.8 CPU seconds of a prompt on the embedded model it saves 0.5; the
    others are those libraries' imports.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def threads_for(config: Config, *, ranked: bool = False) -> int | None:
    """The threads of models on the CPU.

    The embedded model gets one unless the user says otherwise. Its matrices are too small to share out: with two
    threads the same run took twice as long on a busy two-core machine.
    """
    if config.threads is not None or "OMP_NUM_THREADS" in os.environ:
        return config.threads
    models = [*([] if ranked else _writers(config)), *_readers(config, None if ranked else config.policy)]
    return 1 if all(model.embedded for model in models) else None


def embedded(config: Config, *, ranked: bool = False) -> bool:
    """Whether the embedded model writes candidates; or scores them, where they are there already."""
    return any(model.embedded for model in (_readers(config, None) if ranked else _writers(config)))


def _writers(config: Config) -> list[Model]:
    """The policy, unless it is an object of the user's."""
    from bon.models import Model
    from bon.spec import names_object

    return [] if config.policy is not None and names_object(config.policy) else [Model.of(config.policy)]


def _readers(config: Config, policy: str | None) -> list[Model]:
    """The scorer's models, none where it is an object of the user's."""
    from bon.models import Model, as_scorer
    from bon.spec import names_object

    if config.scorer is not None and names_object(config.scorer):
        return []
    models = [policy if model is None else model for model in as_scorer(config.scorer).models]
    return [Model.of(model) for model in models if not (isinstance(model, str) and names_object(model))]
