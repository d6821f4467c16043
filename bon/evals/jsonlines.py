"""Datasets that are lists of rows with labelled candidates: any file of them, and what the named ones build on."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bon.data.formats import read_file
from bon.data.rows import row_of
from bon.errors import InputError
from bon.evals.dataset import Dataset, Example

_LABELS = ("correct", "best", "grade", "win_rate")
_TELLING = {*_LABELS, "followed", "generators", "answer"}
"""Fields that would tell a scorer which candidate is right; ``answer`` is the task's reference."""


class Listed(Dataset):
    """A dataset of a fixed list of examples."""

    @abstractmethod
    def examples(self) -> list[Example]:
        """All of them, in their own order."""

    def rows(self, limit: int | None = None, seed: int = 0) -> list[Example]:
        """All examples, or ``limit`` of them in an order drawn with ``seed``; fewer are the first of more."""
        examples = self.examples()
        if limit is None or limit >= len(examples):
            return examples
        random.Random(seed).shuffle(examples)
        return examples[:limit]


class JSONLines(Listed):
    """A file, JSON Lines or another that ``bon.data.formats`` reads, whose rows bring their candidates and labels.

    A row has ``messages`` or ``prompt``, ``candidates``, and one of ``correct``, ``grade``, ``win_rate``,
    ``win_rate_vs_NAME`` (a number or true/false for each candidate) and ``best`` (the index of one); it may have
    ``generators``, ``subset``, ``id`` and ``answer``, a right answer.

    Args:
        path: the file.
        label: the field that holds the labels, where a row has several, or one of another name.
    """

    def __init__(self, path: str, label: str | None = None) -> None:
        self.path, self.label = path, label

    @property
    def name(self) -> str:
        """The file's name."""
        return Path(self.path).name

    def examples(self) -> list[Example]:
        """The file's rows.

        Raises:
            InputError: it cannot be read, is empty, or a row of it cannot be used.
        """
        return read_examples(self.path, lambda fields: judged(fields, self.label))


def read_examples(path: str, make: Callable[[dict[str, Any]], Example]) -> list[Example]:
    """The examples of a file, of any format that ``bon.data.formats`` reads.

    Raises:
        InputError: it cannot be read, holds no rows, or a row cannot be used.
    """
    examples = []
    for number, fields in read_file(path):
        try:
            if isinstance(fields, InputError):
                raise fields
            examples.append(make(fields))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
    if not examples:
        raise InputError(f"{path} is empty: a dataset has one JSON object a line.")
    return examples


def unjudged(fields: Mapping[str, Any]) -> Example:
    """The example of a row that brings no candidates.

    Raises:
        InputError: the row cannot be used.
    """
    return _example(fields, ranked=False)


def judged(fields: Mapping[str, Any], label: str | None = None) -> Example:
    """The example of a row with candidates and labels.

    Args:
        fields: see ``JSONLines``.
        label: see ``JSONLines``.

    Raises:
        InputError: the row cannot be used.
    """
    example = _example(fields, ranked=True)
    count = len(example.candidates)
    if count == 1:
        raise InputError("the row has one candidate only: there is nothing to choose from.")
    generators = fields.get("generators") or ()
    if generators and (len(generators) != count or not all(isinstance(each, str) for each in generators)):
        raise InputError(f"'generators' must be a name for each of the {count} candidates, not {generators!r:.60}.")
    return replace(example, labels=_labels(fields, label or _label_of(fields), count), generators=tuple(generators))


def _example(fields: Mapping[str, Any], ranked: bool) -> Example:
    fields = {"reference": fields.get("answer"), **fields}
    row = row_of(0, fields, ranked=ranked)
    subset = fields.get("subset") or ""
    if not isinstance(subset, str):
        raise InputError(f"'subset' must be text, not {subset!r:.60}.")
    known = {name: value for name, value in row.task.metadata.items() if not _tells(name)}
    return Example(replace(row.task, metadata=known), candidates=row.candidates, subset=subset)


def _tells(name: str) -> bool:
    return name in _TELLING or name.startswith("win_rate_vs_")


def _label_of(fields: Mapping[str, Any]) -> str:
    names = [name for name in fields if name in _LABELS or name.startswith("win_rate_vs_")]
    if not names:
        raise InputError(
            f"the row has no labels: it needs one of {', '.join(_LABELS)}. Its fields: {', '.join(fields)}."
        )
    if len(names) > 1:
        raise InputError(f"the row has several labels: {', '.join(names)}. Choose one: label={names[0]}.")
    return names[0]


def _labels(fields: Mapping[str, Any], name: str, count: int) -> Sequence[float]:
    value = fields.get(name)
    if name == "best":
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise InputError(f"'best' must be the index of one of the {count} candidates, from 0, not {value!r:.60}.")
        return tuple(float(index == value) for index in range(count))
    if not isinstance(value, list):
        raise InputError(f"{name!r} must be a list with a label for each candidate, not {value!r:.60}.")
    if len(value) != count:
        raise InputError(f"{name!r} has {len(value)} labels for {count} candidates.")
    for index, label in enumerate(value):
        if not isinstance(label, int | float):
            raise InputError(f"label {index} of {name!r} must be a number, not {label!r:.60}.")
    return tuple(map(float, value))
