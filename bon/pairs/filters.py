"""Which pairs are worth keeping: length, language, repetition, and answers that are none."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from bon.errors import InputError, UnknownNameError
from bon.pairs.alike import tokens
from bon.scorers.guard_rules import RULES, Read, fired

_WORDS = {  # frequent ones; what several languages have counts for each
    "de": "der die das und ist nicht ein eine mit zu den dem für auf wie ich sie wird sind auch bei von im in",
    "en": "the of and to is in a that it for on with as are this be you your an i by from what how do me write",
    "es": "el la los las y es en que un una por con para de del se su como más qué pero está lo al",
    "fr": "le la les de des et est un une dans que pour qui sur pas avec vous ce du au je il nous plus sont en",
    "it": "il la di che è e per un una con non del della in sono gli le nel come più anche questo lo alla",
    "nl": "de het een en van is niet dat op te voor met zijn er aan in ook wordt je hoe wat",
    "pt": "o a os as e é que um uma de para com não do da em por como mais são ao você dos na no",
}
_SCRIPTS = {"CYRILLIC": "ru", "HANGUL": "ko", "ARABIC": "ar", "HEBREW": "he", "GREEK": "el", "THAI": "th"}
_SCRIPTS |= {"DEVANAGARI": "hi", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh"}
LANGUAGES = sorted({*_WORDS, *_SCRIPTS.values()})
"""Codes that ``language`` can return."""


@lru_cache(maxsize=16)
def language(text: str) -> str | None:
    """The language of a text by its script and its frequent words; None where these do not say (code, names).

    A script stands for its most frequent language: Cyrillic for Russian, Arabic for Arabic, Devanagari for Hindi.
    """
    scripts = Counter(unicodedata.name(letter, "").split(" ")[0] for letter in text[:2000] if letter.isalpha())
    foreign = Counter[str]()
    for script, count in scripts.items():
        foreign[_SCRIPTS.get(script, "")] += count
    if foreign["ja"] > 0.1 * (foreign["ja"] + foreign["zh"]):  # kana make Japanese of it
        foreign["ja"] += foreign.pop("zh", 0)
    most = max(foreign, key=lambda code: foreign[code], default="")
    if most:
        return most
    said = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    hits = {code: sum(said[word] for word in listed.split()) for code, listed in _WORDS.items()}
    first, second = sorted(hits, key=lambda code: -hits[code])[:2]
    return first if hits[first] > hits[second] else None


@dataclass(frozen=True)
class Filters:
    """What a pair must be like.

    Args:
        languages: of instruction and response, codes of ``LANGUAGES``; () takes all. A text whose language cannot be
            told (code) is kept.
        least_words: of an instruction.
        most_words: of each of both.
        strip: regular expressions; what they match is taken out of both texts.
        drop: regular expressions; a pair in which one matches is refused.

    Raises:
        InputError: an unknown language, or an expression that is none.
    """

    languages: Sequence[str] = ()
    least_words: int = 3
    most_words: int = 400
    strip: Sequence[str] = ()
    drop: Sequence[str] = ()
    _strip: Sequence[re.Pattern[str]] = field(init=False, repr=False)
    _drop: Sequence[re.Pattern[str]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for code in self.languages:
            if code not in LANGUAGES:
                raise UnknownNameError("language", code, LANGUAGES)
        for name in ("strip", "drop"):
            object.__setattr__(self, f"_{name}", [_compiled(name, pattern) for pattern in getattr(self, name)])

    def stripped(self, text: str) -> str:
        """A text without what is to be taken out."""
        for pattern in self._strip:
            text = pattern.sub("", text)
        return text.strip()

    def of_instruction(self, text: str) -> str | None:
        """Why an instruction is refused; None where it is not."""
        reason = self.of_text("instruction", text, self.least_words)
        repeats = reason is None and RULES["repeats"].fires(Read(""), Read(text))
        return "the instruction repeats itself" if repeats else reason

    def of_response(self, instruction: str, text: str) -> str | None:
        """Why a response is refused; None where it is not."""
        if reason := self.of_text("response", text):
            return reason
        rule = fired(instruction, text)
        return None if rule is None else f"of the response: {RULES[rule].says}"

    def of_text(self, what: str, text: str, least: int = 1) -> str | None:
        """Why a text is refused, whatever it belongs to; None where it is not."""
        count = len(tokens(text))
        if not least <= count <= self.most_words:
            return f"the {what} is too {'short' if count < least else 'long'}"
        if self.languages and (language(text) or self.languages[0]) not in self.languages:
            return f"the {what} is in another language"
        return f"--drop matches the {what}" if any(one.search(text) for one in self._drop) else None


def _compiled(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"--{name} {pattern!r} is no regular expression: {error}.") from error
