"""What a scorer is trained on: instructions with good answers to them, as ``bon pairs`` writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bon.data.formats import read_file
from bon.errors import InputError
from bon.evals.dataset import Example
from bon.evals.jsonlines import Listed
from bon.task import Task

LEAST_PAIRS = 2


@dataclass(frozen=True, slots=True)
class Pair:
    """An instruction and a good answer to it.

    Args:
        instruction: what the model shall find.
        response: what it is shown.
        context: what a reader of the response knew beforehand; see ``Task``.
        source, licence: where it comes from, for the adapter's record.
        negatives: other instructions that the response does not follow.
        rejected: a worse answer to the instruction, where there is one.
    """

    instruction: str
    response: str
    context: str = ""
    source: str = ""
    licence: str = ""
    negatives: tuple[str, ...] = ()
    rejected: str = ""

    @property
    def task(self) -> Task:
        """What a scorer is asked about."""
        return Task(Task.of(self.instruction).messages, self.instruction, self.context)


def read_pairs(path: str) -> list[Pair]:
    """The pairs of a file: rows with ``instruction`` or ``prompt``, ``response``, and what else ``Pair`` has.

    Raises:
        InputError: it cannot be read, holds fewer than two pairs, or a row is none.
    """
    pairs = []
    for number, fields in read_file(path):
        try:
            if isinstance(fields, InputError):
                raise fields
            pairs.append(_pair(fields))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    if len(pairs) < LEAST_PAIRS:
        raise InputError(
            f"{path} holds {len(pairs) or 'no'} pair{'' if len(pairs) == 1 else 's'}; hundreds are a good start. "
            "bon pairs makes them."
        )
    return pairs


def _pair(fields: Mapping[str, Any]) -> Pair:
    texts = {name: fields.get(name) or "" for name in ("response", "context", "source", "licence", "rejected")}
    texts["instruction"] = fields.get("instruction") or fields.get("prompt") or ""
    negatives = fields.get("negatives") or []
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"{name!r} must be text, not {text!r:.60}.")
        if name in ("instruction", "response") and not text.strip():
            raise InputError(f"the pair has no {name}: it needs 'instruction' (or 'prompt') and 'response'.")
    if not isinstance(negatives, list) or not all(isinstance(one, str) and one.strip() for one in negatives):
        raise InputError(f"'negatives' must be a list of instructions, not {negatives!r:.60}.")
    return Pair(**texts, negatives=tuple(negatives))


class HeldBack(Listed):
    """Pairs that are not trained on, as a dataset: the instruction is to be found, and nothing to be chosen."""

    name = "held-back pairs"

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs

    def examples(self) -> list[Example]:
        """Each pair with its answer as the only candidate."""
        return [Example(pair.task, candidates=(pair.response,), labels=(1.0,)) for pair in self._pairs]
