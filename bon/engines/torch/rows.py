"""The rows of a running batch and the model's memory of them.

A ``Rows`` holds keys and values for every row, computes the next logits, and lets rows leave. ``PlainRows`` is the
ordinary way, through transformers' own cache, and works with every decoder that transformers can generate with;
``bon.engines.torch.prefix.shared`` is the fast one, whose rows others can join. Neither samples nor knows about text.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

Ids = tuple[int, ...]
Measure = Callable[[Tensor, Tensor], Tensor]
"""A number for each place, shape (tokens,), of its logits, (tokens, vocabulary), and the token that is there."""

_AT_A_TIME = 64  # positions whose logits are exponentiated together: that takes their memory once more


@dataclass
class Stats:
    """What an engine computed and stored, added up over its calls.

    Args:
        computed: prompt tokens that went through the model, padding not counted.
        padding: tokens that went through the model and belong to no prompt.
        cached: prompt tokens that another prompt's computation served.
        decoded: tokens computed one by one, one per row and step.
        steps: passes through the model that computed them.
        prefix_bytes: most memory that keys and values of prompts took in one batch.
    """

    computed: int = 0
    padding: int = 0
    cached: int = 0
    decoded: int = 0
    steps: int = 0
    prefix_bytes: int = 0


def _go_on() -> None:
    """Let a call run to its end."""


@dataclass(frozen=True)
class Run:
    """What the batches of one call have in common.

    Args:
        model: a causal language model of transformers.
        stats: counts what is computed and stored.
        tokens: tokens that go through the model in one pass at most; it bounds what the layers hold meanwhile.
        logits: positions whose logits are made in one pass at most.
        check: called before each pass; ends the call by raising.
    """

    model: Any
    stats: Stats = field(default_factory=Stats)
    tokens: int = 4096
    logits: int = 1024
    check: Callable[[], object] = _go_on


class Rows(Protocol):
    """A batch under way."""

    @property
    def cached(self) -> Sequence[int]:
        """Per prompt: tokens that were not computed for it because another prompt shares them."""

    def prefill(self, prompts: Sequence[Ids], copies: Sequence[int]) -> Tensor:
        """Read the prompts; prompt i becomes copies[i] rows. Returns the next logits, shape (rows, vocabulary)."""

    def prefill_drafts(self, prompts: Sequence[Ids], drafts: Sequence[Ids]) -> tuple[Tensor, list[list[float]]]:
        """Read each prompt, one row each, with a guess at how it goes on.

        Returns the next logits behind the draft's tokens that were the model's own first choice, up to the first that
        was not, shape (rows, vocabulary); and the log-probabilities of those tokens, per row.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, shape (rows,); returns the next logits, shape (rows, vocabulary)."""

    def select(self, alive: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Let rows leave. Returns the old index of each row that stays, in the new order."""

    def rate(self, contexts: Sequence[Ids], continuations: Sequence[Ids], measure: Measure) -> list[float]:
        """Sum of a measure over the continuation, for each pair; contexts and continuations are not empty."""


@runtime_checkable
class Joins(Rows, Protocol):
    """Rows that others can join while they are under way."""

    def join(self, other: Any) -> None:
        """Take in the rows of another batch of the same model and kind, behind ours; it is not used afterwards."""


