"""A guard before a scorer: texts that work on the scorer and not on the task get no reward."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from bon.errors import InputError
from bon.scorers.base import Compound, Needs, Pending, Scorer
from bon.scorers.guard_rules import RULES, fired
from bon.scorers.parsing import strip_think
from bon.spec import SCORERS
from bon.types import Score


class Guard(Compound):
    """Gives candidates the rewards of another scorer, and none to those on which a rule of ``RULES`` fires.

    The status is then "failed" and the reason names the rule: the candidate is not picked while any other has a reward.
    It is voided and not lowered because scorers have no common floor, and because the scorer then never sees it: it
    costs no tokens, and a consensus does not count its vote. The rules know patterns in a few languages and nothing of
    what is right; an attack that is made for them passes.

    Args:
        scorer: the scorer, or its spec: ``guard:"flip:NAME,style=turns"``.

    Raises:
        InputError: no scorer, or a guard.
        UnknownNameError: a scorer that does not exist.
    """

    def __init__(self, scorer: str | Scorer) -> None:
        if isinstance(scorer, str) and scorer.strip():
            scorer = SCORERS.make(scorer.strip())
        if not isinstance(scorer, Scorer) or isinstance(scorer, Guard):
            raise InputError(
                f'a guard stands before a scorer: write guard:flip or guard:"flip:MODEL", not {scorer!r:.60}.'
            )
        self.parts = [scorer]

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """What the scorer needs."""
        return self.parts[0].needs

    @property
    def range(self) -> tuple[float, float] | None:  # type: ignore[override]
        """The scorer's."""
        return self.parts[0].range

    @property
    def name(self) -> str:
        """The scorer's, guarded."""
        return f"guard({self.parts[0].name})"

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``."""
        passed = []
        for position, each in enumerate(pending):
            rule = fired(each.task.instruction, strip_think(each.candidate.text))
            if rule is None:
                passed.append(position)
            else:
                yield position, Score(None, "failed", f"guard, rule {rule!r}: {RULES[rule].says}")
        if passed:
            async with aclosing(self.parts[0].score([pending[position] for position in passed])) as scores:
                async for at, score in scores:
                    yield passed[at], score

    def settle(self, tied: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """As the scorer does; what a rule fires on has no reward to share."""
        return self.parts[0].settle(tied)
