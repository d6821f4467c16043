"""Keys and values of a shared prefix, computed once, stored once, read once per step.

The rows of a batch form a tree: all share a preamble, some share a context, the samples of one prompt share that
prompt, and each row has a tail of its own. Every node's keys and values exist once. The attention function below
lets each row attend to the chain of nodes above it and to its own tail, and merges the parts exactly: a part is its
softmax-weighted mean of values together with the logarithm of its softmax denominator, and the denominators weigh
the means. Prompts of different lengths run through the model one behind the other, without padding.

It plugs into transformers' attention interface and copies no model code. It serves decoders whose layers all attend
to the whole context; ``fits`` says which, and everything else takes ``bon.engines.rows.PlainRows``.
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

from bon.engines.prefix_tree import Ids, Node, tree
from bon.engines.rows import PlainRows, Stats, token_logprobs

NAME = "bon_shared_prefix"
_CHUNK = 32  # columns by which a row's own storage grows at least
_LOGIT_BYTES = 1 << 27  # logits turned into log-probabilities at a time
_HARMLESS = {"position_ids", "use_cache", "is_causal", "output_attentions", "output_hidden_states", "sliding_window"}
_ROPE_TYPES = {"default", "linear", "llama3", "yarn", "proportional"}  # the others depend on the batch's longest row

Index = np.ndarray[Any, np.dtype[np.int64]]


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
    if query.device.type == "cpu" and not softcap and (causal or query.shape[2] * key.shape[2] >= 4096):
        mean, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=1.0
        )
        return mean, log_sum
    scores = _capped(query @ key.transpose(2, 3), softcap).float()
    if bias is not None:
        scores += bias
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
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
        bias: (slots, 1, 1, columns), -inf on the padding; None where there is none.
    """

    lengths: Index
    columns: int = 0
    bias: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory of the columns in use."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum(t[0, :, 0].numel() * t.element_size() * int(self.lengths.sum()) for t in tensors)

    def padding_bias(self, device: torch.device) -> Tensor | None:
        """The bias that hides padding behind the segments' ends."""
        if (self.lengths == self.columns).all():
            return None
        hidden = np.where(np.arange(self.columns) < self.lengths[:, None], 0.0, -np.inf)
        return torch.from_numpy(hidden).to(device, torch.float32)[:, None, None]

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
        slot: (rows,) each row's segment.
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
        order = np.argsort(self.slot, kind="stable")
        counts = np.bincount(self.slot, minlength=slots)
        within = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        most = int(counts.max(initial=0))
        rows = np.zeros((slots, most), dtype=np.int64)
        rows[self.slot[order], within] = order
        place = np.empty(len(order), dtype=np.int64)
        place[order] = self.slot[order] * most + within
        self.most = most
        self.regular = bool((counts == most).all() and (order == np.arange(len(order))).all())
        self.rows = torch.from_numpy(rows).flatten().to(self.device)
        self.place = torch.from_numpy(place).to(self.device)


# --- one pass through the model ------------------------------------------------------------------------------------


