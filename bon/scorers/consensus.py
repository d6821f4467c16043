"""Consensus: how much a candidate has in common with the others. No model runs; nothing is asked of the prompt.

Minimum Bayes risk decoding picks the candidate with the highest expected utility under the policy, estimated with the
policy's own samples (Kumar and Byrne, 2004; Eikema and Aziz, 2020): argmax over i of the mean over j of u(y_i, y_j).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import ClassVar

from bon.scorers.base import Needs, Pending, Scorer, by_group
from bon.similarity import Similarity, among, as_similarity
from bon.types import Score


class Consensus(Scorer):
    """Scores candidates by their mean similarity with all candidates of the task, themselves included.

    Including itself moves all rewards of a task alike. A single candidate has no reward: there is nothing to compare it
    with. Of two candidates neither is preferred: where the similarity counts recall more than precision, it would
    always be the longer one.

    Args:
        similarity: a name in ``bon.similarity.SIMILARITIES``, or a ``Similarity``.

    Raises:
        UnknownNameError: no such similarity.
    """

    needs: ClassVar[Needs] = Needs(group=True, all_rewards=True)
    concurrent = True

    def __init__(self, similarity: str | Similarity = "word_f1") -> None:
        self.similarity = as_similarity(similarity)
        self.range = (0.0, self.similarity.maximum)

    @property
    def name(self) -> str:
        """Kind and similarity."""
        return f"consensus({self.similarity.name})"

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``."""
        for positions in by_group(pending):
            texts = [pending[position].candidate.text for position in positions]
            for position, reward in zip(positions, consensus(self.similarity, texts), strict=True):
                yield position, Score(reward) if len(texts) > 1 else ALONE


ALONE = Score(None, "failed", "there is no other candidate to compare it with")


def consensus(similarity: Similarity, texts: Sequence[str]) -> list[float]:
    """Mean similarity of each text with all of them, rounded so that equal is equal whatever their order."""
    values = among(similarity, texts)
    if len(texts) == 2:
        values = (values + values.T) / 2
    return [round(float(reward), 12) for reward in values.mean(axis=1)]
