"""Rows over many machines with Ray Data: a pool of workers, each of which builds its models from the spec once.

Ray schedules, restarts workers that died and gives their rows to others; what is here is the worker, and what is wrong
with a cluster in words. ``run`` maps a dataset of rows; ``finished`` does blocks of rows for ``bon run --ray``.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from bon import portal
from bon.best_of_n import BestOfN
from bon.config import Config
from bon.credit import refuse
from bon.data.rows import BadRow, Counts, Row, credited_rows, error_row, output_row, read_rows, row_of, run_rows
from bon.data.shards import Block
from bon.data.sink import to_json
from bon.errors import BonError, EngineError, InputError, MissingExtraError, UnavailableError, whole_number
from bon.pipeline import WAVE
from bon.selectors import only_the_best_counts
from bon.types import Result

if TYPE_CHECKING:
    from ray.data import Dataset

log = logging.getLogger("bon")

LOCAL = "local"
"""The address of a cluster that is started on this machine, and stopped again."""

_ANSWERS_S = 5.0
"""A cluster's port has to accept a connection within this time."""

# Ray speaks gRPC: what HTTP/2 begins with, an empty frame of settings, and the kind of frame that answers (RFC 9113).
_SETTINGS = b"\x04"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0" * 5

_DEATHS = 5
"""Rows are given up when this many workers have died while they did them."""


@dataclass(frozen=True, slots=True)
class Workers:
    """What runs the rows.

    Args:
        count: how many workers; each loads the models.
        cpus: of each worker.
        gpus: of each worker, a fraction where several share one; None is as many as its models are split over, where
            the cluster has GPUs and a model is not behind a URL.

    Raises:
        InputError: no workers, or a share that is no number of at least 0.
    """

    count: int = 1
    cpus: float = 1.0
    gpus: float | None = None

    def __post_init__(self) -> None:
        whole_number("workers", self.count, 1)
        for name, share in (("cpus", self.cpus), ("gpus", self.gpus or 0.0)):
            if not isinstance(share, int | float) or not 0 <= share < float("inf"):
                raise InputError(f"{name} of a worker must be a number of at least 0, got {share!r}.")


@dataclass(frozen=True, slots=True)
class How:
    """How rows become output rows, beside the configuration.

    Args:
        run: which settings make them, for the rows.
        everything, credit: as ``--all`` and ``--credit`` of the command line.
    """

    run: str = ""
    everything: bool = False
    credit: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """A block whose rows are all done, or failed.

    Args:
        shard: of the block.
        rows: as JSON, in the block's order.
        failures: of them: the line, and why.
        counts: of the others.
        seconds: that it took.
    """

    shard: str
    rows: tuple[bytes, ...]
    failures: tuple[tuple[int, BonError], ...]
    counts: Counts
    seconds: float


class Worker:
    """Best-of-N in an actor of Ray's: the models are built once, and what comes is done with them.

    An error of building is kept and told with the first rows: raised here, Ray would report it for each worker and try
    again.
    """

    def __init__(self, config: Config, how: How, folder: str) -> None:
        self.how = how
        self.error: BonError | None = None
        if Path(folder).is_dir():  # names of files and modules mean the same as where the command was typed
            os.chdir(folder)
        try:
            self.bon: BestOfN = config.build()
            if how.credit:
                refuse(self.bon.scorer)
        except Exception as error:
            said = str(error) if isinstance(error, BonError) else f"{type(error).__name__}: {error}"
            kind = InputError if isinstance(error, InputError) else UnavailableError
            self.error = kind(f"a worker on {socket.gethostname()} cannot be set up: {said}")
        else:
            together = self.bon.policy.concurrent and self.bon.scorer.concurrent
            self.turn: Any = nullcontext() if together else threading.Lock()
            self._several = not only_the_best_counts(self.bon.selector)

    def outcomes(self, rows: Iterable[Row]) -> list[Result | BonError]:
        """The result of each row or its error, in order."""

        async def collect(wanted: list[Row]) -> list[Result | BonError]:
            made: dict[int, Result | BonError] = {}
            outcomes = run_rows(self.bon, wanted)
            outcomes = credited_rows(self.bon.scorer, outcomes) if self.how.credit else outcomes
            async with aclosing(outcomes):
                async for row, outcome in outcomes:
                    made[id(row)] = outcome
            return [made[id(row)] for row in wanted]

        return portal.run(collect(list(rows)))

    def written(self, row: Row, outcome: Result | BonError) -> dict[str, Any]:
        """The output row."""
        if isinstance(outcome, BonError):
            return error_row(row, outcome, run=self.how.run)
        return output_row(row, outcome, run=self.how.run, everything=self.how.everything, several=self._several)


