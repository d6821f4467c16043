"""``bon pairs``: instructions with good answers, for training a scorer that reads backwards."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bon.cli.options import (
    Number,
    Policy,
    Rows,
    SamplingOptions,
    Scorer,
    Setup,
    configured,
    embedded,
    grouped,
    option,
    threads_for,
)
from bon.cli.rows import Input
from bon.cli.run import is_file
from bon.errors import BonError, InputError
from bon.errors import number as check_number

if TYPE_CHECKING:
    from bon.config import Config
    from bon.pairs.collect import Collection
    from bon.pairs.sources import Pair, Reading

_READ, _KEPT, _WRITTEN = "What rows hold", "Which pairs are kept", "What the model writes itself"


@dataclass(frozen=True)
class Held:
    """What the rows hold."""

    response_field: Annotated[
        str, option(_READ, "--response-field", metavar="NAME", help="The answer of a row that is a pair.")
    ] = "response"
    input_field: Annotated[
        str | None,
        option(_READ, "--input-field", metavar="NAME", help="What belongs behind what is asked (Alpaca's input)."),
    ] = None
    label: Annotated[
        str | None, option(_READ, "--label", metavar="NAME", help="The labels of candidates, where a row has several.")
    ] = None
    source: Annotated[
        str | None,
        option(_READ, "--source", metavar="TEXT", help="What pairs say they come from; the file by default."),
    ] = None


@dataclass(frozen=True)
class Kept:
    """Which pairs are kept."""

    least: Annotated[
        float | None,
        option(
            _KEPT,
            "--least",
            metavar="X",
            help="Least label or reward; by default a row's best answer, whatever it has.",
        ),
    ] = None
    per_prompt: Annotated[
        int,
        typer.Option("--per-prompt", min=1, metavar="K", help="Answers to a prompt at most.", rich_help_panel=_KEPT),
    ] = 1
    held_out: Annotated[
        list[str] | None,
        option(
            _KEPT,
            "--held-out",
            metavar="ROWS",
            help="Rows to be judged on, FILE or dataset: no pair has their prompts.",
        ),
    ] = None
    near: Annotated[
        float,
        typer.Option(
            "--near",
            min=0.01,
            max=1.0,
            metavar="J",
            help="Instructions this alike (Jaccard) count as the same.",
            rich_help_panel=_KEPT,
        ),
    ] = 0.6
    language: Annotated[
        list[str] | None,
        option(_KEPT, "--language", metavar="CODE", help="Of both texts (en, de, ...); repeatable; by default any."),
    ] = None
    most_words: Annotated[
        int, typer.Option("--most-words", min=1, metavar="W", help="Of each text.", rich_help_panel=_KEPT)
    ] = 400
    strip: Annotated[
        list[str] | None, option(_KEPT, "--strip", metavar="REGEX", help="Is taken out of both texts; repeatable.")
    ] = None
    drop: Annotated[
        list[str] | None, option(_KEPT, "--drop", metavar="REGEX", help="No pair has a match; repeatable.")
    ] = None
    rejected: Annotated[
        bool,
        option(_KEPT, "--rejected", help="Add a worse answer of the same row, for bon train flip --preference."),
    ] = False
    negatives: Annotated[
        int,
        typer.Option("--negatives", min=0, metavar="K", help="Of each of both kinds, at most.", rich_help_panel=_KEPT),
    ] = 2


@grouped
def pairs(
    file: Annotated[
        str | None,
        typer.Argument(metavar="[FILE]", help="Pairs, labelled candidates, a run's output, or with --policy prompts."),
    ] = None,
    *,
    setup: Setup,
    licence: Annotated[
        str | None,
        option(
            _READ, "--licence", metavar="NAME", help="Of what has no field licence; unknown where you do not know it."
        ),
    ] = None,
    policy: Policy = None,
    scorer: Scorer = None,
    number: Number,
    sampling: SamplingOptions,
    count: Annotated[
        int,
        typer.Option("--count", min=1, metavar="C", help="Pairs in the output, at least.", rich_help_panel=_WRITTEN),
    ] = 1000,
    turn_temperature: Annotated[
        list[float] | None,
        option(_WRITTEN, "--turn-temperature", metavar="T", help="Of what is asked; repeatable; by default .6, .8, 1."),
    ] = None,
    held: Held,
    kept: Kept,
    rows: Rows,
) -> int:
    """Make pairs of an instruction and a good answer, with negatives, to train a scorer that reads backwards.

    Rows become pairs as they are: they hold a response, candidates with labels, or the winner of bon run. With --policy
    each row is a prompt that is answered, the best of -n by --scorer. With --policy and no FILE the model writes the
    prompts as well. Every pair is in the output as soon as it is there; negatives follow at the end. --resume adds to
    what is there, from another source too.
    """
    config = configured(
        setup, number, sampling, policy=policy, scorer=scorer, min_reward=kept.least if policy else None
    )
    if file is None and policy is None:
        raise InputError(
            "there is nothing to make pairs of: give FILE, --policy MODEL, or both. Type: bon pairs --help"
        )
    if file is not None and not is_file(file):
        raise InputError(f"there is no file {file!r}.")
    if kept.least is not None:
        check_number("--least", kept.least)
    for name, value in (("--scorer", scorer), ("-n", number.n)):
        if value is not None and policy is None:
            raise InputError(f"{name} says how answers are chosen that --policy gives: name one, or leave {name} out.")
    if turn_temperature and file is not None:
        raise InputError(f"--turn-temperature is of what a model asks, and here {file} does: leave one of them out.")
    if rows.output is None or (rows.output.exists() and not rows.output.is_file()):
        raise InputError(
            "pairs go to a file, which is written anew with their negatives at the end: give -o FILE.jsonl."
        )
    if file is not None and rows.output.exists() and file != "-" and rows.output.samefile(file):
        raise InputError(f"{file} is both the input and the output. Choose another -o.")

    from tqdm import tqdm

    from bon.cli.terminal import StoppedError, say
    from bon.data.sink import Output
    from bon.pairs.alike import HeldOut
    from bon.pairs.collect import Collection, add_negatives
    from bon.pairs.filters import Filters
    from bon.pairs.sources import Reading, instructions_of

    if file is None:
        if licence is None:
            raise InputError("what a model writes has a licence too: give --licence NAME, or --licence unknown.")
        config = config.changed(sampling={"seed": 0, **config.sampling})
        if embedded(config):
            say("the embedded model was never taught what users ask: what it writes in their place means nothing.")
        if number.n is None:
            config = config.changed(n=1, scorer=scorer or "first")
    name = "standard input" if file == "-" else Path(file).name if file else f"{policy}, seed {config.sampling['seed']}"
    fields = (rows.prompt_field, held.response_field, held.input_field, held.label)
    reading = Reading(held.source or name, licence, *fields, least=kept.least, rejected=kept.rejected)
    wanted = Filters(kept.language or (), most_words=kept.most_words, strip=kept.strip or (), drop=kept.drop or ())
    held_out = HeldOut(chain.from_iterable(map(instructions_of, kept.held_out or ())))
    collection = Collection(wanted, held_out, kept.per_prompt, kept.near)
    output = Output.open(rows.output, resume=rows.resume, overwrite=rows.overwrite, read=collection.known)
    with closing(output):
        if output.repaired:
            say(f"{output.name}: the last line was torn and has been cut off ({output.repaired} bytes).")
        given = Input(file or "", rows, reading.row, reading.source)
        made = _made(given, reading, config, policy is not None, turn_temperature or [0.6, 0.8, 1.0], count, collection)
        try:
            with (
                _broken_into(given),
                closing(made),
                tqdm(
                    total=None if file else count,
                    initial=collection.count,
                    unit="pair",
                    disable=not sys.stderr.isatty(),
                ) as bar,
            ):
                first = next(made, None)
                if first is not None or not (given.stopped or given.broken):  # else what is to be overwritten stays
                    output.start()
                for pair in made if first is None else chain([first], made):
                    collection.add(pair, output)
                    bar.update(collection.count - bar.n)
            if collection.count:
                add_negatives(rows.output, kept.negatives)
        except KeyboardInterrupt:
            raise StoppedError(
                f"interrupted: {collection.count} pairs are in {output.name}, without negatives. The same command with "
                "--resume goes on from there."
            ) from None
        refused = "".join(f"; {count} refused: {reason}" for reason, count in collection.refused.most_common() if count)
        if output.written or not (given.stopped or given.broken):
            say(f"{output.written} new pairs, {collection.count} in {output.name}{refused}.")
        if given.broken is not None:
            raise given.broken
        if not given.stopped and collection.count < 2:
            what = "one pair only" if collection.count else "no pairs"
            raise InputError(f"{what}: a scorer learns to tell instructions apart, and needs two at least.")
        return given.exit_code


@contextmanager
def _broken_into(given: Input) -> Iterator[None]:
    """Note what ends the making of pairs; those that are there get their negatives all the same."""
    try:
        yield
    except BonError as error:
        given.broken = error


def _made(
    given: Input,
    reading: Reading,
    config: Config,
    answered: bool,
    temperatures: list[float],
    count: int,
    collection: Collection,
) -> Generator[Pair, None, None]:
    from bon.pairs.making import from_model, from_prompts, from_rows

    if not answered:
        yield from from_rows(given, reading, collection, given.fail)
        return
    with config.changed(threads=threads_for(config)).build() as bon:
        if given.source:
            yield from from_prompts(bon, given, reading, collection, given.fail)
        else:
            fail = given.fail if given.files.skip_bad else _raised
            yield from from_model(bon, temperatures, reading, collection, count, fail)


def _raised(line: int, error: BonError) -> None:
    raise error
