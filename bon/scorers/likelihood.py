"""Backward likelihood: how likely the original instruction is, given the response. Prefill only, nothing is decoded."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bon.engines.base import Engine, Loglikelihood, Piece, Prompt, Rates
from bon.errors import EngineError, InputError, whole_number
from bon.prompts import Style, load_style
from bon.scorers.base import ModelScorer, Pending
from bon.scorers.parsing import NO_RESPONSE, response_piece
from bon.similarity import words
from bon.types import Score, Usage

if TYPE_CHECKING:
    from bon.models import Model


_SENTENCE_END = re.compile(r"(?<=[.!?:\n])\s+")

FOILS = (
    "Write a short story about a dog who gets lost.",
    "What is the boiling point of water?",
    "Summarize the following text in one sentence.",
    "Give me three tips for a job interview.",
)
"""Instructions of different kinds that a response is seldom an answer to."""


class BackwardLikelihood(ModelScorer):
    """Scores candidates by mean log p(x | y) per token of the instruction x, its end token included, in nats.

    Rewards are comparable within one task only; without ``contrast`` they are negative, 0 at best. There is nothing to
    prune and nothing inferred to show.

    Args:
        model: as in ``Flip``.
        style: "direct", "turns", or a ``Style`` that asks for the bare instruction.
        drop_restated: whether the model is shown a response without the sentences that restate the instruction: they
            make it likely without following it. A response that does nothing else is shown as it is.
        contrast: how many of ``FOILS`` are rated as well, at most 4; the mean of theirs is subtracted, so that a
            response after which any instruction is likely gains nothing by it.
        options: passed on when a model is loaded by name.

    Raises:
        InputError: a style that asks for JSON: the bare instruction is not the answer to it; or more foils than there
            are.
    """

    ability: ClassVar[type] = Rates

    def __init__(
        self,
        model: str | Path | Model | Engine | Callable[..., Any] | None = None,
        *,
        style: str | Style = "direct",
        drop_restated: bool = False,
        contrast: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(model, options)
        self.drop_restated = drop_restated
        self.foils = FOILS[: whole_number("contrast", contrast, 0)]
        if contrast > len(FOILS):
            raise InputError(f"contrast is how many of {len(FOILS)} instructions are rated as well, got {contrast}.")
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
        each_rates = 1 + len(self.foils)
        for position, each in enumerate(pending):
            response = response_piece(each.candidate)
            if response is not None and self.drop_restated:
                response = unrestated(response, each.task.instruction)
            if response is None:
                yield position, NO_RESPONSE
            else:
                prompts[position] = self.style.prompt(each.task, response, self.template)
        repeated = [prompt for prompt in prompts.values() for _ in range(each_rates)]
        texts = [x for position in prompts for x in (pending[position].task.instruction.strip(), *self.foils)]
        rated = await self.engine.loglikelihood(repeated, texts) if prompts else []
        for i, position in enumerate(prompts):
            yield position, _score(rated[i * each_rates : (i + 1) * each_rates])


def unrestated(response: Piece, instruction: str) -> Piece:
    """A response without the sentences at least 70% of whose words, of three or more, are the instruction's."""
    text = response if isinstance(response, str) else response.text
    asked = {*words(instruction)}
    kept = []
    for sentence in _SENTENCE_END.split(text):
        said = words(sentence)
        if len(said) < 3 or sum(word in asked for word in said) < 0.7 * len(said):
            kept.append(sentence)
    short = " ".join(kept)
    return short if short.strip() and short != text else response


def _score(rated: Sequence[Loglikelihood]) -> Score:
    """The score of one candidate: how likely it makes its instruction, beside how likely it makes the foils."""
    error = next((one.error for one in rated if one.error is not None), None)
    if isinstance(error, EngineError):
        return Score(None, "failed", f"not scored: {error}", error=error)
    if error is not None:
        return Score(None, "failed", f"the response does not fit the scorer: {error}")
    read, cached = sum(one.prompt_tokens + one.tokens for one in rated), sum(one.cached_tokens for one in rated)
    usage = Usage(scorer_prompt_tokens=read, cached_tokens=cached)
    own, *foils = (one.mean for one in rated)
    reward = own - sum(foils) / len(foils) if foils else own
    if not math.isfinite(reward):
        return Score(None, "failed", f"the model gives the instruction a log-likelihood of {own}", usage=usage)
    return Score(reward, usage=usage)
