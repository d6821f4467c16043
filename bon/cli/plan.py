"""``bon plan``: what a file of prompts will take, and what a million of them would, from rates measured on a few."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bon.cli.cluster import Cluster, inputs_of, workers_of
from bon.cli.options import (
    JSON,
    Choice,
    Number,
    Policy,
    SamplingOptions,
    Setup,
    configured,
    grouped,
    threads_for,
)
from bon.cli.run import is_file
from bon.errors import InputError

if TYPE_CHECKING:
    from bon.bench.plan import Cost, Plan, Stage
    from bon.data.rows import BadRow, Row

MANY = 1_000_000


@grouped
def plan(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="Prompts as for bon run, or a folder of such files.")
    ] = None,
    *,
    setup: Setup,
    policy: Policy = None,
    choice: Choice,
    number: Number,
    sampling: SamplingOptions,
    cluster: Cluster,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message, for prompts that have none.")
    ] = None,
    prompt_field: Annotated[
        str | None,
        typer.Option("--prompt-field", metavar="NAME", help="What is asked, where it is in no other field."),
    ] = None,
    block: Annotated[
        int | None, typer.Option("--block", metavar="B", min=1, help="Prompts that are measured together; as in a run.")
    ] = None,
    as_json: JSON = False,
) -> int:
    """Say what the prompts of a file will take, and what a million of them would.

    Up to five blocks of prompts, taken from all over the file, are sampled and scored as bon run would; the rates of
    prefill and decoding, N and the lengths then say how many prompts a second K workers do. With --ray the workers are
    measured where they will run, all at once, so what they take from each other counts; without, one is measured here.
    """
    from bon.bench.plan import ROUNDS, Meter, Plan, measure, measure_on_ray
    from bon.cli.terminal import print_json
    from bon.data.ray import connected, rows_of_block

    config = configured(setup, number, sampling, choice, policy=policy)
    config = config.changed(threads=threads_for(config))
    if file is None or not is_file(file, or_folder=True):
        raise InputError("FILE is missing. Type: bon plan --help" if file is None else f"there is no file {file!r}.")
    workers = workers_of(cluster)
    size = block or rows_of_block(config)
    found = _Sample(size * ROUNDS)
    found.read(_rows(file, system, prompt_field))
    if not found.taken:
        raise InputError(f"{file} has no prompt that can be read. Give bon plan --prompt-field NAME?")
    if cluster.ray is None:
        meter = Meter(config, os.getcwd())
        costs: tuple[Cost, ...] = (measure(meter, found.taken, size, meter.setup),)
    else:
        with connected(cluster.ray, config, workers) as placed:
            costs = measure_on_ray(config, found.taken, size, placed)
    made = Plan(costs, workers.count, rows_of_block(config, workers.count, range(found.rows)), found.longer)
    if as_json:
        print_json(_report(made, found))
    else:
        _show(made, found, file)
    return 0


def _rows(file: str, system: str | None, prompt_field: str | None) -> Iterable[Row | BadRow]:
    from bon.data.formats import read_file
    from bon.data.rows import read_rows, row_of

    read = partial(row_of, system=system, prompt_field=prompt_field)
    for path in inputs_of(file, None):
        yield from read_rows(read_file(str(path)), read)


class _Sample:
    """Some rows of a file, each with the same chance, in the order of the file; and how long all are."""

    def __init__(self, most: int) -> None:
        self._most, self._random = most, random.Random(0)
        self._kept: list[tuple[int, Row]] = []
        self.rows = self.bad = self._characters = 0

    def read(self, rows: Iterable[Row | BadRow]) -> None:
        """Take some of the rows."""
        from bon.data.rows import Row

        for row in rows:
            if not isinstance(row, Row):
                self.bad += 1
                continue
            self.rows += 1
            self._characters += _length(row)
            if len(self._kept) < self._most:
                self._kept.append((self.rows, row))
            elif (place := self._random.randrange(self.rows)) < self._most:
                self._kept[place] = (self.rows, row)

    @property
    def taken(self) -> list[Row]:
        """The rows that were taken."""
        return [row for _, row in sorted(self._kept, key=lambda kept: kept[0])]

    @property
    def longer(self) -> float:
        """How much longer all rows are than these."""
        own = sum(_length(row) for _, row in self._kept)
        return self._characters / self.rows / (own / len(self._kept)) if own else 1.0


def _length(row: Row) -> int:
    return sum(len(message.content) for message in row.task.messages)


def _report(plan: Plan, sample: _Sample) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "prompts": sample.rows,
        "bad": sample.bad,
        "workers": plan.workers,
        "prompts_per_second": plan.rate(),
        "seconds": plan.seconds(sample.rows),
        "setup_seconds": plan.setup,
        "million": _million(plan, None),
        "by_n": {str(n): _million(plan, n) for n in _numbers(plan)},
        "costs": [asdict(cost) for cost in plan.costs],
    }


def _million(plan: Plan, n: float | None) -> dict[str, float]:
    hours = plan.seconds(MANY, n) / 3600
    tokens = {name: MANY * count for name, count in plan.costs[0].tokens(n, plan.longer).items()}
    return {"hours": hours, "worker_hours": MANY / plan.rate(n) * plan.workers / 3600, **tokens}


def _numbers(plan: Plan) -> list[int]:
    return sorted({1, 4, 16, 64, round(plan.costs[0].n)})


def _show(plan: Plan, sample: _Sample, file: str) -> None:
    from bon.bench.harness import table

    cost = plan.costs[0]
    several = f"in {len(plan.costs)} workers at once" if len(plan.costs) > 1 else "in one worker"
    print(f"measured on {cost.prompts} prompts, {cost.n:g} candidates each, {several}")
    for name, stage, each in (("policy", cost.policy, False), ("scorer", cost.scorer, True)):
        longer = 1.0 if each else plan.longer
        print(
            f"  {name}  {_said(stage, each)}: {1000 * stage.seconds(cost.n, each=each, longer=longer):.3g} ms a prompt"
        )
    alone = plan.rate() / plan.workers
    print(f"a worker does {alone:.3g} prompts a second, {plan.workers} of them {plan.rate():.3g}")
    bad = f" (and {sample.bad} bad row{'' if sample.bad == 1 else 's'})" if sample.bad else ""
    print(f"{file}: {sample.rows} prompts{bad} take {_time(plan.seconds(sample.rows))}, and {plan.setup:.0f} s to load")
    print("\na million such prompts")
    rows = []
    for n in _numbers(plan):
        million = _million(plan, n)
        read, written = (
            sum(million[f"{role}_{what}"] for role in ("policy", "scorer")) for what in ("read", "written")
        )
        one_day = math.ceil(million["worker_hours"] / 24)
        hours = _time(3600 * million["hours"])
        rows.append([n, hours, f"{million['worker_hours']:.3g}", one_day, f"{read:.2g}", f"{written:.2g}"])
    heads = ["N", f"on {plan.workers}", "worker-hours", "workers for a day", "tokens read", "written"]
    print(table(heads, rows))


def _said(stage: Stage, each: bool) -> str:
    parts = []
    if stage.prefill:
        parts.append(f"reads {stage.read:.3g} tokens a {'candidate' if each else 'prompt'} at {stage.prefill:.0f}/s")
    if stage.decode:
        parts.append(f"writes {stage.written:.3g} a candidate at {stage.decode:.0f}/s")
    return ", ".join(parts) or "counts no tokens"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
