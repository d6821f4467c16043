"""Which tokens do prompts share? Found in the token ids themselves, whatever made them.

Three levels are told apart: the preamble that all prompts of a call begin with, the context that neighbours share
beyond it, and the rest. A level goes through the model in passes of a bounded size. Pure functions over lists of ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Ids = tuple[int, ...]

MIN_SHARED = 16  # tokens: for fewer, another level costs each step more than it saves once


@dataclass(frozen=True, slots=True)
class Node:
    """A stretch of tokens.

    Args:
        ids: the tokens.
        start: position of the first.
        parent: index of the node before it, in the level above.
    """

    ids: Ids
    start: int
    parent: int


def common(first: Ids, second: Ids) -> int:
    """How many tokens two sequences begin with together."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while low < high:  # slices compare in C: bisecting beats counting in Python
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def preamble(prompts: Sequence[Ids]) -> Ids:
    """What all prompts begin with; nothing where that is too short to be worth it.

    At least two tokens of each prompt are left over.
    """
    if len(prompts) < 2:
        return ()
    # The common prefix of the least and the greatest sequence is that of all.
    length = min(common(min(prompts), max(prompts)), min(map(len, prompts)) - 2)
    return prompts[0][:length] if length >= MIN_SHARED else ()


def arrange(prompts: Sequence[Ids]) -> list[int]:
    """Order in which prompts that share a context stand side by side, and short ones come before long ones."""
    ranked = sorted(range(len(prompts)), key=lambda i: prompts[i])
    skip = len(preamble(prompts))
    clusters: list[list[int]] = []
    for i in ranked:
        if clusters and common(prompts[clusters[-1][-1]], prompts[i]) >= skip + MIN_SHARED:
            clusters[-1].append(i)
        else:
            clusters.append([i])
    for cluster in clusters:
        cluster.sort(key=lambda i: len(prompts[i]))
    clusters.sort(key=lambda cluster: len(prompts[cluster[-1]]))
    return [i for cluster in clusters for i in cluster]


def tree(prompts: Sequence[Ids], skip: int, wanted: Sequence[int]) -> tuple[list[list[Node]], list[int]]:
    """Split prompts behind their preamble into a level of shared contexts, where there are any, and one of the rest.

    Args:
        prompts: neighbours may share a context; each has more than ``wanted`` tokens behind the preamble.
        skip: length of the preamble.
        wanted: per prompt, how many of its last tokens must not be shared: those whose logits are asked for.

    Returns:
        The levels, the last with one node per prompt in the given order; and per prompt how many of its tokens behind
        the preamble another prompt computes.
    """
    shared = [common(a, b) for a, b in itertools.pairwise(prompts)]
    most = [len(ids) - count for ids, count in zip(prompts, wanted, strict=True)]
    # A context is what neighbours share at all, or all that they may share (several answers to one question, beside
    # other questions that begin alike): whichever leaves less to read.
    either = [
        [skip + MIN_SHARED] * len(shared),
        [max(skip + MIN_SHARED, min(pair)) for pair in itertools.pairwise(most)],
    ]
    runs = min((_divided(shared, least) for least in either), key=lambda runs: _to_read(runs, shared, most, skip))
    if len(runs) == len(prompts):
        return [[Node(ids[skip:], skip, 0) for ids in prompts]], [0] * len(prompts)
    contexts: list[Node] = []
    rest: list[Node] = []
    saved: list[int] = []
    for run in runs:
        end = _end(run, shared, most)
        rest += [Node(prompts[i][end:], end, len(contexts)) for i in run]
        contexts.append(Node(prompts[run[0]][skip:end], skip, 0))
        saved += [0] + [end - skip] * (len(run) - 1)
    return [contexts, rest], saved


def _divided(shared: Sequence[int], least: Sequence[int]) -> list[list[int]]:
    """Neighbours side by side that share so much."""
    runs: list[list[int]] = [[0]]
    for i, (length, enough) in enumerate(zip(shared, least, strict=True), 1):
        if length >= enough:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _end(run: Sequence[int], shared: Sequence[int], most: Sequence[int]) -> int:
    """Where the context of a run ends."""
    return min([most[i] for i in run] + [shared[i] for i in run[:-1]])


def _to_read(runs: Sequence[Sequence[int]], shared: Sequence[int], most: Sequence[int], skip: int) -> int:
    """Tokens behind the preamble that are read, but for those that must not be shared."""
    ends = [_end(run, shared, most) for run in runs]
    return sum(end - skip + sum(most[i] - end for i in run) for run, end in zip(runs, ends, strict=True))


@dataclass(frozen=True, slots=True)
class Piece:
    """What one pass reads: rows ``first`` to ``last`` in full, or tokens ``start`` to ``stop`` of a single row."""

    first: int
    last: int
    start: int
    stop: int


def pieces(lengths: Sequence[int], wanted: Sequence[int], tokens: int, logits: int) -> Iterator[Piece]:
    """Split rows into passes of at most ``tokens`` tokens and ``logits`` positions whose logits are wanted.

    Args:
        lengths: tokens of each row.
        wanted: per row, how many of its last tokens' logits are wanted.
        tokens, logits: limits of a pass. A row that exceeds one is split into passes of its own, the wanted tokens all
            in the last of them where they fit one.
    """
    first = read = made = 0
    for row, (length, want) in enumerate(zip(lengths, wanted, strict=True)):
        alone = length > tokens or want > logits
        if row > first and (alone or read + length > tokens or made + want > logits):
            yield Piece(first, row, 0, read)
            first, read, made = row, 0, 0
        if alone:
            edges = [length]
            while edges[-1]:
                start = max(0, edges[-1] - tokens)
                if edges[-1] - max(start, length - want) > logits:
                    start = edges[-1] - logits
                edges.append(start)
            yield from (Piece(row, row + 1, start, stop) for start, stop in itertools.pairwise(reversed(edges)))
            first = row + 1
        else:
            read, made = read + length, made + want
    if first < len(lengths):
        yield Piece(first, len(lengths), 0, read)
