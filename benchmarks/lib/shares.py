"""Shares of the way from a random pick to the best candidate: over several sets, and in a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bon.bench.harness import table
from bon.evals.metrics import Floats, Interval


def over_sets(found: Sequence[tuple[Floats, float]]) -> Interval:
    """The mean over sets, which count alike, with its 95% interval.

    Args:
        found: of each set its resampled shares, shape (resamples,), and its share.
    """
    low, high = np.percentile(np.mean([drawn for drawn, _ in found], 0), (2.5, 97.5))
    return {"mean": float(np.mean([mean for _, mean in found])), "low": float(low), "high": float(high)}


def shares_table(rows: Sequence[dict[str, Any]], key: str) -> str:
    """A line for each of what ``key`` names in the rows of a report, a column for each set (``case``)."""
    shares = {(row[key], row["case"]): row["share"] for row in rows}
    picks, cases = (list(dict.fromkeys(row[name] for row in rows)) for name in (key, "case"))
    return table([key, *cases], [[pick[:34], *(cell(shares[pick, case]) for case in cases)] for pick in picks])


def cell(share: Interval | None) -> str:
    """A share with its interval; "-" where there is none."""
    return "-" if share is None else f"{share['mean']:+.2f} [{share['low']:+.2f}, {share['high']:+.2f}]"
