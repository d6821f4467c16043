"""The mini world as a dataset: instructions of the grammar that the embedded model learnt, and its verifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import ClassVar, get_args

from bon.errors import UnknownNameError
from bon.evals.dataset import Dataset, Example
from bon.mini.tasks import Split, instruction, sample_tasks, verify
from bon.task import Task


class MiniWorld(Dataset):
    """Instructions of the mini world.

    Args:
        split: "heldout" (combinations of values that the embedded model never saw), "unseen_wording" (wordings that it
            never saw) or "train".

    Raises:
        UnknownNameError: no such split.
    """

    max_tokens: ClassVar[int] = 96  # the longest right answer has about 50

    def __init__(self, split: Split = "heldout") -> None:
        if split not in get_args(Split):
            raise UnknownNameError("split of the mini world", split, get_args(Split))
        self.split: Split = split

    @property
    def name(self) -> str:
        """Which instructions these are."""
        kinds = {
            "heldout": "with held-out combinations",
            "unseen_wording": "in unseen wordings",
            "train": "of training",
        }
        return f"instructions {kinds[self.split]}"

    @property
    def parts(self) -> Mapping[str, Dataset]:
        """Held-out instructions come with unseen wordings."""
        return {"unseen_wordings": MiniWorld("unseen_wording")} if self.split == "heldout" else {}

    def rows(self, limit: int | None = None, seed: int = 0) -> Iterator[Example]:
        """Different instructions, 500 unless said otherwise, the families in turn."""
        for task in sample_tasks(500 if limit is None else limit, seed, self.split):
            yield Example(Task.of(instruction(task)), partial(verify, task))
