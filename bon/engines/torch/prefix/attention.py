"""Attention over a chain of shared segments and a row's own tokens, merged exactly.

A part is attention over some of the keys: the softmax-weighted mean of their values, together with the logarithm of
the softmax's denominator. Parts over different keys join into the softmax over all of them, weighed by their
denominators. ``shared_attention`` is registered with transformers' attention interface; what it attends to comes with
the pass under way (``Step`` or ``Prefill``), not from a cache of transformers. No model code is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "bon_shared_prefix"
_SCORES = 1 << 26  # attention scores held at a time where no fused kernel takes them away
_CHUNK = 32  # columns by which a row's own storage grows at least
_PARTS = 4  # of a batch whose rows have different lengths, at most, where that spares ...
_SPARED = 1 << 17  # ... so many numbers of padding, which a core reads in the time that the parts cost
_HARMLESS = {"position_ids", "use_cache", "is_causal", "output_attentions", "output_hidden_states", "sliding_window"}

Index = np.ndarray[Any, np.dtype[np.int64]]


class NotServedError(Exception):
    """A model has something that shared prefixes do not serve; the message says what."""


# --- parts of one softmax ------------------------------------------------------------------------------------------


def part(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, causal: bool = False, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys: the mean of their values and the log of the softmax denominator.

    Args:
        query: (groups, heads, queries, width), already scaled.
        key, value: (groups, heads, keys, width).
        bias: added to the scores, (groups, 1, 1, keys).
        causal: query i sees keys 0..i only.
        softcap: bound of the scores by a tanh; 0 for none.

    Returns:
        (groups, heads, queries, width) and (groups, heads, queries).
    """
    if query.device.type == "cpu" and not softcap:
        mean, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=1.0
        )
        return mean, log_sum
    # A block of queries at a time, so that the scores stay small; they are materialised here.
    rows = max(1, _SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    blocks = [
        _explicit(query[:, :, at : at + rows], key, value, bias, at if causal else None, softcap)
        for at in range(0, query.shape[2], rows)
    ]
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat([mean for mean, _ in blocks], 2), torch.cat([log_sum for _, log_sum in blocks], 2)


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, first: int | None, softcap: float
) -> tuple[Tensor, Tensor]:
    """See ``part``; ``first`` is the position of the first query where attention is causal."""
    scores = _capped(query @ key.transpose(2, 3), softcap).float()
    if bias is not None:
        scores += bias
    if first is not None:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(first + 1)
        scores = scores.masked_fill(later, -torch.inf)
    log_sum = scores.logsumexp(-1)
    weights = (scores - log_sum.unsqueeze(-1)).exp_()
    return weights.to(value.dtype) @ value, log_sum


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Join parts over different keys into the softmax over all of them."""
    if len(parts) == 1:
        return parts[0][0]
    weights = torch.stack([log_sum for _, log_sum in parts]).softmax(0).unsqueeze(-1)
    joined = parts[0][0] * weights[0]
    for weight, (mean, _) in zip(weights[1:], parts[1:], strict=True):
        joined = torch.addcmul(joined, mean, weight)
    return joined


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return torch.tanh(scores / softcap) * softcap if softcap else scores


# --- storage -------------------------------------------------------------------------------------------------------


@dataclass
class Segments:
    """Keys and values of one segment per slot, one tensor per layer of shape (slots, heads, columns, width).

    Args:
        lengths: (slots,) columns in use; further ones up to ``columns`` are padding.
        columns: width in use of the tensors, which may be wider.
        kept: whether they stay as they are, for later calls.
        bias: (slots, 1, 1, columns or more), -inf on the padding; None where there is none.
        last: the slots and each one's last column, (slots,) both, where these differ.
        parts: (first slot, slot behind the last, columns in use) of slots of about one length.
    """

    lengths: Index
    columns: int = 0
    bias: Tensor | None = None
    kept: bool = False
    last: tuple[Tensor, Tensor] | None = None
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory of the columns in use."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum(t[0, :, 0].numel() * t.element_size() * int(self.lengths.sum()) for t in tensors)

    def crop(self, lengths: Index, device: torch.device) -> None:
        """Forget what lies behind ``lengths`` columns of each segment."""
        self.lengths, self.columns = lengths, int(lengths.max())
        self.bias = self.padding_bias(device)

    def grow(self, device: torch.device) -> None:
        """Make room for one more column of each slot."""
        self.lengths = self.lengths + 1
        self.columns = int(self.lengths.max())
        self.parts = self._parts()
        if (self.lengths == self.columns).all():
            self.bias = self.last = None
            return
        self.last = torch.arange(len(self.lengths), device=device), torch.from_numpy(self.lengths - 1).to(device)
        if self.bias is None:
            self.bias = self.padding_bias(device)
        else:
            if self.bias.shape[-1] < self.columns:
                self.bias = torch.nn.functional.pad(self.bias, (0, _CHUNK), value=-torch.inf)
            self.bias[self.last[0], 0, 0, self.last[1]] = 0.0

    def _parts(self) -> list[tuple[int, int, int]]:
        slots = len(self.lengths)
        edges = np.linspace(0, slots, _PARTS + 1).astype(int)
        parts = [(a, b, int(self.lengths[a:b].max())) for a, b in itertools.pairwise(edges.tolist()) if a < b]
        spared = sum((b - a) * (self.columns - columns) for a, b, columns in parts)
        numbers = next((each[0, :, 0].numel() for each in self.keys.values()), 0)
        return parts if spared * numbers >= _SPARED else [(0, slots, self.columns)]

    def joined(self, other: Segments, device: torch.device) -> Segments:
        """These slots, and those of another behind them; nobody may use either afterwards, unless it is ``kept``."""
        left, lengths = len(self.lengths), np.concatenate([self.lengths, other.lengths])
        mine, more = (int(each.lengths.max(initial=0)) for each in (self, other))
        both = Segments(lengths, max(mine, more))
        both.bias = both.padding_bias(device)
        for target, ours, theirs in ((both.keys, self.keys, other.keys), (both.values, self.values, other.values)):
            for layer in ours.keys() | theirs.keys():
                old, new = ours.get(layer), theirs.get(layer)
                like = theirs[layer] if old is None else old
                if old is None or self.kept or len(old) < len(lengths) or old.shape[2] < both.columns:
                    # Zeros, as nothing writes the padding and it must be finite.
                    grown = like.new_zeros(len(lengths), like.shape[1], both.columns, like.shape[3])
                    if old is not None:
                        grown[:left, :, :mine] = old[:left, :, :mine]
                    old = grown
                if new is not None:
                    old[left : len(lengths), :, :more] = new[: len(other.lengths), :, :more]
                target[layer] = old
        return both

    def padding_bias(self, device: torch.device) -> Tensor | None:
        """The bias that hides padding behind the segments' ends."""
        if (self.lengths == self.columns).all():
            return None
        hidden = np.where(np.arange(self.columns) < self.lengths[:, None], 0.0, -np.inf)
        return torch.from_numpy(hidden).to(device, torch.float32)[:, None, None]

    def taken(self, slots: Index, device: torch.device) -> Segments:
        """A copy of some slots."""
        at, lengths = torch.from_numpy(slots).to(device), self.lengths[slots]
        copy = Segments(lengths, int(lengths.max()))
        copy.bias = copy.padding_bias(device)
        for ours, theirs in ((copy.keys, self.keys), (copy.values, self.values)):
            ours.update({layer: tensor[at, :, : copy.columns] for layer, tensor in theirs.items()})
        return copy

    def move(self, holes: Index, movers: Index, left: int) -> None:
        """Fill slots that are gone with the last ones, so that ``left`` slots remain."""
        if len(holes):
            self.lengths[holes] = self.lengths[movers]
            for tensor in (*self.keys.values(), *self.values.values()):
                to, source = torch.from_numpy(holes).to(tensor.device), torch.from_numpy(movers).to(tensor.device)
                tensor[to, :, : self.columns] = tensor[source, :, : self.columns]
            if self.bias is not None:
                self.bias[torch.from_numpy(holes)] = self.bias[torch.from_numpy(movers)]
        self.lengths = self.lengths[:left]
        self.bias = None if self.bias is None else self.bias[:left]


