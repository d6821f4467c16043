"""Who is compared with whom: the questions about one task's candidates, round by round, and the rewards that follow.

A contest is a generator: it yields the questions of a round, each a tuple of entrants in the order in which they are
shown, is sent one tuple of weights for each (None where the judge could not be read), and returns one reward for each
entrant. Contests know no model, so that the rounds of many tasks can run as one batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence

Shown = tuple[int, ...]
Weights = tuple[float, ...] | None
Contest = Generator[Sequence[Shown], Sequence[Weights], list[float]]


class Wins:
    """What a contest of all pairs has come to so far.

    Args:
        entrants: how many.
    """

    def __init__(self, entrants: int) -> None:
        self.won = [0.0] * entrants
        self.open = [2.0 * (entrants - 1)] * entrants

    def take(self, shown: Shown, weights: Weights) -> None:
        """Count one answer; one that could not be read is worth half a win to both."""
        for entrant, weight in zip(shown, weights or (0.5, 0.5), strict=True):
            self.won[entrant] += weight
            self.open[entrant] -= 1

    def hopeless(self, entrant: int) -> bool:
        """Whether another entrant has more wins than this one can still reach."""
        return self.won[entrant] + self.open[entrant] < max(self.won)

    def most(self, entrant: int) -> float:
        """The reward that an entrant can reach at most."""
        return (self.won[entrant] + self.open[entrant]) / (2 * (len(self.won) - 1))


def rated(entrants: int) -> Contest:
    """Each by itself; the reward is the rating."""
    answers = yield [(entrant,) for entrant in range(entrants)]
    return [weights[0] if weights else math.nan for weights in answers]


def all_pairs(entrants: int) -> Contest:
    """Every pair in both orders; the reward is the share of comparisons won."""
    wins = Wins(entrants)
    questions = [*itertools.permutations(range(entrants), 2)]
    answers = yield questions
    for shown, weights in zip(questions, answers, strict=True):
        wins.take(shown, weights)
    return [won / (2 * (entrants - 1)) for won in wins.won]


def knockout(entrants: int) -> Contest:
    """Rounds of pairs, in both orders, whose losers leave: entrants - 1 comparisons.

    The reward is the share of rounds survived. An odd one goes on without a comparison; of an even result the first
    in the draw goes on.
    """
    left = list(range(entrants))
    survived = [0] * entrants
    rounds = math.ceil(math.log2(entrants))
    while len(left) > 1:
        pairs = [*zip(left[::2], left[1::2], strict=False)]
        answers = yield [shown for a, b in pairs for shown in ((a, b), (b, a))]
        winners = []
        for (a, b), there, back in zip(pairs, answers[::2], answers[1::2], strict=True):
            for_a = (there or (0.5, 0.5))[0] + (back or (0.5, 0.5))[1]
            winners.append(a if for_a >= 1 else b)
        left = winners + left[2 * len(pairs) :]
        for entrant in left:
            survived[entrant] += 1
    return [count / rounds for count in survived]


def pivot(entrants: int, pivots: int) -> Contest:
    """A ring, in which each is shown once in each place, then everybody against the best of the ring.

    Takes N + k(N - k) + k(k - 1)/2 comparisons for N entrants and k pivots, those of the second stage in alternating
    order; the reward is the mean share won.
    """
    won, met = [0.0] * entrants, [0] * entrants

    def take(shown: Shown, weights: Weights) -> None:
        for entrant, weight in zip(shown, weights or (0.5, 0.5), strict=True):
            won[entrant] += weight
            met[entrant] += 1

    ring = [(entrant, (entrant + 1) % entrants) for entrant in range(entrants)]
    answers = yield ring
    for shown, weights in zip(ring, answers, strict=True):
        take(shown, weights)
    best = sorted(range(entrants), key=lambda entrant: (-won[entrant], entrant))[:pivots]
    pairs = [(a, b) for place, a in enumerate(best) for b in range(entrants) if b not in best[: place + 1]]
    pairs = [pair if sum(pair) % 2 else pair[::-1] for pair in pairs]
    answers = yield pairs
    for shown, weights in zip(pairs, answers, strict=True):
        take(shown, weights)
    return [a / b for a, b in zip(won, met, strict=True)]


def listed(orders: Sequence[Shown], fits: int | None) -> Contest:
    """All in one list, in several orders; the reward is the mean share of each.

    Args:
        orders: permutations of the entrants.
        fits: entrants that fit one list; of longer ones the winners of parts meet.
    """
    lists = [[*order] for order in orders]
    shares = [[0.0] * len(orders[0]) for _ in orders]
    while open_ := [at for at, left in enumerate(lists) if left]:
        parts = [(at, part) for at in open_ for part in _parts(lists[at], fits)]
        answers = yield [tuple(part) for _, part in parts]
        for at in open_:
            mine = [
                (part, weights or (1 / len(part),) * len(part))
                for (of, part), weights in zip(parts, answers, strict=True)
                if of == at
            ]
            if len(mine) == 1:
                [(part, weights)] = mine
                for entrant, weight in zip(part, weights, strict=True):
                    shares[at][entrant] = weight
                lists[at] = []
            else:
                lists[at] = [part[max(range(len(part)), key=weights.__getitem__)] for part, weights in mine]
    return [sum(share[entrant] for share in shares) / len(orders) for entrant in range(len(orders[0]))]


def _parts(entrants: list[int], fits: int | None) -> list[list[int]]:
    """Split evenly into as few lists as fit; none of a single entrant, which would be no comparison."""
    count = 1 if fits is None else min(math.ceil(len(entrants) / fits), len(entrants) // 2)
    size, more = divmod(len(entrants), count)
    edges = [at * size + min(at, more) for at in range(count + 1)]
    return [entrants[a:b] for a, b in itertools.pairwise(edges)]
