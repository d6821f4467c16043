"""From scores to a selection: pure functions over arrays; nothing here runs a model.

The ranking is the same for every selector: candidates with a reward first, the higher reward before the lower; then
pruned ones, the higher bound first; then the rest by index. Equal rewards are decided by the higher ``tie_break`` (mean
log-probability of the reconstruction; an unknown one loses to any known one), then fewer scorer tokens, then the lower
index. No selector picks a candidate without a reward: when there is no reward at all it abstains and says why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from bon.answers import Extract, as_extract, classes
from bon.errors import BonError, InputError, UserCodeError, number, user_error, whole_number
from bon.spec import SELECTORS, Specified
from bon.types import Candidate, Score, Selection

Array: TypeAlias = npt.NDArray[np.float64]
Order: TypeAlias = npt.NDArray[np.intp]


class Selector(Protocol):
    """Picks among candidates; at least one of them has a reward."""

    def __call__(self, rewards: Array, order: Order, texts: Sequence[str], /) -> Selection:
        """Select.

        Args:
            rewards: [n], NaN where there is none.
            order: [n], positions in ranking order.
            texts: the n candidates' texts.
        """


def rank(rewards: Array, tie_break: Array, tokens: Array, bounds: Array | None = None) -> Order:
    """Order candidates, best first.

    Args:
        rewards: [n], NaN where there is none.
        tie_break: [n], larger wins between equal rewards; NaN loses.
        tokens: [n], fewer wins after that.
        bounds: [n], upper bounds of pruned candidates, NaN elsewhere.
    """
    n = len(rewards)
    bounds = np.full(n, np.nan) if bounds is None else bounds
    scored, pruned = ~np.isnan(rewards), ~np.isnan(bounds)
    group = np.where(scored, 0, np.where(pruned, 1, 2))
    value = np.where(scored, rewards, np.where(pruned, bounds, 0.0))
    tie = np.where(scored, np.nan_to_num(tie_break, nan=-np.inf, posinf=np.inf, neginf=-np.inf), 0.0)
    cost = np.where(scored, tokens, 0)
    return np.lexsort((np.arange(n), cost, -tie, -value, group))


def _indices(order: Order) -> tuple[int, ...]:
    return tuple(int(i) for i in order)


@dataclass(frozen=True)
class Best(Specified):
    """Pick the first of the ranking."""

    def __call__(self, rewards: Array, order: Order, texts: Sequence[str], /) -> Selection:
        """Select."""
        ranking = _indices(order)
        return Selection(ranking[0], ranking, ranking[:1])


@dataclass(frozen=True)
class TopK(Specified):
    """Pick the k first of the ranking, or as many as have a reward."""

    k: int

    def __post_init__(self) -> None:
        whole_number("k", self.k, 1)

    def __call__(self, rewards: Array, order: Order, texts: Sequence[str], /) -> Selection:
        """Select."""
        ranking = _indices(order)
        return Selection(ranking[0], ranking, ranking[: min(self.k, int((~np.isnan(rewards)).sum()))])


@dataclass(frozen=True)
class Softmax(Specified):
    """Draw one candidate with probability proportional to exp(reward / temperature).

    Args:
        temperature: towards 0 the best is always drawn (at 0 it is), towards infinity all are equally likely.
        seed: the same seed, candidates and rewards draw the same text, and other candidates draw independently; None
            draws differently every time.
    """

    temperature: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, int | float) or not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be a number >= 0, got {self.temperature!r}.")
        if self.seed is not None and (not isinstance(self.seed, int) or self.seed < 0):
            raise InputError(f"seed must be a whole number >= 0, got {self.seed!r}.")

    def __call__(self, rewards: Array, order: Order, texts: Sequence[str], /) -> Selection:
        """Select; the weights are the probabilities."""
        ranking = _indices(order)
        scored = ~np.isnan(rewards)
        weights = np.zeros(len(rewards))
        if self.temperature == 0:
            weights[ranking[0]] = 1.0
        else:
            with np.errstate(over="ignore"):  # a tiny temperature makes -inf, whose exponential is the right 0
                weights[scored] = np.exp((rewards[scored] - np.nanmax(rewards)) / self.temperature)
            weights /= weights.sum()
        # In ranking order and seeded with the texts: prompts of one file draw independently, shuffled candidates alike.
        content = hashlib.blake2b("\0".join(sorted(texts)).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        seed = None if self.seed is None else [self.seed, int.from_bytes(content)]
        drawn = ranking[int(np.random.default_rng(seed).choice(len(rewards), p=weights[order]))]
        return Selection(drawn, ranking, (drawn,), tuple(weights.tolist()))


@dataclass(frozen=True)
class WeightedVote(Specified):
    r"""Let candidates with the same answer add up their rewards; the best candidate of the winning answer is picked.

    Weights are the rewards; where one is negative (log-likelihoods), the lowest reward is subtracted from all. When all
    weights are then 0 every candidate weighs 1. Equal totals go to the answer of the candidate that ranks first.

    Args:
        extract: see ``bon.answers.as_extract``. Candidates without an answer have no vote; when none has one, the
            first of the ranking wins.
    """

    extract: str | Extract

    def __post_init__(self) -> None:
        as_extract(self.extract)

    def __call__(self, rewards: Array, order: Order, texts: Sequence[str], /) -> Selection:
        """Select; the weights are the candidates' own, 0 without a vote."""
        ranking = _indices(order)
        extract = as_extract(self.extract)
        able = [i for i in ranking if not math.isnan(rewards[i])]
        answers = dict(zip(able, classes([extract(texts[i]) for i in able]), strict=True))
        weights = np.nan_to_num(rewards - min(0.0, float(np.nanmin(rewards))))
        if not weights.any():
            weights = (~np.isnan(rewards)).astype(np.float64)
        voters = [i for i, answer in answers.items() if answer is not None]
        if not voters:
            return Selection(ranking[0], ranking, ranking[:1], tuple([0.0] * len(rewards)))
        totals = {answers[i]: math.fsum(weights[j] for j in voters if answers[j] == answers[i]) for i in voters}
        winner = next(i for i in voters if totals[answers[i]] == max(totals.values()))
        counted = tuple(float(weights[i]) if i in voters else 0.0 for i in range(len(rewards)))
        return Selection(winner, ranking, (winner,), counted)


