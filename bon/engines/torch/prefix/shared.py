"""Keys and values of a shared prefix, computed once, stored once, read once per step.

The rows of a batch form a tree: all share a preamble, some share a context, the samples of one prompt share that
prompt, and each row has a tail of its own. Every node's keys and values exist once. Each row attends to the chain of
nodes above it and to its own tail, see ``attention.py``. Prompts of different lengths run through the model one behind
the other, without padding. Rows that leave make room for the last ones, and for rows that join.

It serves decoders whose layers all attend to the whole context; ``bon.engines.torch.paths`` finds out which do, and
everything else takes ``bon.engines.torch.rows.PlainRows``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bon.engines.torch.prefix.attention import NAME, Index, Level, Pass, Prefill, Segments, Step
from bon.engines.torch.prefix.tree import Ids, Node, Piece, pieces, tree
from bon.engines.torch.rows import Measure, Run, token_logprobs

__all__ = ["NAME", "Kept", "Preamble", "SharedRows", "Store"]


class Preamble:
    """What all prompts of a call begin with; its keys and values are computed when first needed.

    Args:
        ids: the common tokens; none where nothing is shared.
    """

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        self.segments: Segments | None = None


@dataclass(frozen=True)
class Kept:
    """The prompts of one batch as they were read.

    Args:
        row: of each prompt.
        levels: segments, and which of them each row attends to; the last are the prompts' own.
        position: of each row's next token, shape (rows,).
        logits: behind each row, shape (rows, vocabulary).
    """

    row: dict[Ids, int]
    levels: list[tuple[Segments, Index]]
    position: Tensor
    logits: Tensor

    @property
    def tokens(self) -> int:
        """Whose keys and values are held."""
        return sum(int(segments.lengths.sum()) for segments, _ in self.levels)


class Store:
    """Prompts that later calls will ask more samples of, so that they are read once: those of the latest batches.

    Args:
        most: tokens whose keys and values are held at most.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._batches: list[Kept] = []

    @property
    def tokens(self) -> int:
        """Whose keys and values are held."""
        return sum(kept.tokens for kept in self._batches)

    def find(self, prompts: Sequence[Ids]) -> list[tuple[Kept | None, list[int]]]:
        """The batches that prompts are of, and which; the last are of none."""
        found: dict[int, list[int]] = {}
        for i, ids in enumerate(prompts):
            at = next((at for at, kept in enumerate(self._batches) if ids in kept.row), len(self._batches))
            found.setdefault(at, []).append(i)
        return [(self._batches[at] if at < len(self._batches) else None, found[at]) for at in sorted(found)]

    def add(self, kept: Kept) -> None:
        """Hold a batch, and let go of the oldest for which there is no room."""
        self._batches.insert(0, kept)
        while self.tokens > self.most:
            self._batches.pop()

    def clear(self) -> None:
        """Let go of all."""
        self._batches.clear()


