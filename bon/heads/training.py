"""From labelled rows to a head, with an honest figure of what it is worth: ``bon train head``.

What is reported is measured on rows that neither the head nor the choice of its settings has seen: in each fold the
settings are chosen anew. Beside the head stands the longest candidate, which is what a head learns most easily where
labels favour it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bon import portal
from bon.engines.base import Prompt, Reading, Reads
from bon.errors import InputError
from bon.evals.dataset import Dataset, Example
from bon.evals.metrics import bootstrap, expected_best, interval
from bon.heads.data import Floats, Labelled, States, folds, prompt_of
from bon.heads.file import Header, TrainedHead, kind_of, load_states, save_states
from bon.scorers.parsing import response_piece
from bon.types import Candidate

FOLDS = 5
LEAST_ROWS = 2 * FOLDS
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the rows of a fold that the learning curve trains on."""
MOST_LAYERS = 8
_AT_A_TIME = 32  # candidates that are read in one call


def train(
    dataset: Dataset,
    engine: Reads,
    model: str,
    kind: str = "probe",
    *,
    seed: int = 0,
    kept: Path | None = None,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> TrainedHead:
    """Read the candidates, cross-validate, and fit a head to all of them.

    Args:
        dataset: rows with candidates and labels.
        engine: reads them.
        model: its spec, for whoever loads the head.
        kind: "probe" or "bnrm".
        seed: of folds and initial weights.
        kept: where hidden states are kept, and taken from where they are there already.
        progress: told how many candidates have been read.

    Raises:
        InputError: too few rows whose labels differ, or no such kind.
    """
    kind_of(kind)
    rows = [row for row in dataset.rows() if len({*row.labels}) > 1]
    if len(rows) < LEAST_ROWS:
        raise InputError(
            f"{dataset.name} has {len(rows)} rows whose candidates differ in label; a head learns from such rows only, "
            f"and needs {LEAST_ROWS} at least. Fifty are a good start."
        )
    data = labelled(rows, _layers(engine.layers), engine, kept, progress)
    return fit(data, kind, seed, model=model, fingerprint=engine.fingerprint)


def fit(data: Labelled, kind: str, seed: int = 0, *, model: str = "", fingerprint: str = "") -> TrainedHead:
    """Cross-validate and fit a head to candidates whose hidden states are there."""
    made = kind_of(kind)
    report = _validate(data, made, seed)
    settings = made.choose(data, seed)
    arrays = made.fit(data, settings, seed)
    return TrainedHead(Header(kind, model, fingerprint, data.states.last.shape[1], settings, report), arrays)


def _layers(count: int) -> list[int]:
    """The layers that may be chosen: all, or some at equal distances."""
    return sorted({round(layer) for layer in np.linspace(1, count, min(count, MOST_LAYERS))})


def _validate(data: Labelled, made: Any, seed: int) -> dict[str, Any]:
    """Cross-validation and learning curve, on rows that were left out."""
    held = {share: np.zeros(len(data.labels)) for share in SHARES}
    counts: dict[float, int] = {}
    for part in folds(data.names, FOLDS, seed):
        rest = np.random.default_rng(seed).permutation(np.setdiff1d(data.names, part))
        out = np.isin(data.rows, part)
        settings = made.choose(data.of(rest), seed)
        for share in SHARES:
            counts[share] = round(share * len(rest))
            arrays = made.fit(data.of(rest[: counts[share]]), settings, seed)
            held[share][out] = made.rewards(arrays, settings, data.of(part).states).mean
    draws = bootstrap(len(data.names), seed)
    full, half = data.in_order(held[1.0]), data.in_order(held[0.5])
    figures = {
        name: {
            "pairs_in_order": interval(draws, data.in_order(rewards)),
            "share_of_the_way": interval(draws, *gains(data, rewards)),
        }
        for name, rewards in (("head", held[1.0]), ("longest", data.lengths))
    }
    return {
        "rows": len(data.names),
        "candidates": len(data.labels),
        **figures,
        "beyond_longest": interval(draws, full - data.in_order(data.lengths)),
        "curve": {str(counts[share]): float(data.in_order(held[share]).mean()) for share in SHARES},
        "last_doubling": interval(draws, full - half),
    }


def gains(data: Labelled, rewards: Floats) -> tuple[Floats, Floats]:
    """What the pick has beyond a random one in each row, and what the best has: labels."""
    rows = [data.rows == row for row in data.names]
    means = np.array([data.labels[row].mean() for row in rows])
    picked = np.array([expected_best(data.labels[row], rewards[row], int(row.sum())) for row in rows])
    return picked - means, np.array([data.labels[row].max() for row in rows]) - means


def labelled(
    rows: Sequence[Example],
    layers: Sequence[int],
    engine: Reads,
    kept: Path | None,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> Labelled:
    """Read candidates: those that could be read, of rows where that leaves different labels; otherwise as ``train``.

    Raises:
        InputError: so many could not be read that too few rows are left.
    """
    tasks = [(at, row.task, text) for at, row in enumerate(rows) for text in row.candidates]
    labels = np.array([label for row in rows for label in row.labels])
    asked = [(prompt_of(task), str(response_piece(Candidate(0, text)) or "")) for _, task, text in tasks]
    readings = _readings(asked, layers, engine, kept, progress)
    names = np.array([at for at, _, _ in tasks])
    able = np.array([one.error is None for one in readings])
    for at in np.unique(names):
        if len(np.unique(labels[able & (names == at)])) < 2:
            able &= names != at
    error = next((one.error for one in readings if one.error is not None), None)
    if error is not None and len(np.unique(names[able])) < LEAST_ROWS:
        raise InputError(f"{(~able).sum()} of {len(able)} candidates could not be read, the first of them: {error}")
    lengths = np.array([float(len(text)) for _, _, text in tasks])
    states = States.of(layers, [one for one, fine in zip(readings, able, strict=True) if fine])
    return Labelled(states, labels[able], lengths[able], names[able])


def _readings(
    asked: Sequence[tuple[Prompt, str]],
    layers: Sequence[int],
    engine: Reads,
    kept: Path | None,
    progress: Callable[[int, int], object],
) -> list[Reading]:
    """What the engine holds of each response; what is in the file ``kept`` is not read again."""
    found = {} if kept is None else load_states(kept, engine.fingerprint, layers)
    keys = [_digest(prompt, response) for prompt, response in asked]
    missing = sorted(
        {key: at for at, key in enumerate(keys) if key not in found}.values(), key=lambda at: len(asked[at][1])
    )
    try:
        for start in range(0, len(missing), _AT_A_TIME):
            some = missing[start : start + _AT_A_TIME]
            prompts, responses = zip(*(asked[at] for at in some), strict=True)
            read = portal.run(engine.hidden_states(prompts, responses, layers=layers))
            found |= dict(zip((keys[at] for at in some), read, strict=True))
            progress(start + len(some), len(missing))
    finally:  # what was read stays read, Ctrl-C or not
        if kept is not None and missing:
            save_states(kept, found, engine.fingerprint, layers)
    return [found[key] for key in keys]


def _digest(prompt: Prompt, response: str) -> str:
    asked = json.dumps([[turn.to_dict() for turn in prompt.turns], response])
    return hashlib.blake2b(asked.encode(), digest_size=12).hexdigest()
