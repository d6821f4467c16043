"""Pass rates of best-of-N, exact over all subsets of the candidates, and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, sqrt

import numpy as np
import numpy.typing as npt

Rates = npt.NDArray[np.float64]
"""Probability of passing, one for each example: shape [examples]."""


def expected_pass(passed: Sequence[bool], order: Sequence[int], size: int) -> float:
    """Chance that the first in order passes, over all subsets of ``size`` candidates.

    Args:
        passed: which candidates are right.
        order: all candidate indices, most preferred first.
        size: candidates in a subset.
    """
    # The candidate at a rank wins the subsets whose other members all come after it.
    wins = [comb(len(order) - 1 - rank, size - 1) for rank in range(len(order))]
    return sum(win for win, index in zip(wins, order, strict=True) if passed[index]) / comb(len(order), size)


def interval(rates: Rates) -> list[float]:
    """95% interval of the mean over examples, normal approximation, within [0, 1]."""
    spread = 1.96 * float(rates.std(ddof=1)) / sqrt(len(rates)) if len(rates) > 1 else 1.0
    mean = float(rates.mean())
    return [max(0.0, mean - spread), min(1.0, mean + spread)]
