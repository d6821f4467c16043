"""How alike two instructions are: word F1 exactly as in the FLIP paper, variants by name, and the bound behind pruning.

The default is the multiset word F1 of the released code (github.com/yikee/FLIP, ``metrics.py``; SQuAD's metric with a
score of 0 whenever no word matches, two empty texts included): lower-case, delete ASCII punctuation, drop a/an/the,
split at white space. Nothing here knows about models or candidates.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from bon.errors import InputError, UnknownNameError


@dataclass(frozen=True, slots=True)
class Match:
    """Agreement of an inferred instruction with the original one, each number from 0 to 1.

    Args:
        f1: the reward.
        precision: share of the inferred text that is in the original; None for metrics without one.
        recall: share of the original that was inferred; None for metrics without one.
    """

    f1: float
    precision: float | None = None
    recall: float | None = None


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


def multiset_f1(inferred: Sequence[str], original: Sequence[str]) -> Match:
    """F1 of two multisets, in the paper's order of floating-point operations; 0 when nothing matches."""
    same = sum((Counter(inferred) & Counter(original)).values())
    if same == 0:
        return Match(0.0, 0.0, 0.0)
    precision = same / len(inferred)
    recall = same / len(original)
    return Match(2 * precision * recall / (precision + recall), precision, recall)


def upper_bound(original_words: int, unmatched: int) -> float:
    """Highest F1 that is left once ``unmatched`` inferred words match nothing in an original of R words.

    At best all R words still come and nothing else does: precision R/(R+u), recall 1, so F1 <= 2R/(2R+u). The result
    is rounded up by more than the rounding error of ``multiset_f1``, so that a tie is never mistaken for a loss.
    """
    if original_words == 0:
        return 0.0
    return min(1.0, 2 * original_words / (2 * original_words + unmatched) * (1 + 1e-12))


class F1Bound:
    """The bound of ``upper_bound`` for a text that grows; the last word counts only once white space follows it."""

    def __init__(self, instruction: str, tokenize: Callable[[str], list[str]] = words) -> None:
        self._tokenize = tokenize
        self._left = Counter(tokenize(instruction))
        self._size = self._left.total()
        self._seen = 0
        self.unmatched = 0

    def update(self, text: str) -> float:
        """Count the words that were finished since the last call, and return the bound."""
        end = len(text) if text[-1:].isspace() else len(text) - len((text.rsplit(maxsplit=1) or [""])[-1])
        for word in self._tokenize(text[self._seen : end]):
            if self._left[word] > 0:
                self._left[word] -= 1
            else:
                self.unmatched += 1
        self._seen = max(self._seen, end)
        return upper_bound(self._size, self.unmatched)


@dataclass(frozen=True, slots=True)
class WordF1:
    """Multiset F1 over words; bounded, so reconstructions can be pruned."""

    name: str = "word_f1"
    tokenize: Callable[[str], list[str]] = words
    maximum: float = 1.0

    def __call__(self, inferred: str, instruction: str) -> Match:
        """Compare the two texts."""
        return multiset_f1(self.tokenize(inferred), self.tokenize(instruction))

    def bound(self, instruction: str) -> Bound | None:
        """Start a bound."""
        return F1Bound(instruction, self.tokenize)


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
        return multiset_f1(self._ngrams(inferred), self._ngrams(instruction))

    def bound(self, instruction: str) -> Bound | None:
        """There is none."""
        return None

    def _ngrams(self, text: str) -> list[str]:
        joined = "".join(unicode_words(text))
        return [joined[i : i + self.n] for i in range(max(1, len(joined) - self.n + 1))] if joined else []


@dataclass(frozen=True, slots=True)
class RougeL:
    """F1 over the longest common subsequence of words (ROUGE-L with beta 1, the words of ``words``): order counts."""

    name: str = "rouge_l"
    maximum: float = 1.0

    def __call__(self, inferred: str, instruction: str) -> Match:
        """Compare the two texts."""
        a, b = words(inferred), words(instruction)
        common = _longest_common_subsequence(a, b)
        if common == 0:
            return Match(0.0, 0.0, 0.0)
        precision, recall = common / len(a), common / len(b)
        return Match(2 * precision * recall / (precision + recall), precision, recall)

    def bound(self, instruction: str) -> Bound | None:
        """The multiset bound holds here too: a common subsequence is never longer than the multiset overlap."""
        return F1Bound(instruction)


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö 2004): O(|a|) steps on |b|-bit integers."""
    where: dict[str, int] = {}
    for i, word in enumerate(b):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(b)) - 1
    rows = full
    for word in a:
        hits = rows & where.get(word, 0)
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
            return Match(0.0)
        cosine = float(vectors[0] @ vectors[1] / lengths.prod())
        return Match(min(1.0, max(0.0, cosine)))

    def bound(self, instruction: str) -> Bound | None:
        """There is none."""
        return None


SIMILARITIES: dict[str, Callable[[], Similarity]] = {
    "word_f1": WordF1,
    "word_f1_unicode": lambda: WordF1("word_f1_unicode", unicode_words),
    "char_ngram_f1": CharNgramF1,
    "rouge_l": RougeL,
}


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
        unmatched words of the instruction (as a multiset); articles match nothing and are not listed.
    """
    left = Counter(words(instruction))
    spans = []
    for part in re.finditer(r"\S+", inferred):
        wanted = Counter(words(part.group()))
        if wanted and wanted <= left:
            left -= wanted
            spans.append(part.span())
    return spans


def mean_bound(finished: Iterable[float], unfinished: Iterable[float]) -> float:
    """Highest mean that finished values and bounded ones can reach when any bounded one may also drop out."""
    values = list(finished)
    for bound in sorted(unfinished, reverse=True):
        if not values or bound > math.fsum(values) / len(values):
            values.append(bound)
    return math.fsum(values) / len(values) * (1 + 1e-12) if values else 0.0
