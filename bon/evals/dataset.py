"""The dataset contract: tasks, and a way to tell whether an answer to each is right.

A dataset is a class with one line in ``bon.spec.DATASETS``, or an entry point of the group ``bon.datasets``. From then
on it has a name in Python and on the command line (``bon eval NAME``).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from bon.data.formats import NAMED
from bon.errors import InputError
from bon.spec import DATASETS, Specified, split_spec
from bon.task import Task


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a dataset: candidates with labels, or a way to tell whether an answer is right, or both.

    Args:
        task: what is asked.
        passes: whether a text is a right answer; None where only given candidates can be judged.
        candidates: given answers, in no meaningful order; () where a policy has to write them.
        labels: how good each candidate is, higher is better: 0 or 1, a grade, a win rate.
        generators: who wrote each candidate, where that is known; as many as there are candidates, or none.
        extract: the final answer of a text, for the majority vote; None where there is none to extract.
        subset: which part of the dataset the row belongs to.
    """

    task: Task
    passes: Callable[[str], bool] | None = None
    candidates: Sequence[str] = ()
    labels: Sequence[float] = ()
    generators: Sequence[str] = ()
    extract: Callable[[str], str | None] | None = None
    subset: str = ""


class Dataset(ABC, Specified):
    """A source of examples.

    Attributes:
        max_tokens: of an answer; long enough for a right one.
    """

    max_tokens: ClassVar[int] = 1024

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call it in a table."""

    @property
    def parts(self) -> Mapping[str, Dataset]:
        """Further sets that are always evaluated along with this one, by their key in the report."""
        return {}

    @abstractmethod
    def rows(self, limit: int | None = None, seed: int = 0) -> Iterable[Example]:
        """The examples, the same ones in the same order for the same arguments.

        Args:
            limit: how many at most; None leaves it to the dataset.
            seed: of the choice among more than ``limit``.
        """

    def figures(self, report: Mapping[str, Any]) -> Mapping[str, Any]:
        """What else a report on this dataset says, made of what it says already (see ``Summary.report``)."""
        return {}

    def official(self, rows: Sequence[Example], rewards: Sequence[Sequence[float]]) -> Mapping[str, float] | None:
        """Figures of the dataset's own protocol, by name; None where it has none but the share of right picks.

        Args:
            rows: some of the examples, with the candidates and labels that were evaluated.
            rewards: of the candidates of each; -inf where there is none.
        """
        return None


def as_dataset(dataset: str | Dataset) -> Dataset:
    """Read a dataset, its spec ("mini:unseen_wording"), a file of rows, or "module:Class" for one of the user's own.

    Raises:
        InputError: none of these.
    """
    if isinstance(dataset, str):
        head, options = split_spec(dataset)
        if head.partition(":")[0] not in DATASETS and (head.endswith(NAMED) or os.path.exists(head)):
            made = DATASETS.construct("jsonl", [head], options)
        else:
            made = DATASETS.make(dataset, objects=True)
        dataset = made() if isinstance(made, type) else made
    if not isinstance(dataset, Dataset):
        raise InputError(f"a dataset is a bon.evals.dataset.Dataset or its spec, not {dataset!r:.80}.")
    return dataset
