"""Consensus: how much a candidate has in common with the others. No model runs; nothing is asked of the prompt.

Minimum Bayes risk decoding picks the candidate with the highest expected utility under the policy, estimated with the
policy's own samples (Kumar and Byrne, 2004; Eikema and Aziz, 2020): argmax over i of the mean over j of u(y_i, y_j).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from statistics import fmean
from typing import ClassVar

from bon.scorers.base import Needs, Pending, Scorer
from bon.similarity import Similarity, as_similarity
from bon.types import Score


class Consensus(Scorer):
    """Scores candidates by their mean similarity with all candidates of the task, themselves included.

    Including itself moves all rewards of a task alike and gives a single candidate a reward. Of two candidates neither
    is preferred.

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
        groups: dict[int, list[int]] = {}
        for position, each in enumerate(pending):
            groups.setdefault(id(each.group), []).append(position)
        for positions in groups.values():
            texts = [pending[position].candidate.text for position in positions]
            for position, text in zip(positions, texts, strict=True):
                yield position, Score(fmean(self.similarity(text, other).f1 for other in texts))
