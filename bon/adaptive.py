"""Adaptive N: sample until one more candidate would gain less than it costs.

What holds whatever the rule is: never fewer than ``least`` samples are asked for and never more than ``most``; a reward
that is the largest of the scorer's range ends the search, for nothing can beat it; a candidate without a reward adds
nothing, so the gain is that of a candidate with one times the share that has one; of a candidate that was pruned the
bound of its reward counts. A scorer that looks at whole groups scores all again in each round, and its range is not
relied on: who beats all others so far may yet be beaten.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bon.errors import InputError, UnknownNameError, number, whole_number
from bon.spec import Specified
from bon.stopping import Rule, Seen, bound, exact, excess, improvement, pandora, votes
from bon.types import Stop

if TYPE_CHECKING:
    from bon.group import Group
    from bon.scorers.base import Scorer
    from bon.selectors import Selector

RULES: dict[str, tuple[Callable[[str], Rule], float]] = {
    "improvement": (lambda _: improvement, 0.003),
    "exact": (lambda _: exact, 1e-9),
    "bound": (lambda _: bound, 0.01),
    "pandora": (lambda _: pandora, 0.003),
    "excess": (lambda _: excess, 0.003),
    "vote": (votes, 0.05),
}
"""By name: what makes the rule from what stands behind the name's colon, and its price where none is said."""
_NEED_A_RANGE = ("exact", "bound")


@dataclass(frozen=True, kw_only=True)
class Adaptive(Specified):
    """Samples until one more would gain less than its price.

    While the rule cannot tell (all rewards so far are the same, or there are none) up to twice ``least`` samples are
    asked for, and no more; "exact" goes on.

    Args:
        least: samples at least, asked for together.
        most: samples at most.
        rule: what estimates the gain: "improvement", "exact" (stop at the largest reward there is, and only there),
            "bound", "pandora", "excess", or "vote:EXTRACT" with a final answer to extract as in ``WeightedVote``; see
            ``bon.stopping``.
        price: of a sample, as the gain is counted: as a share of the scorer's range, for which six standard deviations
            of the rewards stand where it has none; for pandora, excess and vote as a probability. None takes the
            rule's own.
        batch: samples that are asked for together after the first.

    Raises:
        InputError: ``least`` above ``most``, a price that is not above 0, an unknown rule.
    """

    least: int = 4
    most: int = 64
    rule: str = "improvement"
    price: float | None = None
    batch: int = 4

    def __post_init__(self) -> None:
        for name in ("least", "most", "batch"):
            whole_number(name, getattr(self, name), 1)
        if self.least > self.most:
            raise InputError(f"least={self.least} is above most={self.most}: lower the one or raise the other.")
        if self.price is not None and not 0 < number("price", self.price) < math.inf:
            raise InputError(f"price must be above 0, got {self.price!r}: samples that cost nothing never end.")
        name, colon, argument = self.rule.partition(":") if isinstance(self.rule, str) else ("", "", "")
        if name not in RULES or bool(argument) != (name == "vote") or (colon and not argument):
            raise UnknownNameError("rule for stopping", self.rule, [*RULES, "vote:number"])
        RULES[name][0](argument)

    @property
    def _votes(self) -> bool:
        return self.rule.startswith("vote:")

    def fits(self, scorer: Scorer, selector: Selector) -> None:
        """Check that it can work with these.

        Raises:
            InputError: a rule that needs a range with a scorer without one, or fewer samples than are to be picked.
        """
        if self.rule in _NEED_A_RANGE and (scorer.range is None or scorer.needs.group):
            why = "have no bounds" if scorer.range is None else "change with the other candidates"
            raise InputError(
                f"the rule {self.rule!r} goes by the largest reward there can be, and the rewards of {scorer.name!r} "
                f"{why}: take rule=improvement, pandora or excess."
            )
        k: int = getattr(getattr(selector, "selector", selector), "k", 1)
        if self.least < k:
            raise InputError(f"{k} candidates are to be picked, and least={self.least} may leave fewer: say least={k}.")

    def more(self, group: Group) -> int:
        """``least`` at first; then ``batch``, until one more would not pay."""
        if not self._votes:
            stop_at_the_top(group)
        if group.asked < self.least:
            return self.least - group.asked
        group.stop = self._stop(group)
        return min(self.batch, self.most - group.asked) if group.stop is None else 0

    def gain(self, group: Group) -> float | None:
        """What one more sample can be expected to gain; None where the rule cannot tell, 0 where nothing can."""
        name, _, argument = self.rule.partition(":")
        seen, share = _seen(group, self.most - group.asked)
        if self._votes:
            return RULES[name][0](argument)(seen)
        if len(seen.rewards) and seen.rewards.max() >= seen.top:
            return 0.0
        gain = RULES[name][0](argument)(seen)
        return None if gain is None else gain * share

    def _stop(self, group: Group) -> Stop | None:
        gain = self.gain(group)
        rewards = [reward for reward in group.rewards if reward is not None]
        if not self._votes and group.range and rewards and max(rewards) >= group.range[1]:
            return Stop("a reward is the largest that there can be", gain)
        if group.asked >= self.most:
            return Stop("there are as many samples as there may be", gain)
        if gain is None:
            known = "rewards that do not differ" if rewards else "no reward"
            enough = group.asked >= 2 * self.least and self.rule != "exact"
            return Stop(f"so many samples have {known}") if enough else None
        if gain <= (RULES[self.rule.partition(":")[0]][1] if self.price is None else self.price):
            return Stop("one more sample would gain less than it costs", gain)
        return None


def stop_at_the_top(group: Group) -> None:
    """Let a group give up what is still running when a reward is the largest of the range, where that is final."""
    if group.prune and group.range:
        group.stop_at = group.range[1]


def _seen(group: Group, left: int) -> tuple[Seen, float]:
    """What a rule looks at, and the share of the samples that it is about."""
    known: Sequence[float | None] = [s.upper_bound if s.status == "pruned" else s.reward for s in group.scores]
    pairs = [(c, value) for c, value in zip(group.candidates, known, strict=True) if value is not None]
    rewards = np.array([value for _, value in pairs])
    tokens = np.array([c.completion_tokens or 0 for c in group.candidates], float)
    low, top = 0.0, math.inf
    unit = 6 * float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0
    if group.range is not None:
        low, unit, top = group.range[0], group.range[1] - group.range[0], 1.0
    seen = Seen((rewards - low) / (unit or 1.0), top, tokens, [c.text for c, _ in pairs], left)
    return seen, len(pairs) / max(1, len(group.candidates))
