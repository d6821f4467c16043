"""How likely a model finds a response: by itself, and compared with another model. Prefill only."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from bon.engines.base import Engine, Prompt, Rates
from bon.errors import InputError, number
from bon.scorers.base import Compound, ModelScorer, Pending, unscored
from bon.scorers.parsing import NO_RESPONSE, response_piece
from bon.types import Score, Usage

if TYPE_CHECKING:
    from bon.models import Model

Over = Literal["mean", "sum"]


class ForwardLikelihood(ModelScorer):
    """Scores candidates by log p(y | x) under a model, in nats, the end token included.

    Args:
        model: as in ``Flip``; None rates with the policy, which gives candidates from elsewhere what ``logprob`` gives
            its own.
        over: "mean" per token, or the "sum".
        options: passed on when a model is loaded by name.

    Raises:
        InputError: another word for ``over``.
    """

    ability: ClassVar[type] = Rates

    def __init__(
        self,
        model: str | Path | Model | Engine | Callable[..., Any] | None = None,
        *,
        over: Over = "mean",
        **options: Any,
    ) -> None:
        if over not in ("mean", "sum"):
            raise InputError(f"over is mean or sum, got {over!r}.")
        self.over = over
        super().__init__(model, options)

    @property
    def name(self) -> str:
        """Kind and model."""
        return f"forward({self._model_name})"

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate once, all in one call of the engine."""
        texts = {}
        for position, each in enumerate(pending):
            response = response_piece(each.candidate)
            if response is None:
                yield position, NO_RESPONSE
            else:
                texts[position] = response if isinstance(response, str) else response.text
        prompts = [Prompt.of(pending[position].task.asked) for position in texts]
        rated = await self.engine.loglikelihood(prompts, [*texts.values()]) if prompts else []
        for position, one in zip(texts, rated, strict=True):
            usage = Usage(scorer_prompt_tokens=one.prompt_tokens + one.tokens, cached_tokens=one.cached_tokens)
            if one.error is not None:
                yield position, unscored(one.error, usage)
            else:
                yield position, Score(one.mean if self.over == "mean" else one.total, usage=usage)


class Implicit(Compound):
    """Scores candidates by what a model was taught: beta (log p(y | x) - log r(y | x)) with a reference r.

    DPO's implicit reward for a policy and what it was trained from (arXiv 2305.18290), RFG's for two models of any
    origin (2509.25604). Both must read the response as the same tokens, or the sums say nothing.

    Args:
        model: the model that was trained; None is the policy's own.
        reference: the model that it was trained from.
        beta: scales the reward.
        over: "sum", as in the formula, or the "mean" per token.

    Raises:
        InputError: no reference, a beta that is no positive number, another word for ``over``; two tokenizers, once the
            models are loaded.
    """

    def __init__(self, model: Any = None, *, reference: Any = None, beta: float = 0.1, over: Over = "sum") -> None:
        if reference is None:
            raise InputError("the implicit reward needs a reference=MODEL, what the model was trained from.")
        self.beta = number("beta", beta)
        if self.beta <= 0:
            raise InputError(f"beta must be positive, got {beta!r}.")
        self.parts = [ForwardLikelihood(each, over=over) for each in (model, reference)]

    @property
    def name(self) -> str:
        """Kind and both models."""
        return f"implicit({' - '.join(part.name for part in self.parts)})"

    def bound(self, find: Callable[[Model | None], Engine]) -> Self:
        """The same scorer with both models in place."""
        other = super().bound(find)
        known = [getattr(getattr(engine, "renderer", None), "fingerprint", None) for engine in other.engines]
        if None not in known and len({*known}) > 1:
            raise InputError(
                f"{other.name} compares models that read text as different tokens; both need one tokenizer."
            )
        return other

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate once; see ``Scorer.score``."""
        found: list[dict[int, Score]] = []
        for part in self.parts:
            async with aclosing(part.score(pending)) as scores:
                found.append({position: score async for position, score in scores})
        for position in range(len(pending)):
            own, other = (scores[position] for scores in found)
            usage = own.usage + other.usage
            parts = dict(zip(self.part_names, (own.reward, other.reward), strict=True))
            lacking = own if own.reward is None else other
            if own.status == "empty":
                yield position, own
            elif own.reward is None or other.reward is None:
                yield position, Score(None, "failed", lacking.reason, parts=parts, usage=usage, error=lacking.error)
            elif not math.isfinite(reward := self.beta * (own.reward - other.reward)):
                yield position, Score(None, "failed", f"the difference is {reward}", parts=parts, usage=usage)
            else:
                yield position, Score(reward, parts=parts, usage=usage)
