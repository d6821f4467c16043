"""The decode loop: prompts in, completions out, each handed over the moment it ends.

One batch of rows runs in step. Rows that end, reach their limit or are aborted leave the batch. How keys and values are
kept is up to ``bon.engines.torch.rows``; which prompts run together is decided here, by length and by budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bon.engines.base import Completion, Partial
from bon.engines.text.render import Renderer
from bon.engines.text.watch import KEEP_EVERY, Watch
from bon.engines.torch.rows import Rows
from bon.engines.torch.sampling import Uniforms, choose, row_key
from bon.types import Drawing, FinishReason

MAX_ROWS = 256  # rows of one batch: bounds the logits; a row costs no less in a larger batch

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


def batches(jobs: Sequence[Job], budget: int, cost: Callable[[int, int, int, int], int]) -> Iterator[list[Job]]:
    """Split jobs into batches: neighbours together, at most ``budget`` tokens and ``MAX_ROWS`` rows each.

    Args:
        jobs: in the order in which they shall run.
        budget: tokens of keys and values that one batch may need.
        cost: see ``Path.cost``.
    """
    batch: list[Job] = []

    def spent(job: Job, copies: int) -> int:
        """Cost of the batch with so many samples of one more job."""
        return cost(
            len(batch) + 1,
            sum(len(j.samples) for j in batch) + copies,
            max(len(j.ids) for j in (*batch, job)),
            max(j.limit for j in (*batch, job)),
        )

    for job in jobs:
        waiting = job.samples
        while waiting:
            room = min(len(waiting), MAX_ROWS - sum(len(j.samples) for j in batch))
            while room > 1 and spent(job, room) > budget:
                room -= 1
            fits = room > 0 and (not batch or spent(job, room) <= budget)
            if fits and (room == len(waiting) or not batch):
                batch.append(replace(job, samples=waiting[:room]))
                waiting = waiting[room:]
            if waiting:  # rather a new batch than a prompt that is read twice
                yield batch
                batch = []
    if batch:
        yield batch


class Batch:
    """Decodes one batch of jobs to the end.

    Args:
        rows: fresh rows, nothing prefilled.
        jobs: the prompts and samples of this batch.
        renderer: decodes, and knows which tokens end a completion.
        drawing: how tokens are chosen; what differs from job to job is read from the jobs.
        keep: ``keep`` of ``Generates.generate``, for many completions at once.
        counted: requests whose prompt a completion has carried already; those of this batch are added.
    """

    def __init__(
        self,
        rows: Rows,
        jobs: Sequence[Job],
        renderer: Renderer,
        drawing: Drawing,
        keep: KeepAll | None,
        counted: set[int],
    ) -> None:
        self._rows, self._jobs, self._renderer = rows, jobs, renderer
        self._drawing, self._keep, self._counted = drawing, keep, counted
        self._job = np.repeat(np.arange(len(jobs)), [len(j.samples) for j in jobs])
        self._sample = np.concatenate([np.arange(j.samples.start, j.samples.stop) for j in jobs])
        self._limit = np.array([j.limit for j in jobs])[self._job]
        self._ends = np.array(sorted(renderer.end_ids), dtype=np.int64)
        self._ids = np.empty((len(self._job), 32), dtype=np.int64)
        self._logprobs = np.empty((len(self._job), 32), dtype=np.float32)
        self._lengths = np.zeros(len(self._job), dtype=np.int64)
        self._drafted = np.zeros(len(self._job), dtype=np.int64)
        self._steps = 0
        pairs = [(jobs[int(j)], int(s)) for j, s in zip(self._job, self._sample, strict=True)]
        self._uniforms: Uniforms | None = None
        if drawing.temperature > 0:
            self._uniforms = Uniforms(np.stack([row_key(job.seed, job.ids, s) for job, s in pairs]))
        stops = any(job.stop for job in jobs)
        self._watch_every = 1 if stops else KEEP_EVERY if keep else 0
        watches = [Watch(renderer, job.index, s, job.stop, None) if stops or keep else None for job, s in pairs]
        self._watches = np.array(watches, dtype=object)

    def run(self, emit: Emit) -> None:
        """Sample until every row has been handed to ``emit``."""
        logits = self._read()
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

    def _read(self) -> torch.Tensor:
        """Prefill; tokens of a draft that are the model's own choice are there at once."""
        prompts = [j.ids for j in self._jobs]
        if not any(j.draft for j in self._jobs):
            return self._rows.prefill(prompts, [len(j.samples) for j in self._jobs])
        logits, logprobs = self._rows.prefill_drafts(prompts, [j.draft for j in self._jobs])
        self._lengths = self._drafted = np.array([len(row) for row in logprobs])
        self._reserve(int(self._lengths.max()))
        for row, (job, values) in enumerate(zip(self._jobs, logprobs, strict=True)):
            self._ids[row, : len(values)] = job.draft[: len(values)]
            self._logprobs[row, : len(values)] = values
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
