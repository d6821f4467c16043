"""The decode loop: prompts in, completions out, each handed over the moment it ends.

One batch of rows runs in step. Rows that end, reach their limit or are aborted leave the batch, and rows of prompts
that wait take their places. How keys and values are kept is up to ``bon.engines.torch.rows``; which prompts run
together is decided here, by length and by budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bon.engines.base import Completion, Partial
from bon.engines.text.render import Renderer
from bon.engines.text.watch import KEEP_EVERY, Watch
from bon.engines.torch.rows import Joins, Rows
from bon.engines.torch.sampling import Uniforms, choose, row_key
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


class Waiting:
    """Jobs that have not begun, or not with all of their samples.

    Args:
        jobs: in the order in which they shall run.
        budget: tokens of keys and values that the jobs under way may need.
        cost: see ``Path.cost``.
    """

    def __init__(self, jobs: Sequence[Job], budget: int, cost: Callable[[int, int, int, int], int]) -> None:
        self._jobs, self._budget, self._cost = deque(jobs), budget, cost
        self.stops = any(job.stop for job in jobs)

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def take(self, going: Sequence[Job] = ()) -> list[Job]:
        """The next jobs that fit beside those under way: neighbours together, ``MAX_ROWS`` rows at most.

        A job begins with some of its samples only where nothing else runs: its prompt is read once more for the others.
        """
        prompts, rows = len(going), sum(len(job.samples) for job in going)
        longest = max((len(job.ids) for job in going), default=0)
        limit = max((job.limit for job in going), default=0)
        taken: list[Job] = []
        while self._jobs:
            job = self._jobs[0]
            longest, limit = max(longest, len(job.ids)), max(limit, job.limit)
            room = min(len(job.samples), MAX_ROWS - rows)
            while room > 1 and self._cost(prompts + 1, rows + room, longest, limit) > self._budget:
                room -= 1
            fits = room > 0 and self._cost(prompts + 1, rows + room, longest, limit) <= self._budget
            if rows and not (fits and room == len(job.samples)):
                break
            taken.append(replace(job, samples=job.samples[:room]))
            if room < len(job.samples):
                self._jobs[0] = replace(job, samples=job.samples[room:])
                break
            self._jobs.popleft()
            prompts, rows = prompts + 1, rows + room
        return taken


class Batch:
    """Decodes jobs in step; where rows have left, waiting jobs join if the rows can be joined.

    Args:
        fresh: makes rows for some jobs, nothing prefilled.
        waiting: the jobs; those that do not fit and cannot join are still there when the batch has run.
        renderer: decodes, and knows which tokens end a completion.
        drawing: how tokens are chosen; what differs from job to job is read from the jobs.
        keep: ``keep`` of ``Generates.generate``, for many completions at once.
        counted: requests whose prompt a completion has carried already; those of this batch are added.
    """

    def __init__(
        self,
        fresh: Callable[[Sequence[Job]], Rows],
        waiting: Waiting,
        renderer: Renderer,
        drawing: Drawing,
        keep: KeepAll | None,
        counted: set[int],
    ) -> None:
        self._fresh, self._waiting, self._renderer = fresh, waiting, renderer
        self._drawing, self._keep, self._counted = drawing, keep, counted
        self._ends = np.array(sorted(renderer.end_ids), dtype=np.int64)
        self._watch_every = 1 if waiting.stops else KEEP_EVERY if keep else 0
        self._steps = 0
        self._jobs = waiting.take()
        self._rows = fresh(self._jobs)
        self._job = self._sample = self._limit = self._lengths = self._drafted = np.zeros(0, dtype=np.int64)
        self._ids, self._logprobs = np.zeros((0, 32), dtype=np.int64), np.zeros((0, 32), dtype=np.float32)
        self._watches = np.zeros(0, dtype=object)
        self._uniforms = Uniforms(np.zeros((0, 2), dtype=np.uint64)) if drawing.temperature > 0 else None

    def run(self, emit: Emit) -> None:
        """Sample until every row has been handed to ``emit``."""
        logits = self._read(self._jobs, self._rows)
        full = len(logits)
        while True:
            uniforms = None
            if self._uniforms is not None:
                uniforms = torch.from_numpy(self._uniforms.next()).to(logits.device, torch.float32)
            tokens, logprobs = choose(logits, self._drawing, uniforms)
            done = self._append(tokens.cpu().numpy(), logprobs.cpu().numpy(), emit)
            if done.all():
                return
            if done.any():
                order = self._rows.select(~done)
                self._select(order)
                tokens = tokens[torch.from_numpy(order).to(tokens.device)]
            logits = self._rows.step(tokens)
            if self._waiting and len(logits) <= _REFILL * full and isinstance(self._rows, Joins):
                logits = self._join(self._rows, logits)
                full = max(full, len(logits))

    def _join(self, rows: Joins, logits: torch.Tensor) -> torch.Tensor:
        """Read waiting jobs and take their rows in; returns the logits with theirs behind."""
        left = np.bincount(self._job, minlength=len(self._jobs))
        going = [replace(job, samples=job.samples[: left[at]]) for at, job in enumerate(self._jobs) if left[at]]
        jobs = self._waiting.take(going)
        if not jobs:
            return logits
        others = self._fresh(jobs)
        more = self._read(jobs, others, len(self._jobs))
        self._jobs = [*self._jobs, *jobs]
        rows.join(others)
        return torch.cat([logits, more])

    def _read(self, jobs: Sequence[Job], rows: Rows, first: int = 0) -> torch.Tensor:
        """Prefill the jobs from ``first`` on; tokens of a draft that are the model's own choice are there at once."""
        prompts, copies = [job.ids for job in jobs], [len(job.samples) for job in jobs]
        logprobs: list[list[float]] = [[]] * len(jobs)
        if any(job.draft for job in jobs):
            logits, logprobs = rows.prefill_drafts(prompts, [job.draft for job in jobs])
        else:
            logits = rows.prefill(prompts, copies)
        at = len(self._job)
        self._job = np.append(self._job, np.repeat(np.arange(first, first + len(jobs)), copies))
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
        new = [Watch(self._renderer, j.index, s, j.stop, None) if self._watch_every else None for j, s in pairs]
        self._watches = np.append(self._watches, np.array(new, dtype=object))
        return logits

    def _reserve(self, columns: int) -> None:
        """Make room for more than ``columns`` tokens in each row."""
        while self._ids.shape[1] <= columns:
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)], 1)
            self._logprobs = np.concatenate([self._logprobs, np.empty_like(self._logprobs)], 1)

    def _append(self, tokens: Array, logprobs: Array, emit: Emit) -> Array:
        """Add one token to every row; emit the rows that end with it and say which."""
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
            return self._watch(ended, full, emit)
        for row in done.nonzero()[0]:
            self._finish(int(row), "stop" if ended[row] else "length", emit)
        return done

    def _watch(self, ended: Array, full: Array, emit: Emit) -> Array:
        """Look at the text of the rows for stop strings and ask ``keep``; emit the rows that are over, say which."""
        done: Array = ended | full
        every = self._steps % self._watch_every == 0
        for row in range(len(done)) if every else done.nonzero()[0]:
            watch: Watch = self._watches[row]
            verdict = watch.push(self._ids[row, watch.count : self._lengths[row] - ended[row]].tolist())
            if verdict is not None:
                self._finish(int(row), verdict[0], emit, verdict[1])
            elif done[row]:
                self._finish(int(row), "stop" if ended[row] else "length", emit)
            done[row] |= verdict is not None
        going = (~done).nonzero()[0]
        if self._keep is not None and self._steps % KEEP_EVERY == 0 and len(going):
            partials = [self._watches[row].partial for row in going]
            for row, partial, kept in zip(going, partials, self._keep(partials), strict=True):
                if not kept:
                    self._finish(int(row), "abort", emit, partial.text)
                    done[row] = True
        return done

    def _finish(self, row: int, reason: FinishReason, emit: Emit, text: str | None = None) -> None:
        ids = sampled = self._ids[row, : self._lengths[row]].tolist()
        logprobs: list[float] = self._logprobs[row, : self._lengths[row]].tolist()
        if text is None:
            if ids[-1] in self._renderer.end_ids:
                ids = ids[:-1]
            text = self._renderer.decode(ids)
        at = int(self._job[row])
        job = self._jobs[at]
        first = job.index not in self._counted
        self._counted.add(job.index)
        emit(
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
                cached_tokens=self._rows.cached[at] if first else 0,
                drafted_tokens=int(self._drafted[row]),
            )
        )

    def _select(self, order: Array) -> None:
        for name in ("_job", "_sample", "_limit", "_ids", "_logprobs", "_lengths", "_drafted", "_watches"):
            setattr(self, name, getattr(self, name)[order])
        if self._uniforms is not None:
            self._uniforms.select(order)
