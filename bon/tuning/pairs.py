"""What a scorer is trained on: instructions with good answers to them. And what it is judged on, kept apart from that.

A pair that stands in the judged rows, word for word or nearly, would be remembered and not read out of the answer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bon.data.formats import read_file
from bon.errors import InputError
from bon.evals.dataset import Example
from bon.evals.jsonlines import Listed
from bon.similarity import characters
from bon.task import Task

_RUN = 3  # words that are compared together
_NEAR = 0.5  # share of the runs of both texts that they have in common: then they say the same
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
    """

    instruction: str
    response: str
    context: str = ""
    source: str = ""
    licence: str = ""
    negatives: tuple[str, ...] = ()

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
    texts = {name: fields.get(name) or "" for name in ("response", "context", "source", "licence")}
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


def near(texts: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Which texts stand among others, the same words or nearly: index -> index of the nearest of the others.

    Nearly the same are two texts that have half of their runs of three words in common (Jaccard).
    """
    known = [_runs(other) for other in others]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for at, runs in enumerate(known):
        for run in runs:
            holders[run].append(at)
    found = {}
    for index, text in enumerate(texts):
        runs = _runs(text)
        common = Counter(at for run in runs for at in holders.get(run, ()))
        shares = {at: count / (len(runs) + len(known[at]) - count) for at, count in common.items()}
        nearest = max(shares, key=lambda at: shares[at], default=None)
        if nearest is not None and shares[nearest] >= _NEAR:
            found[index] = nearest
    return found


def _runs(text: str) -> set[tuple[str, ...]]:
    words = characters(text)
    size = min(_RUN, len(words))
    return {*zip(*(words[first:] for first in range(size)), strict=False)}


class HeldBack(Listed):
    """Pairs that are not trained on, as a dataset: the instruction is to be found, and nothing to be chosen."""

    name = "held-back pairs"

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs

    def examples(self) -> list[Example]:
        """Each pair with its answer as the only candidate."""
        return [Example(pair.task, candidates=(pair.response,), labels=(1.0,)) for pair in self._pairs]
