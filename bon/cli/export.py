"""``bon export``: what a run with ``--all`` found, as rows that trainers read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bon.cli.cluster import inputs_of
from bon.cli.options import Rows, grouped, option
from bon.cli.rows import Input
from bon.cli.run import is_file
from bon.errors import BonError, InputError

if TYPE_CHECKING:
    from bon.data.export import Export
    from bon.data.rows import Row
    from bon.data.sink import Output
    from bon.engines.base import Rates
    from bon.types import Result

_MADE, _KEPT = "What rows are made of", "Which rows there are"
LOGPS = "ref_logps"
"""The column of a reference model's log-probabilities."""
BATCH = 32
"""Prompts whose completions the reference model reads in one call."""

app = typer.Typer(help="Turn a run with --all into rows for trainers.")

Runs = Annotated[
    list[str],
    typer.Argument(metavar="FILE", help="What bon run --all or bon rerank --all wrote, files or folders of shards."),
]
DropTies = Annotated[bool, option(_KEPT, "--drop-ties", help="None whose rewards are the same.")]
CutOff = Annotated[bool, option(_KEPT, "--cut-off", help="Also answers that were cut off, which have no end to learn.")]


@dataclass(frozen=True)
class Taken:
    """What is taken of each prompt."""

    keep: Annotated[
        list[str] | None, option(_MADE, "--keep", metavar="NAME", help="A column of the prompt's to keep; repeatable.")
    ] = None
    system: Annotated[
        str | None, option(_MADE, "--system", metavar="TEXT", help="The system message that the run was given.")
    ] = None


@app.callback()
def _root() -> None: ...


@app.command("pairs")
@grouped
def pairs(
    files: Runs,
    *,
    pairing: Annotated[
        str,
        option(
            _MADE, "--pairing", metavar="P", help="best-worst, best-random, adjacent, or optimistic:C (mean + C sd)."
        ),
    ] = "best-worst",
    drop_ties: DropTies = False,
    min_margin: Annotated[
        float, option(_KEPT, "--min-margin", metavar="M", help="Least difference between the two rewards.")
    ] = 0.0,
    reference_response: Annotated[
        bool, option(_MADE, "--reference-response", help="Add a random candidate, as SELM needs it.")
    ] = False,
    seed: Annotated[int, option(_MADE, "--seed", metavar="S", help="Of what is random.")] = 0,
    cut_off: CutOff = False,
    taken: Taken,
    rows: Rows,
) -> int:
    """Write preference pairs (prompt, chosen, rejected) in TRL's conversational form, as for DPO.

    The output is JSON Lines, or Parquet where -o FILE ends in .parquet. Candidates that were pruned have no reward and
    stand in no pair: give bon run --no-prune.
    """
    from bon.data.export import Pairs

    export = Pairs(
        pairing=pairing,
        drop_ties=drop_ties,
        min_margin=min_margin,
        reference_response=reference_response,
        seed=seed,
        keep=taken.keep or (),
        cut_off=cut_off,
    )
    return _exported(files, export, "pair", taken, rows)


@app.command("groups")
@grouped
def groups(
    files: Runs,
    *,
    tau: Annotated[float, option(_MADE, "--tau", metavar="T", help="Temperature of the soft targets.")] = 1.0,
    scale: Annotated[
        bool, option(_MADE, "--scale/--no-scale", help="Divide advantages by the rewards' standard deviation.")
    ] = True,
    reference: Annotated[
        str | None,
        option(_MADE, "--reference", metavar="MODEL", help="Add this model's log-probabilities of the completions."),
    ] = None,
    threads: Annotated[int | None, option(_MADE, "--threads", metavar="T", help="Of that model on the CPU.")] = None,
    drop_ties: DropTies = False,
    taken: Taken,
    rows: Rows,
) -> int:
    """Write one row a prompt: completions, rewards, ranks, soft targets, group-normalised advantages.

    The output is JSON Lines, or Parquet where -o FILE ends in .parquet. Candidates that were pruned have no reward and
    are in no group: give bon run --no-prune.
    """
    from bon.data.export import Groups

    export = Groups(tau=tau, scale=scale, drop_ties=drop_ties, keep=taken.keep or ())
    return _exported(files, export, "group", taken, rows, reference, threads)


