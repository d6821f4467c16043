"""Instructions that are alike: near duplicates, texts that stand in others, and neighbours.

A text is the set of its words and of its pairs of adjacent words (a character is a word in scripts without spaces).
None of these look-ups compares everything with everything.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from heapq import nsmallest
from itertools import chain, pairwise

from bon.similarity import characters, multiset_f1, unicode_words

NEAR = 0.6
"""Jaccard similarity from which on two texts are near duplicates: about one word in seven differs."""

_RUN = 13  # words in a row that a text has from another one: the length that GPT-3's authors looked for (2005.14165, C)
_SHARED = 3  # items that two texts have in common before they are compared in full
_RAREST = 12  # words of a text by which its neighbours are looked up
_AROUND = 32  # texts with a word in common that are looked at, on either side
_CLOSEST = 24  # neighbours by rare words that are compared in full

Item = tuple[str, ...]
Texts = Iterable[str]


@lru_cache(maxsize=256)  # a text is looked up in several places, one after the other
def tokens(text: str) -> tuple[str, ...]:
    """The words of a text, lower-cased, without punctuation and articles."""
    return tuple(characters(text, unicode_words))


def items(words: Sequence[str]) -> frozenset[Item]:
    """A text's words and pairs of adjacent words."""
    return frozenset([*zip(words, strict=True), *pairwise(words)])


def jaccard(a: frozenset[Item], b: frozenset[Item]) -> float:
    """Share of all items that both have."""
    both = len(a & b)
    return both / max(1, len(a) + len(b) - both)


class Seen:
    """Texts that can be asked whether a near duplicate is among them; the answer is exact.

    Two sets of Jaccard similarity t or more have k of the first n - ceil(t n) + k of the n items of each in common, in
    any order that is fixed (prefix filtering: Chaudhuri et al. 2006; Wang et al. 2012). With the longest items first,
    which are rare, few texts have to be compared.

    Args:
        near: the Jaccard similarity from which on texts are near duplicates; 1 finds only texts of the same words.
        texts: those that are seen already.
    """

    def __init__(self, near: float = NEAR, texts: Texts = ()) -> None:
        self.near = near
        self._texts: list[tuple[str, frozenset[Item]]] = []
        self._exact: dict[str, int] = {}
        self._with: defaultdict[Item, list[int]] = defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Add a text."""
        if text in self._exact:
            return
        at = self._exact[text] = len(self._texts)
        having = items(tokens(text))
        self._texts.append((text, having))
        for item in self._prefix(having):
            self._with[item].append(at)

    def find(self, text: str) -> str | None:
        """The first text that is the same or nearly so; None where there is none."""
        if text in self._exact:
            return text
        having = items(tokens(text))
        shared = Counter(chain.from_iterable(self._with.get(item, ()) for item in self._prefix(having)))
        least = min(_SHARED, self._least(having))
        for at in sorted(at for at, count in shared.items() if count >= least):
            other, had = self._texts[at]
            if jaccard(having, had) >= self.near:
                return other
        return None

    def _least(self, having: frozenset[Item]) -> int:
        """Items that a near duplicate has of these."""
        return math.ceil(self.near * len(having) - 1e-9)

    def _prefix(self, having: frozenset[Item]) -> list[Item]:
        ordered = sorted(having, key=lambda item: (-sum(map(len, item)), item))
        return ordered[: len(having) - self._least(having) + _SHARED]


class HeldOut:
    """Texts that no pair may hold: exactly, nearly, or in a run of 13 words.

    Args:
        texts: the instructions of rows that something will be judged on.
    """

    def __init__(self, texts: Texts = ()) -> None:
        self._seen, self._runs = Seen(), set[Item]()
        for text in texts:
            self._seen.add(text)
            self._runs |= _runs(tokens(text))

    def holds(self, text: str) -> bool:
        """Whether a text is one of them, or as good as one."""
        return not self._runs.isdisjoint(_runs(tokens(text))) or self._seen.find(text) is not None


def _runs(words: Sequence[str]) -> set[Item]:
    return {tuple(words[at : at + _RUN]) for at in range(len(words) - _RUN + 1)}


def neighbours(texts: Sequence[str], count: int) -> list[list[str]]:
    """For each text the nearest others that are no near duplicates of it: the same topic, another task.

    Those that share the rarest words are looked up, and the nearest of them by word F1 are taken. Of a frequent word
    only some of the texts that have it are looked at: the cost grows with the number of texts and not with its square.

    Args:
        texts: distinct ones.
        count: neighbours of each, at most.
    """
    words = [tokens(text) for text in texts]
    having = list(map(items, words))
    posted: defaultdict[str, list[int]] = defaultdict(list)
    for at, own in enumerate(words):
        for word in set(own):
            posted[word].append(at)
    found = []
    for at, own in enumerate(words):
        shared: Counter[int] = Counter()
        for word in sorted(set(own), key=lambda word: (len(posted[word]), word))[:_RAREST]:
            others = posted[word]
            weight, middle = math.log(len(texts) / len(others)), bisect_left(others, at)
            for other in others[max(0, middle - _AROUND) : middle + _AROUND]:
                shared[other] += weight  # type: ignore[assignment]
        close = nsmallest(_CLOSEST, shared, key=lambda other: (-shared[other], other))
        ranked = [
            (-multiset_f1(words[other], own).f1, other)
            for other in close
            if shared[other] > 0 and jaccard(having[other], having[at]) < NEAR
        ]
        found.append([texts[other] for _, other in sorted(ranked)[:count]])
    return found
