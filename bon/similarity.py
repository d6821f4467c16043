"""How alike two instructions are: word F1 exactly as in the FLIP paper, variants by name, and the bound behind pruning.

The default is the multiset word F1 of the released code (github.com/yikee/FLIP, ``metrics.py``; SQuAD's metric with a
score of 0 whenever no word matches, two empty texts included): lower-case, delete ASCII punctuation, drop a/an/the,
split at white space. A script without spaces would be one giant word there, so an instruction that has one (Chinese,
Japanese, Thai, ...) is compared by its characters. Nothing here knows about models or candidates.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from bon.errors import InputError, UnknownNameError

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Tokenize = Callable[[str], list[str]]
Compared = Literal["words", "characters", "texts"]


@dataclass(frozen=True, slots=True)
class Match:
    """Agreement of an inferred instruction with the original one, each number from 0 to 1.

    Args:
        f1: the reward.
        precision: share of the inferred text that is in the original; None for metrics without one.
        recall: share of the original that was inferred; None for metrics without one.
        compared: what was counted: "words", "characters" (see ``characters``), or "texts" as a whole.
    """

    f1: float
    precision: float | None = None
    recall: float | None = None
    compared: Compared = "words"


class Bound(Protocol):
    """An upper bound that tightens while a text grows."""

    def update(self, text: str) -> float:
        """Return what the similarity can still reach; ``text`` starts with the text of the call before."""


@runtime_checkable
class Similarity(Protocol):
    """A measure of agreement between an inferred instruction and the original.

    Attributes:
        name: what to call it in a table.
        maximum: the largest value it can have.
    """

    @property
    def name(self) -> str:
        """What to call it in a table."""

    @property
    def maximum(self) -> float:
        """The largest value it can have."""

    def __call__(self, inferred: str, instruction: str) -> Match:
        """Compare the two texts."""

    def bound(self, instruction: str) -> Bound | None:
        """Start an upper bound for a growing inferred text; None where the metric has none."""


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Split a text into the words that the paper's metric counts.

    Punctuation is deleted and not replaced, so ``foo-bar`` is the one word ``foobar``; a word therefore ends at white
    space only, and the words of a text are those of its white-space-separated parts, one after the other.
    """
    return _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def unicode_words(text: str) -> list[str]:
    """Split like ``words`` after NFKC, with every script's punctuation deleted (curly quotes, dashes, full stops)."""
    normal = unicodedata.normalize("NFKC", text).lower().translate(_ASCII_PUNCTUATION)
    kept = "".join(c for c in normal if not unicodedata.category(c).startswith("P"))
    return _ARTICLES.sub(" ", kept).split()


# Letters and marks of the scripts that put no spaces between words. Korean has spaces; digits stay in words.
_CHARACTER = re.compile(
    "["
    "\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # ideographs
    "\u3031-\u3035\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # kana
    "\u3105-\u312f\u31a0-\u31bf"  # bopomofo
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf"  # Thai, Lao
    "\u1780-\u17d3\u17d7\u17dc-\u17dd"  # Khmer
    "\u1000-\u103f\u1050-\u108f\u109a-\u109d\ua9e0-\ua9ef\uaa60-\uaa76\uaa7a-\uaa7f"  # Myanmar
    "\u0f00\u0f40-\u0f84\u0f88-\u0fbc\u1950-\u19c9\u1a20-\u1a7f\uaa80-\uaadd\ua000-\ua4cf"  # Tibetan, Tai, Yi
    "]"
)
# Their punctuation and invisible breaks, which part words; curly double quotes, dashes and dots come with them.
_MARK = re.compile(
    "["
    "\u3001-\u3003\u3008-\u3011\u3014-\u301f\u3030\u303d\u30a0\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    "\u201c-\u201f\u2010-\u2015\u2025-\u2027\u00b7\u0e2f\u0e4f\u0e5a\u0e5b\u17d4-\u17d6\u17d8-\u17da\u104a-\u104f\u0f01-\u0f14"
    "\u200b\ufe00-\ufe0f\U000e0100-\U000e01ef"  # zero-width space, variation selectors
    "]"
)


def characters(text: str, tokenize: Tokenize = words) -> list[str]:
    """Split a text like ``tokenize``, but each character of a script without spaces is a token of its own.

    Runs of other characters stay words, so text in several scripts works. What comes after such a character or after
    white space changes nothing before it.
    """
    return tokenize(_CHARACTER.sub(r" \g<0> ", _MARK.sub(" ", text)))


def _tokenizer(instruction: str, tokenize: Tokenize) -> tuple[Tokenize, Compared]:
    """How to split texts that are compared with an instruction; decided by it alone: a growing text changes nothing."""
    if tokenize in WORD_LOCAL and _CHARACTER.search(instruction):
        return partial(characters, tokenize=tokenize), "characters"
    return tokenize, "words"


