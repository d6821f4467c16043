"""Backward likelihood: how likely the original instruction is, given the response. Prefill only, nothing is decoded."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from bon.engines.base import Engine, Loglikelihood, Prompt
from bon.errors import InputError, PromptTooLongError
from bon.prompts import Style, load_style
from bon.scorers.base import Item, Scored, no_response
from bon.scorers.lazy import LazyEngine
from bon.scorers.parsing import response_piece
from bon.types import Score, Usage


class BackwardLikelihood:
    """Scores candidates by mean log p(x | y) per token of the instruction x, its end token included, in nats.

    Rewards are negative, 0 at best, and comparable within one task only. There is nothing to prune and nothing inferred
    to show.

    Args:
        model: a model name or folder, an ``Engine``, or None for the embedded mini model, as in ``Flip``.
        prompt: "direct" or a ``Style`` that asks for the bare instruction.
        options: passed on when a model is loaded by name.

    Raises:
        InputError: a style that asks for JSON: the bare instruction is not the answer to it.
    """

    def __init__(
        self, model: str | Path | Engine | None = None, *, prompt: str | Style = "direct", **options: Any
    ) -> None:
        self.style = load_style(prompt)
        if self.style.output != "text":
            raise InputError(
                f"the likelihood scorer needs a prompt that asks for the bare instruction, and {self.style.name!r} "
                "asks for JSON. Use 'direct', or from_files(..., output='text')."
            )
        self.template = {"enable_thinking": False}
        self._model = LazyEngine(model, options)

    @property
    def name(self) -> str:
        """Kind and model."""
        return f"likelihood({self._model.name})"

    @property
    def engine(self) -> Engine | None:
        """The engine, loaded now if it was not; None as long as no model was named (see ``on``)."""
        return self._model.named

    def on(self, engine: Engine) -> BackwardLikelihood:
        """Return the same scorer on another engine, which stays its owner's."""
        return self._model.moved(self, engine)

    @property
    def overlaps(self) -> bool:
        """Whether calls may run at the same time."""
        return self._model.engine.overlaps

    async def score(self, items: Sequence[Item]) -> AsyncIterator[Scored]:
        """Score every item once, all in one call of the engine."""
        prompts: dict[int, Prompt] = {}
        for index, item in enumerate(items):
            response = response_piece(item.candidate)
            if response is None:
                yield no_response(index, item)
            else:
                prompts[index] = self.style.prompt(item.task, response, self.template)
        while prompts:
            order = list(prompts)
            try:
                continuations = [items[i].task.instruction.strip() for i in order]
                rated = await self._model.engine.loglikelihood([prompts[i] for i in order], continuations)
            except PromptTooLongError as error:
                if not error.indices:
                    raise
                for position in error.indices:
                    del prompts[order[position]]
                    reason = f"the response does not fit the scorer: {error}"
                    candidate = items[order[position]].candidate.index
                    yield Scored(order[position], Score(candidate, None, "failed", reason=reason))
                continue
            for i, likelihood in zip(order, rated, strict=True):
                scored = _scored(i, items[i], likelihood)
                items[i].board.post(scored.score.reward)
                yield scored
            return

    async def aclose(self) -> None:
        """Free the model if it was loaded here."""
        await self._model.aclose()


def _scored(index: int, item: Item, likelihood: Loglikelihood) -> Scored:
    usage = Usage(
        scorer_prompt_tokens=likelihood.prompt_tokens + likelihood.tokens, cached_tokens=likelihood.cached_tokens
    )
    if not math.isfinite(likelihood.mean):
        reason = f"the model gives the instruction a log-likelihood of {likelihood.mean}"
        return Scored(index, Score(item.candidate.index, None, "failed", reason=reason), usage)
    return Scored(index, Score(item.candidate.index, likelihood.mean), usage)
