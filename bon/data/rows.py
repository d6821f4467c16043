"""Records in, JSON Lines out: rows stream through best-of-N, and a finished row is a whole line on disk.

Rows are read lazily. Results come as they finish, which need not be the order of the input; ``id`` (or ``line``, where
a row has no id) says which row it was. Nothing here prints, and nothing decides whether a bad row ends the run.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any

from bon.best_of_n import BestOfN
from bon.credit import credited
from bon.data.formats import Record, shown
from bon.errors import BonError, InputError
from bon.pipeline import in_order, rank
from bon.scorers.base import Scorer
from bon.selectors import Selector
from bon.task import Message, Task, as_messages
from bon.types import Result

Key = tuple[str, str | int | bytes]
"""("id", its value) or ("row", its digest)."""

_READ = frozenset({"prompt", "messages", "instruction", "reference", "candidates"})
"""Fields that mean something here; the others are a task's metadata."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the input.

    Args:
        line: its number, from 1.
        fields: everything it holds.
        task: what is asked.
        candidates: the texts to rank, where it brings them.
    """

    line: int
    fields: Mapping[str, Any]
    task: Task
    candidates: tuple[str, ...] = ()

    @property
    def digest(self) -> bytes:
        """What is asked, and of which candidates one is to be picked, in short."""
        asked = (self.task.messages, self.task.instruction, self.candidates)
        return blake2b(repr(asked).encode(), digest_size=16).digest()

    @property
    def key(self) -> Key:
        """What identifies the row when a run is resumed: its id, or where it has none what it holds."""
        identity = self.fields.get("id")
        return ("row", self.digest) if identity is None else ("id", identity)


Read = Callable[[int, Mapping[str, Any]], Row]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A record that cannot be used, and why."""

    line: int
    error: BonError


def row_of(
    line: int,
    fields: Mapping[str, Any],
    *,
    system: str | None = None,
    ranked: bool = False,
    prompt_field: str | None = None,
) -> Row:
    """The row of a record.

    Args:
        line: its number.
        fields: what it holds.
        system: a system message, if it has none of its own.
        ranked: whether it must bring ``candidates``.
        prompt_field: the field that holds what is asked, text or messages, instead of ``prompt`` and ``messages``.

    Raises:
        InputError: it cannot be used.
    """
    identity = fields.get("id")
    if isinstance(identity, bool) or not isinstance(identity, str | int | None):
        raise InputError(f"'id' must be text or a whole number, not {shown(identity)}.")
    messages = _messages(fields) if prompt_field is None else _named(fields, prompt_field)
    if system is not None and messages[0].role not in ("system", "developer"):
        messages = (Message("system", system), *messages)
    instruction = fields.get("instruction")
    if instruction is not None and not isinstance(instruction, str):
        raise InputError(f"'instruction' must be text, not {shown(instruction)}.")
    metadata = {name: value for name, value in fields.items() if name not in _READ}
    task = replace(Task.of(messages, instruction), reference=_reference(fields), metadata=metadata)
    return Row(line, fields, task, _candidates(fields) if ranked else ())


