"""A file of prompts, or of candidates to rank: what to do about bad rows, Ctrl-C, progress and exit codes.

``bon.data`` reads and writes rows. A bad row ends the reading; what is under way by then is finished and written. With
``skip_bad`` bad rows are reported and the run goes on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from bon import portal
from bon.allocation import Allocation
from bon.budget import as_budget
from bon.cli.options import Files, embedded, loaded, threads_for
from bon.cli.show import show
from bon.cli.tally import Tally
from bon.cli.terminal import StoppedError, one_line, say
from bon.config import Config
from bon.credit import refuse
from bon.data.formats import read_file
from bon.data.rows import (
    BadRow,
    Counts,
    Key,
    Outcomes,
    Row,
    credited_rows,
    output_row,
    rank_rows,
    read_rows,
    row_of,
    run_rows,
)
from bon.data.sink import Output
from bon.errors import BonError, InputError
from bon.group import Group
from bon.pipeline import made
from bon.scorers.base import Scorer
from bon.selectors import Selector, as_selector, only_the_best_counts
from bon.trace import Trace
from bon.types import Result, Sampling


@dataclass(kw_only=True)
class Job(Tally):
    """One run over a file.

    Args:
        output, trace: where results go.
        several: whether the selector may pick more than one candidate, so that rows list what it picked.
        run: which settings make them.
        broken: why the input could not be read to its end.
    """

    output: Output
    several: bool
    run: str
    trace: Trace | None = None
    ids: dict[Key, int] = field(default_factory=dict)
    broken: BonError | None = None

    def rows(self, parsed: Iterable[Row | BadRow]) -> Iterator[Row]:
        """The rows that are still to be done."""
        try:
            for row in parsed:
                self.seen += 1
                if isinstance(row, BadRow):
                    self.fail(row.line, row.error)
                elif not self.files.resume or not self._known(row):
                    yield row
                if self.stopped:
                    return
        except BonError as error:
            self.broken = error

    def _known(self, row: Row) -> bool:
        """Whether a row is not to be done: the output has it already, or it has the id of another one."""
        key = row.key
        if key[0] == "id" and (first := self.ids.setdefault(key, row.line)) != row.line:
            self.fail(row.line, InputError(f"the id {key[1]!r} is that of line {first}; --resume needs unique ids."))
            return True
        if not self.output.done[key]:
            return False
        if self.output.asked.get(key, row.digest) != row.digest:
            raise InputError(
                f"{self.name}:{row.line}: {self.output.name} has the id {key[1]!r} for another prompt. "
                "Give the row an id of its own, or choose another -o."
            )
        self.output.done[key] -= 1
        self.already += 1
        return True

    def finish(self, row: Row, result: Result) -> None:
        """Write a result and count it."""
        everything = self.files.everything
        if row.candidates and self.files.output is None and not everything and sys.stdout.isatty():
            print(f"{self.name}:{row.line}: {one_line(result.task.instruction)}")
            show(result)
            self.output.written += 1
        else:
            self.output.write(output_row(row, result, run=self.run, everything=everything, several=self.several))
        self.counts += Counts.of(result)
        if self.trace is not None:
            self.trace.add(result, row.line)

    def keep(self, rows: Mapping[int, Row], groups: Iterable[Group], selector: Selector) -> None:
        """Write what an interrupted run over all rows together has, where that is a candidate with a reward.

        Args:
            rows: that are not written, by the identity of their tasks.
            groups: of the run.
            selector: what picks.
        """
        for group in groups:
            if (row := rows.get(id(group.task))) is not None and group.best_reward is not None:
                group.expire("the run was interrupted")
                if isinstance(result := made(group.result, selector), Result):
                    self.finish(row, result)


def run_file(
    source: str,
    files: Files,
    config: Config,
    *,
    system: str | None = None,
    ranked: bool = False,
    credit: bool = False,
    total: int | None = None,
) -> int:
    """Do every row of a file; return the exit code.

    Args:
        source: its name, or "-" for standard input.
        files: what to do with it.
        config: models, scoring and choice.
        system: a system message for rows that have none of their own.
        ranked: whether rows bring their candidates, so that no policy is needed.
        credit: whether each row's winner is rated again without each of its sentences.
        total: samples of all rows together, which are then read before the first is sampled.

    Raises:
        InputError: the input cannot be read, the output cannot be written, or there are no rows.
        StoppedError: Ctrl-C, after what is finished has been written.
    """
    _check_output(source, files)
    read = partial(row_of, system=system, ranked=ranked, prompt_field=files.prompt_field)
    run = settings_of(files, config, system, ranked, credit, total)
    with ExitStack() as stack:
        output = Output.open(files.output, resume=files.resume, overwrite=files.overwrite, run=run, read=read)
        stack.callback(output.close)
        trace = None if files.trace is None else stack.enter_context(_open_trace(files.trace, files.output))
        several = not only_the_best_counts(as_selector(config.selector))
        job = Job(source=source, files=files, output=output, several=several, run=run, trace=trace)
        if output.repaired:
            say(f"{output.name}: the last line was torn and has been cut off ({output.repaired} bytes).")
        rows = job.rows(islice(read_rows(read_file(source), read), files.limit))
        first = next(rows, None)  # a first row that is bad needs no model to be refused
        if not job.seen and job.broken is None:
            row = 'A row of JSON Lines is an object such as {"prompt": "Write a haiku."}.'
            raise InputError(f"{job.name} is empty. {row}")
        started = perf_counter()
        if first is not None:
            rows = chain([first], rows)
            allocation, left = None, {}
            if total is not None:
                left = {id(row.task): row for row in rows}
                if total < len(left):
                    raise InputError(f"--total-samples {total} is below the {len(left)} prompts: each needs one.")
                rows = iter(left.copy().values())
                rule: Any = as_budget(config.n)
                more = max(total - output.spent, len(left))
                allocation = Allocation(more, rule if hasattr(rule, "gain") else None)
            if embedded(config, ranked=ranked):
                rows = job.counting_off_world(rows)
            with _ranking(config) if ranked else _sampling(config, allocation) as (scorer, outcomes):
                if credit:
                    refuse(scorer)
                started = perf_counter()  # loading is not counted
                output.start()
                finished = outcomes(rows)
                try:
                    finished = credited_rows(scorer, finished) if credit else finished
                    _finish_all(job, finished, _count(source, files.limit), left)
                except KeyboardInterrupt:
                    if allocation is not None:
                        job.keep(left, allocation.groups, _selector(config))
                    raise StoppedError(job.interrupted) from None
        job.say_off_world(ranked)
        if output.name != "standard output" or job.failed or sys.stderr.isatty():
            job.say_summary(perf_counter() - started)
        else:
            job.say_unlisted()
        if job.broken is not None:
            raise job.broken
        return job.exit_code


@contextmanager
def _sampling(
    config: Config, allocation: Allocation | None
) -> Iterator[tuple[Scorer, Callable[[Iterable[Row]], Outcomes]]]:
    with config.changed(threads=threads_for(config)).build() as bon:
        bon = bon if allocation is None else bon.replace(n=allocation)
        yield bon.scorer, partial(run_rows, bon)


@contextmanager
def _ranking(config: Config) -> Iterator[tuple[Scorer, Callable[[Iterable[Row]], Outcomes]]]:
    with loaded(config, ranked=True) as (_, scorer):
        yield scorer, partial(rank_rows, scorer, _selector(config), prune=config.prune)


def _selector(config: Config) -> Selector:
    return as_selector(config.selector, config.min_reward, seed=Sampling.of(config.sampling).seed)


def _finish_all(job: Job, outcomes: Outcomes, total: int | None, left: dict[int, Row]) -> None:
    async def work(bar: tqdm[Any]) -> None:
        async with aclosing(outcomes):
            async for row, outcome in outcomes:
                if isinstance(outcome, BonError):
                    job.fail(row.line, outcome)
                else:
                    job.finish(row, outcome)
                left.pop(id(row.task), None)
                bar.update(job.already + job.output.written + job.failed - bar.n)

    with tqdm(total=total, unit="row", file=sys.stderr, disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
        portal.run(work(bar))


def settings_of(files: Files, config: Config, system: str | None, ranked: bool, credit: bool, total: int | None) -> str:
    """What decides how a row comes out, beside the row, in short."""
    settings = config.to_dict()
    for name in ("threads", "schedule", *(("policy", "n") if ranked else ())):
        del settings[name]
    settings |= {"ranked": ranked, "system": system, "everything": files.everything, "credit": credit}
    settings |= {} if total is None else {"total_samples": total}
    return blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()


def _check_output(source: str, files: Files) -> None:
    if files.output is not None and files.output.exists() and source != "-" and files.output.samefile(source):
        raise InputError(f"{source} is both the input and the output. Choose another -o.")


def _open_trace(path: Path, output: Path | None) -> Trace:
    if output is not None and path.exists() and path.samefile(output):
        raise InputError(f"{path} is the output and would be overwritten by the trace. Choose another --trace.")
    return Trace(path)


def _count(source: str, limit: int | None) -> int | None:
    """Rows of a file that has one a line, for the progress bar; None for others."""
    if not sys.stderr.isatty() or not source.endswith((".jsonl", ".txt")) or not os.path.isfile(source):
        return limit
    with open(source, "rb") as again:
        lines = sum(block.count(b"\n") for block in iter(lambda: again.read(1 << 20), b""))
    return lines if limit is None else min(lines, limit)
