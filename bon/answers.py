"""Final answers in texts: how they are found, and which of them are the same."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from bon.errors import InputError

Extract = Callable[[str], str | None]

_NUMBER = re.compile(r"(?:(?<!\d)-)?\d[\d,]*(?:\.\d+)?")
_CHOICE = re.compile(
    r"(?:(?:answer|choice|option)(?:\sis)?\s?:?\s?[*(\[]{0,3}|\(|\\boxed\{(?:\\text\{)?)([A-J])(?![\w'])", re.IGNORECASE
)
_LETTER = re.compile(r"(?<!\w)([A-J])[.)\]*]{0,3}\s*\Z")


def last_number(text: str) -> str | None:
    """The last number of a text, without commas and idle zeros."""
    found = _NUMBER.findall(text)
    return f"{Decimal(found[-1].replace(',', '')).normalize():f}" if found else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` of a text; one that is not closed is none."""
    start = text.rfind("\\boxed{")
    depth = 0
    for at in range(start + 6, len(text)) if start >= 0 else ():
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return text[start + 7 : at].strip() or None
    return None


def last_choice(text: str) -> str | None:
    """The letter, A to J, that a text names last as its answer: "the answer is B", "(B)", or a B at its end."""
    found = [*_CHOICE.finditer(text)]
    last = _LETTER.search(text, max(0, len(text) - 20)) or (found[-1] if found else None)
    return None if last is None else last[1].upper()


NAMED: dict[str, Extract] = {"number": last_number, "boxed": last_boxed, "choice": last_choice}
"""What can be looked for by name."""


def as_extract(what: str | Extract) -> Extract:
    """A name in ``NAMED``, a function of your own, or a regular expression whose last match is the answer.

    Of an expression with a group, the first group is the answer. Answers have no white space around them.

    Raises:
        InputError: none of these.
    """
    if callable(what):
        function = what
        return lambda text: None if (found := function(text)) is None else str(found).strip()
    if not isinstance(what, str):
        raise InputError(f"extract must be {', '.join(NAMED)}, a regular expression or a function, got {what!r}.")
    if what in NAMED:
        return NAMED[what]
    try:
        pattern = re.compile(what)
    except re.error as error:
        raise InputError(f"{what!r} is not a regular expression: {error}.") from error

    def last(text: str) -> str | None:
        matches = [*pattern.finditer(text)]
        found = matches[-1].group(1 if pattern.groups else 0) if matches else None
        return None if found is None else found.strip()

    return last


def classes(answers: Sequence[str | None]) -> list[int | None]:
    r"""The class of each answer; None has none.

    Answers are the same when their text is, and, where ``math-verify`` is installed (``pip install 'bon[evals]'``),
    when it finds them equal: 0.5 and \frac{1}{2}. What is equal to the same is the same.
    """
    distinct = [*dict.fromkeys(answer for answer in answers if answer is not None)]
    of = {answer: index for index, answer in enumerate(distinct)}
    for a, b in itertools.combinations(distinct, 2):
        if of[a] != of[b] and _equal(a, b):
            old, new = max(of[a], of[b]), min(of[a], of[b])
            of = {answer: new if index == old else index for answer, index in of.items()}
    return [None if answer is None else of[answer] for answer in answers]


_HAS_VERIFY = importlib.util.find_spec("math_verify") is not None
_LONGEST = 80  # characters of an answer that is looked at as mathematics


@functools.lru_cache(maxsize=4096)  # a group is voted on again whenever a candidate comes
def _equal(a: str, b: str) -> bool:
    if not _HAS_VERIFY or max(len(a), len(b)) > _LONGEST or not all(re.search(r"\d|\\", text) for text in (a, b)):
        return False
    if _NUMBER.fullmatch(a) and _NUMBER.fullmatch(b):
        return last_number(a) == last_number(b)
    from math_verify import verify

    powers = [re.findall(r"[!^]", text) for text in (a, b)]
    return powers[0] == powers[1] and bool(verify(_parsed(a), _parsed(b), timeout_seconds=None))


@functools.lru_cache(maxsize=1024)
def _parsed(answer: str) -> Any:
    from math_verify import parse

    # Its time limit is a signal, which only the main thread gets: leave it nothing that takes time.
    return parse(f"\\boxed{{{re.sub(r'[!^]', ' ', answer)}}}", parsing_timeout=None)
