"""Rows of ``bon run --all`` and ``bon rerank --all`` as the results that they were written from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bon.data.formats import read_file, shown
from bon.data.rows import FAILED, BadRow, Row, as_asked, read_rows, row_of
from bon.errors import InputError
from bon.selectors import Best, select
from bon.types import Candidate, Result, Score, Selection, Timing, Usage

_TEXT, _NUMBER, _COUNT = (str, "text"), (float, "a number"), (int, "a whole number")
_OF_CANDIDATES = {
    "finish_reason": _TEXT,
    "cumulative_logprob": _NUMBER,
    "completion_tokens": _COUNT,
    "error": _TEXT,
    "tool_calls": (list, "a list of objects"),
    "reasoning": _TEXT,
    "refusal": _TEXT,
}
_OF_SCORES = {
    "reason": _TEXT,
    "tie_break": _NUMBER,
    "spread": _NUMBER,
    "upper_bound": _NUMBER,
    "tokens": _COUNT,
    "same_as": _COUNT,
}


def run_row(line: int, fields: Mapping[str, Any], **options: Any) -> Row:
    """The row of a run's output: what it asked, whatever names its own fields had; see ``row_of``."""
    return replace(as_asked(line, fields, partial(row_of, **options)), fields=fields)


def read_results(source: str, **options: Any) -> Iterator[Result]:
    """The results of a file, one by one; ``options`` as for ``row_of``.

    Raises:
        InputError: it cannot be read, or a row of it is no result; the message names the line.
    """
    for row in read_rows(read_file(source), partial(run_row, **options)):
        try:
            if isinstance(row, BadRow):
                raise row.error
            yield result_of(row)
        except InputError as error:
            raise InputError(f"{source}:{row.line}: {error}") from error


def result_of(row: Row) -> Result:
    """The result that a row of a run with ``--all`` was written from, without its times and its tokens.

    Raises:
        InputError: the row has not all candidates and scores, or they do not fit together.
    """
    fields = row.fields
    given, scored = fields.get("candidates"), fields.get("scores")
    if fields.get("status") == FAILED:
        raise InputError(f"the run has no result for this row: {fields.get('reason')} --skip-bad leaves it out.")
    if not isinstance(given, Sequence) or not isinstance(scored, Sequence) or isinstance(given, str):
        raise InputError(
            "the row has no 'candidates' with 'scores': it was not written with --all. Type: bon run PROMPTS --all "
            "-o FILE, or bon rerank CANDIDATES --all -o FILE"
        )
    if len(given) != len(scored):
        raise InputError(f"the row has {len(given)} candidates and {len(scored)} scores.")
    candidates = tuple(_candidate(index, one) for index, one in enumerate(given))
    scores = tuple(_score(index, one) for index, one in enumerate(scored))
    best = fields.get("best")
    if best is not None and (isinstance(best, bool) or not isinstance(best, int) or not 0 <= best < len(candidates)):
        raise InputError(f"'best' must be the index of one of the {len(candidates)} candidates, not {shown(best)}.")
    ranking = select(Best(), scores, candidates).ranking
    picked = fields.get("picked")
    if not isinstance(picked, list) or not all(isinstance(each, int) and each in ranking for each in picked):
        picked = [] if best is None else [best]
    return Result(row.task, candidates, scores, Selection(best, ranking, tuple(picked)), Timing(0.0, 0.0, 0.0), Usage())


def _candidate(index: int, given: Any) -> Candidate:
    known = given if isinstance(given, Mapping) else {"text": given}
    if not isinstance(known.get("text"), str):
        raise InputError(f"candidate {index} must be text or an object with 'text', not {shown(given)}.")
    _check(f"candidate {index}", known, _OF_CANDIDATES)
    return Candidate(
        index,
        known["text"],
        known.get("finish_reason") or "stop",
        cumulative_logprob=known.get("cumulative_logprob"),
        completion_tokens=known.get("completion_tokens"),
        error=known.get("error"),
        tool_calls=tuple(known.get("tool_calls") or ()),
        reasoning=known.get("reasoning") or "",
        refusal=known.get("refusal") or "",
    )


def _score(index: int, given: Any) -> Score:
    if not isinstance(given, Mapping) or "reward" not in given:
        raise InputError(f"score {index} must be an object with 'reward', not {shown(given)}.")
    _check(f"score {index}", given, _OF_SCORES)
    reward = given["reward"]
    status: Any = given.get("status") or ("failed" if reward is None else "ok")
    try:
        return Score(
            reward,
            status,
            given.get("reason"),
            given.get("explanation"),
            tie_break=given.get("tie_break"),
            spread=given.get("spread"),
            upper_bound=given.get("upper_bound"),
            usage=Usage(scorer_completion_tokens=given.get("tokens") or 0),
            candidate=index,
            same_as=given.get("same_as"),
        )
    except InputError as error:
        raise InputError(f"score {index}: {error}") from error


def _check(where: str, given: Mapping[str, Any], known: Mapping[str, tuple[type, str]]) -> None:
    """Refuse fields that are something else than a run writes."""
    for name, (kind, called) in known.items():
        value = given.get(name)
        calls = value if kind is list and isinstance(value, list) else ()
        if value is None or (_is(value, kind) and all(isinstance(call, Mapping) for call in calls)):
            continue
        raise InputError(f"{where}: {name!r} must be {called}, not {shown(value)}.")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