@dataclass(frozen=True)
class LowerBound(Specified):
    """Pick the best by reward minus c standard deviations of it (``Score.spread``): be right rather than bold.

    It ranks, and ``MinReward`` compares, these lower bounds. A candidate whose spread is unknown is not picked.

    Args:
        c: how many standard deviations.
    """

    c: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= number("c", self.c) < math.inf:
            raise InputError(f"lcb:c takes a number >= 0 of standard deviations, got {self.c!r}.")

    def bounds(self, scores: Sequence[Score]) -> Array:
        """The lower bound of each candidate, NaN where there is none.

        Raises:
            InputError: no reward comes with a spread.
        """
        known = [score.reward is not None and score.spread is not None for score in scores]
        if not any(known):
            raise InputError(
                "the selector lcb needs rewards whose spread is known, and this scorer knows none: head:FILE does, "
                "and flip:MODEL,samples=4."
            )
        return _floats([s.reward for s in scores]) - self.c * _floats([s.spread for s in scores])

    def __call__(self, rewards: Array, order: Order, texts: Sequence[str], /) -> Selection:
        """Select, by what ``bounds`` gave."""
        return Best()(rewards, order, texts)


@dataclass(frozen=True)
class MinReward(Specified):
    """Abstain when the best reward is below ``least``; otherwise leave the choice to ``selector``.

    What ``selector`` chooses among others (top-k, a draw, a vote) are the candidates that reach ``least``.
    """

    selector: Selector
    least: float

    def __call__(self, rewards: Array, order: Order, texts: Sequence[str], /) -> Selection:
        """Select, or abstain."""
        if np.nanmax(rewards) < self.least:
            reason = f"the best reward, {np.nanmax(rewards):.4g}, is below the minimum of {self.least:.4g}"
            return Selection(None, _indices(order), reason=reason)
        enough = np.where(rewards >= self.least, rewards, np.nan)
        return self.selector(enough, order, texts)


