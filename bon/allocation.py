"""A number of samples for several prompts together: the next ones go where they can be expected to gain most.

The prompts must run together, so all of a file are read before the first is sampled, and results come at the end. Until
a prompt has half of what an even division would give it, it waits for nobody, unless a reward is the largest there can
be already: what the estimates of a rule are worth is at stake in the other half only. Where they tell nothing apart
the division is even.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bon.adaptive import Adaptive, stop_at_the_top
from bon.errors import InputError, whole_number
from bon.types import Stop

if TYPE_CHECKING:
    from bon.group import Group
    from bon.scorers.base import Scorer
    from bon.selectors import Selector

_SHARE = 4  # of what is left, one part is given away at a time
_ROUND = 256  # samples of one round at most: they fill a batch, and what is scored an interrupted run keeps


class Allocation:
    """Divides a number of samples among the groups of one run.

    Args:
        total: samples of all groups together, at most; fewer where nothing more can be gained.
        rule: estimates the gains, and says how many samples a group gets at first, at most and at a time. Its price
            counts for nothing.

    Attributes:
        groups: of the run.

    Raises:
        InputError: ``total`` < 1.
    """

    def __init__(self, total: int, rule: Adaptive | None = None) -> None:
        self.total, self.rule = whole_number("total samples", total, 1), rule or Adaptive()
        self.groups: Sequence[Group] = ()
        self._planned: dict[int, int] = {}

    @property
    def most(self) -> int:
        """Samples of one group at most."""
        return self.rule.most

    def fits(self, scorer: Scorer, selector: Selector) -> None:
        """Check that the rule can work with these."""
        self.rule.fits(scorer, selector)

    def share(self, groups: Sequence[Group]) -> None:
        """Decide what each of all groups gets next.

        Raises:
            InputError: fewer samples than groups.
        """
        if self.total < len(groups):
            raise InputError(f"{self.total} samples are fewer than the {len(groups)} prompts: each needs one at least.")
        self.groups, even = groups, self.total // len(groups)
        least, half = min(self.rule.least, even), even // 2
        left = self.total - sum(group.asked for group in groups)
        waiting = []
        for position, group in enumerate(groups):
            stop_at_the_top(group)
            gain = self.rule.gain(group) if group.asked else None
            group.stop = Stop("nothing can be gained" if gain == 0.0 else "the samples of all prompts are spent", gain)
            if gain != 0.0 and group.asked < self.most and not group.over and not group.stuck:
                first = group.asked < max(half, 2 * least if gain is None else least)
                waiting.append((-math.inf if first else -(gain or 0.0), group.asked, position))
        batch = max(least, self.rule.batch)
        unbegun = sum(not asked for _, asked, _ in waiting)
        turns = min(max(unbegun, -(-left // (_SHARE * batch))), -(-_ROUND // batch))
        self._planned = {}
        for _, asked, position in sorted(waiting)[:turns]:
            self._planned[id(groups[position])] = more = min(
                self.rule.batch if asked else least, left, self.most - asked
            )
            left -= more

    def more(self, group: Group) -> int:
        """What was decided for it."""
        return self._planned.pop(id(group), 0)