@app.command("sft")
@grouped
def sft(
    files: Runs,
    *,
    min_reward: Annotated[
        float | None, option(_KEPT, "--min-reward", metavar="R", help="No answer below this reward.")
    ] = None,
    cut_off: CutOff = False,
    taken: Taken,
    rows: Rows,
) -> int:
    """Write the winners (prompt, completion) to fine-tune on: one a prompt, k after --selector top-k:K.

    The output is JSON Lines, or Parquet where -o FILE ends in .parquet.
    """
    from bon.data.export import SFT

    export = SFT(min_reward=min_reward, keep=taken.keep or (), cut_off=cut_off)
    return _exported(files, export, "winner", taken, rows)


@dataclass
class _Table:
    """A Parquet file, which is written at the end; what is there when a run is broken off is written as well."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def written(self) -> int:
        return len(self.rows)

    def start(self) -> None: ...

    def write(self, value: dict[str, Any], /) -> None:
        self.rows.append(value)

    def close(self) -> None:
        from bon.data.export import save

        beside = self.path.with_name(self.path.name + ".jsonl")
        try:
            if self.rows:
                save(self.rows, self.path)
        except InputError as error:
            save(self.rows, beside)
            raise InputError(f"{error} They are in {beside}.") from error


Made = tuple["Row", "Result", dict[str, Any]]
"""A row of a run, its result, and a row of the export."""


def _opened(rows: Rows) -> tuple[Output | _Table, Counter[bytes]]:
    """The output, and digests of the rows that it has already."""
    from bon.data.export import pyarrow
    from bon.data.rows import row_of
    from bon.data.sink import Output

    there = Counter[bytes]()
    path = rows.output
    if path is not None and path.suffix.lower() == ".parquet":
        if rows.resume:
            raise InputError(f"--resume adds to JSON Lines, and {path} is written at the end. Name it .jsonl.")
        if path.exists() and not rows.overwrite:
            raise InputError(f"{path} exists already. Add --overwrite to replace it, or choose another -o.")
        if not path.absolute().parent.is_dir():
            raise InputError(f"there is no folder {str(path.parent)!r} for {path.name}. Make it first.")
        pyarrow()
        return _Table(path), there

    def noted(line: int, fields: Mapping[str, Any]) -> Row:
        there[_digest(fields)] += 1
        return row_of(line, fields, prompt_field="prompt")

    return Output.open(path, resume=rows.resume, overwrite=rows.overwrite, read=noted), there


def _digest(row: Mapping[str, Any]) -> bytes:
    """A row in short, but for what a model says of it."""
    from bon.data.sink import to_json

    return blake2b(to_json({name: value for name, value in row.items() if name != LOGPS}), digest_size=16).digest()


def _check_same(output: Output | _Table, there: Counter[bytes], inputs: Sequence[Input], export: Export) -> None:
    """Refuse to resume what other rows or options gave; the files are read once more for that."""
    from bon.data.formats import read_file
    from bon.data.rows import Row, read_rows

    if any(given.source == "-" for given in inputs):
        raise InputError("--resume reads the input twice: name a file in place of standard input.")
    read = (read_rows(read_file(given.source), given.read) for given in inputs)
    rows = (row for rows in read for row in rows if isinstance(row, Row))
    strange = there - Counter(_digest(one) for *_, one in _made(rows, export, lambda line, error: None))
    export.refused.clear()
    if strange:
        raise InputError(
            f"{output.name} has {strange.total()} rows that these files and options do not give: cannot resume. Give "
            "the same ones again, choose another -o, or replace it with --overwrite."
        )


def _engine(stack: ExitStack, reference: str, threads: int | None) -> Rates:
    """The reference model, which is freed with the stack."""
    from bon import portal
    from bon.cli.options import threads_for
    from bon.config import Config
    from bon.models import ModelPool
    from bon.scorers.forward import ForwardLikelihood

    pool = ModelPool(threads_for(Config(reference, "random", threads=threads)))
    stack.callback(lambda: portal.run(pool.aclose()))
    return cast("Rates", pool.scorer(ForwardLikelihood(reference)).engines[0])  # which checks it


def _known(made: Made, there: Counter[bytes]) -> bool:
    digest = _digest(made[2])
    there[digest] -= 1
    return there[digest] >= 0


def _made(rows: Iterable[Row], export: Export, fail: Callable[[int, BonError], None]) -> Iterator[Made]:
    from bon.data.results import result_of

    for row in rows:
        try:
            result = result_of(row)
            made = export(result)
        except InputError as error:
            fail(row.line, error)
            continue
        for one in made:
            yield row, result, one


def _rated(given: Input, made: Iterator[Made], engine: Rates | None) -> Iterator[dict[str, Any]]:
    """The rows, with the reference model's log-probabilities where there is one; it reads a batch in one call."""
    from bon import portal
    from bon.data.export import reference_logps

    if engine is None:
        yield from (one for *_, one in made)
        return
    while batch := list(islice(made, BATCH)):
        told = portal.run(reference_logps(engine, [result for _, result, _ in batch]))
        for (row, _, one), logps in zip(batch, told, strict=True):
            if isinstance(logps, BonError):
                given.fail(row.line, logps)
            else:
                yield {**one, LOGPS: logps}


