"""The decode loop: prompts in, completions out, each handed over the moment it ends.

One batch of rows runs in step. Rows that end, reach their limit or are aborted leave the batch, and rows of prompts
that wait take their places, be they of the same call or of another. How keys and values are kept is up to
``bon.engines.torch.rows``; which prompts run together is decided here, by length and by budget.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from bon.engines.base import Completion, Partial
from bon.engines.text.render import Renderer
from bon.engines.text.watch import KEEP_EVERY, Watch
from bon.engines.torch.rows import Joins, Rows
from bon.engines.torch.sampling import Uniforms, choose, row_key
from bon.engines.torch.worker import StoppedError
from bon.types import Drawing, FinishReason

MAX_ROWS = 256  # rows of one batch: bounds the logits; a row costs no less in a larger batch
_REFILL = 0.75  # of its rows a batch still has when others join: for each that ends, a prefill would cost a step

Emit = Callable[[Completion], None]
KeepAll = Callable[[Sequence[Partial]], Sequence[bool]]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt and the samples wanted of it.

    Args:
        index: position of its request in the call.
        ids: token ids of the prompt.
        samples: sample indices.
        limit: tokens that a completion may have.
        seed: of its random numbers, together with the prompt and the sample index.
        stop: strings at which a completion ends.
        draft: a guess at the completion, shorter than ``limit``; for a single greedy sample only.
    """

    index: int
    ids: tuple[int, ...]
    samples: range
    limit: int
    seed: int = 0
    stop: tuple[str, ...] = ()
    draft: tuple[int, ...] = ()


