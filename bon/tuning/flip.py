"""``bon train flip``: from pairs to an adapter, and what it brought, on rows that it never saw.

The model without the adapter and with it are measured together: they share their weights.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bon import portal
from bon.errors import InputError
from bon.evals.dataset import Dataset
from bon.evals.harness import evaluate
from bon.models import Model, ModelPool, weights_of
from bon.pairs.alike import HeldOut
from bon.scorers.flip import Flip
from bon.scorers.likelihood import BackwardLikelihood
from bon.spec import ENGINES
from bon.tuning.pairs import LEAST_PAIRS, HeldBack, Pair
from bon.tuning.settings import Settings
from bon.tuning.training import PLOT, Progress, Training

log = logging.getLogger("bon")

_HELD_BACK = 64  # pairs, or an eighth where that is less: a prompt is looked for among 64
_WINDOW = 40  # points of the plot of the loss


def train(
    model: Model,
    pairs: Sequence[Pair],
    out: Path,
    settings: Settings,
    *,
    judged: Sequence[Dataset] = (),
    limit: int | None = None,
    threads: int | None = None,
    progress: Progress = lambda done, of, loss: None,
    show: bool = False,
) -> dict[str, Any]:
    """Train an adapter, or go on where that was broken off, and measure it.

    Args:
        model: the base, which torch can load.
        pairs: instructions with good answers.
        out: folder of the adapter.
        settings: how.
        judged: what it is measured on; without any, an eighth of the pairs, 64 at most, which are held back.
        limit: rows of each of them at most.
        threads: of the arithmetic on a CPU.
        progress: told of each step.
        show: show progress bars of the measurement on stderr.

    Returns:
        What stands in the adapter's ``bon.json``; ``measured`` by name of the dataset and of the scorer.

    Raises:
        InputError: too few pairs, a model that cannot be trained, or what ``Training`` and ``evaluate`` say.
        EngineError: the loss is no number.
    """
    if model.runs_on not in ("torch", "vllm"):
        raise InputError(
            f"{model.text!r} is trained by torch, which loads models in Hugging Face format and GGUF files."
        )
    if model.adapter is not None:
        raise InputError(f"{model.text!r} has an adapter already, and one on top cannot be used. Name its base.")
    model = replace(model, engine="torch")
    ENGINES.check("torch", model.options)  # before the training, not after it
    held = [] if judged else _held_back(pairs, settings.seed)
    sets: list[Dataset] = [*judged] or [HeldBack(held)]
    if twice := [name for name, count in Counter(one.name for one in sets).items() if count > 1]:
        raise InputError(
            f"{twice[0]!r} is judged on twice, and its figures have one place. Rename one, or leave it out."
        )
    asked = [row.task.instruction for one in sets for row in one.rows()]
    apart = without([pair for pair in pairs if pair not in held], asked)
    if len(apart) < LEAST_PAIRS:
        raise InputError(
            f"of {len(pairs)} pairs {len(apart)} are left to train on: the others are what the adapter is judged on. "
            "Name more pairs, or other rows."
        )
    training = Training(model, weights_of(model), apart, out, settings, threads)
    training.run(progress)
    record: dict[str, Any] = {
        "left_out": {"in the judged rows": len(pairs) - len(apart), "too long or empty": training.left_out},
        "sources": Counter(pair.source or "unknown" for pair in apart),
        "licences": Counter(pair.licence or "unknown" for pair in apart),
    }
    training.write_record(record)
    _plot(out / PLOT, [own for own, _ in training.losses])
    adapted = replace(model, options={**model.options, "adapter": str(out)})
    record["measured"] = {one.name: _measured(one, (model, adapted), settings, limit, threads, show) for one in sets}
    return training.finish(record)


def without(pairs: Sequence[Pair], judged: Sequence[str]) -> list[Pair]:
    """The pairs whose instruction is not one of the judged ones, exactly or nearly; says how many are."""
    held = HeldOut(judged)
    kept: list[Pair] = []
    refused: list[Pair] = []
    for pair in pairs:
        (refused if held.holds(pair.instruction) else kept).append(pair)
    if refused:
        log.warning(
            "%d of %d pairs stand in the rows that the adapter is judged on, word for word or nearly, and are not "
            "trained on; the first asks %.60r",
            len(refused),
            len(pairs),
            refused[0].instruction,
        )
    return kept


def _held_back(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    drawn = [pairs[at] for at in np.random.default_rng(seed).permutation(len(pairs))]
    different = list({pair.instruction: pair for pair in drawn}.values())  # a prompt is told from the others
    return different[: min(_HELD_BACK, max(1, len(pairs) // 8))]


def _measured(
    dataset: Dataset, models: Sequence[Model], settings: Settings, limit: int | None, threads: int | None, show: bool
) -> dict[str, Any]:
    """Figures of each scorer on one dataset: without the adapter, and with it."""
    pool = ModelPool(threads)
    try:
        pool.load(models)
        engines = [pool.engine(model) for model in models]
        makes = (Flip,) if isinstance(dataset, HeldBack) else (Flip, BackwardLikelihood)  # which only chooses
        scorers = [make(engine, style=settings.style) for make in makes for engine in engines]
        report = evaluate(dataset, scorers=scorers, limit=limit, seed=settings.seed, progress=show, threads=threads)
    finally:
        portal.run(pool.aclose())
    shares = {name: {"share": one["share"]} for name, one in report["scorers"].items() if one["kind"] == "scorer"}
    return {name: {**share, **report["inversion"].get(name, {})} for name, share in shares.items()}


def _plot(path: Path, losses: Sequence[float]) -> None:
    from bon.mini.train import plot_loss

    window = max(1, len(losses) // _WINDOW)
    ends = range(window, len(losses) + 1, window)
    try:
        plot_loss(path, [(end, float(np.mean(losses[end - window : end]))) for end in ends])
    except OSError as error:
        log.warning("no plot of the loss: cannot write %r: %s", str(path), error.strerror)


def table(record: Mapping[str, Any]) -> str:
    """What an adapter brought, in one table."""
    head = ("", "F1", "echoes", "own of 8", "own of 64", "share of the way [95%]")
    lines = []
    for dataset, scorers in record["measured"].items():
        width = max(map(len, (dataset, *scorers)))
        lines.append(f"{dataset:<{width}}  " + "  ".join(f"{name:>9}" for name in head[1:]))
        for name, of in scorers.items():
            found = of.get("retrieval_at_1", {})
            figures = [of.get("f1"), of.get("echoes"), found.get("8"), found.get("64")]
            shown = ["-" if one is None else f"{one:.3f}" for one in figures]
            share = of["share"]
            if share is not None and share["mean"] is not None:
                shown.append(f"{share['mean']:+.3f} [{share['low']:+.3f}, {share['high']:+.3f}]")
            lines.append(f"{name:<{width}}  " + "  ".join(f"{one:>9}" for one in shown))
    return "\n".join(lines)
