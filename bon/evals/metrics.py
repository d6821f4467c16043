"""The arithmetic of evaluations: exact best-of-N, paired bootstrap, rank correlation, pools of equal strength.

Nothing here knows of models or texts. Labels and rewards are arrays of one row's candidates; a candidate without a
reward has -inf.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from math import comb

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Interval = dict[str, float]
"""``mean``, ``low`` and ``high``: the figure and the ends of its 95% interval."""

RESAMPLES = 2000
_NEAR = 0.05  # of the range of labels: generators within it are equally strong


def expected_best(labels: Floats, rewards: Floats, size: int) -> float:
    """Mean label of the candidate with the best reward, over all subsets of ``size`` candidates.

    Candidates that share the best reward share the pick. A row with fewer candidates takes all it has.
    """
    _, level, counts = np.unique(rewards, return_inverse=True, return_counts=True)
    size = min(size, len(labels))
    # The best of a subset is at a level when all of it lies at or below that level, and not all below.
    within = [comb(int(up_to), size) for up_to in (0, *counts.cumsum())]
    chances = [(here - below) / within[-1] for below, here in pairwise(within)]
    return float(np.dot(chances, np.bincount(level, labels) / counts))


def bootstrap(rows: int, seed: int) -> Floats:
    """How often each row is drawn in each resample: shape [resamples, rows]; used for all figures, it pairs them."""
    drawn = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    return drawn.astype(np.float64)


def interval(weights: Floats, above: Floats, below: Floats | None = None) -> Interval | None:
    """The sum of ``above`` over that of ``below``, one number each for a row, with its percentile interval.

    Args:
        weights: from ``bootstrap``.
        above: what is averaged.
        below: 1 for each row unless said otherwise: the mean.

    Returns:
        None where all of ``below`` is 0.
    """
    below = np.ones_like(above) if below is None else below
    if not below.any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = (weights @ above) / (weights @ below)
    low, high = np.percentile(resampled[np.isfinite(resampled)], (2.5, 97.5))
    return {"mean": float(above.sum() / below.sum()), "low": float(low), "high": float(high)}


def spearman(a: Floats, b: Floats) -> float | None:
    """Rank correlation of candidates that have both numbers, equal ones sharing a rank; None where one is constant."""
    both = np.isfinite(a) & np.isfinite(b)
    ranks = np.array([_ranks(a[both]), _ranks(b[both])])
    if not both.any() or not np.ptp(ranks, axis=1).all():
        return None
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: Floats) -> Floats:
    _, level, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[level])


def equal_pool(labels: Sequence[Floats], generators: Sequence[Sequence[str]]) -> list[list[int]]:
    """The candidates of generators that are equally strong, for each row; fewer than two in a row are none.

    The pool: of all sets of generators whose mean labels over the rows lie within 5% of the range of labels, the one
    with the most candidates in rows where it has at least two; of several, the weakest.
    """
    written: dict[str, list[float]] = defaultdict(list)
    for values, names in zip(labels, generators, strict=True):
        for value, name in zip(values, names, strict=bool(names)):
            written[name].append(float(value))
    if not written:
        return [[] for _ in labels]
    means = {name: float(np.mean(values)) for name, values in written.items()}
    near = _NEAR * float(np.ptp(np.concatenate(labels))) + 1e-9  # rounding
    pools = []
    for least in sorted(set(means.values())):
        pool = {name for name, mean in means.items() if least <= mean <= least + near}
        rows = [[i for i, name in enumerate(row) if name in pool] for row in generators]
        pools.append([row if len(row) > 1 else [] for row in rows])
    return max(pools, key=lambda pool: sum(map(len, pool)))