class Begun:
    """How often each block was begun: more than once means that a worker died over it. An actor beside the driver."""

    def __init__(self) -> None:
        self.times: Counter[str] = Counter()

    def begin(self, shard: str) -> int:
        """Note that a block is begun, and return how often it was."""
        self.times[shard] += 1
        return self.times[shard]


class BlockWorker(Worker):
    """Does whole blocks, pickled, which Ray neither divides nor looks into."""

    def __init__(self, config: Config, how: How, folder: str, begun: Any) -> None:
        super().__init__(config, how, folder)
        self.begun = begun

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Do the blocks of a batch."""
        return {"done": [pickle.dumps(self._done(*pickle.loads(block))) for block in batch["block"]]}

    def _done(self, shard: str, rows: tuple[Row, ...]) -> Done | BonError:
        if self.error is not None:
            return self.error
        import ray

        started = perf_counter()
        outcomes: list[Result | BonError]
        with self.turn:
            if ray.get(self.begun.begin.remote(shard)) > _DEATHS:  # Ray would go on for ever
                reason = f"{_DEATHS} workers died, one after another, while they did the rows of {shard}."
                outcomes = [EngineError(reason)] * len(rows)
            else:
                outcomes = self.outcomes(rows)
        counts, failures = Counts(), []
        for row, outcome in zip(rows, outcomes, strict=True):
            if isinstance(outcome, BonError):
                failures.append((row.line, sendable(outcome)))
            else:
                counts += Counts.of(outcome)
        lines = (to_json(self.written(row, outcome)) for row, outcome in zip(rows, outcomes, strict=True))
        return Done(shard, tuple(lines), tuple(failures), counts, perf_counter() - started)


class RowWorker(Worker):
    """Does the rows of a table."""

    def __init__(self, config: Config, how: How, folder: str, reading: Mapping[str, Any]) -> None:
        super().__init__(config, how, folder)
        self.reading = reading

    def __call__(self, table: Any) -> Any:
        """Map a table of rows to a table of output rows."""
        import pyarrow

        if self.error is not None:
            raise self.error
        read = list(read_rows(enumerate(table.to_pylist(), 1), lambda *row: row_of(*row, **self.reading)))
        with self.turn:
            outcomes = iter(self.outcomes(row for row in read if isinstance(row, Row)))
        rows = [
            error_row(row, row.error, run=self.how.run)
            if isinstance(row, BadRow)
            else self.written(row, next(outcomes))
            for row in read
        ]
        for came, row in zip(read, rows, strict=True):
            for name in ("line", "run"):  # they are for files: the place in a batch says nothing
                row.pop(name, None)
                row |= {name: came.fields[name]} if name in came.fields else {}
        names = dict.fromkeys(name for row in rows for name in row)
        return pyarrow.table({name: [row.get(name) for row in rows] for name in names})


def run(
    dataset: Dataset,
    spec: Config | BestOfN | Mapping[str, Any] | str | Path,
    *,
    workers: Workers | int = 1,
    everything: bool = False,
    system: str | None = None,
    prompt_field: str | None = None,
) -> Dataset:
    """Map a dataset of rows with "prompt" or "messages" to one with the best completion of each; lazily, as Ray does.

    A row keeps its columns. One that fails has no text, the status "error", and why in ``reason``; the others go on.

    Args:
        dataset: of rows as ``bon run`` reads them from a file.
        spec: what makes the ``BestOfN`` of each worker: a configuration, its settings, the name of its TOML file, or a
            ``BestOfN`` whose parts were given as text.
        workers: how many, or what each of them gets.
        everything: every candidate and score, as ``--all`` of the command line.
        system: a system message for rows that have none of their own.
        prompt_field: the column with what is asked, where that is another one.

    Raises:
        InputError: no dataset of Ray's, or a setting that cannot be.
        MissingExtraError: Ray is not installed.
    """
    data = _ray_data()
    if not isinstance(dataset, data.Dataset):
        raise InputError(
            f"a dataset of Ray's is needed, not {type(dataset).__name__}. Write ray.data.read_json(FILE) or "
            "ray.data.from_items(ROWS); for files with resuming, type: bon run FILE -o FOLDER --ray local"
        )
    workers = Workers(workers) if isinstance(workers, int) else workers
    config = _config(spec)
    arguments = {"config": config, "how": How(everything=everything), "folder": os.getcwd()}
    arguments["reading"] = {"system": system, "prompt_field": prompt_field}
    return _mapped(dataset, RowWorker, arguments, config, workers, batch_size=rows_of_block(config), format="pyarrow")


def packed(block: Block) -> bytes:
    """A block as it is sent to a worker."""
    return pickle.dumps((block.shard, block.rows))


def finished(blocks: Sequence[bytes], config: Config, how: How, workers: Workers) -> Iterator[Done]:
    """Do blocks of rows on the cluster that is connected; yield each as it is finished.

    Args:
        blocks: packed.
        config: what each worker builds.
        how, workers: what comes out, and what does it.

    Raises:
        BonError: a worker cannot be built, or rows cannot be done however often they are tried.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    begun = ray.remote(Begun).options(num_cpus=0, scheduling_strategy=here).remote()
    items = [{"block": block} for block in blocks]
    dataset = _ray_data().from_items(items, override_num_blocks=len(items))
    arguments = {"config": config, "how": how, "folder": os.getcwd(), "begun": begun}
    done = _mapped(dataset, BlockWorker, arguments, config, workers, batch_size=1, format="numpy")
    try:
        for batch in done.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
            for each in batch["done"]:
                outcome = pickle.loads(each)
                if isinstance(outcome, BonError):
                    raise outcome
                yield outcome
    except RayError as error:
        raise EngineError(
            f"the workers cannot go on: {_first_line(error)}. What is finished is kept; --resume goes on from there."
        ) from error