def before(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a row with those that a result put its own in place of; see ``output_row``."""
    replaced = fields.get("replaced")
    return {**fields, **replaced} if isinstance(replaced, Mapping) else fields


def read_rows(records: Iterable[Record], read: Read = row_of) -> Iterator[Row | BadRow]:
    """Read rows one by one.

    Args:
        records: see ``bon.data.formats``.
        read: ``row_of``, with its options.
    """
    for line, fields in records:
        try:
            if isinstance(fields, InputError):
                raise fields
            yield read(line, fields)
        except InputError as error:
            yield BadRow(line, error)


def _reference(fields: Mapping[str, Any]) -> str | None:
    reference = fields.get("reference")
    if isinstance(reference, bool | list | dict):
        raise InputError(f"'reference' must be text or a number, not {shown(reference)}. Name the field otherwise.")
    return None if reference is None else str(reference)


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is not None and messages is not None:
        raise InputError("the row has both 'prompt' and 'messages'. Keep one of them.")
    if messages is not None:
        if not isinstance(messages, list):
            raise InputError(f"'messages' must be a list of objects with 'role' and 'content', not {shown(messages)}.")
        return as_messages(messages)
    if prompt is None:
        raise InputError(
            f"the row has neither 'prompt' nor 'messages'. Its fields: {_names(fields)}. If one of them is the prompt, "
            "give bon run or bon rerank --prompt-field NAME."
        )
    if not isinstance(prompt, str):
        raise InputError(f"'prompt' must be text, not {shown(prompt)}. A conversation belongs in 'messages'.")
    return as_messages(prompt)


def _named(fields: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    asked = fields.get(name)
    if not isinstance(asked, str | list):
        if name in fields:
            raise InputError(f"{name!r} must be text or a list of messages, not {shown(asked)}.")
        raise InputError(f"the row has no field {name!r}. Its fields: {_names(fields)}.")
    return as_messages(asked)


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in list(fields)[:8]) or "none"


def _candidates(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Texts, or the candidates of an earlier run (objects with ``text``)."""
    candidates = fields.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise InputError(f"'candidates' must be a list of at least one text, not {shown(candidates)}.")
    texts = [c["text"] if isinstance(c, dict) and "text" in c else c for c in candidates]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"candidate {index} must be text, not {shown(text)}.")
    return tuple(texts)


Outcomes = AsyncGenerator[tuple[Row, Result | BonError], None]


def run_rows(bon: BestOfN, rows: Iterable[Row]) -> Outcomes:
    """Sample and score every row; yield (row, result or error) as they finish."""
    return _with_rows(rows, lambda rows: bon.stream(row.task for row in rows))


def rank_rows(scorer: Scorer, selector: Selector, rows: Iterable[Row], *, prune: bool = True) -> Outcomes:
    """Score the candidates that every row brings; yield (row, result or error), in order."""
    return _with_rows(
        rows, lambda rows: in_order(rank(scorer, ((row.task, row.candidates) for row in rows), selector, prune=prune))
    )


async def credited_rows(scorer: Scorer, outcomes: Outcomes) -> Outcomes:
    """The same with the credit of each sentence of the winners."""
    async with aclosing(outcomes):
        async for row, outcome in outcomes:
            yield row, await credited(scorer, outcome) if isinstance(outcome, Result) else outcome


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


def output_row(
    row: Row, result: Result, *, run: str, everything: bool = False, several: bool = False
) -> dict[str, Any]:
    """The row as it is written: its own fields, then the result's.

    Where the row already has a field of that name with another value, the old value goes to ``replaced``, so that the
    output of one run can be the input of the next without a loss.

    Args:
        row: what came in.
        result: what came out.
        run: which settings made it; ``--resume`` looks at it.
        everything: write all candidates and scores and not just the winner (and, where the row brought candidates,
            their rewards and their indices, best first).
        several: list what the selector picked, best first: for one that may pick more than the winner.
    """
    own = result.to_dict()
    if not everything:
        winner = None if result.best is None else result.scores[result.best]
        own = {name: own[name] for name in ("text", "reward", "best", "reason", "credit") if name in own}
        own |= {"status": winner and winner.status, "inferred": winner and winner.explanation}
        if row.candidates:
            own |= {"ranking": list(result.selection.ranking), "rewards": [score.reward for score in result.scores]}
        if result.stop is not None:
            own |= {"n": len(result.candidates), "stop": asdict(result.stop)}
        if several:
            own["picked"] = [{"text": c.text, "reward": result.scores[c.index].reward} for c in result.picked]
    elif row.candidates:
        del own["candidates"]  # the row has them
    own |= {"run": run} | ({"line": row.line} if row.fields.get("id") is None else {})
    replaced = {name: old for name, old in row.fields.items() if name in own and old != own[name]}
    if replaced and "replaced" in row.fields:
        replaced["replaced"] = row.fields["replaced"]
    return {**row.fields, **own, **({"replaced": replaced} if replaced else {})}
