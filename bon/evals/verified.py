"""Datasets with a verifier, so that a policy's own answers can be judged: IFEval and GSM8K.

Given candidates come from one file, the questions with what the verifier needs from another one, or from the hub. They
and the verifier are loaded when the first answer is checked; ``passes("")`` says at once what is missing.
"""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar

from bon.answers import last_number
from bon.errors import InputError, MissingExtraError
from bon.evals.dataset import Example
from bon.evals.jsonlines import judged, read_examples, unjudged
from bon.evals.named import Hub, Named, in_folder
from bon.task import Task

_INSTALL = "pip install 'bon[evals]'"


class Verified(Named):
    """Questions with a verifier, and given answers where there is a file of them.

    Attributes:
        questions_file: how the file of questions is called in the folder ``$BON_DATA``.

    Args:
        path: a JSON Lines file of given candidates with labels; None looks into ``$BON_DATA``.
        questions: one of all questions; None looks into ``$BON_DATA``, then fetches it.
    """

    questions_file: ClassVar[str]

    def __init__(self, path: str | None = None, questions: str | None = None) -> None:
        super().__init__(path)
        self.questions = questions

    def examples(self) -> list[Example]:
        """The rows with given candidates; the questions, where there are none.

        Raises:
            InputError: there is neither a file nor a network, or a row cannot be used.
        """
        given = self.path or (None if self.questions else in_folder(self.file))
        rows = read_examples(given, judged) if given else list(self._questions.values())
        return [replace(row, passes=partial(self._passes, row.task.instruction)) for row in rows]

    @cached_property
    def _questions(self) -> Mapping[str, Example]:
        """By their text."""
        rows = self.read(
            self.questions,
            self.questions_file,
            lambda fields: unjudged(self.converted(fields)),
            f"{self.title}:questions=PATH",
        )
        return {row.task.instruction: row for row in rows}

    def _passes(self, question: str, text: str) -> bool:
        if question not in self._questions:
            raise InputError(
                f"{question[:60]!r} is not among the questions of {self.title}: its answers cannot be checked."
            )
        return self._check(self._questions[question].task, text)

    @cached_property
    @abstractmethod
    def _check(self) -> Callable[[Task, str], bool]:
        """Whether a text is a right answer to a question."""


class IFEval(Verified):
    """Prompts whose constraints a program can check (arXiv 2311.07911), all of them, in the strict way."""

    title = "ifeval"
    file = "ifeval.jsonl"
    questions_file = "ifeval_input_data.jsonl"
    source = "huggingface.co/datasets/google/IFEval (ifeval_input_data.jsonl)"
    hub = Hub("google/IFEval", ["train"], {})

    def convert(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Constraints without the language that M-IFEval puts before them."""
        return {
            "id": fields["key"],
            "prompt": fields["prompt"],
            "constraints": [name.removeprefix("en:") for name in fields["instruction_id_list"]],
            "arguments": fields["kwargs"],
        }

    @cached_property
    def _check(self) -> Callable[[Task, str], bool]:
        try:
            import langdetect
            import nltk
            from if_verifiable import IFEvalSample, evaluate_output_for_sample
        except ModuleNotFoundError as error:
            raise MissingExtraError("if-verifiable, which checks IFEval's constraints,", _INSTALL) from error
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError as error:
            what = "the data punkt_tab of NLTK, which counts IFEval's sentences,"
            raise MissingExtraError(what, "python -m nltk.downloader punkt_tab") from error
        langdetect.DetectorFactory.seed = 0  # it draws samples

        def check(task: Task, text: str) -> bool:
            known = task.metadata
            sample = IFEvalSample(known["id"], task.instruction, known["constraints"], known["arguments"])
            _, scores = evaluate_output_for_sample("ifeval", sample, text)
            return bool(scores.binary_strict == 1)

        return check


class GSM8K(Verified):
    """Grade-school arithmetic (arXiv 2110.14168); an answer is right if its final number is."""

    max_tokens: ClassVar[int] = 512
    title = "gsm8k"
    file = "gsm8k_samples.jsonl"
    questions_file = "gsm8k_test.jsonl"
    source = "github.com/openai/grade-school-math (data/test.jsonl)"
    hub = Hub("openai/gsm8k", ["test"], {"name": "main"})

    def convert(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The final number of the published solution stands behind ####."""
        answer = fields["answer"]
        if "question" not in fields:
            return fields
        return {"prompt": fields["question"], "answer": answer.rpartition("####")[2].strip().replace(",", "")}

    def examples(self) -> list[Example]:
        """As ``Verified``'s; the final answer is the last number."""
        return [replace(row, extract=last_number) for row in super().examples()]

    @cached_property
    def _check(self) -> Callable[[Task, str], bool]:
        try:
            from math_verify import parse, verify
        except ModuleNotFoundError as error:
            raise MissingExtraError("math-verify, which checks GSM8K's answers,", _INSTALL) from error
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no time limit

        def check(task: Task, text: str) -> bool:
            # Its time limit is a signal, which only the main thread gets: leave it nothing that takes time.
            plain = re.sub(r"\*\*|[\^!]", " ", text)
            right, said = parse(task.reference, parsing_timeout=None), parse(plain, parsing_timeout=None)
            return bool(verify(right, said, timeout_seconds=None))

        return check
