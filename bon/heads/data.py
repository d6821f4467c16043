"""What heads learn from: hidden states and labels of candidates, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bon.engines.base import Prompt, Reading
from bon.task import Task

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Arrays = Mapping[str, Floats]
"""A trained head: arrays by name."""


class Rewards(NamedTuple):
    """What a head says of n candidates.

    Args:
        mean: shape (n,), the rewards.
        spread: shape (n,), their standard deviations.
        factors: for each candidate the factors that make most of its reward: (number, share of the reward).
    """

    mean: Floats
    spread: Floats
    factors: Sequence[tuple[tuple[int, float], ...]] = ()


@dataclass(frozen=True, eq=False)
class States:
    """Hidden states of n candidates; see ``Reading``.

    Args:
        layers: which are pooled.
        pools: shape (n, layers, width).
        last: shape (n, width).
    """

    layers: tuple[int, ...]
    pools: Floats
    last: Floats

    @classmethod
    def of(cls, layers: Sequence[int], readings: Sequence[Reading]) -> States:
        """The states of readings without an error, at least one."""
        pools, last = (np.array([getattr(one, name) for one in readings], float) for name in ("pools", "last"))
        return cls(tuple(layers), pools, last)

    def at(self, layers: Sequence[int]) -> Floats:
        """The pools of some of the layers side by side: shape (n, len(layers) * width)."""
        return self.pools[:, [self.layers.index(layer) for layer in layers]].reshape(len(self.pools), -1)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Candidates with labels, those of a row next to each other.

    Args:
        states: of the n candidates.
        labels: shape (n,), higher is better.
        lengths: shape (n,), characters.
        rows: shape (n,), the row that each belongs to; the labels of a row are not all equal.
    """

    states: States
    labels: Floats
    lengths: Floats
    rows: Ints

    def of(self, rows: Ints) -> Labelled:
        """The candidates of some of the rows."""
        kept = np.isin(self.rows, rows)
        states = States(self.states.layers, self.states.pools[kept], self.states.last[kept])
        return Labelled(states, self.labels[kept], self.lengths[kept], self.rows[kept])

    @property
    def names(self) -> Ints:
        """The rows that there are."""
        return np.unique(self.rows)

    def pairs(self) -> tuple[Ints, Ints, Floats]:
        """Better and worse candidate of each pair of a row, and weights that count each row once."""
        same = self.rows[:, None] == self.rows[None, :]
        better, worse = np.nonzero(same & (self.labels[:, None] > self.labels[None, :]))
        _, at, count = np.unique(self.rows[better], return_inverse=True, return_counts=True)
        return better, worse, 1.0 / count[at]

    def in_order(self, rewards: Floats) -> Floats:
        """Share of the pairs of each row that the rewards put in order, equal rewards counting half."""
        better, worse, weights = self.pairs()
        right = (rewards[better] > rewards[worse]) + 0.5 * (rewards[better] == rewards[worse])
        return np.asarray(np.bincount(np.unique(self.rows[better], return_inverse=True)[1], right * weights), float)

    def centred(self, values: Floats) -> Floats:
        """Values, one or many for each candidate, minus the mean of their row."""
        _, at, count = np.unique(self.rows, return_inverse=True, return_counts=True)
        sums = np.zeros((len(count), *values.shape[1:]))
        np.add.at(sums, at, values)
        means: Floats = (sums.T / count).T[at]
        return values - means


def prompt_of(task: Task) -> Prompt:
    """What stands before a response that is read: the conversation alone."""
    return replace(Prompt.of(task.asked), template={"enable_thinking": False})


def folds(rows: Ints, count: int, seed: int) -> list[Ints]:
    """Rows in random order, divided into as many parts of nearly the same size."""
    return np.array_split(np.random.default_rng(seed).permutation(rows), count)


def scales(values: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each column, the latter 1 where the column is constant."""
    spread = values.std(0)
    return values.mean(0), np.where(spread > 1e-9, spread, 1.0)