class _Pass(Protocol):
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
    bon_pass: _Pass | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' format: query (1, heads, tokens, width) to (1, tokens, heads, width)."""
    unknown = {k for k, v in options.items() if v is not None and v is not False and k not in _HARMLESS}
    if bon_pass is None or unknown or dropout or value.shape[-1] != query.shape[-1]:
        raise NotImplementedError(f"shared-prefix attention does not know {sorted(unknown)}")
    _, heads, tokens, width = query.shape
    scaled = query[0].transpose(0, 1) * (width**-0.5 if scaling is None else scaling)
    grouped = scaled.reshape(tokens, key.shape[1], heads // key.shape[1], width)
    output = bon_pass.attend(
        module.layer_idx, grouped, key[0].transpose(0, 1), value[0].transpose(0, 1), float(softcap or 0.0)
    )
    return output.reshape(1, tokens, heads, width).to(query.dtype), None


AttentionInterface.register(NAME, shared_attention)


@dataclass
class _Step:
    """One new token for each row."""

    levels: list[Level]
    own: Segments

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float) -> Tensor:
        rows = len(query)
        keys, values = self._append(layer, key, value)
        scores = _capped(query @ keys.transpose(2, 3), softcap)  # (rows, kv heads, queries per head, columns)
        if self.own.bias is not None:
            scores = scores + self.own.bias[:rows]
        if not self.levels:
            return scores.softmax(-1) @ values
        shared = [_grouped_part(level, layer, query, softcap) for level in self.levels]
        # A shared part enters the row's own softmax as one more column: the log of its denominator.
        columns = [scores.float(), *(log_sum.unsqueeze(-1) for _, log_sum in shared)]
        weights = torch.cat(columns, -1).softmax(-1).to(values.dtype)
        joined = weights[..., : scores.shape[-1]] @ values
        for at, (mean, _) in enumerate(shared, scores.shape[-1]):
            joined = torch.addcmul(joined, mean, weights[..., at : at + 1])
        return joined

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new column and return all columns so far, (rows, heads, columns, width) each."""
        own, at = self.own, self.own.columns - 1
        for store, new in ((own.keys, key), (own.values, value)):
            if layer not in store or store[layer].shape[2] <= at:
                old = store.get(layer)
                wider = new.new_empty(len(new), new.shape[1], at + max(_CHUNK, at // 2), new.shape[2])
                if old is not None:
                    wider[:, :, :at] = old[: len(new), :, :at]
                store[layer] = wider
            store[layer][: len(new), :, at] = new
        rows, columns = len(key), own.columns
        return own.keys[layer][:rows, :, :columns], own.values[layer][:rows, :, :columns]


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
    return (mean, log_sum) if level.regular else (mean[level.place], log_sum[level.place])


@dataclass
class _Prefill:
    """Many new tokens for each row, none of which has own tokens yet; rows of one segment stand side by side.

    Args:
        spans: first token of each row in the pass, and the total at the end.
        store: where keys and values go; None where nothing will attend to them later.
    """

    levels: list[Level]
    spans: Index
    store: Segments | None
    _blocks: list[tuple[Tensor, Tensor]] = field(init=False, default_factory=list)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float) -> Tensor:
        own = self._own(query, key, value, softcap)
        if self.store is not None:
            self._keep(layer, key, value)
        return merge([own, *(self._shared(level, layer, query, softcap) for level in self.levels)])

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
        segments = level.segments
        means, log_sums = [], []
        for slot, first, last in _runs(level.slot):
            q = query[self.spans[first] : self.spans[last]].transpose(0, 1)
            heads, tokens, per_head, width = q.shape
            columns = int(segments.lengths[slot])
            mean, log_sum = part(
                q.reshape(1, heads, tokens * per_head, width),
                segments.keys[layer][slot : slot + 1, :, :columns],
                segments.values[layer][slot : slot + 1, :, :columns],
                softcap=softcap,
            )
            means.append(mean.reshape(heads, tokens, per_head, width).transpose(0, 1))
            log_sums.append(log_sum.reshape(heads, tokens, per_head).transpose(0, 1))
        return (means[0], log_sums[0]) if len(means) == 1 else (torch.cat(means), torch.cat(log_sums))

    def _keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        assert self.store is not None
        column = np.arange(self.store.columns)
        index = self.spans[:-1, None] + np.minimum(column, self.store.lengths[:, None] - 1)
        tokens = torch.from_numpy(index).to(key.device)
        self.store.keys[layer] = key[tokens].transpose(1, 2).contiguous()
        self.store.values[layer] = value[tokens].transpose(1, 2).contiguous()


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


def _fill(alive: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[Index, Index, Index]:
    """Close gaps by moving the last into them: the new order, the gaps, and what moves into them."""
    left = int(alive.sum())
    holes = np.flatnonzero(~alive[:left])
    movers = left + np.flatnonzero(alive[left:])
    order = np.arange(left)
    order[holes] = movers
    return order, holes, movers


# --- rows ----------------------------------------------------------------------------------------------------------


class Preamble:
    """What all prompts of a call begin with; its keys and values are computed when first needed.

    Args:
        ids: the common tokens; none where nothing is shared.
    """

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        self.segments: Segments | None = None


class SharedRows:
    """Rows whose common prefixes exist once; see ``bon.engines.rows.Rows``.

    Args:
        model: a model that ``fits`` accepted, its attention implementation set to ``NAME``.
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

    def step(self, tokens: Tensor) -> Tensor:
        """See ``Rows.step``."""
        own = self._own
        own.columns += 1
        own.lengths = own.lengths + 1
        if own.bias is not None:
            own.bias = torch.cat([own.bias, own.bias.new_zeros(len(own.bias), 1, 1, 1)], -1)
        logits = self._forward(tokens, self._position, _Step(self._levels, own), 0)
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
            _Prefill(self._levels, spans, self._own if store else None),
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

    def _forward(self, ids: Tensor, positions: Tensor, current: _Pass, keep: Tensor | int) -> Tensor:
        output = self._model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep, bon_pass=current
        )
        logits: Tensor = output.logits[0]
        return logits

    def _note_prefix(self) -> None:
        self._stats.prefix_bytes = max(self._stats.prefix_bytes, sum(level.segments.bytes for level in self._levels))