def _exported(
    sources: Sequence[str],
    export: Export,
    what: str,
    taken: Taken,
    rows: Rows,
    reference: str | None = None,
    threads: int | None = None,
) -> int:
    """Write the rows of all files; return the exit code."""
    from bon.cli.terminal import StoppedError, say
    from bon.data.results import run_row

    files: list[str] = []
    for source in sources:
        if not is_file(source, or_folder=True):
            raise InputError(f"there is no file {source!r}.")
        files += [source] if source == "-" else map(str, inputs_of(source, rows.output))
    for source in files:
        if rows.output is not None and rows.output.exists() and source != "-" and rows.output.samefile(source):
            raise InputError(f"{source} is both the input and the output. Choose another -o.")
    read = partial(run_row, system=taken.system, prompt_field=rows.prompt_field)
    inputs = [Input(source, rows, read, "standard input" if source == "-" else source) for source in files]
    output, there = _opened(rows)
    with closing(output), ExitStack() as stack:
        if rows.resume:
            _check_same(output, there, inputs, export)
        engine = None if reference is None else _engine(stack, reference, threads)
        try:
            for given in inputs:
                made = _made(given, export, given.fail)
                for row in _rated(given, (one for one in made if not _known(one, there)), engine):
                    if not output.written:
                        output.start()  # until now what is to be overwritten stays
                    output.write(row)
                if given.stopped or given.broken:
                    break
        except KeyboardInterrupt:
            raise StoppedError(f"interrupted: {output.written} {what}s are in {output.name}.") from None
    left_out = [f"{count} {reason}" for reason, count in export.refused.most_common() if count]
    new = "new " if rows.resume else ""
    say(f"{output.written} {new}{what}s in {output.name}{'; left out: ' if left_out else ''}{', '.join(left_out)}.")
    if any("(pruned)" in reason for reason in left_out):
        say("pruned candidates have no reward, and they are the worst ones: give bon run --no-prune to have them all.")
    for given in inputs:
        if given.broken is not None:
            raise given.broken
    code = max(given.exit_code for given in inputs)
    if not code and not output.written and not rows.resume:
        raise InputError(f"there are no {what}s in {', '.join(sources)}.")
    return 1 if any(given.engine_failed for given in inputs) else code
