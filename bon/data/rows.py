"""JSON Lines in, JSON Lines out: rows stream through best-of-N, and a finished row is a whole line on disk.

Rows are read lazily. Results come as they finish, which need not be the order of the input; ``id`` (or ``line``, where
a row has no id) says which row it was. Nothing here prints, and nothing decides whether a bad row ends the run.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from bon.best_of_n import BestOfN
from bon.errors import BonError, InputError
from bon.pipeline import in_order, rank
from bon.scorers.base import Scorer
from bon.selectors import Selector
from bon.task import Message, Task, as_messages
from bon.types import Result

Key = tuple[str, str | int]
"""("id", its value) or ("line", its number): what identifies a row when a run is resumed."""


_READ = frozenset({"prompt", "messages", "instruction", "reference", "candidates"})
"""Fields that mean something here; the others are a task's metadata."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the input.

    Args:
        line: its number, from 1.
        fields: everything the line holds.
        task: what is asked.
        candidates: the texts to rank, where the line brings them.
    """

    line: int
    fields: Mapping[str, Any]
    task: Task
    candidates: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """What identifies the row when a run is resumed."""
        return _key(self.fields, self.line)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that cannot be used, and why."""

    line: int
    error: BonError


def read_rows(lines: Iterable[bytes], *, system: str | None = None, ranked: bool = False) -> Iterator[Row | BadRow]:
    """Read rows one by one; blank lines are skipped.

    Args:
        lines: raw lines, in UTF-8.
        system: a system message for rows that have none of their own.
        ranked: whether every row must bring ``candidates``.
    """
    for number, raw in enumerate(lines, 1):
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not line.strip():
            continue
        try:
            yield _row(number, line, system, ranked)
        except InputError as error:
            yield BadRow(number, error)


def _row(number: int, line: bytes, system: str | None, ranked: bool) -> Row:
    fields = parse_object(line)
    _key(fields, number)
    messages = _messages(fields)
    if system is not None and messages[0].role not in ("system", "developer"):
        messages = (Message("system", system), *messages)
    instruction = fields.get("instruction")
    if instruction is not None and not isinstance(instruction, str):
        raise InputError(f"'instruction' must be text, not {_shown(instruction)}.")
    metadata = {name: value for name, value in fields.items() if name not in _READ}
    task = replace(Task.of(messages, instruction), reference=_reference(fields), metadata=metadata)
    return Row(number, fields, task, _candidates(fields) if ranked else ())


def _reference(fields: Mapping[str, Any]) -> str | None:
    reference = fields.get("reference")
    if isinstance(reference, bool | list | dict):
        raise InputError(f"'reference' must be text or a number, not {_shown(reference)}. Name the field otherwise.")
    return None if reference is None else str(reference)


def parse_object(line: bytes) -> dict[str, Any]:
    """Read one line of JSON Lines.

    Raises:
        InputError: not UTF-8, not JSON, or not an object.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not UTF-8. Save the file as UTF-8."
        ) from error
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InputError(
            f"not valid JSON: {error.msg} at column {error.colno}. Each line must be one object."
        ) from error
    except RecursionError as error:
        raise InputError("not usable JSON: it is nested too deeply.") from error
    except UnicodeEncodeError as error:
        raise InputError(f"not usable JSON: it holds half a surrogate pair ({error.object[error.start]!a}).") from error
    except ValueError as error:
        raise InputError(f"not usable JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"a row must be a JSON object with 'prompt' or 'messages', not {_shown(value)}.")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is not None and messages is not None:
        raise InputError("the row has both 'prompt' and 'messages'. Keep one of them.")
    if messages is not None:
        if not isinstance(messages, list):
            raise InputError(f"'messages' must be a list of objects with 'role' and 'content', not {_shown(messages)}.")
        return as_messages(messages)
    if prompt is None:
        names = ", ".join(repr(name) for name in list(fields)[:8]) or "none"
        raise InputError(f"the row has neither 'prompt' nor 'messages'. Its fields: {names}.")
    if not isinstance(prompt, str):
        raise InputError(f"'prompt' must be text, not {_shown(prompt)}. A conversation belongs in 'messages'.")
    return as_messages(prompt)


def _candidates(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Texts, or the candidates of an earlier run (objects with ``text``)."""
    candidates = fields.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise InputError(f"'candidates' must be a list of at least one text, not {_shown(candidates)}.")
    texts = [c["text"] if isinstance(c, dict) and "text" in c else c for c in candidates]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"candidate {index} must be text, not {_shown(text)}.")
    return tuple(texts)


def _key(fields: Mapping[str, Any], line: int) -> Key:
    identity = fields.get("id")
    if identity is None:
        return ("line", line)
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise InputError(f"'id' must be text or a whole number, not {_shown(identity)}.")
    return ("id", identity)


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"


Outcomes = AsyncGenerator[tuple[Row, Result | BonError], None]


def run_rows(bon: BestOfN, rows: Iterable[Row]) -> Outcomes:
    """Sample and score every row; yield (row, result or error) as they finish."""
    return _with_rows(rows, lambda rows: bon.stream(row.task for row in rows))


def rank_rows(scorer: Scorer, selector: Selector, rows: Iterable[Row], *, prune: bool = True) -> Outcomes:
    """Score the candidates that every row brings; yield (row, result or error), in order."""
    return _with_rows(
        rows, lambda rows: in_order(rank(scorer, ((row.task, row.candidates) for row in rows), selector, prune=prune))
    )


async def _with_rows(
    rows: Iterable[Row], stream: Callable[[Iterator[Row]], AsyncGenerator[tuple[int, Result | BonError], None]]
) -> Outcomes:
    taken: dict[int, Row] = {}

    def noted() -> Iterator[Row]:
        for position, row in enumerate(rows):
            taken[position] = row
            yield row

    async with aclosing(stream(noted())) as outcomes:
        async for position, outcome in outcomes:
            yield taken.pop(position), outcome


def output_row(row: Row, result: Result, *, everything: bool = False, several: bool = False) -> dict[str, Any]:
    """The row as it is written: its own fields, then the result's.

    Where the row already has a field of that name with another value, the old value goes to ``replaced``, so that the
    output of one run can be the input of the next without a loss.

    Args:
        row: what came in.
        result: what came out.
        everything: write all candidates and scores and not just the winner (and, where the row brought candidates,
            their rewards and their indices, best first).
        several: list what the selector picked, best first: for one that may pick more than the winner.
    """
    own = result.to_dict()
    if not everything:
        winner = None if result.best is None else result.scores[result.best]
        own = {name: own[name] for name in ("text", "reward", "best", "reason")}
        own |= {"status": winner and winner.status, "inferred": winner and winner.explanation}
        if row.candidates:
            own |= {"ranking": list(result.selection.ranking), "rewards": [score.reward for score in result.scores]}
        if several:
            own["picked"] = [{"text": c.text, "reward": result.scores[c.index].reward} for c in result.picked]
    elif row.candidates:
        del own["candidates"]  # the row has them
    if row.key[0] == "line":
        own["line"] = row.line
    replaced = {name: old for name, old in row.fields.items() if name in own and old != own[name]}
    if replaced and "replaced" in row.fields:
        replaced["replaced"] = row.fields["replaced"]
    return {**row.fields, **own, **({"replaced": replaced} if replaced else {})}
