"""Budgets on candidates that are there with their rewards: what each would have sampled, and what it would have picked.

A replay asks the budget itself, on a group that gets the stored candidates in the place of a policy's; so it costs no
model and shows what a run would have done with those samples. Rewards are those that each candidate got by itself: for
scorers that look at whole groups a replay means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bon.adaptive import Adaptive
from bon.allocation import Allocation
from bon.budget import Budget
from bon.evals.metrics import Floats
from bon.group import Group
from bon.selectors import Best, Selector
from bon.task import Task
from bon.types import Candidate, Score, Usage

ORDERS = 4
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


def replay(budget: Budget, rows: Sequence[Samples], selector: Selector | None = None, seed: int = 0) -> Floats:
    """What a budget would have done with each task, on average over some orders, the same ones for every budget.

    Returns:
        Shape [rows, 4]: the label of the pick, 0 where there was none; samples; their tokens; rounds.

    Raises:
        BonError: what the budget raised.
    """
    pick = selector or Best()
    found = [_one(budget, row, order, pick) for row in rows for order in _orders(row, seed)]
    return _averaged(found, len(rows))


def allocated(
    total: int, rows: Sequence[Samples], selector: Selector | None = None, seed: int = 0, rule: Adaptive | None = None
) -> Floats:
    """What all tasks would have got of one number of samples, see ``bon.allocation``.

    Returns:
        As ``replay``, but that ``rounds`` are those of all.
    """
    found = []
    for number in range(ORDERS):
        allocation, rounds = Allocation(total, rule), 0
        places = [_Place(row, _orders(row, seed)[number]) for row in rows]
        while True:
            allocation.share([place.group for place in places])
            if not sum(place.take(allocation.more(place.group)) for place in places):
                break
            rounds += 1
        found.append([(*place.spent(selector or Best()), rounds) for place in places])
    return _averaged([each for row in zip(*found, strict=True) for each in row], len(rows))


def oracle(n: int, rows: Sequence[Samples], seed: int = 0) -> Floats:
    """What nobody can beat who wants the best label of n candidates: stop at the first that has it.

    Returns:
        As ``replay``, the rounds being as many as the samples.
    """
    found = []
    for row in rows:
        for order in _orders(row, seed):
            labels = row.labels[order[:n]]
            samples = int(labels.argmax()) + 1
            tokens = sum(row.candidates[index].completion_tokens or 0 for index in order[:samples])
            found.append((float(labels.max()), samples, tokens, samples))
    return _averaged(found, len(rows))


def _orders(row: Samples, seed: int) -> npt.NDArray[np.intp]:
    return np.random.default_rng(seed).permuted(np.tile(np.arange(len(row.labels)), (ORDERS, 1)), axis=1)


def _one(budget: Budget, row: Samples, order: npt.NDArray[np.intp], selector: Selector) -> tuple[float, ...]:
    place, rounds = _Place(row, order), 0
    while place.take(budget.more(place.group)):
        rounds += 1
    return *place.spent(selector), rounds


class _Place:
    """One row in one order, and the group that gets its candidates."""

    def __init__(self, row: Samples, order: npt.NDArray[np.intp]) -> None:
        self._row, self._order = row, order
        self.group = Group(Task.of("replayed"))
        self.group.range = row.range

    def take(self, more: int) -> int:
        """Sample and score as many more as there are; returns how many."""
        more = min(more, len(self._order) - self.group.asked)
        for index in range(self.group.ask(more), self.group.asked):
            candidate = replace(self._row.candidates[self._order[index]], index=index)
            if self.group.admit(candidate, Usage(policy_completion_tokens=candidate.completion_tokens or 0)):
                self.group.post(candidate, self._row.scores[self._order[index]])
        return more

    def spent(self, selector: Selector) -> tuple[float, float, float]:
        """The label of the pick, samples, their tokens."""
        best = self.group.result(selector).best
        label = 0.0 if best is None else float(self._row.labels[self._order[best]])
        return label, self.group.asked, self.group.usage.policy_completion_tokens


def _averaged(found: Sequence[tuple[float, ...]], rows: int) -> Floats:
    averaged: Floats = np.array(found, float).reshape(rows, ORDERS, 4).mean(axis=1)
    return averaged
