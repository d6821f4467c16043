"""JSON Lines in, JSON Lines out: rows stream through best-of-N, and a finished row is a whole line on disk.

Rows are read lazily and written as they finish, which is not the order of the input; ``id`` (or ``line``, where a row
has no id) says which row it was. Nothing here prints, and nothing decides whether a bad row ends the run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from bon.best_of_n import BestOfN
from bon.errors import BonError, InputError, PromptTooLongError
from bon.types import Message, Result, Task, as_messages

Key = tuple[str, str | int]
"""("id", its value) or ("line", its number): what identifies a row when a run is resumed."""


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
    fields = _object(line)
    _key(fields, number)
    messages = _messages(fields)
    if system is not None and messages[0].role not in ("system", "developer"):
        messages = (Message("system", system), *messages)
    instruction = fields.get("instruction")
    if instruction is not None and not isinstance(instruction, str):
        raise InputError(f"'instruction' must be text, not {_shown(instruction)}.")
    task = Task.of(messages, instruction)
    return Row(number, fields, task, _candidates(fields) if ranked else ())


def _object(line: bytes) -> dict[str, Any]:
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


async def run_rows(bon: BestOfN, rows: Iterable[Row]) -> AsyncIterator[tuple[Row, Result | BonError]]:
    """Sample and score every row; yield (row, result or error) as they finish."""
    waiting: dict[int, Row] = {}

    def tasks() -> Iterator[Task]:
        for position, row in enumerate(rows):
            waiting[position] = row
            yield row.task

    async with aclosing(bon.stream(tasks())) as outcomes:  # type: ignore[type-var]
        async for position, outcome in outcomes:
            row = waiting.pop(position)
            if isinstance(outcome, PromptTooLongError) and len(outcome.indices) > 1:
                outcome = await _alone(bon, row)  # the shared error counts the tokens of the first such prompt only
            yield row, outcome


async def _alone(bon: BestOfN, row: Row) -> Result | BonError:
    try:
        return await bon.run(row.task)
    except BonError as error:
        return error


async def rank_rows(bon: BestOfN, rows: Iterable[Row]) -> AsyncIterator[tuple[Row, Result | BonError]]:
    """Score the candidates that every row brings; yield (row, result or error), in order."""
    for row in rows:
        try:
            yield row, await bon.run_rerank(row.task, row.candidates)
        except BonError as error:
            yield row, error


def output_row(row: Row, result: Result, *, everything: bool = False) -> dict[str, Any]:
    """The row as it is written: its own fields, then the result's.

    Where the row already has a field of that name with another value, the old value goes to ``replaced``, so that the
    output of one run can be the input of the next without a loss.

    Args:
        row: what came in.
        result: what came out.
        everything: write all candidates and scores and not just the winner.
    """
    own = result.to_dict()
    if not everything:
        winner = None if result.best is None else result.scores[result.best]
        own = {name: own[name] for name in ("text", "reward", "best", "reason")}
        own |= {"status": winner and winner.status, "inferred": winner and winner.inferred}
    elif row.candidates:
        del own["candidates"]  # the row has them
    if row.key[0] == "line":
        own["line"] = row.line
    replaced = {name: old for name, old in row.fields.items() if name in own and old != own[name]}
    if replaced and "replaced" in row.fields:
        replaced["replaced"] = row.fields["replaced"]
    return {**row.fields, **own, **({"replaced": replaced} if replaced else {})}


def to_json(value: Any) -> bytes:
    """JSON in UTF-8, on one line; what orjson cannot write (lone surrogates, very long integers) json escapes."""
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError:
        return json.dumps(value).encode()


@dataclass(slots=True)
class Output:
    """Where rows go: a file that is appended to one whole line at a time, or standard output.

    Args:
        name: for messages.
        done: keys of the rows that were there before.
        repaired: bytes of a torn last line that were cut off.
        written: rows written so far.
    """

    name: str
    file: BinaryIO
    done: set[Key] = field(default_factory=set)
    repaired: int = 0
    written: int = 0
    _path: Path | None = None
    _fresh: bool = False
    _truncate: bool = False

    @classmethod
    def open(cls, path: Path | None, *, resume: bool = False, overwrite: bool = False) -> Output:
        """Open the output and find out whether it can be written, before any work is done.

        Args:
            path: a file, or None for standard output.
            resume: go on with what an interrupted run left; a torn last line is cut off.
            overwrite: begin anew; what is there stays until ``start``.

        Raises:
            InputError: the file exists already, cannot be written, or holds what no run wrote.
        """
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other.")
        if path is None:
            if resume or overwrite:
                raise InputError(f"--{'resume' if resume else 'overwrite'} needs an output file: give -o FILE.")
            return cls("standard output", sys.stdout.buffer)
        fresh = not path.exists()
        regular = fresh or path.is_file()
        if not fresh and regular and path.stat().st_size and not (resume or overwrite):
            raise InputError(
                f"{path} exists already. Add --resume to append the rows that are missing, "
                "--overwrite to begin anew, or choose another -o."
            )
        try:
            file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise InputError(f"cannot write to {path}: {error.strerror}. Choose another -o.") from error
        output = cls(str(path), file, _path=path, _fresh=fresh, _truncate=overwrite and regular)
        if resume and regular:
            try:
                output._take_stock(path)
            except BaseException:
                output.close()
                raise
        return output

    def _take_stock(self, path: Path) -> None:
        """Find the rows that are done; end or cut off a last line that was torn."""
        whole, line = 0, b"\n"
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    fields = _object(line)
                    identity = fields.get("id", fields.get("line"))
                    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
                        raise InputError("the row has neither 'id' nor 'line'")
                except InputError as error:
                    if not line.endswith(b"\n"):
                        os.truncate(path, whole)
                        self.repaired = len(line)
                        return
                    raise InputError(f"{path}:{number}: cannot resume: {error}") from error
                self.done.add(("id", identity) if "id" in fields and fields["id"] is not None else ("line", identity))
                whole += len(line)
        if not line.endswith(b"\n"):
            self.file.write(b"\n")

    def start(self) -> None:
        """Drop what an overwritten file held, now that the run is certain to begin."""
        if self._truncate:
            self.file.truncate(0)

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one row and see it out of this process.

        Raises:
            OSError: the disk is full, the pipe is closed.
        """
        line = memoryview(to_json(value) + b"\n")
        while line:
            line = line[self.file.write(line) :]
        self.file.flush()
        self.written += 1

    def close(self) -> None:
        """Close the file; one that was made for this run and got no row is removed."""
        if self._path is None:
            return
        self.file.close()
        if self._fresh and not self.written and self._path.is_file() and not self._path.stat().st_size:
            self._path.unlink()
