"""From logits to tokens: filters, seeded draws that do not depend on the batch, and raw log-probabilities.

A draw is inverse-CDF sampling with one uniform number per row and step. The number comes from a counter-based
generator keyed by (seed, prompt, sample index), so a row gets the same numbers whatever else is in its batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bon.types import Drawing

_CHUNK = 64  # uniforms drawn at a time for one row
_NUCLEUS = 1024  # likeliest tokens looked at before a whole vocabulary is sorted
_COLDEST = 1e-5  # below it logits divided by the temperature overflow; vLLM takes the likeliest token there as well


def row_key(seed: int, prompt: Sequence[int], sample_index: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """128-bit key of one completion's random numbers, shape (2,)."""
    content = hashlib.blake2b(digest_size=16)
    content.update(f"{seed} {sample_index} ".encode())
    content.update(np.asarray(prompt, dtype=np.int64).tobytes())
    return np.frombuffer(content.digest(), dtype=np.uint64)


class Uniforms:
    """One uniform number per row and step.

    Args:
        keys: shape (rows, 2), one key of ``row_key`` per row.
    """

    def __init__(self, keys: np.ndarray[Any, np.dtype[np.uint64]]) -> None:
        self._keys = keys
        self._chunk = np.empty((len(keys), _CHUNK))
        self._step = np.zeros(len(keys), dtype=np.int64)

    def next(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Each row's next number in [0, 1), shape (rows,)."""
        at = self._step % _CHUNK
        for row in np.flatnonzero(at == 0):
            counter = int(self._step[row]) // 4  # Philox makes four numbers per count
            bits = np.random.Philox(key=self._keys[row], counter=counter)
            self._chunk[row] = np.random.Generator(bits).random(_CHUNK)
        self._step = self._step + 1
        column: np.ndarray[Any, np.dtype[np.float64]] = self._chunk[np.arange(len(at)), at]
        return column

    def select(self, order: np.ndarray[Any, Any]) -> None:
        """Keep these rows, in this order."""
        self._keys, self._chunk, self._step = self._keys[order], self._chunk[order], self._step[order]

    def join(self, other: Uniforms) -> None:
        """Take in the rows of another, behind ours."""
        for name in ("_keys", "_chunk", "_step"):
            setattr(self, name, np.concatenate([getattr(self, name), getattr(other, name)]))


def choose(logits: Tensor, drawing: Drawing, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Draw one token per row; its log-probability is the model's own, before temperature and filters.

    Args:
        logits: shape (rows, vocabulary).
        drawing: temperature 0, or nearly 0, takes the likeliest token. The order of the rest is vLLM's: temperature,
            min-p, top-k, top-p.
        uniforms: shape (rows,), in [0, 1), on the logits' device; not read at temperature 0.

    Returns:
        Token ids and log-probabilities, both of shape (rows,).
    """
    logits = logits.float()
    if drawing.temperature < _COLDEST or uniforms is None:
        tokens = logits.argmax(-1)
    else:
        tokens = _draw(logits / drawing.temperature, drawing, uniforms.float().unsqueeze(-1))
    return tokens, logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def _draw(scaled: Tensor, drawing: Drawing, uniforms: Tensor) -> Tensor:
    vocabulary = scaled.shape[-1]
    top_k = drawing.top_k if 0 < drawing.top_k < vocabulary else 0
    floor = math.log(drawing.min_p) if drawing.min_p > 0 else None
    if not top_k and drawing.top_p >= 1:
        if floor is not None:
            scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + floor, -math.inf)
        return _invert(scaled.softmax(-1), uniforms)
    if top_k:
        values, ids = scaled.topk(top_k, -1)
        total = values.logsumexp(-1, keepdim=True)
    else:
        values, ids = scaled.topk(min(_NUCLEUS, vocabulary), -1)
        # min-p comes first: top-p is a share of what it leaves.
        kept = scaled if floor is None else scaled.masked_fill(scaled < values[:, :1] + floor, -math.inf)
        total = kept.logsumexp(-1, keepdim=True)
    if floor is not None:
        values = values.masked_fill(values < values[:, :1] + floor, -math.inf)
        if top_k:
            total = values.logsumexp(-1, keepdim=True)
    probabilities = (values - total).exp()
    before = probabilities.cumsum(-1) - probabilities
    chosen = ids.gather(-1, _invert(probabilities * (before < drawing.top_p), uniforms).unsqueeze(-1)).squeeze(-1)
    if not top_k and vocabulary > _NUCLEUS:
        reached = before[:, -1] + probabilities[:, -1] >= drawing.top_p
        if not bool(reached.all()):  # a flat distribution: the nucleus is wider than what was looked at
            rows = (~reached).nonzero().squeeze(-1)
            ranked = kept[rows].sort(dim=-1, descending=True, stable=True)
            probabilities = (ranked.values - total[rows]).exp()
            before = probabilities.cumsum(-1) - probabilities
            picked = _invert(probabilities * (before < drawing.top_p), uniforms[rows])
            chosen[rows] = ranked.indices.gather(-1, picked.unsqueeze(-1)).squeeze(-1)
    return chosen


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Index at which the cumulated weight passes ``uniforms`` times the total; weights need not sum to one."""
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    # Strictly below the total, so that rounding never lands behind the last token that has any weight.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target, right=True).squeeze(-1)
