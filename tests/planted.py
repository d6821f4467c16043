"""Heads for the tests: made from random states, without a model, or trained on the embedded one."""

import json

import numpy as np

from bon.heads.data import Labelled, States
from bon.heads.file import Header, TrainedHead, kind_of


def planted(rows=60, size=6, width=24, *, seed=0, confounded=0.0, noise=0.0):
    """Candidates whose states hold their quality, their length and much else.

    Args:
        rows, size, width: how many rows, of how many candidates, with states of how many numbers.
        confounded: how much of the label is length: 0 none, 1 all.
        noise: share of the labels that are drawn anew.
    """
    generator = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(99).normal(size=(width, 2)))[0].T  # the same in every data set
    quality, length = generator.normal(size=(2, rows * size))
    states = generator.normal(size=(rows * size, width)) + 2 * (quality[:, None] * directions[0])
    states += 2 * (length[:, None] * directions[1]) + np.repeat(generator.normal(size=(rows, width)), size, 0)
    labels = ((1 - confounded) * quality + confounded * length > 0).astype(float)
    redrawn = generator.random(len(labels)) < noise
    labels[redrawn] = generator.integers(0, 2, redrawn.sum())
    labels[::size], labels[1::size] = 1.0, 0.0  # each row has both
    first, second = slice(None, None, size), slice(1, None, size)
    for at, wanted in ((first, 1.0), (second, -1.0)):  # and these labels are right
        states[at] += (wanted * 2 - 2 * quality[at])[:, None] * directions[0]
        quality[at] = wanted
    data = Labelled(States((2,), states[:, None], states), labels, length, np.repeat(np.arange(rows), size))
    return data, quality, length


def learnt(data, kind, *, model="mini", fingerprint="none"):
    """A head without a report: cross-validation takes its time."""
    settings = kind_of(kind).choose(data, 0)
    width = data.states.last.shape[1]
    return TrainedHead(Header(kind, model, fingerprint, width, settings), kind_of(kind).fit(data, settings, 0))


def trained(folder, kind, model="mini", fingerprint="none", width=24):
    """A file with a head for a model, trained on random states."""
    data, _, _ = planted(rows=6, width=width)
    path = folder / f"{kind}.npz"
    learnt(data, kind, model=model, fingerprint=fingerprint).save(path)
    return path


def labelled_rows(count=12):
    """Rows in which the longer of two kinds of answer is right."""
    good, bad = "It is a long and very good answer number {}.", "No {}."
    return [
        json.dumps({"prompt": f"Say something about {i}.", "candidates": [good.format(i), bad.format(i)], "best": 0})
        for i in range(count)
    ]
