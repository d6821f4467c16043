"""Where pairs come from: rows that hold them, labelled candidates, winners of a run, and what a model writes itself.

Only good answers become pairs. A model that learns to read the instruction out of bad answers as well can no longer
tell them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bon.data.formats import NAMED, read_file, shown
from bon.data.results import result_of
from bon.data.rows import BadRow, Row, before, read_rows, row_of
from bon.engines.base import Generates, Prompt, Request, Turn
from bon.errors import InputError
from bon.evals.dataset import as_dataset
from bon.evals.jsonlines import judged
from bon.types import Result, Sampling

Answer = tuple[str, str, float | None, str]
"""A response, who wrote it, what made it the best, and a worse response of the same row, "" where there is none."""

TURN_TOKENS = 256
"""Of a user's turn at most; one that is not at its end by then is no pair's instruction."""


@dataclass(frozen=True, slots=True)
class Pair:
    """An instruction, and an answer that is good.

    Args:
        instruction: what backward inference is to recover.
        response: the answer.
        source: the file, the data set or the model that it comes from.
        at: which of its source's it is: an id, a line, a sample's number.
        licence: of both texts; "unknown" where the user said so.
        context: what a reader of the response knew beforehand; see ``Task``.
        generator: who wrote the response, where that is known.
        reward: what made it the best, where a scorer chose it.
        rejected: a worse answer of the same row, where one is asked for.
    """

    instruction: str
    response: str
    source: str
    at: str | int
    licence: str
    context: str = ""
    generator: str = ""
    reward: float | None = None
    rejected: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value not in ("", None)}


@dataclass(frozen=True)
class Reading:
    """How pairs are read out of rows.

    Args:
        source: what the rows are called, where they have no field ``source`` of their own.
        licence: theirs, where they have no field ``licence`` or ``license``.
        prompt_field: the field that holds what is asked, where it is not ``prompt``, ``messages`` or ``instruction``.
        response_field: the field that holds the answer of a row that is a pair.
        input_field: the field with what belongs behind what is asked (Alpaca's ``input``), in the same message.
        label: the field that holds the labels of candidates, where a row has several.
        least: the least label or reward of an answer that is good; None takes the best of a row.
        rejected: whether a pair also gets an answer that is worse by label or reward.
    """

    source: str
    licence: str | None = None
    prompt_field: str | None = None
    response_field: str = "response"
    input_field: str | None = None
    label: str | None = None
    least: float | None = None
    rejected: bool = False

    def row(self, line: int, fields: Mapping[str, Any]) -> Row:
        """The row of a record; see ``row_of``.

        Raises:
            InputError: it asks for nothing, or cannot be used.
        """
        given, fields = fields, before(fields)
        field = self.prompt_field
        if field is None and not fields.keys() & {"prompt", "messages"}:
            field = "instruction"
        more = fields.get(self.input_field) if self.input_field else None
        if more:
            asked = fields.get(field or "prompt")
            if not isinstance(more, str) or not isinstance(asked, str):
                raise InputError(f"{self.input_field!r} and what stands before it must be text, not {shown(more)}.")
            fields = {**fields, field or "prompt": f"{asked}\n\n{more}"}
        return replace(row_of(line, fields, prompt_field=field), fields=given)

    def pairs(self, row: Row) -> list[Pair]:
        """The pairs of a row, the best one first; none where no answer is good enough.

        Raises:
            InputError: the row has no answers, no labels or no licence.
        """
        return [self.pair(row, *answer) for answer in self._answers(row)]

    def pair(
        self, row: Row, response: str, generator: str = "", reward: float | None = None, rejected: str = ""
    ) -> Pair:
        """The pair of a row and an answer; raises what ``licence_of`` does."""
        fields = row.fields
        at = fields.get("at", row.line) if fields.get("id") is None else fields["id"]
        context = row.task.context or fields.get("context") or ""
        source = str(fields.get("source") or self.source)
        licence = self.licence_of(row)
        worse = rejected if self.rejected else ""
        return Pair(row.task.instruction, response, source, at, licence, str(context), generator, reward, worse)

    def licence_of(self, row: Row) -> str:
        """The row's licence.

        Raises:
            InputError: neither the row nor the user says which one.
        """
        licence = row.fields.get("licence") or row.fields.get("license") or self.licence
        if not licence or not str(licence).strip():
            raise InputError("the row has no licence. Give --licence NAME, or --licence unknown if you do not know it.")
        return str(licence)

    def _answers(self, row: Row) -> Sequence[Answer]:
        fields = row.fields
        if self.response_field in fields:
            response, worse = fields[self.response_field], fields.get("rejected") if self.rejected else None
            for name, text in ((self.response_field, response), ("rejected", worse or "")):
                if not isinstance(text, str):
                    raise InputError(f"{name!r} must be text, not {shown(text)}.")
            return [(response, str(fields.get("generator") or ""), None, worse or "")]
        if self.label is None and {"text", "reward"} <= fields.keys():
            return self._winner(row)
        if "candidates" in fields:
            return self._labelled(row)
        raise InputError(
            f"the row has no {self.response_field!r}, no winner ('text' and 'reward' of bon run), and no 'candidates' "
            "with labels. Give --response-field NAME, or --policy MODEL to have its prompt answered."
        )

    def _winner(self, row: Row) -> Sequence[Answer]:
        fields = row.fields
        text, reward = fields["text"], fields["reward"]
        if text is None or reward is None:
            return []
        if not isinstance(text, str) or not isinstance(reward, int | float):
            raise InputError(f"'text' and 'reward' must be text and a number, not {shown(text)} and {shown(reward)}.")
        whole = {"candidates", "scores"} <= fields.keys()
        known = winner(result_of(row)) if whole else (text, reward, "")
        if known is None or (self.least is not None and reward < self.least):
            return []
        return [(text, "", float(reward), known[2])]

    def _labelled(self, row: Row) -> Sequence[Answer]:
        fields = {name: value for name, value in row.fields.items() if name not in ("messages", "instruction")}
        example = judged({**fields, "prompt": row.task.instruction}, self.label)
        top, labels = max(example.labels), example.labels
        if self.least is None and top == min(labels):
            return []  # all are as good, or as bad
        least = top if self.least is None else self.least
        order = sorted(range(len(labels)), key=lambda i: -labels[i])
        good = [i for i in order if labels[i] >= least]
        others = [example.candidates[i] for i in reversed(order[len(good) :])] or [""]  # the worst first
        writers = example.generators or [""] * len(labels)
        return [(example.candidates[i], writers[i], None, others[n % len(others)]) for n, i in enumerate(good)]


def instructions_of(rows: str) -> Iterator[str]:
    """The instructions of rows that something will be judged on, and the messages that they stand in.

    Args:
        rows: a file of prompts, of labelled candidates or of pairs; or a dataset's spec.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    if rows.endswith(NAMED):
        tasks = []
        for row in read_rows(read_file(rows), Reading(rows).row):
            if isinstance(row, BadRow):
                raise InputError(f"{rows}:{row.line}: {row.error}")
            tasks.append(row.task)
    else:
        tasks = [example.task for example in as_dataset(rows).rows()]
    if not tasks:
        raise InputError(f"{rows} holds no rows, so nothing would be held out. Name another file.")
    for task in tasks:
        yield task.instruction
        yield next(message.content for message in reversed(task.messages) if message.role == "user")


def winner(result: Result) -> tuple[str, float | None, str] | None:
    """The best answer that a policy gave, its reward where it was one of several, and the worst of those ("" if none).

    None where there is no answer, or where it was cut off.
    """
    if result.text is None or result.best is None or result.candidates[result.best].finish_reason == "length":
        return None
    if len(result.candidates) == 1 or result.reward is None:
        return result.text, None, ""
    rated = [(s.reward, c.text) for s, c in zip(result.scores, result.candidates, strict=True) if s.reward is not None]
    reward, worst = min(rated)
    return result.text, result.reward, worst if reward < result.reward else ""


async def users_turns(engine: Generates, sampling: Sampling, first: int, count: int) -> list[tuple[int, str]]:
    """Let an instruct model write what users would ask it: (number of the sample, text), those that came to an end.

    The prompt is the model's own chat template up to where the user's first turn begins (Magpie, arXiv 2406.08464).

    Args:
        engine: a model that runs here; over HTTP one whose tokenizer is named.
        sampling: with a seed, by which a sample's number says what it is.
        first: number of the first sample.
        count: samples.

    Raises:
        BonError: the engine cannot continue a user's turn, or fails.
    """
    request = Request(
        Prompt((Turn("user", ("",)),), open=True),
        replace(sampling, max_tokens=TURN_TOKENS),
        n=count,
        first_sample=first,
        together=True,
    )
    written = {}
    async for completion in engine.generate([request]):
        if completion.error is not None:
            raise completion.error
        if completion.finish_reason == "stop":
            written[completion.sample_index] = completion.text.strip()
    return sorted(written.items())
