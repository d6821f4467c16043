"""What to begin with on real text: what candidates have in common, and where that decides nothing, the likelihood."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, ClassVar, Self

from bon.engines.base import Engine
from bon.errors import InputError
from bon.scorers.base import Compound, Needs, Pending
from bon.scorers.consensus import Consensus
from bon.scorers.guard import Guard
from bon.scorers.likelihood import BackwardLikelihood
from bon.types import Score

if TYPE_CHECKING:
    from bon.models import Model


class Default(Compound):
    """Scores candidates by consensus (chrF); ties are decided by the backward likelihood.

    Consensus costs nothing, and picked better than chance on each real set with more than two candidates a row. Of two
    candidates it prefers neither, and then the model reads: which of them makes the instruction likelier, examples
    shown as turns and sentences that restate the instruction left out. Only those that share the best reward are read,
    as ``Score.tie_break``; one on which a rule of ``guard`` fires is not, and loses the tie: of two candidates an echo
    of the instruction makes it likeliest. ``benchmarks/README.md`` has what was measured, on which prompts, and where
    the limits lie.

    Args:
        model: what reads, as in the scorer ``likelihood``. Where it is None and the policy cannot read, a tie stays
            one.
        options: others of ``likelihood``.
    """

    needs: ClassVar[Needs] = Needs(group=True, all_rewards=True)
    range = (0.0, 1.0)

    def __init__(self, model: Any = None, **options: Any) -> None:
        likelihood = BackwardLikelihood(model, **{"style": "turns", "drop_restated": True, **options})
        self.parts = [Consensus("chrf"), Guard(likelihood)]

    @property
    def name(self) -> str:
        """Its parts."""
        return ", ".join(part.name for part in self.parts)

    def bound(self, find: Callable[[Model | None], Engine]) -> Self:
        """The same scorer with its model in place; without one where the policy, which is to read, cannot."""
        try:
            return super().bound(find)
        except InputError:
            if self.models != (None,):
                raise
        other = copy.copy(self)
        other.parts = self.parts[:1]
        return other

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``. A single one gets the least reward, so that it can be picked."""
        async with aclosing(self.parts[0].score(pending)) as scores:
            async for position, score in scores:
                yield position, score if score.reward is not None else Score(0.0, reason=score.reason)

    def settle(self, tied: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Rate what consensus cannot tell apart; see ``Scorer.settle``."""
        return self.parts[1].score(tied) if len(self.parts) > 1 else super().settle(tied)
