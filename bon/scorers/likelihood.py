"""Backward likelihood: how likely the original instruction is, given the response. Prefill only, nothing is decoded."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bon.engines.base import Engine, Loglikelihood, Prompt, Rates
from bon.errors import EngineError, InputError
from bon.prompts import Style, load_style
from bon.scorers.base import ModelScorer, Pending
from bon.scorers.parsing import NO_RESPONSE, response_piece
from bon.types import Score, Usage

if TYPE_CHECKING:
    from bon.models import Model


class BackwardLikelihood(ModelScorer):
    """Scores candidates by mean log p(x | y) per token of the instruction x, its end token included, in nats.

    Rewards are negative, 0 at best, and comparable within one task only. There is nothing to prune and nothing inferred
    to show.

    Args:
        model: as in ``Flip``.
        style: "direct" or a ``Style`` that asks for the bare instruction.
        options: passed on when a model is loaded by name.

    Raises:
        InputError: a style that asks for JSON: the bare instruction is not the answer to it.
    """

    ability: ClassVar[type] = Rates

    def __init__(
        self,
        model: str | Path | Model | Engine | Callable[..., Any] | None = None,
        *,
        style: str | Style = "direct",
        **options: Any,
    ) -> None:
        super().__init__(model, options)
        self.style = load_style(style)
        if self.style.output != "text":
            raise InputError(
                f"the likelihood scorer needs a prompt that asks for the bare instruction, and {self.style.name!r} "
                "asks for JSON. Use 'direct', or from_files(..., output='text')."
            )
        self.template = {"enable_thinking": False}

    @property
    def name(self) -> str:
        """Kind and model."""
        return f"likelihood({self._model_name})"

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate once, all in one call of the engine."""
        prompts: dict[int, Prompt] = {}
        for position, each in enumerate(pending):
            response = response_piece(each.candidate)
            if response is None:
                yield position, NO_RESPONSE
            else:
                prompts[position] = self.style.prompt(each.task, response, self.template)
        instructions = [pending[position].task.instruction.strip() for position in prompts]
        rated = await self.engine.loglikelihood(list(prompts.values()), instructions) if prompts else []
        for position, likelihood in zip(prompts, rated, strict=True):
            yield position, _score(likelihood)


def _score(likelihood: Loglikelihood) -> Score:
    if likelihood.error is not None:
        if isinstance(likelihood.error, EngineError):
            return Score(None, "failed", f"not scored: {likelihood.error}", error=likelihood.error)
        return Score(None, "failed", f"the response does not fit the scorer: {likelihood.error}")
    usage = Usage(
        scorer_prompt_tokens=likelihood.prompt_tokens + likelihood.tokens, cached_tokens=likelihood.cached_tokens
    )
    if not math.isfinite(likelihood.mean):
        reason = f"the model gives the instruction a log-likelihood of {likelihood.mean}"
        return Score(None, "failed", reason, usage=usage)
    return Score(likelihood.mean, usage=usage)
