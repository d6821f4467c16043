"""``bon run --ray``: a file, or a folder of them, over the machines of a Ray cluster; rows go to a folder of shards."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from bon.errors import InputError

if TYPE_CHECKING:
    from bon.cli.options import Files
    from bon.cli.tally import Tally
    from bon.config import Config
    from bon.data.ray import Done, Workers
    from bon.data.rows import BadRow, Row
    from bon.data.shards import Block, Shards

_PANEL = "Many machines"


@dataclass(frozen=True)
class Cluster:
    """Which machines do the rows of a file."""

    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS|local",
            help="Do a file's rows on a Ray cluster: HOST:PORT, auto, or local. FILE may be a folder, and -o is one.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", metavar="K", min=1, help="How many load the models; 1 by default.", rich_help_panel=_PANEL
        ),
    ] = None
    worker_cpus: Annotated[
        float | None,
        typer.Option("--worker-cpus", metavar="C", min=0, help="Of each, 1 by default.", rich_help_panel=_PANEL),
    ] = None
    worker_gpus: Annotated[
        float | None,
        typer.Option(
            "--worker-gpus",
            metavar="G",
            min=0,
            help="Of each, a fraction where several share one; by default what its models are split over.",
            rich_help_panel=_PANEL,
        ),
    ] = None


def run_on_ray(
    source: str, files: Files, config: Config, cluster: Cluster, *, system: str | None = None, credit: bool = False
) -> int:
    """Do every row of a file or of a folder of files on a cluster; return the exit code.

    Raises:
        InputError: the input cannot be read, the folder is another run's, no cluster answers, or a worker cannot be
            set up.
        StoppedError: Ctrl-C, after what is finished has been written.
    """
    from bon.cli.files import settings_of
    from bon.cli.options import embedded, threads_for
    from bon.cli.tally import Tally
    from bon.cli.terminal import StoppedError
    from bon.data.formats import read_file
    from bon.data.ray import How, connected, finished, packed, rows_of_block
    from bon.data.rows import row_of
    from bon.data.shards import Shards

    assert cluster.ray is not None
    if files.output is None:
        raise InputError("--ray writes a folder of shards: give -o FOLDER.")
    if files.trace is not None:
        raise InputError("--trace is for a run on one machine.")
    workers = workers_of(cluster)
    inputs = inputs_of(source, files.output)
    run = settings_of(files, config, system, False, credit, None)
    read = partial(row_of, system=system, prompt_field=files.prompt_field)
    shards = Shards.open(files.output, run, read, resume=files.resume, overwrite=files.overwrite)
    with closing(shards):
        shards.check_inputs([path.name for path in inputs])
        tally = Tally(source=source, files=files, output=shards)
        todo, blocks = {}, []
        records = chain.from_iterable(read_file(str(path)) for path in inputs)
        size = rows_of_block(config, workers.count, islice(records, files.limit))
        for block in _missing(inputs, shards, tally, size, embedded(config)):
            todo[block.shard] = replace(block, rows=())
            blocks += [packed(block)] if block.rows else []
        started = perf_counter()
        shards.start()
        for block in [block for block in todo.values() if not block.places]:
            shards.write(block, [], 0)
        if blocks:
            built, how = config.changed(threads=threads_for(config)), How(run, files.everything, credit)
            try:
                with connected(cluster.ray, built, workers) as placed:
                    started = _finish(finished(blocks, built, how, placed), todo, shards, tally)
            except KeyboardInterrupt:
                raise StoppedError(tally.interrupted) from None
        tally.say_off_world()
        tally.say_summary(perf_counter() - started)
        return tally.exit_code


def workers_of(cluster: Cluster) -> Workers:
    """What the options say of workers."""
    from bon.data.ray import Workers

    cpus = 1.0 if cluster.worker_cpus is None else cluster.worker_cpus
    return Workers(cluster.workers or 1, cpus, cluster.worker_gpus)


def inputs_of(source: str, output: Path | None) -> list[Path]:
    """The files to read."""
    from bon.data.formats import NAMED

    if source == "-":
        raise InputError("--ray reads files: standard input cannot be read again when the run is resumed.")
    path = Path(source)
    if not path.is_dir():
        return [path]
    if output is not None and output.exists() and output.samefile(path):
        raise InputError(f"{source} is both the input and the output. Choose another -o.")
    found = sorted(file for file in path.iterdir() if file.is_file() and file.name.lower().endswith(NAMED))
    if not found:
        raise InputError(f"the folder {source!r} has no file of rows ({', '.join(NAMED[::2])}; gzipped or not).")
    return found


def _missing(inputs: Sequence[Path], shards: Shards, tally: Tally, size: int, embedded: bool) -> Iterator[Block]:
    """What is to be done, and rows that cannot be are reported."""
    from bon.data.formats import read_file
    from bon.data.rows import read_rows

    left = tally.files.limit
    for path in inputs:
        rows = islice(_counted(read_rows(read_file(str(path)), shards.read), tally), left)
        before = tally.seen
        for block in shards.missing(path, tally.counting_off_world(rows) if embedded else rows, size):
            for bad in block.bad.values():
                tally.fail(bad.line, bad.error, str(path))
            yield block
        left = None if left is None else left - (tally.seen - before)
    tally.already = shards.already
    if not tally.seen:
        row = 'A row of JSON Lines is an object such as {"prompt": "Write a haiku."}.'
        raise InputError(f"{tally.name} is empty. {row}")


def _counted(rows: Iterable[Row | BadRow], tally: Tally) -> Iterator[Row | BadRow]:
    for row in rows:
        tally.seen += 1
        yield row


def _finish(outcomes: Iterable[Done], todo: Mapping[str, Block], shards: Shards, tally: Tally) -> float:
    """Write each block as it is finished; return when the first was begun, since loading is not counted."""
    from tqdm import tqdm

    started = None
    total = sum(len(block.places) for block in todo.values())
    with tqdm(total=total, unit="row", file=sys.stderr, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        for done in outcomes:
            started = perf_counter() - done.seconds if started is None else started
            block = todo[done.shard]
            shards.write(block, done.rows, len(done.rows) - len(done.failures))
            for line, error in done.failures:
                tally.fail(line, error, str(block.file))
            tally.counts += done.counts
            bar.update(len(done.rows))
    return started or perf_counter()