class PlainRows:
    """Left-padded rows in transformers' ``DynamicCache``.

    Args:
        run: the model, and its limits.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._model, self._stats = run, run.model, run.stats
        self._accepted = set(inspect.signature(run.model.forward).parameters)
        self._cache = DynamicCache(config=run.model.config)
        self._cache_name = cache_argument(run.model)
        self._mask: Tensor | None = None  # shape (rows, tokens so far); None where nothing is padded
        self._position = torch.zeros(0, dtype=torch.long)  # shape (rows,): position of each row's next token
        self.cached: list[int] = []

    def prefill(self, prompts: Sequence[Ids], copies: Sequence[int]) -> Tensor:
        """See ``Rows.prefill``."""
        self.cached = [0] * len(prompts)
        *_, (logits, _) = self._forward_padded(prompts, keep=1)
        logits = logits[:, -1]
        if any(count != 1 for count in copies):
            index = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies)).to(logits.device)
            self._take(index)
            logits = logits[index]
        tensors = [t for layer in self._cache.layers for t in (layer.keys, layer.values) if t is not None]
        self._stats.prefix_bytes = max(self._stats.prefix_bytes, sum(t.numel() * t.element_size() for t in tensors))
        return logits

    def prefill_drafts(self, prompts: Sequence[Ids], drafts: Sequence[Ids]) -> tuple[Tensor, list[list[float]]]:
        """Decode instead: this cache cannot take tokens back from some of its rows."""
        return self.prefill(prompts, [1] * len(prompts)), [[] for _ in prompts]

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Rows.step``."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        logits = self._forward(tokens.unsqueeze(1), self._position.unsqueeze(1), self._mask, keep=1)[:, -1]
        self._position = self._position + 1
        self._stats.decoded += len(tokens)
        self._stats.steps += 1
        return logits

    def select(self, alive: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """See ``Rows.select``."""
        order = alive.nonzero()[0]
        self._take(torch.from_numpy(order).to(self._position.device))
        return order

    def rate(self, contexts: Sequence[Ids], continuations: Sequence[Ids], measure: Measure) -> list[float]:
        """See ``Rows.rate``."""
        self.cached = [0] * len(contexts)
        inputs = [(*a, *b[:-1]) for a, b in zip(contexts, continuations, strict=True)]
        totals = torch.zeros(len(inputs), dtype=torch.float64)
        for logits, behind in self._forward_padded(inputs, keep=max(map(len, continuations))):
            for row, ids in enumerate(continuations):
                # Of this row's targets, those that come out of this pass.
                end = len(ids) - behind
                if end > 0:
                    targets = torch.tensor(ids[max(0, end - logits.shape[1]) : end], device=logits.device)
                    totals[row] += measure(logits[row, -len(targets) :], targets).double().sum().cpu()
        return [float(total) for total in totals]

    def _forward_padded(self, prompts: Sequence[Ids], keep: int) -> Iterator[tuple[Tensor, int]]:
        """Read the prompts, some columns of all of them in each pass.

        Yields:
            Logits of ``keep`` columns or fewer, (rows, columns, vocabulary), and how many columns come behind them.
        """
        device = self._model.device
        lengths = torch.tensor([len(p) for p in prompts])
        width = int(lengths.max())
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        pad = (width - lengths).to(device).unsqueeze(1)
        positions = (torch.arange(width, device=device) - pad).clamp_(min=0)
        mask = (torch.arange(width, device=device) >= pad).long() if bool((lengths != width).any()) else None
        self._mask, self._position = mask, lengths.to(device)
        for first, end in self._passes(width, len(prompts), keep):
            wanted = min(end - first, max(0, keep - (width - end)))
            part = None if mask is None else mask[:, :end]
            logits = self._forward(ids[:, first:end], positions[:, first:end], part, keep=max(1, wanted))
            if wanted:
                yield logits, width - end
        self._stats.computed += int(lengths.sum())
        self._stats.padding += width * len(prompts) - int(lengths.sum())

    def _passes(self, width: int, rows: int, keep: int) -> list[tuple[int, int]]:
        """First column and end of each pass; a single one where a layer cannot take up where it stopped."""
        kinds = set(getattr(self._model.config.get_text_config(decoder=True), "layer_types", None) or ())
        most = self._run.tokens if keep == 1 else min(self._run.tokens, self._run.logits)
        step = max(1, most // rows) if kinds <= {"full_attention", "sliding_attention"} else width
        return [(first, min(first + step, width)) for first in range(0, width, step)]

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, keep: int) -> Tensor:
        self._run.check()
        inputs = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": keep}
        accepted = {k: v for k, v in inputs.items() if k in self._accepted}
        logits: Tensor = self._model(
            input_ids=ids, use_cache=True, **{self._cache_name: self._cache}, **accepted
        ).logits
        return logits[:, -keep:]

    def _take(self, index: Tensor) -> None:
        self._cache.batch_select_indices(index)
        self._position = self._position[index]
        if self._mask is not None:
            mask = self._mask[index]
            self._mask = None if bool(mask.all()) else mask


def cache_argument(model: Any) -> str:
    """What a model calls its cache: transformers 5.24 renamed the argument."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each id under its logits; shapes (tokens, vocabulary) and (tokens,)."""
    pieces = zip(torch.split(logits, _AT_A_TIME), torch.split(ids, _AT_A_TIME), strict=True)
    return torch.cat([_logprobs(some.float(), of) for some, of in pieces])


def confidence(logits: Tensor, ids: Tensor, top: int | None = None) -> Tensor:
    """Mean of log(V p) over the vocabulary, or of log p over the ``top`` likeliest tokens; see ``Weighs``."""
    return torch.cat([_confidence(some.float(), top) for some in torch.split(logits, _AT_A_TIME)])


def _confidence(logits: Tensor, top: int | None) -> Tensor:
    size = logits.shape[-1]
    mean = logits.mean(-1) + math.log(size) if top is None else logits.topk(min(top, size)).values.mean(-1)
    return mean - logits.logsumexp(-1)


def _logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