@dataclass
class Level:
    """Segments that rows attend to, and which row attends to which of them.

    Args:
        segments: shared by the rows below.
        slot: (rows,) each row's segment, -1 for none.
        device: where the model is.
    """

    segments: Segments
    slot: Index
    device: torch.device

    def __post_init__(self) -> None:
        self.regroup()

    def regroup(self) -> None:
        """Arrange the rows by segment: ``rows`` is (slots, most rows of one slot), padded with any row."""
        slots = len(self.segments.lengths)
        without = self.slot < 0
        order = np.argsort(self.slot, kind="stable")[int(without.sum()) :]
        counts = np.bincount(self.slot[~without], minlength=slots)
        within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        most = int(counts.max(initial=0))
        rows = np.zeros((slots, most), dtype=np.int64)
        rows[self.slot[order], within] = order
        place = np.zeros(len(self.slot), dtype=np.int64)
        place[order] = self.slot[order] * most + within
        self.most = most
        self.regular = len(order) == len(place) and bool(
            (counts == most).all() and (order == np.arange(len(order))).all()
        )
        self.without = torch.from_numpy(without).to(self.device) if without.any() else None
        self.rows = torch.from_numpy(rows).flatten().to(self.device)
        self.place = torch.from_numpy(place).to(self.device)


