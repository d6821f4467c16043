"""From pairs to batches of token ids, exactly those that ``flip`` and ``likelihood`` let the model read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from bon.engines.text.render import Renderer
from bon.engines.torch.reading import in_batches
from bon.scorers.likelihood import BackwardLikelihood
from bon.scorers.parsing import response_piece
from bon.tuning.pairs import Pair
from bon.types import Candidate

Ids = tuple[int, ...]
_ALIKE = 16  # batches whose pairs are sorted by length together


@dataclass(frozen=True, slots=True)
class Encoded:
    """A pair as the model reads it.

    Args:
        prompt: ids up to where the instruction begins.
        targets: ids of the instruction, and of each negative, with the end of the turn.
    """

    prompt: Ids
    targets: tuple[Ids, ...]

    @property
    def length(self) -> int:
        """Tokens of its row: the prompt, and all targets behind it."""
        return len(self.prompt) + sum(map(len, self.targets))


def encode(pair: Pair, scorer: BackwardLikelihood, renderer: Renderer, negatives: int = 0) -> Encoded | None:
    """A pair in the prompt of a scorer, with so many negatives.

    None where a response is nothing but thinking, or an instruction nothing that the tokenizer knows.
    """
    response = response_piece(Candidate(0, pair.response))
    if response is None:
        return None
    end = () if renderer.end_id is None else (renderer.end_id,)
    prompt = renderer.render(scorer.style.prompt(pair.task, response, scorer.template))
    texts = (pair.instruction, *pair.negatives[:negatives])
    own, *others = (renderer.encode(text.strip()) for text in texts)
    return Encoded(prompt, tuple((*ids, *end) for ids in (own, *filter(None, others)))) if own else None


def steps(lengths: Sequence[int], batch: int, epochs: int, seed: int) -> list[list[int]]:
    """Which pairs each step of a training reads; neighbours in length together, the rest by chance.

    Args:
        lengths: tokens of each pair.
        batch: pairs of a step.
        epochs: how often each pair is read.
        seed: of the order.
    """
    found = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths)).tolist()
        made = []
        for first in range(0, len(order), _ALIKE * batch):
            some = sorted(order[first : first + _ALIKE * batch], key=lambda at: lengths[at])
            made += [some[at : at + batch] for at in range(0, len(some), batch)]
        found += [made[at] for at in rng.permutation(len(made))]
    return found


def with_rivals(pairs: Sequence[Encoded], rivals: int, rng: np.random.Generator) -> list[Encoded]:
    """The pairs of a step, each with as many other instructions: its negatives, then those of other pairs of the step.

    Args:
        pairs: of one step.
        rivals: how many others.
        rng: chooses.
    """
    found = []
    for at, pair in enumerate(pairs):
        own, *negatives = pair.targets
        others = [pairs[i].targets[0] for i in rng.permutation(len(pairs)) if i != at]
        chosen = [target for target in (*negatives, *others) if target != own][:rivals]
        found.append(Encoded(pair.prompt, (own, *chosen)))
    return found


def passes(pairs: Sequence[Encoded], most: int) -> Iterator[list[Encoded]]:
    """The pairs of a step, some at a time: at most ``most`` tokens with padding, a longer one alone."""
    rows = {at: (*pair.prompt, *chain.from_iterable(pair.targets)) for at, pair in enumerate(pairs)}
    return ([pairs[at] for at in batch] for batch in in_batches(rows, most))