WORD_LOCAL: tuple[Tokenize, ...] = (words, unicode_words)
"""Functions that split each white-space-separated part by itself: what ``F1Bound`` and ``characters`` rely on."""


def multiset_f1(inferred: Sequence[str], original: Sequence[str], compared: Compared = "words") -> Match:
    """F1 of two multisets; 0 when nothing matches."""
    return _f1((Counter(inferred) & Counter(original)).total(), len(inferred), len(original), compared)


def _f1(same: int, inferred: int, original: int, compared: Compared) -> Match:
    """F1 of so many matches, in the paper's order of floating-point operations."""
    if same == 0:
        return Match(0.0, 0.0, 0.0, compared)
    precision = same / inferred
    recall = same / original
    return Match(2 * precision * recall / (precision + recall), precision, recall, compared)


def upper_bound(original_words: int, unmatched: int) -> float:
    """Highest F1 that is left once ``unmatched`` inferred words match nothing in an original of R words.

    At best all R words still come and nothing else does: precision R/(R+u), recall 1, so F1 <= 2R/(2R+u). The result
    is rounded up by more than the rounding error of ``multiset_f1``, so that a tie is never mistaken for a loss.
    """
    if original_words == 0:
        return 0.0
    return min(1.0, 2 * original_words / (2 * original_words + unmatched) * (1 + 1e-12))


class F1Bound:
    """The bound of ``upper_bound`` for a text that grows; a word counts only once white space follows it.

    Args:
        instruction: the original.
        tokenize: one of ``WORD_LOCAL``; another could take back words that were counted.
    """

    def __init__(self, instruction: str, tokenize: Tokenize = words) -> None:
        self._tokenize, compared = _tokenizer(instruction, tokenize)
        self._by_character = compared == "characters"
        self._left = Counter(self._tokenize(instruction))
        self._size = self._left.total()
        self._looked_at = self._counted = 0
        self.unmatched = 0

    def update(self, text: str) -> float:
        """Count the words that were finished since the last call, and return the bound."""
        end = len(text)
        while end > self._looked_at and not self._ends_word(text[end - 1]):
            end -= 1
        if end > self._looked_at:
            for word in self._tokenize(text[self._counted : end]):
                if self._left[word] > 0:
                    self._left[word] -= 1
                else:
                    self.unmatched += 1
            self._counted = end
        self._looked_at = max(self._looked_at, len(text))
        return upper_bound(self._size, self.unmatched)

    def _ends_word(self, character: str) -> bool:
        return character.isspace() or (self._by_character and _CHARACTER.match(character) is not None)


@dataclass(frozen=True, slots=True)
class WordF1:
    """Multiset F1 over words, or over characters where the instruction's script has no spaces.

    Bounded, so reconstructions can be pruned, unless ``tokenize`` is a function of the caller's, of which nothing is
    known: its tokens are compared as they are.
    """

    name: str = "word_f1"
    tokenize: Tokenize = words
    maximum: float = 1.0

    def __call__(self, inferred: str, instruction: str) -> Match:
        """Compare the two texts."""
        split, compared = _tokenizer(instruction, self.tokenize)
        return multiset_f1(split(inferred), split(instruction), compared)

    def bound(self, instruction: str) -> Bound | None:
        """Start a bound."""
        return F1Bound(instruction, self.tokenize) if self.tokenize in WORD_LOCAL else None

    def among(self, texts: Sequence[str]) -> Array:
        """The value of each text beside each other one, [n, n]; by characters where any of them needs it."""
        split, _ = _tokenizer("\n".join(texts), self.tokenize)
        words_of = [split(text) for text in texts]
        number: dict[str, int] = {}
        item = np.array([number.setdefault(word, len(number)) for some in words_of for word in some], np.int64)
        row = np.repeat(np.arange(len(texts)), [len(some) for some in words_of])
        sizes, same = overlaps(row, item, len(texts))
        f1: Array = 2 * same / np.maximum(1, sizes + sizes[:, None])
        return f1


@dataclass(frozen=True, slots=True)
class CharNgramF1:
    """Multiset F1 over character n-grams, for scripts that write no spaces (Chinese, Japanese, Thai).

    Texts are normalised as in ``unicode_words`` and joined without spaces; a text shorter than n counts as one n-gram.
    No bound: a new character changes n-grams that are already there.
    """

    n: int = 2
    name: str = "char_ngram_f1"
    maximum: float = 1.0

    def __call__(self, inferred: str, instruction: str) -> Match:
        """Compare the two texts."""
        return multiset_f1(self._ngrams(inferred), self._ngrams(instruction), "characters")

    def bound(self, instruction: str) -> Bound | None:
        """There is none."""
        return None

    def _ngrams(self, text: str) -> list[str]:
        joined = "".join(unicode_words(text))
        return [joined[i : i + self.n] for i in range(max(1, len(joined) - self.n + 1))] if joined else []


