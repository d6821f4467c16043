"""Results as a trace: when each candidate was sampled and scored, side by side.

The format is the list form of Chrome's trace event format, which https://ui.perfetto.dev and chrome://tracing open,
even where the end of the file is missing. Every prompt is a process; its first thread is the whole run, and every
candidate has a thread with two spans. A sampling span begins when the sample was asked for: waiting is part of it.
All prompts are on one clock, which starts when the file is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from time import time
from typing import Any, BinaryIO

from bon.data.sink import check_replaceable, to_json
from bon.errors import InputError
from bon.types import Candidate, Result, Score

_SHORT = 200  # characters of a text that a trace shows


class Trace:
    """A trace file that grows with every result. A trace that is there is overwritten.

    Args:
        path: where to write.

    Raises:
        InputError: the file cannot be written, or is there and is no trace of bon's.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        try:
            check_replaceable(path, "trace", b"[]\n", b'[\n{"ph":"M","name":"process_name"')
            self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise InputError(f"cannot write the trace to {str(path)!r}: {error.strerror}.") from error
        self._opened = time()
        self._results = 0

    def add(self, result: Result, number: int | None = None) -> None:
        """Write the spans of a result that was made after the file was opened.

        A candidate that was not sampled here has no sampling span; one whose score was not computed no scoring span.

        Args:
            result: what to show.
            number: what to call its prompt, by default its place among the results; no two may be the same.
        """
        events = _events(self._results if number is None else number, result, result.timing.started - self._opened)
        for position, event in enumerate(events):
            self._file.write((b",\n" if self._results or position else b"[\n") + to_json(event))
        self._file.flush()
        self._results += 1

    def close(self) -> None:
        """End the file."""
        if not self._file.closed:
            self._file.write(b"\n]\n" if self._results else b"[]\n")
            self._file.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _events(number: int, result: Result, started: float) -> Iterator[dict[str, Any]]:
    yield _name("process_name", number, 0, f"prompt {number}: {result.task.instruction[:60]}")
    yield _name("thread_name", number, 0, f"best of {len(result.candidates)}")
    yield _span("run", number, 0, started, (0.0, result.timing.total), _summary(result))
    for candidate, score in zip(result.candidates, result.scores, strict=True):
        thread = candidate.index + 1
        winner = " (best)" if candidate.index == result.best else ""
        yield _name("thread_name", number, thread, f"candidate {candidate.index}{winner}")
        yield {"ph": "M", "name": "thread_sort_index", "pid": number, "tid": thread, "args": {"sort_index": thread}}
        if candidate.finished > candidate.started:
            name, times = f"sample: {candidate.finish_reason}", (candidate.started, candidate.finished)
            yield _span(name, number, thread, started, times, _about(candidate))
        if score.finished > score.started and score.same_as is None:
            name, times = f"score: {score.status}", (score.started, score.finished)
            yield _span(name, number, thread, started, times, _found(score))


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _span(
    name: str, process: int, thread: int, offset: float, times: tuple[float, float], about: dict[str, Any]
) -> dict[str, Any]:
    """A complete event; times in microseconds."""
    start, end = times
    where = {"cat": name.partition(":")[0], "pid": process, "tid": thread}
    return {
        "ph": "X",
        "name": name,
        **where,
        "ts": round((offset + start) * 1e6),
        "dur": max(1, round((end - start) * 1e6)),
        "args": about,
    }


def _summary(result: Result) -> dict[str, Any]:
    return _known(
        best=result.best,
        reward=result.reward,
        overlap_seconds=result.timing.overlap,
        usage=asdict(result.usage),
        saved=asdict(result.saved),
    )


def _about(candidate: Candidate) -> dict[str, Any]:
    return _known(
        text=candidate.text[:_SHORT],
        finish_reason=candidate.finish_reason,
        tokens=candidate.completion_tokens,
        error=candidate.error,
    )


def _found(score: Score) -> dict[str, Any]:
    return _known(
        reward=score.reward,
        status=score.status,
        explanation=None if score.explanation is None else score.explanation[:_SHORT],
        tokens=score.tokens,
        upper_bound=score.upper_bound,
        reason=score.reason,
    )


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
