"""Consensus by meaning: how close a candidate's embedding is to those of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from bon.engines.base import Embedding, Embeds, Engine
from bon.scorers.base import ModelScorer, Needs, Pending, by_group, unscored
from bon.scorers.consensus import ALONE
from bon.scorers.parsing import NO_RESPONSE, response_piece
from bon.types import Score, Usage

if TYPE_CHECKING:
    from bon.models import Model

Vector = npt.NDArray[np.float64]


class EmbeddingConsensus(ModelScorer):
    """Scores candidates by the mean cosine of their embedding with those of all candidates, themselves included.

    ``Consensus`` with a similarity that sees meaning and not words. A candidate that cannot be embedded (too long for
    the model) has no reward, and no say in those of the others.

    Args:
        model: an embedding model, by name, folder or URL (``/v1/embeddings``), or an engine that embeds.
        options: passed on when a model is loaded by name.
    """

    needs: ClassVar[Needs] = Needs(group=True, all_rewards=True)
    ability: ClassVar[type] = Embeds
    hosts: ClassVar[Mapping[str | None, str]] = {None: "embedder", "torch": "embedder", "vllm": "vllm-embedder"}
    range = (-1.0, 1.0)

    def __init__(self, model: str | Path | Model | Engine, **options: Any) -> None:
        super().__init__(model, options)

    @property
    def name(self) -> str:
        """Kind, similarity and model."""
        return f"consensus(embedding:{self._model_name})"

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; each text is embedded once, all in one call of the engine."""
        texts: dict[int, str] = {}
        for position, each in enumerate(pending):
            response = response_piece(each.candidate)
            if response is None:
                yield position, NO_RESPONSE
            else:
                texts[position] = response if isinstance(response, str) else response.text
        every = sorted({*texts.values()})
        found = dict(zip(every, await self.engine.embed(every) if every else [], strict=True))
        vectors: dict[str, Vector] = {}
        failed: dict[str, Score] = {}
        for text, one in found.items():
            length = float(np.linalg.norm(one.vector.astype(np.float64)))
            if one.error is not None:
                failed[text] = unscored(one.error)
            elif not 0 < length < np.inf:
                failed[text] = Score(None, "failed", f"the model gives an embedding whose length is {length}")
            else:
                vectors[text] = one.vector / length
        for positions in by_group(pending):
            there = [position for position in positions if texts.get(position) in vectors]
            rewards = _rewards([texts[position] for position in there], vectors)
            for position in positions:
                if position in texts:
                    text = texts[position]
                    usage = Usage(scorer_prompt_tokens=found.pop(text, _COUNTED).prompt_tokens)
                    known = failed.get(text) or (Score(rewards[text]) if len(there) > 1 else ALONE)
                    yield position, replace(known, usage=usage)


_COUNTED = Embedding(np.zeros(0, np.float32))
"""What is left of a text whose tokens are counted already."""


def _rewards(texts: Sequence[str], vectors: Mapping[str, Vector]) -> dict[str, float]:
    """Mean cosine of each text with all of them, rounded so that equal is equal whatever their order."""
    counts = Counter(texts)
    if not counts:
        return {}
    names = sorted(counts)
    stacked = np.stack([vectors[name] for name in names])
    cosine = np.clip(stacked @ stacked.T, -1.0, 1.0)
    np.fill_diagonal(cosine, 1.0)
    means = (cosine + cosine.T) / 2 @ np.array([counts[name] for name in names]) / len(texts)
    return {name: round(float(mean), 12) for name, mean in zip(names, means, strict=True)}