@dataclass(frozen=True, slots=True)
class ChrF:
    """Character n-gram F-score (chrF; Popović 2015): mean precision and recall over n-grams of 1 to ``order``
    characters, recall counting ``beta`` times as much.

    Lower-case, white space as one space (sacreBLEU's options ``lowercase`` and ``whitespace``, whose figures these are;
    it counts each text anew for each pair). An order that one of the texts is too short for does not count. No bound.
    """

    order: int = 6
    beta: float = 2.0
    name: str = "chrf"
    maximum: float = 1.0

    def __call__(self, inferred: str, instruction: str) -> Match:
        """Compare the two texts."""
        f, precision, recall = (float(each[0, 1]) for each in self._compare([inferred, instruction]))
        return Match(f, precision, recall, "characters")

    def bound(self, instruction: str) -> Bound | None:
        """There is none."""
        return None

    def among(self, texts: Sequence[str]) -> Array:
        """The value of each text beside each other one, [n, n]: row i as inferred, column j as instruction."""
        return self._compare(texts)[0]

    def _compare(self, texts: Sequence[str]) -> tuple[Array, Array, Array]:
        joined = [" ".join(text.lower().split()) for text in texts]
        row = np.repeat(np.arange(len(texts)), [len(text) for text in joined])
        character = np.array([ord(c) for text in joined for c in text], np.int64)
        gram = np.zeros_like(character)  # number of the n-gram that begins at each place
        precision, recall, orders = np.zeros((3, len(texts), len(texts)))
        for n in range(1, self.order + 1):
            gram = gram[: len(character) - n + 1] << 21 | character[n - 1 :]  # a character has 21 bits
            gram = np.unique(gram, return_inverse=True)[1].reshape(-1)
            whole = row[: len(gram)] == row[n - 1 :]  # within one text
            sizes, same = overlaps(row[: len(gram)][whole], gram[whole], len(texts))
            orders += np.outer(sizes > 0, sizes > 0)
            precision += same / np.maximum(1, sizes)[:, None]
            recall += same / np.maximum(1, sizes)
        precision, recall = precision / np.maximum(1, orders), recall / np.maximum(1, orders)
        weight = self.beta**2
        f = (1 + weight) * precision * recall / np.maximum(weight * precision + recall, np.finfo(float).tiny)
        return f, precision, recall


def overlaps(row: Indices, item: Indices, rows: int) -> tuple[Indices, Array]:
    """The sizes of multisets, [rows], and those of the intersections of each two, [rows, rows].

    Args:
        row: [items], whose each is.
        item: [items], what it is.
        rows: how many multisets.
    """
    order = np.lexsort((item, row))
    row, item = row[order], item[order]
    begins = np.flatnonzero(np.diff(row, prepend=-1) | np.diff(item, prepend=-1))
    times = np.arange(len(item)) - np.repeat(begins, np.diff(begins, append=len(item)))
    # An item's first occurrence is one thing to have in common, its second another.
    _, column, had = np.unique(item * (times.max(initial=0) + 1) + times, return_inverse=True, return_counts=True)
    sizes, shared = np.bincount(row, minlength=rows), had[column] > 1
    row, column = row[shared], np.cumsum(had > 1)[column[shared]] - 1
    order = np.argsort(column, kind="stable")
    row, column = row[order], column[order]
    same = np.zeros((rows, rows))
    for first in range(0, int(column.max(initial=-1)) + 1, _COLUMNS):
        start, stop = np.searchsorted(column, (first, first + _COLUMNS))
        block = np.zeros((rows, _COLUMNS), np.float32)
        block[row[start:stop], column[start:stop] - first] = 1
        same += block @ block.T
    np.fill_diagonal(same, sizes)
    return sizes, same


_COLUMNS = 4096  # looked at together


