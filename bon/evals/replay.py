"""Budgets on candidates that are there with their rewards: what each would have sampled, and what it would have picked.

A replay asks the budget itself, on a group that gets the stored candidates in the place of a policy's; so it costs no
model and shows what a run would have done with those samples. Rewards are those that each candidate got by itself: for
scorers that look at whole groups a replay means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bon.budget import Budget
from bon.errors import BonError
from bon.evals.metrics import Floats
from bon.group import Group
from bon.selectors import Best, Selector
from bon.task import Task
from bon.types import Candidate, Score, Usage

ORDERS = 8
"""Orders in which each row is replayed: its candidates are samples of one policy, so that any is as good as another."""


@dataclass(frozen=True, slots=True)
class Samples:
    """The candidates of one task, each with its score and its label.

    Args:
        candidates: in the order of sampling; ``completion_tokens`` is what each cost.
        scores: one for each.
        labels: how good each is.
        range: of the scorer's rewards.
    """

    candidates: Sequence[Candidate]
    scores: Sequence[Score]
    labels: Floats
    range: tuple[float, float] | None

    @property
    def tokens(self) -> Floats:
        """What the policy wrote for each candidate."""
        return np.array([candidate.completion_tokens or 0 for candidate in self.candidates], float)

    def oracle(self) -> tuple[float, float, float]:
        """Label, samples and tokens of who stops at the first candidate with the best label of all; expected."""
        n, good = len(self.labels), int((self.labels == self.labels.max()).sum())
        samples = (n + 1) / (good + 1)
        return float(self.labels.max()), samples, samples * float(self.tokens.mean())


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a budget did with one task, on average over some orders of its candidates.

    Args:
        label: of the pick; 0 where there was none.
        samples, tokens: what it cost.
        rounds: how often the budget was asked.
    """

    label: float
    samples: float
    tokens: float
    rounds: float


def replay(budget: Budget, samples: Samples, selector: Selector | None = None, seed: int = 0) -> Replayed:
    """What a budget would have done: the mean over ``ORDERS`` orders, the same ones for every budget.

    Raises:
        BonError: what the budget raised.
    """
    orders = np.random.default_rng(seed).permuted(np.tile(np.arange(len(samples.labels)), (ORDERS, 1)), axis=1)
    return Replayed(*np.mean([_one(budget, samples, order, selector or Best()) for order in orders], axis=0).tolist())


def _one(budget: Budget, samples: Samples, order: Sequence[int], selector: Selector) -> tuple[float, ...]:
    group, rounds = Group(Task.of("replayed")), 0
    group.range = samples.range
    most = min(len(order), getattr(budget, "most", None) or len(order))
    while more := min(budget.more(group), most - group.asked):
        rounds += 1
        for index in range(group.ask(more), group.asked):
            candidate = replace(samples.candidates[order[index]], index=index)
            if group.admit(candidate, Usage(policy_completion_tokens=candidate.completion_tokens or 0)):
                group.post(candidate, samples.scores[order[index]])
    try:
        best = group.result(selector).best
    except BonError:
        best = None
    label = 0.0 if best is None else float(samples.labels[order[best]])
    return label, group.asked, group.usage.policy_completion_tokens, rounds