class SharedRows:
    """Rows whose common prefixes exist once; see ``bon.engines.torch.rows.Rows``.

    Args:
        run: a model that ``bon.engines.torch.paths.check`` accepted, its attention implementation set to ``NAME``.
        root: the preamble of all prompts of the call; shared by the call's batches.
        store: where prompts may have been kept.
        keep: whether to keep the prompts there.
    """

    def __init__(self, run: Run, root: Preamble, store: Store | None = None, *, keep: bool = False) -> None:
        self._run, self._model, self._root, self._stats = run, run.model, root, run.stats
        self._store, self._keep = store, keep
        self._device = run.model.device
        self._levels: list[Level] = []
        self._own = Segments(np.zeros(0, dtype=np.int64))
        self._position = torch.zeros(0, dtype=torch.long)
        self.cached: list[int] = []

    def prefill(self, prompts: Sequence[Ids], copies: Sequence[int]) -> Tensor:
        """See ``Rows.prefill``."""
        found = [] if self._store is None else self._store.find(prompts)
        if len(found) > 1:
            return self._gather([which for _, which in found], prompts, copies)
        if found and (kept := found[0][0]) is not None:
            self.cached = [len(prompt) for prompt in prompts]
            self._stats.cached += sum(self.cached)
            return self._resume(kept, prompts, copies)
        logits = torch.cat(list(self._read(prompts, [1] * len(prompts), store=True)))
        if self._store is not None and self._keep:
            levels = [*((level.segments, level.slot) for level in self._levels), (self._own, np.arange(len(prompts)))]
            for segments, _ in levels:
                segments.kept = True
            kept = Kept({ids: row for row, ids in enumerate(prompts)}, levels, self._position, logits)
            self._store.add(kept)
            logits = self._resume(kept, prompts, copies)
        elif max(copies) > 1:
            slot = np.repeat(np.arange(len(prompts)), copies)
            self._push(slot)
            self._own = Segments(np.zeros(len(slot), dtype=np.int64))
            logits = logits[torch.from_numpy(slot).to(self._device)]
        self._note_prefix()
        return logits

    def prefill_drafts(self, prompts: Sequence[Ids], drafts: Sequence[Ids]) -> tuple[Tensor, list[list[float]]]:
        """See ``Rows.prefill_drafts``: the drafts are read behind the prompts, and what departs is forgotten."""
        wanted = [len(draft) + 1 for draft in drafts]
        behind: list[Tensor] = []
        agreed: list[int] = []
        logprobs: list[list[float]] = []
        for logits in self._read([(*a, *b) for a, b in zip(prompts, drafts, strict=True)], wanted, store=True):
            choices = logits.argmax(-1).cpu().numpy()
            last: list[int] = []
            read: list[int] = []
            taken: list[int] = []
            at = 0
            while at < len(choices):  # row by row; a pass holds whole rows
                draft = drafts[len(agreed)]
                agreed.append(agreement(choices[at:], draft))
                read += range(at, at + agreed[-1])
                taken += draft[: agreed[-1]]
                last.append(at + agreed[-1])
                at += len(draft) + 1
            behind.append(logits[last])
            ids = torch.tensor(taken, dtype=torch.long, device=self._device)
            found = token_logprobs(logits[read], ids).cpu()
            del logits  # before the next pass makes as many
            logprobs += [piece.tolist() for piece in torch.split(found, agreed[len(agreed) - len(last) :])]
        left = np.array(wanted) - 1 - np.array(agreed)
        self._own.crop(self._own.lengths - left, self._device)
        self._position = self._position - torch.from_numpy(left).to(self._device)
        self._note_prefix()
        return torch.cat(behind), logprobs

    def _gather(self, parts: Sequence[Sequence[int]], prompts: Sequence[Ids], copies: Sequence[int]) -> Tensor:
        """Make rows of prompts that were read in different batches, or not yet; returns the next logits."""
        logits, cached = list[Tensor](), list[int]()
        for which in parts:
            part = SharedRows(self._run, self._root, self._store, keep=self._keep)
            logits.append(part.prefill([prompts[i] for i in which], [copies[i] for i in which]))
            cached += part.cached
            self.join(part)
        asked = [i for which in parts for i in which]
        self.cached = [cached[at] for at in np.argsort(asked)]
        order = np.argsort(np.repeat(asked, [copies[i] for i in asked]), kind="stable")
        at = torch.from_numpy(order).to(self._device)
        self._own = self._own.taken(order, self._device)
        self._position = self._position[at]
        for level in self._levels:
            level.slot = level.slot[order]
            level.regroup()
        return torch.cat(logits)[at]

    def join(self, other: SharedRows) -> None:
        """See ``Joins.join``."""
        ours, theirs = len(self._position), len(other._position)
        levels = []
        for mine, more in itertools.zip_longest(self._levels, other._levels):
            slot = np.full(ours, -1) if mine is None else mine.slot
            behind = np.full(theirs, -1) if more is None else more.slot
            segments = (more if mine is None else mine).segments
            if mine is not None and more is not None and more.segments is not segments:
                behind = np.where(behind < 0, -1, behind + len(segments.lengths))
                segments = segments.joined(more.segments, self._device)
            levels.append(Level(segments, np.concatenate([slot, behind]), self._device))
        self._levels = levels
        self._own = self._own.joined(other._own, self._device)
        self._position = torch.cat([self._position.to(self._device), other._position])
        self._note_prefix()

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Rows.step``."""
        self._own.grow(self._device)
        logits = self._forward(tokens, self._position, Step(self._levels, self._own), 0)
        self._position = self._position + 1
        self._stats.decoded += len(tokens)
        self._stats.steps += 1
        return logits

    def select(self, alive: np.ndarray[Any, np.dtype[np.bool_]]) -> Index:
        """See ``Rows.select``: the last rows move into the places of those that left."""
        order, holes, movers = _fill(alive)
        self._own.move(holes, movers, len(order))
        self._position = self._position[torch.from_numpy(order).to(self._device)]
        for level in self._levels:
            level.slot = level.slot[order]
        self._levels = [level for level in self._levels if (level.slot >= 0).any()]
        for level in self._levels:
            self._compact(level)
        return order

    def _compact(self, level: Level) -> None:
        """Let segments go that no row attends to."""
        used = np.zeros(len(level.segments.lengths), dtype=bool)
        used[level.slot[level.slot >= 0]] = True
        if not used.all():
            left, empty, filling = _fill(used)
            if level.segments.kept:
                level.segments = level.segments.taken(left, self._device)
            else:
                level.segments.move(empty, filling, len(left))
            renamed = np.full(len(used) + 1, -1)  # the last is that of no segment
            renamed[left] = np.arange(len(left))
            level.slot = renamed[level.slot]
        level.regroup()

    def _resume(self, kept: Kept, prompts: Sequence[Ids], copies: Sequence[int]) -> Tensor:
        """Make rows of prompts that were read before; returns the next logits."""
        rows = np.repeat([kept.row[ids] for ids in prompts], copies)
        at = torch.from_numpy(rows).to(self._device)
        self._levels = [Level(segments, slot[rows], self._device) for segments, slot in kept.levels]
        for level in self._levels:
            self._compact(level)
        self._own, self._position = Segments(np.zeros(len(rows), dtype=np.int64)), kept.position[at]
        return kept.logits[at]

    def rate(self, contexts: Sequence[Ids], continuations: Sequence[Ids], measure: Measure) -> list[float]:
        """See ``Rows.rate``."""
        inputs = [(*a, *b[:-1]) for a, b in zip(contexts, continuations, strict=True)]
        counts = [len(c) for c in continuations]
        targets = torch.tensor([t for c in continuations for t in c], device=self._device)
        found: list[Tensor] = []
        at = 0
        for logits in self._read(inputs, counts, store=False):
            found.append(measure(logits, targets[at : at + len(logits)]).double().cpu())
            at += len(logits)
            del logits  # before the next pass makes as many
        self._note_prefix()
        return [float(one.sum()) for one in torch.split(torch.cat(found), counts)]

    def _read(self, prompts: Sequence[Ids], wanted: Sequence[int], *, store: bool) -> Iterator[Tensor]:
        """Read the prompts as a tree; yields the logits of the ``wanted`` last tokens of each, some at a time.

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
                self._extend([Node(self._root.ids, 0, 0)])
                self._own.kept = True
                self._root.segments = self._own
            self._levels = [Level(self._root.segments, np.zeros(len(levels[0]), dtype=np.int64), self._device)]
        self.cached = [skip * (i > 0 or not fresh) + count for i, count in enumerate(saved)]
        self._stats.cached += sum(self.cached)
        for nodes in levels[:-1]:
            self._extend(nodes)
            self._push(np.array([node.parent for node in levels[-1]]))
        return self._passes(levels[-1], wanted, store=store)

    def _extend(self, nodes: Sequence[Node]) -> None:
        """Give each row the tokens of its node as its own; nobody wants logits."""
        for _ in self._passes(nodes, [0] * len(nodes), store=True):
            pass

    def _passes(self, nodes: Sequence[Node], wanted: Sequence[int], *, store: bool) -> Iterator[Tensor]:
        """Give each row the tokens of its node as its own; yields the logits of the ``wanted`` last ones of each."""
        lengths = np.array([len(node.ids) for node in nodes])
        self._own = self._storage(lengths)
        split: Segments | None = None  # of a row that comes in several passes, where no other is stored
        for piece in pieces(lengths.tolist(), wanted, self._run.tokens, self._run.logits):
            if store:
                yield from self._pass(nodes, wanted, piece, self._own, piece.first)
            elif piece.stop - piece.start == lengths[piece.first : piece.last].sum():
                yield from self._pass(nodes, wanted, piece, None, 0)
            else:
                split = self._storage(lengths[piece.first : piece.last]) if piece.start == 0 else split
                yield from self._pass(nodes, wanted, piece, split, 0)
        self._position = torch.tensor([node.start + len(node.ids) for node in nodes], device=self._device)

    def _pass(
        self, nodes: Sequence[Node], wanted: Sequence[int], piece: Piece, store: Segments | None, slot: int
    ) -> Iterator[Tensor]:
        """One pass through the model; see ``_passes``."""
        ids: list[int] = []
        position: list[int] = []
        keep: list[int] = []
        spans = [0]
        for row in range(piece.first, piece.last):
            node, length = nodes[row], len(nodes[row].ids)
            start, stop = (piece.start, piece.stop) if piece.last == piece.first + 1 else (0, length)
            ids += node.ids[start:stop]
            position += range(node.start + start, node.start + stop)
            spans.append(len(ids))
            keep += range(len(ids) - max(0, stop - max(start, length - wanted[row])), len(ids))
        logits = self._forward(
            torch.tensor(ids, device=self._device),
            torch.tensor(position, device=self._device),
            Prefill(self._levels, np.array(spans), piece.first, store, slot, piece.start),
            torch.tensor(keep, dtype=torch.long, device=self._device),
        )
        self._stats.computed += len(ids)
        if len(logits):
            yield logits

    def _storage(self, lengths: Index) -> Segments:
        segments = Segments(lengths, int(lengths.max()))
        segments.bias = segments.padding_bias(self._device)
        return segments

    def _push(self, slot: Index) -> None:
        """Make what the rows own shared: new row i attends to what was row slot[i]."""
        for level in self._levels:
            level.slot = level.slot[slot]
            level.regroup()
        self._levels.append(Level(self._own, slot, self._device))
        self._position = self._position[torch.from_numpy(slot).to(self._device)]

    def _forward(self, ids: Tensor, positions: Tensor, current: Pass, keep: Tensor | int) -> Tensor:
        self._run.check()
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