@dataclass(frozen=True, slots=True)
class RougeL:
    """F1 over the longest common subsequence of the tokens of ``WordF1`` (ROUGE-L with beta 1): order counts."""

    name: str = "rouge_l"
    maximum: float = 1.0

    def __call__(self, inferred: str, instruction: str) -> Match:
        """Compare the two texts."""
        split, compared = _tokenizer(instruction, words)
        a, b = split(inferred), split(instruction)
        return _f1(_longest_common_subsequence(a, b), len(a), len(b), compared)

    def bound(self, instruction: str) -> Bound | None:
        """The multiset bound holds here too: a common subsequence is never longer than the multiset overlap."""
        return F1Bound(instruction)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): O(|a|) steps on |b|-bit integers.

    Not rapidfuzz's: it takes words of equal hash for equal, and is 12 MB.
    """
    where = dict.fromkeys(a, 0)  # nothing for other words of b, which may be many: each would have |b| bits
    for i, word in enumerate(b):
        if word in where:
            where[word] |= 1 << i
    full = (1 << len(b)) - 1
    rows = full
    for word in a:
        hits = rows & where[word]
        rows = ((rows + hits) | (rows - hits)) & full
    return len(b) - rows.bit_count()


@dataclass(frozen=True, slots=True)
class EmbeddingSimilarity:
    """Cosine similarity of sentence embeddings, negative values counted as 0; opt-in, without a bound.

    Args:
        encode: texts to an array [len(texts), dim], for instance ``SentenceTransformer(name).encode``.
    """

    encode: Callable[[list[str]], object]
    name: str = "embedding"
    maximum: float = 1.0

    def __call__(self, inferred: str, instruction: str) -> Match:
        """Compare the two texts."""
        vectors = np.asarray(self.encode([inferred, instruction]), dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != 2:
            raise InputError(f"encode must return an array [2, dim] for 2 texts, got shape {vectors.shape}.")
        lengths = np.linalg.norm(vectors, axis=1)
        if not lengths.all():
            return Match(0.0, compared="texts")
        cosine = float(vectors[0] @ vectors[1] / lengths.prod())
        return Match(min(1.0, max(0.0, cosine)), compared="texts")

    def bound(self, instruction: str) -> Bound | None:
        """There is none."""
        return None


SIMILARITIES: dict[str, Callable[[], Similarity]] = {
    "word_f1": WordF1,
    "word_f1_unicode": lambda: WordF1("word_f1_unicode", unicode_words),
    "char_ngram_f1": CharNgramF1,
    "chrf": ChrF,
    "rouge_l": RougeL,
}


def among(similarity: Similarity, texts: Sequence[str]) -> Array:
    """The value of each text beside each other one, [n, n]: row i as inferred, column j as instruction."""
    at_once: Callable[[Sequence[str]], Array] | None = getattr(similarity, "among", None)
    if at_once is not None:
        return at_once(texts)
    return np.array([[similarity(one, other).f1 for other in texts] for one in texts])


def as_similarity(spec: str | Similarity) -> Similarity:
    """Look a metric up by name; a metric object passes through.

    Raises:
        UnknownNameError: no such metric.
        InputError: "embedding" by name, which needs an encoder.
    """
    if not isinstance(spec, str):
        if not isinstance(spec, Similarity):
            raise InputError(f"similarity must be a name or a Similarity, got {spec!r}.")
        return spec
    if spec == "embedding":
        raise InputError("the similarity 'embedding' needs an encoder: pass EmbeddingSimilarity(model.encode).")
    if spec not in SIMILARITIES:
        raise UnknownNameError("similarity", spec, [*SIMILARITIES, "embedding"])
    return SIMILARITIES[spec]()


def matched_words(inferred: str, instruction: str) -> list[tuple[int, int]]:
    """Find the parts of ``inferred`` that match the instruction, for highlighting.

    Returns:
        (start, end) character spans, in order, one for each white-space-separated part whose words are all still
        unmatched words of the instruction (as a multiset); articles match nothing and are not listed. Where the
        instruction is compared by characters, its characters are parts too, and spans that touch are joined.
    """
    return _spans(inferred, instruction, instruction, matched=True)


def missed_words(inferred: str, instruction: str) -> list[tuple[int, int]]:
    """Find the parts of the instruction that ``inferred`` lacks: spans as those of ``matched_words``."""
    return _spans(instruction, inferred, instruction, matched=False)


def _spans(text: str, other: str, instruction: str, *, matched: bool) -> list[tuple[int, int]]:
    split, compared = _tokenizer(instruction, words)
    left = Counter(split(other))
    spans: list[tuple[int, int]] = []
    for part in (_PART if compared == "characters" else _WORD).finditer(text):
        wanted = Counter(split(part.group()))
        if found := all(left[word] >= count for word, count in wanted.items()):
            left.subtract(wanted)  # unlike <= and -=, no look at the whole text for each part
        if wanted and found == matched:
            start = spans.pop()[0] if spans and spans[-1][1] == part.start() else part.start()
            spans.append((start, part.end()))
    return spans


_WORD = re.compile(r"\S+")
_PART = re.compile(rf"{_CHARACTER.pattern}|[^\s{_CHARACTER.pattern[1:-1]}{_MARK.pattern[1:-1]}]+")


def mean_bound(finished: Iterable[float], unfinished: Iterable[float]) -> float:
    """Highest mean that finished values and bounded ones can reach when any bounded one may also drop out."""
    values = list(finished)
    for bound in sorted(unfinished, reverse=True):
        if not values or bound > math.fsum(values) / len(values):
            values.append(bound)
    return math.fsum(values) / len(values) * (1 + 1e-12) if values else 0.0