@dataclass(eq=False)
class Source:
    """What one call wants sampled.

    Args:
        jobs: those that have not begun, or not with all of their samples, in the order in which they shall run.
        fresh: makes rows for some of them, nothing prefilled.
        cost: see ``Path.cost``.
        emit: takes each completion the moment it ends.
        keep: ``keep`` of ``Generates.generate``, for many completions at once; raises StoppedError where it failed.
        stopped: whether nobody wants the rest any more.
        end: called when nothing is left to sample.
        fail: called with what ended the sampling.
        counted: requests whose prompt a completion has carried already.
    """

    jobs: deque[Job]
    fresh: Callable[[Sequence[Job]], Rows]
    cost: Callable[[int, int, int, int], int]
    emit: Emit
    keep: KeepAll | None = None
    stopped: Callable[[], bool] = lambda: False
    end: Callable[[], object] = lambda: None
    fail: Callable[[BaseException], object] = lambda error: None
    counted: set[int] = field(default_factory=set)

    def needs(self, going: Sequence[Job], more: Sequence[Job] = ()) -> int:
        """Tokens of keys and values that jobs under way take, and more of them."""
        jobs = [*going, *more]
        rows = sum(len(job.samples) for job in jobs)
        return self.cost(len(jobs), rows, max(len(j.ids) for j in jobs), max(j.limit for j in jobs)) if jobs else 0

    def take(self, going: Sequence[Job], rows: int, budget: int) -> list[Job]:
        """The next jobs that fit beside those under way: neighbours together.

        A job begins with some of its samples only where nothing else runs: its prompt is read once more for the others.

        Args:
            going: jobs of this source that are under way, with as many samples as are left.
            rows: under way, of all sources; with those taken, they are ``MAX_ROWS`` at most.
            budget: tokens of keys and values that this source's jobs may need.
        """
        taken: list[Job] = []
        while self.jobs:
            job = self.jobs[0]
            room = min(len(job.samples), MAX_ROWS - rows)
            while room > 0 and self.needs(going, [*taken, replace(job, samples=job.samples[:room])]) > budget:
                room -= 1
            if rows and room < len(job.samples):
                break
            room = max(room, 1)
            taken.append(replace(job, samples=job.samples[:room]))
            rows += room
            if room < len(job.samples):
                self.jobs[0] = replace(job, samples=job.samples[room:])
                break
            self.jobs.popleft()
        return taken


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A job under way.

    Args:
        job: with the samples that began.
        source: whose it is.
        cached: tokens of its prompt that were not computed for it.
    """

    job: Job
    source: Source
    cached: int


class Batch:
    """Decodes in step; where there is room, rows of jobs that wait join those under way, if they can be joined.

    Args:
        sources: what is sampled. Those that join are added, and those of which nothing is left go. Where rows cannot
            be joined, jobs may be left when the batch has run.
        budget: tokens of keys and values that the jobs under way may need.
        renderer: decodes, and knows which tokens end a completion.
        drawing: how tokens are chosen; what differs from job to job is read from the jobs.
        joining: finds another source that may join; None where none may.
    """

    def __init__(
        self,
        sources: list[Source],
        budget: int,
        renderer: Renderer,
        drawing: Drawing,
        joining: Callable[[], Source | None] | None = None,
    ) -> None:
        self._sources, self._budget, self._renderer = sources, budget, renderer
        self._drawing, self._joining = drawing, joining
        self._ends = np.array(sorted(renderer.end_ids), dtype=np.int64)
        self._watch_every = self._steps = 0
        self._full: float = math.inf  # rows that there was room for, where jobs had to wait
        self._rows: Rows | None = None
        self._entries = self._watches = np.zeros(0, dtype=object)
        self._sample = self._limit = self._lengths = self._drafted = np.zeros(0, dtype=np.int64)
        self._ids, self._logprobs = np.zeros((0, 32), dtype=np.int64), np.zeros((0, 32), dtype=np.float32)
        self._uniforms = Uniforms(np.zeros((0, 2), dtype=np.uint64)) if drawing.temperature > 0 else None

    def run(self) -> None:
        """Sample until every row has been handed over."""
        logits = self._enter([])
        while self._rows is not None and len(self._entries):
            uniforms = None
            if self._uniforms is not None:
                uniforms = torch.from_numpy(self._uniforms.next()).to(logits.device, torch.float32)
            tokens, logprobs = choose(logits, self._drawing, uniforms)
            done = self._append(tokens.cpu().numpy(), logprobs.cpu().numpy())
            if done.any():
                order = self._rows.select(~done)
                self._select(order)
                tokens = tokens[torch.from_numpy(order).to(tokens.device)]
                self._end()
            logits = self._rows.step(tokens) if len(tokens) else logits[:0]
            if isinstance(self._rows, Joins):
                logits = self._enter([logits])

    def _enter(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """Read jobs that wait where there is room; returns the logits with those of their rows behind."""
        if any(source.jobs for source in self._sources) and len(self._entries) <= _REFILL * self._full:
            for source in self._sources:
                logits += self._begin(source)
            self._full = len(self._entries) if any(source.jobs for source in self._sources) else math.inf
        while self._joining and self._full == math.inf and len(self._entries) < MAX_ROWS:
            if (another := self._joining()) is None:
                break
            self._sources.append(another)
            logits += self._begin(another)
            self._full = len(self._entries) if another.jobs else math.inf
        return torch.cat(logits) if len(logits) > 1 else logits[0]  # which are large, and copied only where they must

    def _begin(self, source: Source) -> list[torch.Tensor]:
        """Read the next jobs of a source that fit; returns their rows' logits."""
        left = Counter(self._entries.tolist())
        going: dict[Source, list[Job]] = {each: [] for each in self._sources}
        for entry, count in left.items():
            going[entry.source].append(replace(entry.job, samples=entry.job.samples[:count]))
        spent = sum(each.needs(jobs) for each, jobs in going.items() if each is not source)
        jobs = source.take(going[source], len(self._entries), self._budget - spent)
        if not jobs:
            return []
        others = source.fresh(jobs)
        logits = self._read(source, jobs, others)
        if len(left):
            assert isinstance(self._rows, Joins)
            self._rows.join(others)
        else:
            self._rows = others
        return [logits]

    def _end(self) -> None:
        """Let sources go of which nothing is left."""
        going = {entry.source for entry in self._entries.tolist()}
        for source in [source for source in self._sources if not source.jobs and source not in going]:
            self._sources.remove(source)
            source.end()

    def _read(self, source: Source, jobs: Sequence[Job], rows: Rows) -> torch.Tensor:
        """Prefill jobs; tokens of a draft that are the model's own choice are there at once."""
        prompts, copies = [job.ids for job in jobs], [len(job.samples) for job in jobs]
        logprobs: list[list[float]] = [[]] * len(jobs)
        if any(job.draft for job in jobs):
            logits, logprobs = rows.prefill_drafts(prompts, [job.draft for job in jobs])
        else:
            logits = rows.prefill(prompts, copies)
        at = len(self._entries)
        entries = [Entry(job, source, cached) for job, cached in zip(jobs, rows.cached, strict=True)]
        self._entries = np.append(self._entries, np.repeat(np.array(entries, dtype=object), copies))
        self._sample = np.append(self._sample, [s for job in jobs for s in job.samples])
        self._limit = np.append(self._limit, np.repeat([job.limit for job in jobs], copies))
        drafted = np.repeat([len(row) for row in logprobs], copies)
        self._lengths, self._drafted = np.append(self._lengths, drafted), np.append(self._drafted, drafted)
        self._ids, self._logprobs = (
            np.concatenate([table, np.zeros((sum(copies), table.shape[1]), table.dtype)])
            for table in (self._ids, self._logprobs)
        )
        self._reserve(int(self._lengths.max()))
        for row, (job, values) in enumerate(zip(jobs, logprobs, strict=True) if drafted.any() else (), at):
            self._ids[row, : len(values)] = job.draft[: len(values)]
            self._logprobs[row, : len(values)] = values
        pairs = [(job, sample) for job in jobs for sample in job.samples]
        if self._uniforms is not None:
            self._uniforms.join(Uniforms(np.stack([row_key(job.seed, job.ids, sample) for job, sample in pairs])))
        every = 1 if any(job.stop for job in jobs) else KEEP_EVERY if source.keep else 0
        self._watch_every = min(self._watch_every or every, every or self._watch_every)
        new = [Watch(self._renderer, job.index, s, job.stop, None) if every else None for job, s in pairs]
        self._watches = np.append(self._watches, np.array(new, dtype=object))
        return logits

    def _reserve(self, columns: int) -> None:
        """Make room for more than ``columns`` tokens in each row."""
        while self._ids.shape[1] <= columns:
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)], 1)
            self._logprobs = np.concatenate([self._logprobs, np.empty_like(self._logprobs)], 1)

    def _append(self, tokens: Array, logprobs: Array) -> Array:
        """Add one token to every row; emit the rows that end with it. Returns which leave."""
        self._reserve(int(self._lengths.max()))
        rows = np.arange(len(tokens))
        self._ids[rows, self._lengths] = tokens
        self._logprobs[rows, self._lengths] = logprobs
        self._lengths = self._lengths + 1
        self._steps += 1
        ended: Array = (tokens[:, None] == self._ends).any(1)
        full = self._lengths >= self._limit
        done = ended | full
        if self._watch_every and (self._steps % self._watch_every == 0 or done.any()):
            self._watch(ended, done)
        else:
            for row in done.nonzero()[0]:
                self._finish(int(row), "stop" if ended[row] else "length")
        for source in self._sources:
            if source.stopped():
                source.jobs.clear()
                done |= self._of(source)
        return done

    def _of(self, source: Source) -> Array:
        """Which rows are of a source."""
        return np.array([entry.source is source for entry in self._entries.tolist()], dtype=bool)

    def _watch(self, ended: Array, done: Array) -> None:
        """Look at the text of the rows for stop strings and ask ``keep``; emit the rows that are over and mark them."""
        every = self._steps % self._watch_every == 0
        for row in range(len(done)) if every else done.nonzero()[0]:
            watch: Watch | None = self._watches[row]
            verdict = None
            if watch is not None:
                verdict = watch.push(self._ids[row, watch.count : self._lengths[row] - ended[row]].tolist())
            if verdict is not None:
                self._finish(int(row), verdict[0], verdict[1])
            elif done[row]:
                self._finish(int(row), "stop" if ended[row] else "length")
            done[row] |= verdict is not None
        for source in self._sources if self._steps % KEEP_EVERY == 0 else ():
            going = (~done & self._of(source)).nonzero()[0]
            if source.keep is None or not len(going):
                continue
            partials = [self._watches[row].partial for row in going]
            with contextlib.suppress(StoppedError):  # then the source is stopped
                for row, partial, kept in zip(going, partials, source.keep(partials), strict=True):
                    if not kept:
                        self._finish(int(row), "abort", partial.text)
                        done[row] = True

    def _finish(self, row: int, reason: FinishReason, text: str | None = None) -> None:
        ids = sampled = self._ids[row, : self._lengths[row]].tolist()
        logprobs: list[float] = self._logprobs[row, : self._lengths[row]].tolist()
        if text is None:
            if ids[-1] in self._renderer.end_ids:
                ids = ids[:-1]
            text = self._renderer.decode(ids)
        entry: Entry = self._entries[row]
        job, source = entry.job, entry.source
        first = job.index not in source.counted
        source.counted.add(job.index)
        source.emit(
            Completion(
                job.index,
                int(self._sample[row]),
                text,
                reason,
                tokens=self._renderer.as_tokens(ids, text),
                cumulative_logprob=float(np.sum(logprobs, dtype=np.float64)),
                logprobs=tuple(logprobs),
                pieces=self._renderer.pieces(sampled),
                prompt_tokens=len(job.ids) if first else 0,
                completion_tokens=len(logprobs),
                cached_tokens=entry.cached if first else 0,
                drafted_tokens=int(self._drafted[row]),
            )
        )

    def _select(self, order: Array) -> None:
        for name in ("_entries", "_sample", "_limit", "_ids", "_logprobs", "_lengths", "_drafted", "_watches"):
            setattr(self, name, getattr(self, name)[order])
        if self._uniforms is not None:
            self._uniforms.select(order)
