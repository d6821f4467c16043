"""``bon run`` and ``bon rerank``."""

from __future__ import annotations

import asyncio
import hashlib
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from bon.errors import InputError

_MODELS, _SAMPLING, _SCORING, _FILES = "Models", "Sampling", "Scoring and choice", "Files of prompts"


def _option(panel: str, *names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


Flip = Annotated[
    str | None,
    _option(_MODELS, "--flip", metavar="MODEL", help="What infers instructions back; the policy's model by default."),
]
Engine = Annotated[
    str | None, _option(_MODELS, "--engine", metavar="NAME", help="Back end: torch, vllm, openai, scripted (a fake).")
]
Device = Annotated[str | None, _option(_MODELS, "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str | None, _option(_MODELS, "--dtype", metavar="NAME", help="float32, bfloat16, float16.")]
Scorer = Annotated[
    str,
    _option(_SCORING, "--scorer", metavar="NAME", help="flip, likelihood, or module:name of a scorer or function."),
]
Style = Annotated[
    str | None, _option(_SCORING, "--style", metavar="NAME", help="FLIP's prompt: direct or json (reasons first).")
]
Samples = Annotated[
    int | None,
    _option(_SCORING, "--samples", metavar="K", help="Reconstructions per candidate; the reward is their mean."),
]
Selector = Annotated[str, _option(_SCORING, "--selector", metavar="NAME", help="best, top-k:K, softmax:T, vote:REGEX.")]
MinReward = Annotated[
    float | None,
    _option(_SCORING, "--min-reward", metavar="R", help="Pick nothing when the best reward is below this."),
]
NoPrune = Annotated[bool, _option(_SCORING, "--no-prune", help="Score to the end even what provably cannot win.")]
StopAt = Annotated[
    float | None, _option(_SCORING, "--stop-at", metavar="R", help="Stop once a candidate has this reward.")
]
Seed = Annotated[int | None, _option(_SAMPLING, "--seed", metavar="S", help="The same seed, the same candidates.")]
Everything = Annotated[bool, _option(_FILES, "--all", help="Write all candidates and scores, not just the winner.")]
OutputPath = Annotated[
    Path | None, _option(_FILES, "--output", "-o", metavar="FILE", help="Where rows go; standard output by default.")
]
SkipBad = Annotated[bool, _option(_FILES, "--skip-bad", help="Report bad rows and go on.")]
Resume = Annotated[bool, _option(_FILES, "--resume", help="Add the rows that the output does not have yet.")]
Overwrite = Annotated[bool, _option(_FILES, "--overwrite", help="Begin an output that exists anew.")]
TracePath = Annotated[
    Path | None,
    typer.Option(
        "--trace", metavar="FILE", help="Write when each candidate was sampled and scored, for ui.perfetto.dev."
    ),
]
System = Annotated[
    str | None,
    _option(_SAMPLING, "--system", metavar="TEXT", help="System message, for prompts that have none of their own."),
]


def run(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT|FILE", help="A prompt; a .jsonl file of prompts; - for standard input.")
    ],
    n: Annotated[int, _option(_SAMPLING, "-n", metavar="N", help="Candidates for each prompt.")] = 8,
    policy: Annotated[
        str | None,
        _option(
            _MODELS,
            "--policy",
            metavar="MODEL",
            help="What writes candidates: model name, folder, URL, or module:function; the embedded model by default.",
        ),
    ] = None,
    flip: Flip = None,
    engine: Engine = None,
    device: Device = None,
    dtype: Dtype = None,
    temperature: Annotated[float | None, _option(_SAMPLING, "--temperature", metavar="T", help="0 is greedy.")] = None,
    top_p: Annotated[float | None, _option(_SAMPLING, "--top-p", metavar="P", help="Nucleus mass.")] = None,
    top_k: Annotated[
        int | None, _option(_SAMPLING, "--top-k", metavar="K", help="Likeliest tokens kept; 0 is all.")
    ] = None,
    min_p: Annotated[
        float | None, _option(_SAMPLING, "--min-p", metavar="P", help="Least share of the likeliest.")
    ] = None,
    max_tokens: Annotated[int | None, _option(_SAMPLING, "--max-tokens", metavar="M", help="Length limit.")] = None,
    stop: Annotated[
        list[str] | None, _option(_SAMPLING, "--stop", metavar="TEXT", help="Where a candidate ends; repeatable.")
    ] = None,
    seed: Seed = None,
    system: System = None,
    instruction: Annotated[
        str | None,
        _option(_SCORING, "--instruction", metavar="TEXT", help="The part of the prompt that is the instruction."),
    ] = None,
    scorer: Scorer = "flip",
    style: Style = None,
    samples: Samples = None,
    selector: Selector = "best",
    min_reward: MinReward = None,
    no_prune: NoPrune = False,
    stop_at: StopAt = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    trace: TracePath = None,
    output: OutputPath = None,
    everything: Everything = False,
    skip_bad: SkipBad = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> int:
    """Sample N candidates for a prompt, or for each prompt of a file, and pick the best.

    A file has one JSON object per line, with "prompt" or "messages" and whatever else: all fields are kept. Rows are
    written as they finish. After Ctrl-C (exit code 130) every finished row is in the file, and --resume goes on.
    """
    from bon.cli.build import Options

    sampling = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "max_tokens": max_tokens,
        "stop": stop or None,
        "seed": seed,
    }
    options = Options(
        n=n,
        policy=policy,
        flip=flip,
        scorer=scorer,
        style=style,
        samples=samples,
        sampling={name: value for name, value in sampling.items() if value is not None},
        selector=selector,
        min_reward=min_reward,
        prune=not no_prune,
        stop_at=stop_at,
        engine=engine,
        device=device,
        dtype=dtype,
    )
    if is_file(prompt):
        from bon.cli.files import FileOptions, run_file

        _refuse({"--json": as_json, "--instruction": instruction is not None}, _FOR_ONE_PROMPT)
        return run_file(FileOptions(prompt, output, everything, skip_bad, resume, overwrite, system, trace), options)
    only_files = {"--output": output is not None, "--all": everything, "--skip-bad": skip_bad, "--resume": resume}
    _refuse({**only_files, "--overwrite": overwrite}, _FOR_FILES)
    return _run_prompt(prompt, system, instruction, options, as_json, trace)


_FOR_ONE_PROMPT = {
    "--json": "--json is for a single prompt: the rows of a file are JSON already, and --all writes everything.",
    "--instruction": "--instruction is for a single prompt: the rows of a file have a field 'instruction'.",
}
_FOR_FILES = {
    "--output": "--output is for files of prompts. For a single prompt write: bon run PROMPT --json > FILE.",
    "--all": "--all is for files of prompts: a single prompt shows everything.",
}


def _refuse(given: dict[str, bool], reasons: dict[str, str]) -> None:
    for name, is_given in given.items():
        if is_given:
            raise InputError(reasons.get(name, f"{name} is for files of prompts."))


def is_file(argument: str) -> bool:
    """Whether the argument of ``bon run`` is a file of prompts and not a prompt.

    Raises:
        InputError: a folder, or a name that ends in .jsonl and is not there.
    """
    if argument == "-" or (os.path.exists(argument) and not os.path.isdir(argument)):
        return True
    if os.path.isdir(argument):
        raise InputError(f"{argument!r} is a folder. Give a .jsonl file, or a prompt of more than one word.")
    if argument.endswith(".jsonl"):
        raise InputError(f"there is no file {argument!r}.")
    return False


def _run_prompt(
    prompt: str, system: str | None, instruction: str | None, options: Any, as_json: bool, trace: Path | None
) -> int:
    from bon.cli import console, notice
    from bon.cli.build import build
    from bon.data.sink import to_json
    from bon.task import Message, Task
    from bon.trace import Trace
    from bon.types import Result

    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError("the prompt is not UTF-8. Set the terminal to UTF-8, or use a file.") from error
    messages = (*([Message("system", system)] if system is not None else []), Message("user", prompt))
    task = Task.of(messages, instruction)
    with nullcontext() if trace is None else Trace(trace) as traced:
        built = build(options)
        if options.embedded_policy:
            from bon.mini.tasks import knows

            if not knows(prompt):
                notice.off_world()

        async def work() -> Result:
            try:
                return await built.bon.run(task)
            finally:
                await built.aclose()

        result = asyncio.run(work())
        if traced is not None:
            traced.add(result)
    if as_json:
        identity = hashlib.blake2b(repr(task).encode(), digest_size=8).hexdigest()
        console.print_bytes(to_json({"id": identity, **result.to_dict()}))
    else:
        from bon.cli.show import show

        show(result, console.stdout_console())
    return 0


def rerank(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help='Rows with "prompt" or "messages", and "candidates"; - for standard input.'
        ),
    ],
    flip: Annotated[
        str | None,
        _option(
            _MODELS,
            "--flip",
            metavar="MODEL",
            help="What infers instructions back; the embedded mini model by default.",
        ),
    ] = None,
    engine: Engine = None,
    device: Device = None,
    dtype: Dtype = None,
    scorer: Scorer = "flip",
    style: Style = None,
    samples: Samples = None,
    selector: Selector = "best",
    seed: Annotated[int | None, _option(_SCORING, "--seed", metavar="S", help="For the selector softmax.")] = None,
    min_reward: MinReward = None,
    no_prune: NoPrune = False,
    trace: TracePath = None,
    output: OutputPath = None,
    everything: Everything = False,
    skip_bad: SkipBad = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> int:
    """Rank candidates that you have already: one JSON object per line, with "candidates", a list of texts.

    Everything else is as in ``bon run`` over a file.
    """
    from bon.cli.build import Options
    from bon.cli.files import FileOptions, run_file

    if file != "-" and not is_file(file):
        raise InputError(f"there is no file {file!r}.")
    options = Options(
        flip=flip,
        scorer=scorer,
        style=style,
        samples=samples,
        sampling={} if seed is None else {"seed": seed},
        selector=selector,
        min_reward=min_reward,
        prune=not no_prune,
        engine=engine,
        device=device,
        dtype=dtype,
    )
    files = FileOptions(file, output, everything, skip_bad, resume, overwrite, trace=trace, ranked=True)
    return run_file(files, options)
