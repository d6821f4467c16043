"""What to begin with on real text: what candidates have in common, and where that decides nothing, the likelihood."""

from __future__ import annotations

import copy
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from bon.engines.base import Engine
from bon.errors import InputError
from bon.scorers.base import Needs, Pending, Scorer
from bon.scorers.consensus import Consensus
from bon.scorers.likelihood import BackwardLikelihood
from bon.types import Score

if TYPE_CHECKING:
    from bon.models import Model


class Default(Scorer):
    """Scores candidates by consensus (chrF); ties are decided by the backward likelihood.

    Consensus costs nothing, and picked better than chance on each real set with more than two candidates a row. Of two
    candidates it prefers neither, and then the model reads: which of them makes the instruction likelier, examples
    shown as turns and sentences that restate the instruction left out. Only those that share the best reward are read,
    as ``Score.tie_break``. ``benchmarks/README.md`` has what was measured, on which prompts, and where the limits lie.

    Args:
        model: what reads, as in the scorer ``likelihood``. Where it is None and the policy cannot read, a tie stays
            one.
        options: others of ``likelihood``.
    """

    needs: ClassVar[Needs] = Needs(group=True, all_rewards=True)
    range = (0.0, 1.0)

    def __init__(self, model: Any = None, **options: Any) -> None:
        self.consensus = Consensus("chrf")
        options = {"style": "turns", "drop_restated": True, **options}
        self.likelihood: BackwardLikelihood | None = BackwardLikelihood(model, **options)

    @property
    def name(self) -> str:
        """Its parts."""
        return self.consensus.name + ("" if self.likelihood is None else f", {self.likelihood.name}")

    @property
    def models(self) -> Sequence[Model | None]:  # type: ignore[override]
        """What is still to be loaded."""
        return () if self.likelihood is None else self.likelihood.models

    @property
    def engines(self) -> Sequence[Engine]:
        """What reads."""
        return () if self.likelihood is None else self.likelihood.engines

    @property
    def concurrent(self) -> bool:  # type: ignore[override]
        """Whether calls may run at the same time."""
        return self.likelihood is None or self.likelihood.concurrent

    def bound(self, find: Callable[[Model | None], Engine]) -> Self:
        """The same scorer with its model in place; without one where the policy, which is to read, cannot."""
        other = copy.copy(self)
        if self.likelihood is not None:
            try:
                other.likelihood = self.likelihood.bound(find)
            except InputError:
                if self.likelihood.models != (None,):
                    raise
                other.likelihood = None
        return other

    def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``."""
        return self.consensus.score(pending)

    def settle(self, tied: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Rate what consensus cannot tell apart; see ``Scorer.settle``."""
        return super().settle(tied) if self.likelihood is None else self.likelihood.score(tied)
