"""Keys and values of a shared prefix, computed once, stored once, read once per step.

The rows of a batch form a tree: all share a preamble, some share a context, the samples of one prompt share that
prompt, and each row has a tail of its own. Every node's keys and values exist once. Each row attends to the chain of
nodes above it and to its own tail, see ``attention.py``. Prompts of different lengths run through the model one behind
the other, without padding. Rows that leave make room for the last ones; nothing is padded on.

It serves decoders whose layers all attend to the whole context; ``bon.engines.torch.paths`` finds out which do, and
everything else takes ``bon.engines.torch.rows.PlainRows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bon.engines.torch.prefix.attention import NAME, Index, Level, Pass, Prefill, Segments, Step
from bon.engines.torch.prefix.tree import Ids, Node, tree
from bon.engines.torch.rows import Stats, token_logprobs

__all__ = ["NAME", "Preamble", "SharedRows"]

_LOGIT_BYTES = 1 << 27  # logits turned into log-probabilities at a time


class Preamble:
    """What all prompts of a call begin with; its keys and values are computed when first needed.

    Args:
        ids: the common tokens; none where nothing is shared.
    """

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        self.segments: Segments | None = None


class SharedRows:
    """Rows whose common prefixes exist once; see ``bon.engines.torch.rows.Rows``.

    Args:
        model: a model that ``bon.engines.torch.paths.check`` accepted, its attention implementation set to ``NAME``.
        root: the preamble of all prompts of the call; shared by the call's batches.
        stats: counts what is computed and stored.
    """

    def __init__(self, model: Any, root: Preamble, stats: Stats) -> None:
        self._model, self._root, self._stats = model, root, stats
        self._device = model.device
        self._levels: list[Level] = []
        self._own = Segments(np.zeros(0, dtype=np.int64))
        self._position = torch.zeros(0, dtype=torch.long)
        self.cached: list[int] = []

    def prefill(self, prompts: Sequence[Ids], copies: Sequence[int]) -> Tensor:
        """See ``Rows.prefill``."""
        logits = self._read(prompts, [1] * len(prompts), store=True)
        if max(copies) > 1:
            slot = np.repeat(np.arange(len(prompts)), copies)
            self._push(slot)
            self._own = Segments(np.zeros(len(slot), dtype=np.int64))
            logits = logits[torch.from_numpy(slot).to(self._device)]
        self._note_prefix()
        return logits

    def prefill_drafts(self, prompts: Sequence[Ids], drafts: Sequence[Ids]) -> tuple[Tensor, list[list[float]]]:
        """See ``Rows.prefill_drafts``: the drafts are read behind the prompts, and what departs is forgotten."""
        counts = np.array([len(draft) for draft in drafts])
        logits = self._read([(*a, *b) for a, b in zip(prompts, drafts, strict=True)], (counts + 1).tolist(), store=True)
        first = np.cumsum(counts + 1) - counts - 1  # of each row's logits
        pieces = torch.split(logits, max(1, _LOGIT_BYTES // (4 * logits.shape[-1])))
        choices = torch.cat([piece.argmax(-1) for piece in pieces]).cpu().numpy()
        agreed = np.array([agreement(choices[at:], draft) for at, draft in zip(first, drafts, strict=True)])
        read = [int(at) + i for at, count in zip(first, agreed, strict=True) for i in range(count)]
        taken = torch.tensor([t for draft, count in zip(drafts, agreed, strict=True) for t in draft[:count]])
        logprobs = token_logprobs(logits[read], taken.to(self._device, torch.long)).cpu()
        left = counts - agreed
        self._own.crop(self._own.lengths - left, self._device)
        self._position = self._position - torch.from_numpy(left).to(self._device)
        self._note_prefix()
        behind = torch.from_numpy(first + agreed).to(self._device)
        return logits[behind], [piece.tolist() for piece in torch.split(logprobs, agreed.tolist())]

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Rows.step``."""
        own = self._own
        own.columns += 1
        own.lengths = own.lengths + 1
        if own.bias is not None:
            own.bias = torch.cat([own.bias, own.bias.new_zeros(len(own.bias), 1, 1, 1)], -1)
        logits = self._forward(tokens, self._position, Step(self._levels, own), 0)
        self._position = self._position + 1
        self._stats.decoded += len(tokens)
        return logits

    def select(self, alive: np.ndarray[Any, np.dtype[np.bool_]]) -> Index:
        """See ``Rows.select``: the last rows move into the places of those that left."""
        order, holes, movers = _fill(alive)
        self._own.move(holes, movers, len(order))
        self._position = self._position[torch.from_numpy(order).to(self._device)]
        for level in self._levels:
            level.slot = level.slot[order]
            used = np.zeros(len(level.segments.lengths), dtype=bool)
            used[level.slot] = True
            if not used.all():
                kept, empty, filling = _fill(used)
                level.segments.move(empty, filling, len(kept))
                renamed = np.zeros(len(used), dtype=np.int64)
                renamed[kept] = np.arange(len(kept))
                level.slot = renamed[level.slot]
            level.regroup()
        return order

    def rate(self, contexts: Sequence[Ids], continuations: Sequence[Ids]) -> list[float]:
        """See ``Rows.rate``."""
        inputs = [(*a, *b[:-1]) for a, b in zip(contexts, continuations, strict=True)]
        counts = [len(c) for c in continuations]
        logits = self._read(inputs, counts, store=False)
        self._note_prefix()
        targets = torch.tensor([t for c in continuations for t in c], device=self._device)
        rows = max(1, _LOGIT_BYTES // (4 * logits.shape[-1]))
        pieces = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
        found = torch.cat([token_logprobs(*piece) for piece in pieces]).double().cpu()
        return [float(one.sum()) for one in torch.split(found, counts)]

    def _read(self, prompts: Sequence[Ids], wanted: Sequence[int], *, store: bool) -> Tensor:
        """Read the prompts as a tree; returns the logits of the ``wanted`` last tokens of each.

        Args:
            prompts: token ids.
            wanted: tokens per prompt.
            store: whether the prompts' own keys and values are needed afterwards.
        """
        skip = len(self._root.ids)
        levels, saved = tree(prompts, skip, wanted)
        fresh = bool(skip) and self._root.segments is None
        if skip:
            if self._root.segments is None:
                self._extend([Node(self._root.ids, 0, 0)], [0], store=True)
                self._root.segments = self._own
            self._levels = [Level(self._root.segments, np.zeros(len(levels[0]), dtype=np.int64), self._device)]
        self.cached = [skip * (i > 0 or not fresh) + count for i, count in enumerate(saved)]
        self._stats.cached += sum(self.cached)
        for nodes in levels[:-1]:
            self._extend(nodes, [0] * len(nodes), store=True)
            self._push(np.array([node.parent for node in levels[-1]]))
        return self._extend(levels[-1], wanted, store=store)

    def _extend(self, nodes: Sequence[Node], wanted: Sequence[int], *, store: bool) -> Tensor:
        """Give each row the tokens of its node as its own; returns the logits of the ``wanted`` last ones of each."""
        lengths = np.array([len(node.ids) for node in nodes])
        spans = np.concatenate([[0], np.cumsum(lengths)])
        position = np.arange(spans[-1]) + np.repeat(np.array([node.start for node in nodes]) - spans[:-1], lengths)
        keep = np.concatenate([np.arange(end - count, end) for end, count in zip(spans[1:], wanted, strict=True)])
        self._own = Segments(lengths, int(lengths.max()))
        self._own.bias = self._own.padding_bias(self._device)
        logits = self._forward(
            torch.tensor([token for node in nodes for token in node.ids], device=self._device),
            torch.from_numpy(position).to(self._device),
            Prefill(self._levels, spans, self._own if store else None),
            torch.from_numpy(keep).to(self._device),
        )
        self._position = torch.tensor([node.start + len(node.ids) for node in nodes], device=self._device)
        self._stats.computed += int(spans[-1])
        return logits

    def _push(self, slot: Index) -> None:
        """Make what the rows own shared: new row i attends to what was row slot[i]."""
        for level in self._levels:
            level.slot = level.slot[slot]
            level.regroup()
        self._levels.append(Level(self._own, slot, self._device))
        self._position = self._position[torch.from_numpy(slot).to(self._device)]

    def _forward(self, ids: Tensor, positions: Tensor, current: Pass, keep: Tensor | int) -> Tensor:
        output = self._model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep, bon_pass=current
        )
        logits: Tensor = output.logits[0]
        return logits

    def _note_prefix(self) -> None:
        shared = sum(level.segments.bytes for level in self._levels)
        self._stats.prefix_bytes = max(self._stats.prefix_bytes, shared or self._own.bytes)  # one prompt shares nothing


def agreement(choices: Index, draft: Ids) -> int:
    """How many tokens of a draft are the choices, from the first on."""
    departs = np.flatnonzero(choices[: len(draft)] != np.array(draft, dtype=np.int64))
    return int(departs[0]) if len(departs) else len(draft)


def _fill(alive: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[Index, Index, Index]:
    """Close gaps by moving the last into them: the new order, the gaps, and what moves into them."""
    left = int(alive.sum())
    holes = np.flatnonzero(~alive[:left])
    movers = left + np.flatnonzero(alive[left:])
    order = np.arange(left)
    order[holes] = movers
    return order, holes, movers
