"""How many samples a group gets: a budget is asked whenever all that it asked for has been sampled and scored.

Any object with ``more(group) -> int`` is a budget. ``most``, where it has it, is the largest number of samples that a
group gets (else ``MOST``: a reward that it waits for may never come), ``least`` the smallest, ``stop_at``, where it is
not None, the reward at which what is still running is given up, and ``fits(scorer, selector)`` raises an ``InputError``
where it cannot work with these. One that has ``share(groups)`` runs all groups together: it is called with all of them
before each round. Why it stops it may leave in ``group.stop``. ``bon.adaptive`` has the rules.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from bon.errors import InputError, UnknownNameError, number, whole_number
from bon.spec import BUDGETS, Specified, join_spec, split_spec
from bon.types import Stop

if TYPE_CHECKING:
    from bon.group import Group


MOST = 1024
"""Samples of a group at most, where its budget does not say."""
_LIMITS = ("most_tokens", "most_seconds")
_FIRST = 4  # samples that show what one takes


@runtime_checkable
class Budget(Protocol):
    """Decides how many more samples a group gets."""

    def more(self, group: Group) -> int:
        """How many more samples to ask for now; 0 ends the group. ``group.asked`` were asked for so far."""


@dataclass(frozen=True)
class Fixed(Specified):
    """Always n samples, all asked for at once."""

    n: int = 8

    def __post_init__(self) -> None:
        whole_number("n", self.n, 1)

    @property
    def most(self) -> int:
        """The samples of a group."""
        return self.n

    def more(self, group: Group) -> int:
        """What is missing to n."""
        return max(0, self.n - group.asked)


@dataclass(frozen=True)
class StopAt(Specified):
    """Samples until a candidate has a reward; what is still running is given up then.

    At the scorer's largest reward (1.0 for word F1) the winner's reward is what it would have been.

    Args:
        reward: good enough.
        most: samples when no candidate gets there.
        batch: samples asked for at a time: where the first of them are often good enough, the others are not even
            begun. None asks for all at once, which is the fastest where they seldom are.
    """

    reward: float
    most: int = 8
    batch: int | None = None

    def __post_init__(self) -> None:
        whole_number("most", self.most, 1)
        if self.batch is not None:
            whole_number("batch", self.batch, 1)
        number("the reward to stop at", self.reward)

    @property
    def stop_at(self) -> float:
        """The reward at which what is still running is given up."""
        return self.reward

    def more(self, group: Group) -> int:
        """What is missing to ``most``, no more than ``batch``, unless the reward was reached."""
        missing = 0 if group.reached else max(0, self.most - group.asked)
        return missing if self.batch is None else min(self.batch, missing)


@dataclass(frozen=True)
class Limited:
    """Any budget, with limits to what the samples of a group may take.

    Four are asked for at first; from then on no more than fit, if each takes what those so far took on average.

    Args:
        budget: decides within the limits.
        most_tokens: that the policy writes.
        most_seconds: from when the group was made. What is running by then is finished, unlike with a deadline.
    """

    budget: Budget
    most_tokens: int | None = None
    most_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.most_tokens is not None:
            whole_number("most_tokens", self.most_tokens, 1)
        if self.most_seconds is not None and not number("most_seconds", self.most_seconds) > 0:
            raise InputError(f"most_seconds must be above 0, got {self.most_seconds!r}.")

    def __getattr__(self, name: str) -> Any:
        """What else a pipeline may ask a budget for."""
        if name not in ("most", "least", "stop_at", "fits"):
            raise AttributeError(name)
        return getattr(self.budget, name)

    def more(self, group: Group) -> int:
        """What the budget wants, as far as it fits."""
        wanted = self.budget.more(group)
        tokens = group.usage.policy_completion_tokens
        limits = [("tokens", tokens, self.most_tokens), ("seconds", group.seconds, self.most_seconds)]
        for what, spent, most in limits if wanted else ():
            if most is not None:
                wanted = min(wanted, int(group.asked * (most / max(spent, 1e-9) - 1)) if group.asked else _FIRST)
                if wanted <= 0:
                    group.stop = Stop(f"one more sample would not fit: {spent:.4g} of {most:g} {what} are spent")
                    return 0
        return wanted


def as_budget(n: int | str | Budget) -> Budget:
    """Read a number of samples, the spec of a budget ("stop-at:0.9,most=16"), or a budget.

    Every spec may have the limits of ``Limited`` among its options ("16,most_seconds=5").

    Raises:
        InputError: n < 1, none of these, or a budget whose ``most`` or ``stop_at`` is no number.
    """
    if isinstance(n, str):
        head, options = split_spec(n)
        if limits := {name: options.pop(name) for name in _LIMITS if name in options}:
            return Limited(as_budget(join_spec(head, options)), **limits)
        if re.fullmatch(r"\s*-?[0-9]{1,9}\s*", n):
            return Fixed(int(n))
        if re.fullmatch(r"\s*[+-]?[0-9]*\.[0-9]*\s*", n):
            raise InputError(f"n must be a whole number of at least 1, or a budget such as stop-at:0.9, got {n}.")
        if head.partition(":")[0] not in BUDGETS:
            raise UnknownNameError("budget", n, ["a whole number", *BUDGETS])
        made: Budget = BUDGETS.make(n)
        return made
    if not isinstance(n, Budget) or isinstance(n, type):
        return Fixed(whole_number("n", n, 1))
    most, stop_at = (getattr(n, name, None) for name in ("most", "stop_at"))
    if most is not None:
        whole_number("the budget's most", most, 1)
    if stop_at is not None:
        number("the budget's stop_at", stop_at)
    return n


def spec_of(budget: Budget) -> int | str:
    """What ``as_budget`` reads: its inverse.

    Raises:
        InputError: an object of the user's own.
    """
    if isinstance(budget, Limited):
        limits = {name: value for name in _LIMITS if (value := getattr(budget, name)) is not None}
        return join_spec(str(spec_of(budget.budget)), limits)
    return budget.n if isinstance(budget, Fixed) else BUDGETS.spec_of(budget)
