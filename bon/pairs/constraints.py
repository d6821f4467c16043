"""The same instruction with one constraint dropped, added or changed, by rules: negatives that are wrong in one place.

The rules know English, and constraints in these forms: numbers, lengths, languages (also of programs), formats, "in the
style of", "without ...", sentences such as "Do not ...", and words with an opposite. A constraint is added only where
the response plainly breaks it. Whether the response keeps what is dropped or changed is not checked, and a change in a
text that the instruction quotes counts as one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from bon.pairs.filters import language

_NUMBERS = [
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "twelve",
    "fifteen",
    "twenty",
    "fifty",
]
_CODES = {"English": "en", "French": "fr", "German": "de", "Spanish": "es", "Italian": "it", "Portuguese": "pt"}
_PROGRAMMING = ["Python", "JavaScript", "Java", "Ruby", "PHP", "Rust"]
_FORMATS = ["a table", "a bulleted list", "a numbered list", "JSON", "a poem", "a dialogue", "an email", "a haiku"]
_STYLES = ["Shakespeare", "Hemingway", "Dr. Seuss", "a news report", "a fairy tale", "a legal contract", "a pirate"]
_PAIRS = """advantages disadvantages, pros cons, benefits risks, positive negative, strengths weaknesses, best worst,
    increase decrease, more fewer, longer shorter, short long, brief detailed, formal informal, simple complex,
    always never, similarities differences, first last, highest lowest, maximum minimum, ascending descending,
    happy sad, easy difficult, cheap expensive, include avoid, before after, with without"""
_OPPOSITES = dict(pair.split() for pair in _PAIRS.split(","))
_OPPOSITES |= {other: one for one, other in _OPPOSITES.items()} | {
    "do not": "do",
    "don't": "do",
    "should not": "should",
}

_UNIT = r"(?:words?|sentences?|paragraphs?|lines?|characters?|bullet points?|steps?|items?)"
_COUNT = rf"(?:\d+|{'|'.join(['one', *_NUMBERS])})"


def _any(words: list[str]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def _one_of(others: list[str]) -> Callable[[str, random.Random], str]:
    return lambda old, draw: draw.choice([other for other in others if other.lower() != old.lower()])


_CHANGES: list[tuple[re.Pattern[str], Callable[[str, random.Random], str]]] = [
    (re.compile(r"(?<![\w.])\d{1,3}(?![\w.]*\d)\b"), lambda old, draw: str(int(old) * 2 + draw.randint(1, 3))),
    (_any(_NUMBERS), _one_of(_NUMBERS)),
    (_any(list(_CODES)), _one_of(list(_CODES))),
    (_any(_PROGRAMMING), _one_of(_PROGRAMMING)),
    (_any(_FORMATS), _one_of(_FORMATS)),
    (re.compile(r"(?<=in the style of )[^.,;\n]+"), _one_of(_STYLES)),
    (_any(list(_OPPOSITES)), lambda old, draw: _OPPOSITES[old.lower()]),
]
"""What is replaced, and by what."""

_DROPS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf",? (?:in|using|with|of) (?:(?:at (?:most|least)|no more than|about|exactly|under) )?{_COUNT} {_UNIT}"
        "(?: or (?:less|fewer|more))?",
        r",? in the style of [^.,;\n]+",
        rf",? in (?:{'|'.join(_CODES)})\b",
        r",? without [^.,;\n]+",
        rf",? (?:as|in) (?:{'|'.join(_FORMATS)})\b(?: format)?",
        r"(?<=[.!?]) (?:do not|don't|use|make sure|keep|include|avoid|be sure|your (?:answer|response)|the response)\b"
        r"[^.!?\n]*[.!?]",
    )
]

_ADDED: list[tuple[str, Callable[[str], bool]]] = [
    ("Answer in one sentence.", lambda response: len(re.findall(r"[.!?](?:\s|$)", response)) > 2),
    *((f"Use at most {n} words.", lambda response, n=n: len(response.split()) > 2 * n) for n in (20, 50, 100)),
    *((f"Use at least {n} words.", lambda response, n=n: 2 * len(response.split()) < n) for n in (50, 100, 200)),
    ("Answer as a bulleted list.", lambda response: not re.search(r"(?m)^\s*[-*•]", response)),
    ("Answer in JSON.", lambda response: not re.search(r"[{\[]", response)),
    *((f"Answer in {name}.", lambda response, code=code: language(response) not in (None, code))
      for name, code in _CODES.items()),
    ("Do not use any commas.", lambda response: "," in response),
    ("Use lower case only.", lambda response: response != response.lower()),
    ("End with a question.", lambda response: not response.rstrip().endswith("?")),
]  # fmt: skip
"""What is asked for in addition, and whether a response breaks it."""


def altered(instruction: str, response: str, count: int) -> list[str]:
    """Instructions that differ from this one in one constraint: one changed, one dropped, one added, as far as it goes.

    Args:
        instruction: what the response answers; the same one is always altered in the same way.
        response: a good answer to it.
        count: how many at most.
    """
    if language(instruction) not in ("en", None):
        return []
    draw = random.Random(instruction)
    kinds = [list(kind) for kind in (_changed(instruction, draw), _dropped(instruction), _added(instruction, response))]
    drawn = [draw.choice(kind) for kind in kinds if kind]
    return [text for text in dict.fromkeys(drawn) if text != instruction][:count]


def _changed(instruction: str, draw: random.Random) -> Iterator[str]:
    for pattern, other in _CHANGES:
        for found in pattern.finditer(instruction):
            new = other(found[0], draw)
            new = new.capitalize() if found[0][0].isupper() and new.islower() else new
            yield instruction[: found.start()] + new + instruction[found.end() :]


def _dropped(instruction: str) -> Iterator[str]:
    for pattern in _DROPS:
        for found in pattern.finditer(instruction):
            rest = instruction[: found.start()] + instruction[found.end() :]
            if len(rest.split()) > 2:
                yield rest


def _added(instruction: str, response: str) -> Iterator[str]:
    broken = [text for text, breaks in _ADDED if breaks(response)]
    for text in broken:
        yield f"{instruction}{chr(10) * 2 if chr(10) in instruction else ' '}{text}"