# --- which models ----------------------------------------------------------------------------------------------------


def longest_served(model: Any) -> int | None:
    """Tokens up to which every layer of a model attends to its whole context; None for no limit.

    Raises:
        NotImplementedError: the model has something that shared prefixes do not serve; the message says what.
    """
    config = model.config.get_text_config(decoder=True)
    if not getattr(model, "_supports_attention_backend", False):
        raise NotImplementedError("it does not use transformers' attention interface")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise NotImplementedError(f"it has layers of type {sorted(unknown)}")
    if unknown := _rope_types(getattr(config, "rope_parameters", None)) - _ROPE_TYPES:
        raise NotImplementedError(f"its position encoding is {sorted(unknown)}")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if getattr(config, "layer_types", None) else window is not None
    return int(window) if slides and window else None


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    own = {str(parameters["rope_type"])} if "rope_type" in parameters else set()
    return own.union(*(_rope_types(value) for value in parameters.values()))


def check(model: Any) -> None:
    """Run a few made-up prompts both ways and compare.

    Raises:
        NotImplementedError: shared prefixes give this model other logits than transformers does.
    """
    generator = np.random.default_rng(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    root, *contexts = (generator.integers(0, vocabulary, size).tolist() for size in (17, 18, 19))
    prompts = [(*root, *contexts[i // 2], *generator.integers(0, vocabulary, 2 + i).tolist()) for i in range(4)]
    tokens = torch.from_numpy(generator.integers(0, vocabulary, (2, 6))).to(model.device)
    alive = np.array([True, False, True, True, True, True])
    found = []
    plain = model.config._attn_implementation
    for name in (plain, NAME):
        model.set_attn_implementation(name)
        rows = PlainRows(model, Stats()) if name == plain else SharedRows(model, Preamble(tuple(root)), Stats())
        outputs = [rows.prefill(prompts, [1, 2, 1, 2]), rows.step(tokens[0])]
        back = np.argsort(order := rows.select(alive))
        outputs.append(rows.step(tokens[1][torch.from_numpy(order).to(model.device)])[torch.from_numpy(back)])
        found.append(torch.cat(outputs).float())
    model.set_attn_implementation(plain)
    expected, got = found
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    worst = float((expected - got).abs().max() / expected.std())
    if not worst < tolerance:
        raise NotImplementedError(f"its logits came out different by {worst:.1e} standard deviations")
