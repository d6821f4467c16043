"""What does a head add on real text that was trained on labels of the same set? Share of the way, set by set.

Rows as in ``real_text.py``: every other row trains ("choose"), the others are reported on. Picks: ``default``, which
needs no labels; the longest; ``head``, trained on the set's own rows; ``joint``, one head for all sets; and ``both``,
head and ``default`` by their ranks within a row, weighted as did best on training rows that the head had not seen;
``joint + default`` and ``head + joint + default``, added up as the scorer ``ensemble`` does, all with the same weight.
What was read stays in --states, so a run that was cut off goes on. --out FILE keeps figures and no texts.

    BON_DATA=DIR python benchmarks/real_heads.py --model smollm2-135m --states states.npz --store scores.db
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bon import portal
from bon.bench.harness import Report, conditions
from bon.evals.metrics import bootstrap, interval
from bon.evals.store import Store, stored
from bon.heads import probe
from bon.heads.data import Floats, Labelled, States, folds
from bon.heads.training import FOLDS, gains, labelled
from bon.models import ModelPool
from bon.pipeline import score
from bon.scorers.ensemble import scaled
from bon.spec import SCORERS
from lib.scripts import parser, script
from lib.shares import over_sets, shares_table
from real_text import SETS, Selected

LABELLED = SETS[:-1]  # the last one is a control
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the head, beside ``default``."""
SIZES = ("rows", "candidates", "layers", "max_words", "seed")


class Half(NamedTuple):
    """Every other row of a set.

    Args:
        data: hidden states and labels of n candidates.
        default: shape (n,), their ranks within the row by ``default``.
    """

    data: Labelled
    default: Floats


def main(argv: list[str] | None = None) -> None:
    """Read, train, compare; print a table and one JSON object."""
    options = _options(argv)
    report = Report("real_heads", conditions(model=Path(options.model).name, **{n: getattr(options, n) for n in SIZES}))
    pool = ModelPool()
    try:
        sets = {name: [_half(name, part, options, pool) for part in ("choose", "report")] for name in options.sets}
    finally:
        portal.run(pool.aclose())
    together = _head(_joined([choose.data for choose, _ in sets.values()]), options.seed)
    gained: dict[str, list[tuple[Floats, float]]] = {}
    for name, (choose, out) in sets.items():
        settings, arrays = _head(choose.data, options.seed)
        rewards = probe.rewards(arrays, settings, out.data.states).mean
        joint = probe.rewards(together[1], together[0], out.data.states).mean
        weight = _weight(choose, options.seed)
        picks = {
            "default": out.default,
            "longest": out.data.lengths,
            "head": rewards,
            "joint": joint,
            "both": _both(weight, out, rewards),
            "joint + default": _added(out, joint, out.default),
            "head + joint + default": _added(out, rewards, joint, out.default),
        }
        draws = bootstrap(len(out.data.names), options.seed)
        usual, best = gains(out.data, out.default)
        sizes = {"trained": len(choose.data.names), "rows": len(out.data.names)}
        for pick, values in picks.items():
            won, _ = gains(out.data, values)
            figures = {"share": interval(draws, won, best), "minus_default": interval(draws, won - usual, best)}
            chosen = {"head": settings, "both": {"weight": weight}, "joint": together[0]}.get(pick, {})
            report.rows.append({"case": name, "pick": pick, **sizes, **figures, **chosen})
            gained.setdefault(pick, []).append(((draws @ won) / (draws @ best), float(won.sum() / best.sum())))
    for pick, found in gained.items():  # sets count alike, and are drawn anew each on its own
        report.rows.append({"case": "mean", "pick": pick, "share": over_sets(found)})
    report.text.append(shares_table(report.rows, "pick"))
    report.emit(options.out)


def _half(name: str, part: str, options: argparse.Namespace, pool: ModelPool) -> Half:
    rows = list(Selected(name, part, options.max_words, options.candidates, options.rows).rows(seed=options.seed))
    engine: Any = pool.engine(options.model)
    data = labelled(rows, options.layers, engine, options.states)
    spec = f"default:{options.model}"
    with Store(options.store) as store:
        scorer = stored(SCORERS.make(spec), store, spec)
        groups = portal.run(score(scorer, [(row.task, row.candidates) for row in rows], pool=pool))
    ranks = [_ranks([(s.reward or 0.0, s.tie_break or 0.0) for s in group.scores]) for group in groups]
    return Half(data, np.concatenate(ranks))


def _ranks(values: Sequence[Any]) -> Floats:
    """From 0 to 1 in their order, equal ones alike."""
    return np.array([sum((a > b) + (a == b) / 2 for b in values) - 0.5 for a in values]) / max(1, len(values) - 1)


def _both(weight: float, half: Half, rewards: Floats) -> Floats:
    ranks = [_ranks(rewards[half.data.rows == row].tolist()) for row in half.data.names]
    return weight * np.concatenate(ranks) + (1 - weight) * half.default


def _added(half: Half, *rewards: Floats) -> Floats:
    """The sum of rewards that are each standardised within a row."""
    rows = [half.data.rows == row for row in half.data.names]
    parts = [[scaled(some[row].tolist(), "zscore") for row in rows] for some in rewards]
    return np.sum([np.concatenate(part) for part in parts], 0)


def _head(data: Labelled, seed: int) -> tuple[dict[str, Any], Any]:
    settings = probe.choose(data, seed)
    return settings, probe.fit(data, settings, seed)


def _weight(half: Half, seed: int) -> float:
    """What did best on rows that a head had not seen, trained on the others."""
    data, rewards = half.data, np.zeros(len(half.data.labels))
    for part in folds(data.names, FOLDS, seed):
        settings, arrays = _head(data.of(np.setdiff1d(data.names, part)), seed)
        rewards[np.isin(data.rows, part)] = probe.rewards(arrays, settings, data.of(part).states).mean
    return max(WEIGHTS, key=lambda weight: float(gains(data, _both(weight, half, rewards))[0].sum()))


def _joined(parts: Sequence[Labelled]) -> Labelled:
    """Candidates of several sets; labels in units of their spread within a row, which differs from set to set."""
    states = States(
        parts[0].states.layers,
        np.concatenate([part.states.pools for part in parts]),
        np.concatenate([part.states.last for part in parts]),
    )
    labels = np.concatenate([part.labels / part.centred(part.labels).std() for part in parts])
    rows = np.concatenate([part.rows + 10_000 * at for at, part in enumerate(parts)])
    return Labelled(states, labels, np.concatenate([part.lengths for part in parts]), rows)


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--sets", nargs="+", default=[*LABELLED], choices=[*SETS], help="which")
    options.add_argument("--model", default="smollm2-135m", help="what reads")
    options.add_argument("--rows", type=int, default=150, help="of each set, half of which train")
    options.add_argument("--candidates", type=int, default=4, help="of a row")
    options.add_argument("--layers", type=int, nargs="+", default=[1, 5, 9, 13, 18], help="that a head may choose from")
    options.add_argument("--max-words", type=int, default=150, help="of a candidate")
    options.add_argument("--states", type=Path, required=True, help="npz file that keeps hidden states")
    options.add_argument("--store", type=Path, required=True, help="SQLite file that keeps scores")
    return options.parse_args(argv)


if __name__ == "__main__":
    script(main)