def only_the_best_counts(selector: Selector) -> bool:
    """Whether a selector looks at nothing but the best reward, so that pruning the others changes nothing."""
    return isinstance(selector, Best) or (isinstance(selector, MinReward) and only_the_best_counts(selector.selector))


def as_selector(spec: str | Selector, min_reward: float | None = None, *, seed: int | None = None) -> Selector:
    """Read a selector's spec ("best", "top-k:3", "softmax:0.5", "vote:REGEX", "lcb:1"); a selector passes through.

    Args:
        spec: what to read.
        min_reward: abstain when the best reward is below this.
        seed: for selectors that draw and whose spec names none.

    Raises:
        UnknownNameError: no such name, or no such option.
        InputError: something that is not a selector, or a minimum that is not a number.
    """
    defaults = {} if seed is None else {"seed": seed}
    selector: Selector = SELECTORS.make(spec, defaults, objects=True) if isinstance(spec, str) else spec
    if not callable(selector) or isinstance(selector, type):
        raise InputError(f"a selector is a name or a function of (rewards, order, texts), got {selector!r}.")
    if min_reward is None:
        return selector
    return MinReward(selector, number("min_reward", min_reward))


def select(selector: Selector, scores: Sequence[Score], candidates: Sequence[Candidate]) -> Selection:
    """Rank candidates by their scores and let a selector choose; indices are those of the candidates.

    Args:
        selector: see ``as_selector``.
        scores: scores[i] is about candidates[i].

    Raises:
        UserCodeError: scores and candidates do not belong together, or the selector raised or returned something else
            than a ``Selection``.
    """
    if [s.candidate for s in scores] != [c.index for c in candidates]:
        raise UserCodeError(f"{len(scores)} scores do not belong to {len(candidates)} candidates one by one.")
    rewards = _floats([s.reward for s in scores])
    inner = selector.selector if isinstance(selector, MinReward) else selector
    if isinstance(inner, LowerBound) and not np.isnan(rewards).all():
        rewards = inner.bounds(scores)
    bounds = _floats([s.upper_bound if s.status == "pruned" else None for s in scores])
    order = rank(rewards, _floats([s.tie_break for s in scores]), _floats([s.tokens for s in scores]), bounds)
    if np.isnan(rewards).all():
        selection = Selection(None, _indices(order), reason=_no_reward(scores))
    else:
        selection = _apply(selector, rewards, order, [c.text for c in candidates])
    names = [c.index for c in candidates]
    return dataclasses.replace(
        selection,
        best=None if selection.best is None else names[selection.best],
        ranking=tuple(names[i] for i in selection.ranking),
        picked=tuple(names[i] for i in selection.picked),
    )


def _apply(selector: Selector, rewards: Array, order: Order, texts: Sequence[str]) -> Selection:
    try:
        selection = selector(rewards, order, texts)
    except BonError:
        raise
    except Exception as error:
        raise user_error("the selector", error) from error
    if not isinstance(selection, Selection):
        raise UserCodeError(f"the selector must return a Selection, got {selection!r:.60}.")
    return selection


def _floats(values: Sequence[float | None]) -> Array:
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _no_reward(scores: Sequence[Score]) -> str:
    if not scores:
        return "there are no candidates"
    counts = Counter(score.status for score in scores)
    listed = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    first = next((score.reason for score in scores if score.reason), None)
    return f"no candidate has a reward ({listed})" + (f": {first}" if first else "")
