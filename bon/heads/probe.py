"""A linear probe on pooled hidden states: ridge or logistic regression of labels, on differences within a row.

The idea of INSPECTOR (arXiv 2601.22588), which fits one logistic regression to labels of all prompts together.
Differences keep what a prompt is like out. Least squares on all pairs of a row are least squares on what is centred
within it, so nothing of the size of the pairs is ever made. The logistic loss of a pair is that of Bradley and Terry:
which of the two is better counts, and not by how much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bon.heads.data import Arrays, Floats, Ints, Labelled, Rewards, States, folds, scales

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the penalty, as a share of the sum of all eigenvalues."""
_FOLDS = 5
_STEPS = 200  # of L-BFGS, at most


def choose(data: Labelled, seed: int) -> dict[str, Any]:
    """The layer, or all of them, the loss and the strength that put most pairs of left-out rows in order.

    The logistic loss is tried where ridge regression does best: it takes longer to fit.
    """
    found: list[tuple[float, dict[str, Any]]] = []

    def best() -> dict[str, Any]:
        return max(found, key=lambda each: each[0])[1]

    def measure(layers: Sequence[int], loss: str) -> None:
        features, _, _ = _features(data, layers)
        held = np.zeros((len(data.labels), len(STRENGTHS)))
        for part in folds(data.names, min(_FOLDS, len(data.names)), seed):
            out = np.isin(data.rows, part)
            held[out] = features[out] @ _weights(features, data, ~out, loss, STRENGTHS).T
        for strength, rewards in zip(STRENGTHS, held.T, strict=True):
            settings = {"layers": [*layers], "loss": loss, "strength": strength}
            found.append((float(data.in_order(rewards).mean()), settings))

    for layers in (*([layer] for layer in data.states.layers), data.states.layers):
        measure(layers, "ridge")
    measure(best()["layers"], "logistic")
    return best()


def fit(data: Labelled, settings: Mapping[str, Any], seed: int) -> Arrays:
    """The weights, and those with each fifth of the rows left out: by these the reward's spread is known."""
    features, mean, scale = _features(data, settings["layers"])
    weights = np.concatenate(
        [
            _weights(features, data, ~np.isin(data.rows, left_out), settings["loss"], [settings["strength"]])
            for left_out in (np.zeros(0, np.int64), *folds(data.names, min(_FOLDS, len(data.names)), seed))
        ]
    )
    return {"mean": mean, "scale": scale, "weights": weights[0], "left_out": weights[1:]}


def rewards(arrays: Arrays, settings: Mapping[str, Any], states: States) -> Rewards:
    """Rewards in the unit of the labels, or log-odds; their spread is the jackknife's, over parts of the rows."""
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


def _weights(features: Floats, data: Labelled, kept: Any, loss: str, strengths: Sequence[float]) -> Floats:
    """Weights of the features for each strength, fitted to the candidates that are kept, whole rows of them."""
    some = features[kept]
    penalties = [max(strength * float((some**2).sum()), 1e-12) for strength in strengths]
    if loss == "logistic":
        pairs = replace(data, labels=data.labels[kept], rows=data.rows[kept]).pairs()
        return np.array([_logistic(some, *pairs, penalty) for penalty in penalties])
    kernel, labels = some @ some.T, data.centred(data.labels)[kept]
    return np.array([some.T @ np.linalg.solve(kernel + each * np.eye(len(kernel)), labels) for each in penalties])


def _logistic(features: Floats, better: Ints, worse: Ints, weights: Floats, penalty: float) -> Floats:
    """Minimise the logistic loss of the pairs, plus half the penalty times the squared weights of the features."""
    import torch

    values, counted = torch.from_numpy(features), torch.from_numpy(weights)
    found = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([found], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        margins = (values @ found)[better] - (values @ found)[worse]
        total = -(torch.nn.functional.logsigmoid(margins) * counted).sum() + penalty / 2 * found @ found
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return found.detach().numpy()
