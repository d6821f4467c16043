"""Rules for stopping: what one more sample of a task can be expected to gain, from those that are there.

Each is a function of ``Seen`` that returns an expected gain; None where it cannot tell yet, because fewer than three
candidates have a reward or all rewards are the same. ``bon.adaptive`` compares the gain with a price. Nothing here
knows of groups or models.

Rewards come in units of the scorer's range: 0 is its least reward and 1 its largest. Where it has none, six standard
deviations of the rewards so far stand for it. What ``pandora`` and ``excess`` gain is a chance to win, and what
``votes`` gains the chance to be overtaken; these have no unit.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bon.answers import as_extract, classes

Floats = npt.NDArray[np.float64]
_DELTA = 0.05  # the chance that a bound does not hold
_TAIL = 0.01  # the share of candidates that those to be beaten are the best of
_MIDPOINTS = -np.log1p(-(np.arange(256) + 0.5) / 256)  # of the quantiles of an exponential distribution


@dataclass(frozen=True, slots=True)
class Seen:
    """What a rule looks at.

    Args:
        rewards: of the candidates that have one, in the order of sampling, in units.
        top: the largest reward that there can be; infinite where the scorer has no range.
        tokens: of the candidates that were sampled.
        texts: of the candidates that have a reward.
        left: samples that may still come.
    """

    rewards: Floats
    top: float
    tokens: Floats
    texts: Sequence[str]
    left: int


Rule = Callable[[Seen], float | None]


def exact(seen: Seen) -> float | None:
    """What is missing to the largest reward there is: more than that nothing can gain."""
    return seen.top - float(seen.rewards.max()) if len(seen.rewards) else None


def improvement(seen: Seen) -> float | None:
    """Expected improvement of a normal reward whose mean and variance are estimated, clipped at ``top``.

    Student's t predicts the next reward X of k: mean of the rewards, scale s sqrt(1 + 1/k), k - 1 degrees of freedom;
    (min(X, top) - M)+ = (X - M)+ - (X - top)+. The one-step rule of BEACON (arXiv 2510.15945).
    """
    k = len(seen.rewards)
    if k < 3 or not np.ptp(seen.rewards):
        return None
    scale = float(seen.rewards.std(ddof=1)) * math.sqrt(1 + 1 / k)
    ends = [(end - float(seen.rewards.mean())) / scale for end in (float(seen.rewards.max()), seen.top)]
    best, top = (_excess(end, k - 1) for end in ends)
    return scale * (best - top)


def bound(seen: Seen) -> float | None:
    """A bound whatever the distribution is: with 95% chance the mass above the best of n is at most 1 - 0.05^(1/n)."""
    n = len(seen.rewards)
    return (seen.top - float(seen.rewards.max())) * (1 - _DELTA ** (1 / n)) if n else None


def pandora(seen: Seen) -> float | None:
    """Pandora's box with a confidence bound (arXiv 2510.01394): the gain of Bradley-Terry's chance to win.

    X = e^reward, rewards in standard deviations, has an exponential tail above its median; its scale is taken on the
    large side for what may come, and on the small side for the rival, the best of a hundred.
    """
    n = len(seen.rewards)
    if n < 3 or not (spread := float(seen.rewards.std())):
        return None
    x = np.exp((seen.rewards - seen.rewards.max()) / spread)  # the best is 1
    median = float(np.median(x))
    scale = float(x[x >= median].mean()) - median
    wide = math.sqrt(math.log(n) * math.log(1 / _DELTA) / n)
    rival = median + scale * max(0.0, 1 - wide) * math.log(1 / _TAIL)
    coming = median + scale * (1 + wide) * _MIDPOINTS
    return float(np.maximum(coming / (coming + rival) - 1 / (1 + rival), 0.0).mean()) / 2  # half are above the median


def excess(seen: Seen) -> float | None:
    """The mean-excess rule of the same authors (September 2026), which assumes no distribution.

    With z = e^reward (in standard deviations), k the better half of n, cut the (k+1)th largest z and ex the mean of the
    larger ones beyond it: a rival of cut + ex (1 + ln((k/n) / 0.01)), and a gain of (h(M + ex) - h(M)) / (n + 1) where
    h(z) = z / (z + rival). Averaged over the samples so far, and larger where lengths differ. A better half that ties
    says nothing and does not count.
    """
    if len(seen.rewards) < 4 or not (spread := float(seen.rewards.std())):
        return None
    ordered: list[float] = []
    gains = []
    for z in np.exp((seen.rewards - seen.rewards.max()) / spread).tolist():
        insort(ordered, z)
        n, k = len(ordered), len(ordered) // 2
        if n < 4 or not (beyond := sum(ordered[-k:]) / k - ordered[-k - 1]):
            continue
        rival = ordered[-k - 1] + beyond * (1 + math.log(k / n / _TAIL))
        best = ordered[-1]
        gains.append(n * ((best + beyond) / (best + beyond + rival) - best / (best + rival)) / (n + 1))
    if not gains:
        return None
    mean = float(seen.tokens.mean())
    unsure = 2 * float(seen.tokens.std()) / math.sqrt(len(seen.tokens)) / mean if mean else 0.0
    return sum(gains) / len(gains) / len(ordered) * (1 + unsure)


def votes(extract: str) -> Rule:
    """The chance that the answer with the second most votes is the more frequent one, 0 where it cannot catch up.

    Each candidate with an answer has one vote, and of the two shares nothing is known before: adaptive consistency
    (arXiv 2305.11860).

    Args:
        extract: see ``bon.answers.as_extract``.
    """
    found = as_extract(extract)

    def overtaken(seen: Seen) -> float:
        counted = Counter(answer for answer in classes([found(text) for text in seen.texts]) if answer is not None)
        first, second = [*sorted(counted.values(), reverse=True), 0, 0][:2]
        if first - second > seen.left:
            return 0.0
        n = first + second + 1  # P(share of the first < 1/2) under Beta(first + 1, second + 1)
        ways: int = sum(math.comb(n, i) for i in range(first + 1, n + 1))
        return float(ways / 2**n)

    return overtaken


def _excess(z: float, df: int) -> float:
    """E[(T - z)+] of Student's t with at least two degrees of freedom."""
    if z == math.inf:
        return 0.0
    log_height = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    height = math.exp(log_height - (df + 1) / 2 * math.log1p(z * z / df))
    return (df + z * z) / (df - 1) * height - z * _above(z, df)


def _above(z: float, df: int) -> float:
    """P(T > z) of Student's t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(z / math.sqrt(df))
    odd, cos2 = df % 2, math.cos(angle) ** 2
    term = total = math.cos(angle) if odd else 1.0
    for j in range(1 + odd, df - 2, 2):
        term *= cos2 * j / (j + 1)
        total += term
    inside = math.sin(angle) * total
    return 0.5 - (2 / math.pi * (angle + inside) if odd else inside) / 2
