"""Results as a trace: when each candidate was sampled and scored, side by side.

The format is Chrome's trace event format (JSON), which chrome://tracing and https://ui.perfetto.dev open. Every prompt
is a process, every candidate a thread with two spans. Times are those of one prompt's run: prompts start at 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from bon.errors import InputError
from bon.types import Candidate, Result, Score

_SHORT = 200  # characters of a text that a trace shows


def trace(results: Iterable[Result]) -> dict[str, Any]:
    """Results as one trace, ready to be written as JSON.

    A candidate that was not sampled here has no sampling span; one whose score was not computed has no scoring span.
    """
    events = [event for position, result in enumerate(results) for event in _events(position, result)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(path: str | Path, results: Iterable[Result]) -> None:
    """Write results as a trace file.

    Raises:
        InputError: the file cannot be written.
    """
    content = orjson.dumps(trace(results))
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write the trace to {str(path)!r}: {error.strerror}.") from error


def _events(position: int, result: Result) -> Iterator[dict[str, Any]]:
    yield _name("process_name", position, 0, f"prompt {position}: {result.task.instruction[:60]}")
    for candidate, score in zip(result.candidates, result.scores, strict=True):
        thread = candidate.index + 1
        winner = " (best)" if candidate.index == result.best else ""
        yield _name("thread_name", position, thread, f"candidate {candidate.index}{winner}")
        yield {"ph": "M", "name": "thread_sort_index", "pid": position, "tid": thread, "args": {"sort_index": thread}}
        if candidate.finished > candidate.started:
            yield _span("sample", position, thread, candidate.started, candidate.finished, _about(candidate))
        if score.finished > score.started and score.same_as is None:
            yield _span(f"score: {score.status}", position, thread, score.started, score.finished, _found(score))


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _span(name: str, process: int, thread: int, start: float, end: float, about: dict[str, Any]) -> dict[str, Any]:
    """A complete event; times in microseconds."""
    category = name.partition(":")[0]
    times = {"ts": round(start * 1e6), "dur": max(1, round((end - start) * 1e6))}
    return {"ph": "X", "name": name, "cat": category, "pid": process, "tid": thread, **times, "args": about}


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
        inferred=None if score.inferred is None else score.inferred[:_SHORT],
        tokens=score.tokens,
        upper_bound=score.upper_bound,
        reason=score.reason,
    )


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