# --- one pass through the model ------------------------------------------------------------------------------------


class Pass(Protocol):
    """What the attention function asks of the pass under way."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float) -> Tensor:
        """Queries (tokens, kv heads, queries per kv head, width) to outputs of the same shape."""


def shared_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    bon_pass: Pass | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' format: query (1, heads, tokens, width) to (1, tokens, heads, width)."""
    unknown = {k for k, v in options.items() if v is not None and v is not False and k not in _HARMLESS}
    if bon_pass is None or unknown or dropout or value.shape[-1] != query.shape[-1]:
        raise NotServedError(f"shared-prefix attention does not know {sorted(unknown)}")
    _, heads, tokens, width = query.shape
    scaled = query[0].transpose(0, 1) * (width**-0.5 if scaling is None else scaling)
    grouped = scaled.reshape(tokens, key.shape[1], heads // key.shape[1], width)
    output = bon_pass.attend(
        module.layer_idx, grouped, key[0].transpose(0, 1), value[0].transpose(0, 1), float(softcap or 0.0)
    )
    return output.reshape(1, tokens, heads, width).to(query.dtype), None


AttentionInterface.register(NAME, shared_attention)  # without a mask function of that name no mask is ever built


@dataclass
class Step:
    """One new token for each row."""

    levels: list[Level]
    own: Segments

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float) -> Tensor:
        """See ``Pass.attend``."""
        self._append(layer, key, value)
        shared = [_grouped_part(level, layer, query, softcap) for level in self.levels]
        joined = [self._of_rows(layer, query, shared, softcap, *part) for part in self.own.parts]
        return joined[0] if len(joined) == 1 else torch.cat(joined)

    def _of_rows(
        self,
        layer: int,
        query: Tensor,
        shared: Sequence[tuple[Tensor, Tensor]],
        softcap: float,
        first: int,
        last: int,
        columns: int,
    ) -> Tensor:
        """Attention of some of the rows: over their own columns, and joined with the parts over what they share."""
        keys, values = (held[layer][first:last, :, :columns] for held in (self.own.keys, self.own.values))
        scores = _capped(query[first:last] @ keys.transpose(2, 3), softcap)  # (rows, heads, queries per head, columns)
        if self.own.bias is not None:
            scores = scores + self.own.bias[first:last, ..., :columns]
        if not shared:
            return scores.softmax(-1).to(values.dtype) @ values
        # A shared part enters the row's own softmax as one more column: the log of its denominator.
        denominators = [log_sum[first:last].unsqueeze(-1) for _, log_sum in shared]
        weights = torch.cat([scores.float(), *denominators], -1).softmax(-1).to(values.dtype)
        joined = weights[..., :columns] @ values
        for at, (mean, _) in enumerate(shared, columns):
            joined = torch.addcmul(joined, mean[first:last], weights[..., at : at + 1])
        return joined

    def _append(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write the new column of each row.

        Keys lie in memory as (rows, heads, width, columns): a few queries times such keys take a core half the time.
        """
        own, rows, columns = self.own, len(key), self.own.columns
        for store, new in ((own.keys, key), (own.values, value)):
            old = store.get(layer)
            if old is None or old.shape[2] < columns or len(old) < rows:
                # Zeros: what lies behind a row's last column must be finite.
                heads, width, room = new.shape[1], new.shape[2], columns + max(_CHUNK, columns // 8)
                if store is own.keys:
                    wider = new.new_zeros(rows, heads, width, room).transpose(2, 3)
                else:
                    wider = new.new_zeros(rows, heads, room, width)
                if old is not None:
                    before = old[:rows, :, :columns]
                    wider[: len(before), :, : before.shape[2]] = before
                store[layer] = wider
            if own.last is None:
                store[layer][:rows, :, columns - 1] = new
            else:
                slots, at = own.last
                store[layer][slots, :, at] = new


def _grouped_part(level: Level, layer: int, query: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Each row's part over its segment of a level, all rows of a segment in one matrix product."""
    _, heads, per_head, width = query.shape
    segments = level.segments
    slots, most, columns = len(segments.lengths), level.most, segments.columns
    by_slot = query if level.regular else query[level.rows]
    by_slot = by_slot.view(slots, most, heads, per_head, width).transpose(1, 2)
    mean, log_sum = part(
        by_slot.reshape(slots, heads, most * per_head, width),
        segments.keys[layer][:slots, :, :columns],
        segments.values[layer][:slots, :, :columns],
        bias=segments.bias,
        softcap=softcap,
    )
    mean = mean.reshape(slots, heads, most, per_head, width).transpose(1, 2).flatten(0, 1)
    log_sum = log_sum.reshape(slots, heads, most, per_head).transpose(1, 2).flatten(0, 1)
    if level.regular:
        return mean, log_sum
    mean, log_sum = mean[level.place], log_sum[level.place]
    if level.without is not None:
        log_sum = log_sum.masked_fill(level.without[:, None, None], -torch.inf)
    return mean, log_sum


@dataclass
class Prefill:
    """Many new tokens for some rows; rows of one segment stand side by side.

    Args:
        levels: what the rows attend to.
        spans: first token of each row in the pass, and the total at the end.
        first: index of the first of these rows among the rows of ``levels``.
        store: where keys and values go; None where nothing will attend to them later.
        slot: where in ``store`` the first row's go.
        before: columns of ``store`` that the row has already; only a single row may have any.
    """

    levels: list[Level]
    spans: Index
    first: int
    store: Segments | None
    slot: int
    before: int = 0
    _blocks: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list)
    _places: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float) -> Tensor:
        """See ``Pass.attend``."""
        parts = [self._own(query, key, value, softcap)]
        parts += [self._shared(level, layer, query, softcap) for level in self.levels]
        if self.store is not None:
            if self.before:
                parts.append(_part_of_one(self.store, layer, self.slot, self.before, query, softcap))
            self._keep(self.store, layer, key, value)
        return merge(parts)

    def _own(self, query: Tensor, key: Tensor, value: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
        """Causal attention within each row, rows of similar length padded together."""
        mean, log_sum = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        for tokens, real in self._padded(query.device):
            k, v = key[tokens].transpose(1, 2), value[tokens].transpose(1, 2)
            for head in range(query.shape[2]):  # queries of one kv head, one after the other: keys are not repeated
                q = query[:, :, head][tokens].transpose(1, 2)
                block = part(q, k, v, causal=True, softcap=softcap)
                mean[tokens[real], :, head] = block[0].transpose(1, 2)[real]
                log_sum[tokens[real], :, head] = block[1].transpose(1, 2)[real]
        return mean, log_sum

    def _padded(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Rows of similar length: (rows, longest) token indices, and which of them are real."""
        lengths = np.diff(self.spans)
        for rows in [] if self._blocks else _similar(np.argsort(lengths, kind="stable"), lengths):
            column = np.arange(lengths[rows].max())
            real = column < lengths[rows][:, None]
            tokens = self.spans[rows][:, None] + np.where(real, column, 0)
            self._blocks.append((torch.from_numpy(tokens).to(device), torch.from_numpy(real).to(device)))
        return self._blocks

    def _shared(self, level: Level, layer: int, query: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
        parts = []
        for slot, first, last in _runs(level.slot[self.first : self.first + len(self.spans) - 1]):
            columns = int(level.segments.lengths[slot])
            rows = query[self.spans[first] : self.spans[last]]
            parts.append(_part_of_one(level.segments, layer, slot, columns, rows, softcap))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([mean for mean, _ in parts]), torch.cat([log_sum for _, log_sum in parts])

    def _keep(self, store: Segments, layer: int, key: Tensor, value: Tensor) -> None:
        if self._places is None:
            lengths = np.diff(self.spans)
            slots = self.slot + np.repeat(np.arange(len(lengths)), lengths)
            columns = self.before + np.arange(self.spans[-1]) - np.repeat(self.spans[:-1], lengths)
            self._places = torch.from_numpy(slots).to(key.device), torch.from_numpy(columns).to(key.device)
        slots_, columns_ = self._places
        for kept, new in ((store.keys, key), (store.values, value)):
            if layer not in kept:  # zeros, as nothing writes the padding and it must be finite
                kept[layer] = new.new_zeros(len(store.lengths), new.shape[1], store.columns, new.shape[2])
            kept[layer][slots_, :, columns_] = new


def _part_of_one(
    segments: Segments, layer: int, slot: int, columns: int, query: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    """The part of all queries (tokens, heads, queries per head, width) over the first columns of one segment."""
    tokens, heads, per_head, width = query.shape
    mean, log_sum = part(
        query.transpose(0, 1).reshape(1, heads, tokens * per_head, width),
        segments.keys[layer][slot : slot + 1, :, :columns],
        segments.values[layer][slot : slot + 1, :, :columns],
        softcap=softcap,
    )
    return mean.reshape(heads, tokens, per_head, width).transpose(0, 1), log_sum.reshape(
        heads, tokens, per_head
    ).transpose(0, 1)


def _runs(slot: Index) -> Iterator[tuple[int, int, int]]:
    """(slot, first row, row behind the last) of each run of equal slots."""
    edges = [0, *(np.flatnonzero(np.diff(slot)) + 1).tolist(), len(slot)]
    for first, last in itertools.pairwise(edges):
        yield int(slot[first]), first, last


def _similar(order: Index, lengths: Index) -> Iterator[Index]:
    """Split rows sorted by length where one would be padded to more than 1.5 times its length and 32 tokens."""
    first = 0
    for at in range(1, len(order) + 1):
        if at == len(order) or lengths[order[at]] > 1.5 * lengths[order[first]] + 32:
            yield order[first:at]
            first = at
