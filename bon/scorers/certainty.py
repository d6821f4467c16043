"""How sure a model is at each token of a response, whatever the token: by itself, nothing is compared."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from statistics import fmean
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar

from bon.engines.base import Engine, Prompt, Remote, Weighs
from bon.scorers.base import ModelScorer, Needs, Pending, can, unscored
from bon.scorers.parsing import NO_RESPONSE, response_piece
from bon.types import Score, Usage

if TYPE_CHECKING:
    from bon.models import Model

TOP = 20
"""Likeliest tokens that an API tells at most."""


class SelfCertainty(ModelScorer):
    """Scores candidates by self-certainty: -1/(n V) times the sum over n tokens and a vocabulary of V of log(V p).

    How far the model's distribution at each token of the response is from one that favours no token, in nats, before
    temperature and filters (arXiv 2502.18581; as in the released code the end of the turn is no token). Each response
    is read once more, so it may come from elsewhere; over HTTP no server tells a whole vocabulary.

    Args:
        model: as in ``Flip``; None reads with the policy.
        options: passed on when a model is loaded by name.
    """

    ability: ClassVar[type | UnionType] = Weighs
    top: ClassVar[int | None] = None

    def __init__(self, model: str | Path | Model | Engine | Callable[..., Any] | None = None, **options: Any) -> None:
        super().__init__(model, options)

    @property
    def name(self) -> str:
        """Kind and model."""
        return f"self-certainty({self._model_name})"

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate once, all in one call of the engine."""
        texts = {}
        for position, each in enumerate(pending):
            if response_piece(each.candidate) is None:
                yield position, NO_RESPONSE
            else:
                texts[position] = each.candidate.text  # with its thinking, which was sampled as well
        prompts = [Prompt.of(pending[position].task.asked) for position in texts]
        read = await self.engine.confidence(prompts, [*texts.values()], top=self.top) if prompts else []
        for position, one in zip(texts, read, strict=True):
            usage = Usage(scorer_prompt_tokens=one.prompt_tokens + one.tokens, cached_tokens=one.cached_tokens)
            yield position, Score(-one.mean, usage=usage) if one.error is None else unscored(one.error, usage)


class DeepConf(SelfCertainty):
    """Scores candidates by DeepConf's confidence: minus the mean of log p of the 20 likeliest tokens at each place.

    What is left of self-certainty where a policy behind HTTP tells no more (arXiv 2508.15260; the mean over the whole
    response, in nats; over fewer tokens where the server tells fewer). Candidates of which no server told anything are
    read once, where the engine can.

    Args:
        model: reads candidates without ``top_logprobs``; None is the policy.
        options: passed on when a model is loaded by name.
    """

    needs: ClassVar[Needs] = Needs(logprobs=True, top_logprobs=TOP)
    ability: ClassVar[type | UnionType] = Weighs | Remote  # a server's policy need not read: it tells while it writes
    top: ClassVar[int | None] = TOP

    @property
    def name(self) -> str:
        """Kind and model."""
        return f"deepconf({self._model_name})"

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate once; see ``Scorer.score``."""
        unread = []
        for position, each in enumerate(pending):
            told = [fmean(one["logprob"] for one in place[:TOP]) for place in each.candidate.top_logprobs if place]
            if response_piece(each.candidate) is None or (not told and can(self.engine, Weighs)):
                unread.append(position)
            elif told:
                yield position, Score(-fmean(told))
            else:
                reason = f"{self.engine.name} told no top_logprobs of this candidate, and cannot read it"
                yield position, Score(None, "failed", reason)
        async with aclosing(super().score([pending[position] for position in unread])) as scores:
            async for at, score in scores:
                yield unread[at], score
