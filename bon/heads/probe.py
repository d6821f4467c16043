"""A linear probe: ridge regression of labels on pooled hidden states, on differences within a row.

The idea of INSPECTOR (arXiv 2601.22588), which fits one logistic regression to labels of all prompts together.
Differences keep what a prompt is like out. Least squares on all pairs of a row are least squares on what is centred
within it, so nothing of the size of the pairs is ever made, and the smaller side of the matrix is solved for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bon.heads.data import Arrays, Floats, Labelled, Rewards, States, folds, scales

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the penalty, as a share of the sum of all eigenvalues."""
_FOLDS = 5


def choose(data: Labelled, seed: int) -> dict[str, Any]:
    """The layer, or all of them, and the strength that put most pairs of left-out rows in order."""
    parts = folds(data.names, min(_FOLDS, len(data.names)), seed)
    sets: list[Sequence[int]] = [[layer] for layer in data.states.layers]
    found = []
    for layers in (*sets, data.states.layers):
        features, _, _ = _features(data, layers)
        kernel = features @ features.T / features.shape[1]
        held = np.zeros((len(STRENGTHS), len(data.labels)))
        for part in parts:
            out = np.isin(data.rows, part)
            for at, strength in enumerate(STRENGTHS):
                held[at, out] = kernel[np.ix_(out, ~out)] @ _solve(kernel[np.ix_(~out, ~out)], data, ~out, strength)
        for strength, rewards in zip(STRENGTHS, held, strict=True):
            found.append((float(data.in_order(rewards).mean()), {"layers": [*layers], "strength": strength}))
    return max(found, key=lambda each: each[0])[1]


def fit(data: Labelled, settings: Mapping[str, Any], seed: int) -> Arrays:
    """The weights, and those with each fifth of the rows left out: by these the reward's spread is known."""
    features, mean, scale = _features(data, settings["layers"])
    kernel = features @ features.T / features.shape[1]
    weights = []
    for left_out in (np.zeros(0, np.int64), *folds(data.names, min(_FOLDS, len(data.names)), seed)):
        kept = ~np.isin(data.rows, left_out)
        dual = _solve(kernel[np.ix_(kept, kept)], data, kept, settings["strength"])
        weights.append(features[kept].T @ dual / features.shape[1])
    return {"mean": mean, "scale": scale, "weights": weights[0], "left_out": np.array(weights[1:])}


def rewards(arrays: Arrays, settings: Mapping[str, Any], states: States) -> Rewards:
    """Rewards in the unit of the labels; their spread is the jackknife's, over parts of the rows left out."""
    features = (states.at(settings["layers"]) - arrays["mean"]) / arrays["scale"]
    others = features @ arrays["left_out"].T
    count = others.shape[1]
    spread = np.sqrt((count - 1) / count * ((others - others.mean(1, keepdims=True)) ** 2).sum(1))
    return Rewards(features @ arrays["weights"], spread)


def _features(data: Labelled, layers: Sequence[int]) -> tuple[Floats, Floats, Floats]:
    """Standardised pools, centred within each row; and the mean and the scale that standardised them."""
    values = data.states.at(layers)
    mean, scale = scales(values)
    return data.centred((values - mean) / scale), mean, scale


def _solve(kernel: Floats, data: Labelled, kept: Any, strength: float) -> Floats:
    """Ridge regression in its dual form: one number for each candidate that is kept."""
    labels = data.centred(data.labels)[kept]
    penalty = max(strength * float(np.trace(kernel)), 1e-12)
    return np.linalg.solve(kernel + penalty * np.eye(len(kernel)), labels)
