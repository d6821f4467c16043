"""Which rule for stopping pays: rules beside fixed numbers of samples, on stored candidates, by halves.

What a rule may choose (its price, how many it samples at least and together, at most) is chosen on one half of the
rows, as the cheapest that is there as good as a fixed N, and judged on the other half; and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bon.adaptive import Adaptive
from bon.budget import Fixed, spec_of
from bon.evals.metrics import Floats, bootstrap, interval
from bon.evals.replay import Samples, allocated, oracle, replay
from bon.selectors import Selector

ANY = "any rule"
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_PRICES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
_AS_GOOD = 0.005  # half a point
_LABEL, _SAMPLES, _TOKENS, _ROUNDS = range(4)

Tried = Mapping[str, Mapping[str, Floats]]
"""By rule and spec, what ``replay`` found."""


def settings(most: int, *, bounded: bool, extract: str | None = None) -> dict[str, list[Adaptive]]:
    """What is tried of each rule.

    Args:
        most: samples that there are.
        bounded: whether the scorer has a range.
        extract: where answers are found, for the vote rule; the other rules, which ask for rewards, are then left out.
    """
    sizes = [size for size in _SIZES if 4 <= size <= most]
    rules = ("improvement", "pandora", "excess", *(("bound",) if bounded else ()))
    if extract is not None:
        rules = (f"vote:{extract}",)
    tried = {
        rule: [
            Adaptive(least=batch, most=size, rule=rule, price=price, batch=batch)
            for price in _PRICES
            for batch in (2, 4)
            for size in ((most,) if extract is None else sizes)
        ]
        for rule in rules
    }
    if bounded and extract is None:
        tried["exact"] = [
            Adaptive(least=batch, most=size, rule="exact", batch=batch) for size in sizes for batch in (1, 2, 4)
        ]
    return tried


def compare(
    rows: Sequence[Samples],
    tried: Mapping[str, Sequence[Adaptive]],
    sizes: Sequence[int] = (8, 16),
    selector: Selector | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Replay rules and fixed numbers.

    Args:
        rows: at least two, all with as many candidates.
        tried: by rule, what may be chosen; see ``settings``.
        sizes: the fixed numbers that rules are to be as good as, up to half a point.
        selector: what picks; ``Best`` where it is None.
        seed: of orders, halves and intervals.

    Returns:
        ``rows``; ``fixed`` (a list of ``n``, ``label``, ``samples``, ``tokens`` and ``rounds``); ``tried``, the same by
        rule for each ``spec``; ``oracle`` and ``allocated`` (all rows together get as many samples), the same by size;
        ``halves``, see ``_judged``; and ``recommended``, by size the spec that is the cheapest on all rows of those
        that are as good.
    """
    most = min(len(row.labels) for row in rows)
    fixed = {n: replay(Fixed(n), rows, selector, seed) for n in {*_SIZES, *sizes} if n <= most}
    found: dict[str, dict[str, Floats]] = {
        rule: {str(spec_of(budget)): replay(budget, rows, selector, seed) for budget in budgets}
        for rule, budgets in tried.items()
    }
    everything = {spec: some for of_rule in found.values() for spec, some in of_rule.items()}
    judged = [
        _judged(rule, of_rule, size, fixed[size], seed)
        for size in sizes
        for rule, of_rule in {**found, ANY: everything}.items()
    ]
    return {
        "rows": len(rows),
        "fixed": [{"n": n, **_means(some)} for n, some in sorted(fixed.items())],
        "tried": {
            rule: [{"spec": s, **_means(some)} for s, some in of_rule.items()] for rule, of_rule in found.items()
        },
        "allocated": {
            str(size): _means(allocated(size * len(rows), rows, selector, seed, Adaptive(rule=next(iter(tried)))))
            for size in sizes
        },
        "oracle": {str(size): _means(oracle(size, rows, seed)) for size in sizes},
        "halves": judged,
        "recommended": {str(size): _cheapest(everything, fixed[size], np.arange(len(rows))) for size in sizes},
    }


def front(points: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(tokens, label) of those that no cheaper one equals."""
    line: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda each: (each["tokens"], -each["label"])):
        if not line or point["label"] > line[-1][1]:
            line.append((point["tokens"], point["label"]))
    return line


def _judged(rule: str, tried: Mapping[str, Floats], size: int, fixed: Floats, seed: int) -> dict[str, Any]:
    """What a rule saves beside a fixed N, chosen on one half and judged on the other, both ways.

    Returns:
        ``rule``, ``n``, the ``specs`` that were chosen, ``label``, ``samples``, ``tokens`` and ``rounds``; ``saved``,
        the share of the tokens of the fixed N, and ``lost``, of its label, with paired 95% intervals over rows.
    """
    rows = len(fixed)
    halves = np.array_split(np.random.default_rng(seed).permutation(rows), 2)
    own, specs = np.empty_like(fixed), []
    for chosen_on, judged_on in (halves, halves[::-1]):
        specs.append(_cheapest(tried, fixed, chosen_on))
        own[judged_on] = tried[specs[-1]][judged_on]
    weights = bootstrap(rows, seed)
    return {
        "rule": rule,
        "n": size,
        "specs": specs,
        **_means(own),
        "saved": interval(weights, (fixed - own)[:, _TOKENS], fixed[:, _TOKENS]),
        "lost": interval(weights, (fixed - own)[:, _LABEL]),
    }


def _cheapest(tried: Mapping[str, Floats], fixed: Floats, rows: Any) -> str:
    """Of what is as good as the fixed N on these rows the spec with the fewest tokens; else the best there is."""
    means = {spec: some[rows].mean(axis=0) for spec, some in tried.items()}
    good = {spec: mean for spec, mean in means.items() if mean[_LABEL] >= fixed[rows, _LABEL].mean() - _AS_GOOD}
    if good:
        return min(good, key=lambda spec: float(good[spec][_TOKENS]))
    return max(means, key=lambda spec: float(means[spec][_LABEL]))


def _means(found: Floats) -> dict[str, float]:
    return dict(zip(("label", "samples", "tokens", "rounds"), found.mean(axis=0).tolist(), strict=True))