@contextmanager
def connected(address: str, config: Config, workers: Workers) -> Iterator[Workers]:
    """Meanwhile there is a cluster: the one at an address, or one of its own on this machine.

    Yields the workers with the GPUs that each of them gets.

    Args:
        address: HOST:PORT, "auto" for the cluster that this machine is part of, or "local".
        config: what each worker builds.
        workers: what it has to have room for.

    Raises:
        InputError: nothing answers there, or it has no room for a single worker.
        MissingExtraError: Ray is not installed.
    """
    _ray_data()
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cores = max(os.cpu_count() or 1, -(-workers.count * workers.cpus // 1))
        ray.init(address="local", num_cpus=int(cores), include_dashboard=False, **quiet)
    else:
        _check_answers(address)
        try:
            ray.init(address=address, **quiet)
        except Exception as error:  # Ray has no type of its own for all that can go wrong
            raise _unreachable(address, _first_line(error)) from error
    with redirect_stdout(sys.stderr):  # what Ray says of a worker that died is no result
        try:
            workers = replace(workers, gpus=_gpus_of(config, workers))
            if (fit := room(workers)) < workers.count:
                log.info("the cluster has room for %d of %d workers; others start when it has more", fit, workers.count)
            yield workers
        finally:
            ray.shutdown()


def rows_of_block(config: Config, workers: int = 1, rows: Iterable[object] | None = None) -> int:
    """Rows that are done and written together: they fill the batches of an engine that wants everything at once.

    Args:
        config: of the run.
        workers: that share the rows.
        rows: all of them, of which as many are counted as say whether there are few: then blocks are smaller, so that
            no worker is left without.
    """
    size = max(64, WAVE // config.n) if isinstance(config.n, int) else 64
    if rows is None:
        return size
    count = sum(1 for _ in islice(rows, 2 * workers * size))
    return max(1, min(size, -(-count // (2 * workers))))


def _config(spec: Any) -> Config:
    if isinstance(spec, BestOfN):
        return Config.from_bon(spec)
    if isinstance(spec, Mapping):
        return Config.of(spec)
    return spec if isinstance(spec, Config) else Config.read(spec)


def _mapped(
    dataset: Dataset, worker: type, arguments: Mapping[str, Any], config: Config, workers: Workers, **batches: Any
) -> Dataset:
    from ray.data import ActorPoolStrategy

    return dataset.map_batches(
        worker,
        fn_constructor_kwargs=dict(arguments),
        batch_size=batches["batch_size"],
        batch_format=batches["format"],
        # Two at a time, so that an engine whose requests join a running batch never runs dry between blocks.
        compute=ActorPoolStrategy(
            size=workers.count, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_cpus=workers.cpus,
        num_gpus=_gpus_of(config, workers),
    )


def _gpus_of(config: Config, workers: Workers) -> float:
    """GPUs of a worker."""
    import ray

    from bon.models import Model, as_scorer
    from bon.spec import names_object

    if workers.gpus is not None:
        return workers.gpus
    if not ray.is_initialized() or not ray.cluster_resources().get("GPU"):
        return 0.0
    named = [config.policy] if config.policy is None or not names_object(config.policy) else []
    scorers = [] if config.scorer is None or names_object(config.scorer) else as_scorer(config.scorer).models
    models = [Model.of(model) for model in [*named, *(model for model in scorers if model is not None)]]
    return max((_split_over(model) for model in models if model.runs_on != "http"), default=0.0)


def _split_over(model: Any) -> float:
    return float(model.options.get("tensor_parallel_size", 1))


def _ray_data() -> Any:
    try:
        import ray.data
    except ImportError as error:
        raise MissingExtraError("Ray", "pip install 'bon[ray]'") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return ray.data


def _check_answers(address: str) -> None:
    """Find out at once whether anybody listens; Ray tries for minutes."""
    place = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = place.hostname, place.port
    except ValueError:
        host = port = None
    if address == "auto":
        return
    if host is None or port is None:
        raise InputError(f"{address!r} is no address of a Ray cluster. Write HOST:PORT, auto, or local.")
    try:
        with socket.create_connection((host, port), _ANSWERS_S) as there:
            if os.environ.get("RAY_USE_TLS", "0") in ("", "0"):
                there.sendall(_HELLO)
                if there.recv(4)[3:] != _SETTINGS:
                    raise OSError("what answers there is something else")
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error


def _unreachable(address: str, reason: str) -> InputError:
    return InputError(
        f"no Ray cluster answers at {address!r}: {reason.rstrip('.')}. Start one with: ray start --head, or write "
        "--ray local."
    )


def room(workers: Workers) -> int:
    """How many such workers the machines of the cluster that is connected have room for.

    Raises:
        InputError: none; Ray would wait for a machine for ever.
    """
    import ray

    wanted = {"CPU": workers.cpus, "GPU": workers.gpus or 0.0}
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, share in wanted.items():
        most = max((resources.get(name, 0.0) for resources in alive), default=0.0)
        if share > most:
            raise InputError(
                f"a worker is to have {share:g} {name}s, and no machine of the cluster has more than {most:g}. "
                f"Give --worker-{name.lower()}s less."
            )
    shares = [(name, share) for name, share in wanted.items() if share]
    fits = (
        min((resources.get(name, 0.0) // share for name, share in shares), default=workers.count) for resources in alive
    )
    return int(sum(fits))


def sendable(error: BonError) -> BonError:
    """An error that says the same, and that can be pickled whatever its constructor takes."""
    return InputError(str(error)) if isinstance(error, InputError) else EngineError(str(error))


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).strip().rstrip(".")
