"""The file of pairs: what may go in, and the negatives that are added at the end.

A pair is on disk, whole, as soon as it is there. Its negatives depend on all of the others, so they are made once no
more pairs come, and the file is then replaced in one step: it always holds every pair.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from bon.data.formats import parse_object
from bon.data.rows import Row
from bon.data.sink import Output, to_json
from bon.errors import InputError
from bon.pairs.alike import NEAR, HeldOut, Seen, neighbours
from bon.pairs.constraints import altered
from bon.pairs.filters import Filters
from bon.pairs.sources import Pair
from bon.task import Task


class Collection:
    """Pairs that go into a file.

    Args:
        filters: what they must be like.
        held: what they must not hold.
        per_prompt: answers to one instruction at most.
        near: the similarity from which on instructions count as the same; see ``Seen``.

    Attributes:
        refused: how many pairs, by reason.
        count: pairs in the file, those that it had before included.
    """

    def __init__(self, filters: Filters, held: HeldOut, per_prompt: int = 1, near: float = NEAR) -> None:
        self.filters, self.held, self.per_prompt = filters, held, per_prompt
        self.refused = Counter[str]()
        self.count = 0
        self._seen = Seen(near)
        self._answers = Counter[str]()
        self._responses = set[str]()
        self._last = dict[str, int]()

    def known(self, line: int, fields: Mapping[str, Any]) -> Row:
        """Note a pair that the file has already.

        Raises:
            InputError: it is no pair, or stands in what is held out.
        """
        instruction, response = fields.get("instruction"), fields.get("response")
        if not isinstance(instruction, str) or not isinstance(response, str):
            raise InputError("it is no pair: it has not both texts, 'instruction' and 'response'. Choose another -o.")
        if self.held.holds(instruction):
            raise InputError("the pair stands in the rows of --held-out. Make the file anew from it, with another -o.")
        self._note(instruction, response, str(fields.get("source")), fields.get("at"))
        return Row(line, fields, Task.of(instruction))

    def last(self, source: str) -> int:
        """The highest number of a pair of a source; -1 where it has none."""
        return self._last.get(source, -1)

    def full(self, instruction: str) -> bool:
        """Whether an instruction has all the answers that it may have."""
        return self._answers[self.filters.stripped(instruction)] >= self.per_prompt

    def refuses(self, instruction: str) -> str | None:
        """Why no pair may have an instruction, whatever the response; None where one may."""
        if reason := self.filters.of_instruction(instruction):
            return reason
        if self.held.holds(instruction):
            return "the instruction is held out"
        found = self._seen.find(instruction)
        if found is None or (found == instruction and not self.full(instruction)):
            return None
        return "the instruction is there already, or nearly the same one"

    def add(self, pair: Pair, output: Output) -> None:
        """Write a pair, or count why not."""
        instruction, response = map(self.filters.stripped, (pair.instruction, pair.response))
        reason = self.refuses(instruction) or self.filters.of_response(instruction, response)
        if reason is None and response in self._responses:
            reason = "the response is there already"
        if reason is not None:
            self.refused[reason] += 1
            return
        output.write(replace(pair, instruction=instruction, response=response).to_dict())
        self._note(instruction, response, pair.source, pair.at)

    def _note(self, instruction: str, response: str, source: str, at: Any) -> None:
        self.count += 1
        self._seen.add(instruction)
        self._answers[instruction] += 1
        self._responses.add(response)
        if isinstance(at, int):
            self._last[source] = max(at, self.last(source))


def add_negatives(path: Path, count: int) -> None:
    """Give each pair of a file the instructions that its response does not answer, and replace the file in one step.

    Args:
        path: the file.
        count: neighbours of a pair's instruction, and altered ones of itself, at most so many of each.
    """
    path, near = path.resolve(), dict[str, list[str]]()
    if count:
        texts = list(dict.fromkeys(pair["instruction"] for pair in _pairs(path)))
        near = dict(zip(texts, neighbours(texts, count), strict=True))
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        try:
            for pair in _pairs(path):
                pair.pop("negatives", None)
                if count:
                    instruction = pair["instruction"]
                    kinds = zip_longest(near[instruction], altered(instruction, pair["response"], count))
                    pair["negatives"] = [text for one in kinds for text in one if text]  # of few, some of both kinds
                file.write(to_json(pair) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            part.unlink()  # on a full disk, room for pairs
            raise
    part.replace(path)


def _pairs(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for line in lines:
            if line.strip():
                yield parse_object(line)
