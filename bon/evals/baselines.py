"""Rules that pick without a model, as rewards: what every scorer is measured beside. And the words that they count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from bon.evals.metrics import Floats
from bon.scorers.consensus import consensus
from bon.similarity import WordF1, characters

BASELINES = ("random", "first", "longest", "shortest", "consensus", "majority", "greedy", "bigger", "oracle")


def baselines(texts: Sequence[str], labels: Floats, extract: Callable[[str], str | None] | None) -> dict[str, Floats]:
    """The rewards that each rule gives to the candidates of a row; equal rewards share the pick.

    Args:
        texts: the candidates; length is counted in characters.
        labels: what the oracle knows.
        extract: the final answer of a text, for the majority vote, which is left out where this is None. A text without
            an answer has no vote.
    """
    length = np.array([len(text) for text in texts], float)
    rules = {
        "random": np.zeros(len(texts)),
        "first": -np.arange(len(texts), dtype=float),
        "longest": length,
        "shortest": -length,
        "consensus": np.array(consensus(WordF1(), texts)),
    }
    if extract is not None:
        answers = [extract(text) for text in texts]
        votes = Counter(answer for answer in answers if answer is not None)
        rules["majority"] = np.array([0 if answer is None else votes[answer] for answer in answers], float)
    return {**rules, "oracle": labels}


def words_of(text: str) -> Counter[str]:
    """How often each word occurs; in a script without spaces, each character."""
    return Counter(characters(text))


def repeated(text: str, within: str) -> float:
    """The echo: the share of the words of ``text`` that ``within`` has as well, as multisets."""
    words = words_of(text)
    return (words & words_of(within)).total() / max(1, words.total())
