"""Published datasets by name: a file of one's own, a file in the folder ``$BON_DATA``, or the hub's copy.

A row is in bon's format (``bon.evals.jsonlines``), or as the dataset's authors publish it and then converted.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from bon.errors import InputError
from bon.evals.dataset import Example
from bon.evals.jsonlines import Listed, judged, read_examples


@dataclass(frozen=True, slots=True)
class Hub:
    """Where a dataset is published.

    Args:
        path: the name on the hub, or "json" for files elsewhere, which the options name.
        splits: which of its splits are taken.
        options: further arguments of ``datasets.load_dataset``.
    """

    path: str
    splits: Sequence[str]
    options: Mapping[str, Any]

    def rows(self, missing: str) -> Iterator[dict[str, Any]]:
        """The published rows, each with its ``split``.

        Args:
            missing: what to say, and what to do, where they cannot be had.

        Raises:
            InputError: ``missing``, and why.
        """
        try:
            import huggingface_hub
            from datasets import load_dataset
        except ModuleNotFoundError as error:
            raise InputError(f"{missing} To have bon fetch it, type: pip install 'bon[evals]'") from error
        try:
            if "/" in self.path and not huggingface_hub.constants.HF_HUB_OFFLINE:
                huggingface_hub.dataset_info(self.path, timeout=10)  # load_dataset tries for half a minute
            tables = load_dataset(self.path, split=list(self.splits), **self.options)
        except Exception as error:
            reason = (str(error) or type(error).__name__).partition("\n")[0].rstrip(".")
            raise InputError(f"{missing} It could not be fetched: {reason}.") from error
        for split, table in zip(self.splits, tables, strict=True):
            for row in table:
                yield {"split": split, **row}


class Named(Listed):
    """A published dataset of candidates and labels.

    Attributes:
        title: its name.
        file: how its file is called in the folder ``$BON_DATA``.
        hub: where it can be fetched; None where it is not published in one piece.
        source: where to get it by hand.

    Args:
        path: a JSON Lines file; None looks into ``$BON_DATA``, then fetches it.
    """

    title: ClassVar[str]
    file: ClassVar[str]
    hub: ClassVar[Hub | None] = None
    source: ClassVar[str]

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The name it is registered under."""
        return self.title

    def examples(self) -> list[Example]:
        """All rows.

        Raises:
            InputError: there is neither a file nor a network, or a row cannot be used.
        """
        return self.read(self.path, self.file, self.example, f"{self.title}:PATH")

    def read(
        self, path: str | None, file: str, make: Callable[[dict[str, Any]], Example], written: str
    ) -> list[Example]:
        """Examples from a file, or from the hub.

        Args:
            path: the file, where the user named one.
            file: its name in ``$BON_DATA``.
            make: what makes an example of a row.
            written: the spec that names a file.

        Raises:
            InputError: there is neither a file nor a network, or a row cannot be used.
        """
        if found := path or in_folder(file):
            return read_examples(found, make)
        missing = (
            f"there is no file {file} here. Get it from {self.source}, save it under that name "
            f"and set BON_DATA to its folder, or write {written}."
        )
        if self.hub is None:
            raise InputError(missing)
        return [make(row) for row in self.hub.rows(missing)]

    def example(self, fields: dict[str, Any]) -> Example:
        """The example of a row, in bon's format or as published.

        Raises:
            InputError: the row cannot be used.
        """
        return judged(fields if "candidates" in fields else self.converted(fields))

    def converted(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A published row in bon's format.

        Raises:
            InputError: a column is missing.
        """
        try:
            return self.convert(fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the row is none of {self.title}, neither in bon's format nor as published ({error!r:.60}). "
                f"Get it from {self.source}."
            ) from error

    def convert(self, fields: dict[str, Any]) -> dict[str, Any]:
        """As ``converted``, without the check; for a dataset that is published in bon's format."""
        return fields


def in_folder(file: str) -> str | None:
    """The path of a file in the folder ``$BON_DATA``, where both exist."""
    path = Path(os.environ.get("BON_DATA", ""), file)
    return str(path) if "BON_DATA" in os.environ and path.exists() else None


def shuffled(fields: Mapping[str, Any], chosen: Sequence[str], rejected: Sequence[str]) -> dict[str, Any]:
    """Candidates and labels of a row that is published with the right answers first; the order depends on its id."""
    pairs = [(text, True) for text in chosen] + [(text, False) for text in rejected]
    random.Random(str(fields["id"])).shuffle(pairs)
    texts, correct = zip(*pairs, strict=True)
    return {"id": fields["id"], "prompt": fields["prompt"], "candidates": list(texts), "correct": list(correct)}


_LLMBAR = "https://raw.githubusercontent.com/princeton-nlp/LLMBar/main/Dataset/LLMBar"
_PARTS = ("Natural", "Adversarial/Neighbor", "Adversarial/GPTInst", "Adversarial/GPTOut", "Adversarial/Manual")


class LLMBar(Named):
    """Pairs that differ in how well they follow the instruction, natural and adversarial (arXiv 2310.07641)."""

    title = "llmbar"
    file = "llmbar.jsonl"
    source = "github.com/princeton-nlp/LLMBar (Dataset/LLMBar/*/dataset.json, one row a line: jq -c '.[]')"
    # The hub has a script that loads these files; scripts are no longer run.
    hub = Hub(
        "json",
        [part.replace("/", "_") for part in _PARTS],
        {"data_files": {part.replace("/", "_"): f"{_LLMBAR}/{part}/dataset.json" for part in _PARTS}},
    )

    def convert(self, fields: dict[str, Any]) -> dict[str, Any]:
        """``label`` says which output is better, from 1."""
        return {
            "prompt": fields["input"],
            "candidates": [fields["output_1"], fields["output_2"]],
            "best": fields["label"] - 1,
            "subset": fields.get("split", "").replace("_", "/"),
        }


class JudgeBench(Named):
    """Pairs of answers to hard questions of which one is right (arXiv 2410.12784)."""

    title = "judgebench"
    file = "judgebench.jsonl"
    source = "github.com/ScalerLab/JudgeBench (the files of data/, one after the other)"
    hub = Hub("ScalerLab/JudgeBench", ["gpt", "claude"], {})

    def convert(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The subset is the source of the question, the subjects of MMLU-Pro taken together."""
        return {
            "id": fields["pair_id"],
            "prompt": fields["question"],
            "candidates": [fields["response_A"], fields["response_B"]],
            "best": ["A>B", "B>A"].index(fields["label"]),
            "subset": re.sub(r"^(mmlu-pro)-.*", r"\1", fields["source"]),
        }


class RMBench(Named):
    """Right and subtly wrong answers, each in three styles (arXiv 2410.16184)."""

    title = "rm-bench"
    file = "rm_bench.jsonl"
    source = "github.com/THU-KEG/RM-Bench (data/total_dataset.json, one row a line: jq -c '.[]')"
    hub = Hub("THU-KEG/RM-Bench", ["train"], {})

    def convert(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The subset is the domain."""
        return shuffled(fields, fields["chosen"], fields["rejected"]) | {"subset": fields["domain"]}


class AlpacaEval(Named):
    """AlpacaEval's prompts with answers of many models; the label is the win rate against GPT-4-Turbo."""

    title = "alpaca-eval"
    file = "alpacaeval_dev.jsonl"
    source = "github.com/tatsu-lab/alpaca_eval (results/, joined into messages, candidates and win_rate)"


class ArenaEarly(Named):
    """Users' prompts of Arena-Hard's first version; the label is GPT-4's grade from 1 to 10."""

    title = "arena-early"
    file = "arena_early.jsonl"
    source = "huggingface.co/spaces/lmarena/arena-hard-auto (joined into messages, candidates and grade)"


class Crux(Named):
    """What does this Python function return? Nobody can tell a right answer from the instruction: a control."""

    title = "crux"
    file = "crux.jsonl"
    source = "github.com/WildEval/ZeroEval (result_dirs/crux, joined into messages, candidates and correct)"

    def example(self, fields: dict[str, Any]) -> Example:
        """The example of a row; its final answer is the field ``answer`` of the JSON that the prompt asks for."""
        return replace(super().example(fields), extract=literal_answer)


_ANSWER = re.compile(r'"answer"\s*:\s*"((?:[^"\\]|\\.)*)"')


def literal_answer(text: str) -> str | None:
    """The last ``"answer": "..."`` of a text, without quotes and spaces: models write 'a', "a" and a for the same."""
    found = _ANSWER.findall(text)
    return re.sub(r"[\s'\"\\]", "", found[-1]) if found else None
