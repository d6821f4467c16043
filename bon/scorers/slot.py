"""A judge with one place to fill in: the probability of "Yes" behind an explanation; nothing is parsed.

The idea of ESFP-RM (arXiv 2508.18212, withdrawn by its authors in v2): an explanation first, then the label word's
probability at one fixed place, among the label words only, minus the same for an empty response.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bon.engines.base import Engine, Generates, Loglikelihood, Piece, Prompt, Rates, Request, Turn
from bon.errors import InputError, whole_number
from bon.prompts.judging import SLOT, SLOT_QUESTION
from bon.scorers.base import ModelScorer, Pending, unscored
from bon.scorers.parsing import NO_RESPONSE, response_piece, strip_think
from bon.task import Task
from bon.types import Sampling, Score, Usage

if TYPE_CHECKING:
    from bon.models import Model


class Slot(ModelScorer):
    """Scores candidates by P("Yes") to "does it do what was asked?", minus the same for an empty response.

    Args:
        model: as in ``Flip``; it must give log-probabilities.
        explain: tokens of the explanation that the model writes before it is asked; 0 asks at once, by prefill alone.
        labels: the two words; each must be one token of the model.
        options: passed on when a model is loaded by name.

    Raises:
        InputError: explain < 0, or labels that are not two different words.
    """

    ability: ClassVar[type] = Rates
    range = (-1.0, 1.0)

    def __init__(
        self,
        model: str | Path | Model | Engine | Callable[..., Any] | None = None,
        *,
        explain: int = 80,
        labels: Sequence[str] = ("Yes", "No"),
        **options: Any,
    ) -> None:
        self.explain = whole_number("explain", explain, 0)
        if isinstance(labels, str) or len(labels) != 2 or len({*labels}) != 2 or not all(map(str.strip, labels)):
            raise InputError(f'labels are two different words, good before bad, such as ["Yes", "No"], got {labels!r}.')
        self.labels = tuple(labels)
        super().__init__(model, options)

    @property
    def name(self) -> str:
        """Kind and model."""
        return f"slot({self._model_name})"

    def _able(self, engine: Engine) -> Engine:
        if self.explain and not isinstance(engine, Generates):
            raise InputError(
                f"slot has the model write an explanation, and {engine.name!r} cannot; explain=0 does not."
            )
        return super()._able(engine)

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate once; see ``Scorer.score``."""
        shown: dict[int, Prompt] = {}
        for position, each in enumerate(pending):
            response = response_piece(each.candidate)
            if response is None:
                yield position, NO_RESPONSE
            else:
                shown[position] = _ask(each.task, response)
        said, usage, failed = await self._explained(shown)
        for position, error in failed.items():
            yield position, unscored(error, usage[position])
            del shown[position]
        tasks = {id(pending[position].group): pending[position].task for position in shown}
        prompts = [_then(prompt, said.get(position)) for position, prompt in shown.items()]
        prompts += [_then(_ask(task, ""), None) for task in tasks.values()]
        rated = await self.engine.loglikelihood(
            [prompt for prompt in prompts for _ in self.labels], list(self.labels) * len(prompts), end=False
        )
        pairs = [rated[at : at + 2] for at in range(0, len(rated), 2)]
        empty = dict(zip(tasks, pairs[len(shown) :], strict=True))
        for (position, _), pair in zip(shown.items(), pairs, strict=False):
            calibration = empty[id(pending[position].group)]
            yield position, self._score(pair, calibration, said.get(position), usage.get(position, Usage()))

    async def _explained(self, shown: dict[int, Prompt]) -> tuple[dict[int, str], dict[int, Usage], dict[int, Any]]:
        """Explanations, what they cost, and errors, by position."""
        said: dict[int, str] = {}
        usage: dict[int, Usage] = {}
        failed: dict[int, Any] = {}
        places = list(shown) if self.explain else []
        sampling = Sampling(temperature=0.0, max_tokens=max(1, self.explain))
        requests = [Request(shown[position], sampling, together=True) for position in places]
        async with aclosing(self.engine.generate(requests)) as completions:
            async for done in completions:
                position = places[done.request_index]
                said[position] = strip_think(done.text).strip()
                usage[position] = Usage(
                    scorer_prompt_tokens=done.prompt_tokens,
                    scorer_completion_tokens=done.completion_tokens,
                    cached_tokens=done.cached_tokens,
                )
                if done.error is not None:
                    failed[position] = done.error
        return said, usage, failed

    def _score(
        self, rated: Sequence[Loglikelihood], empty: Sequence[Loglikelihood], said: str | None, usage: Usage
    ) -> Score:
        read = sum(one.prompt_tokens + one.tokens for one in rated)
        usage += Usage(scorer_prompt_tokens=read, cached_tokens=sum(one.cached_tokens for one in rated))
        error = next((one.error for one in (*rated, *empty) if one.error is not None), None)
        if error is not None:
            return unscored(error, usage)
        for word, one in zip(self.labels, rated, strict=True):
            if one.tokens != 1:
                raise InputError(
                    f"the label {word!r} is {one.tokens} tokens of {self._model_name}, and each must be one: choose "
                    'other words, for example labels=["A", "B"].'
                )
        reward = _share(rated) - _share(empty)
        if not math.isfinite(reward):
            return Score(None, "failed", "the model gives the labels no finite probability", said, usage=usage)
        return Score(round(reward, 12), explanation=said, usage=usage)


def _ask(task: Task, response: Piece) -> Prompt:
    return SLOT.prompt(task, [response], template={"enable_thinking": False})


def _then(prompt: Prompt, said: str | None) -> Prompt:
    """Ask for the label, behind an explanation where there is one."""
    if said:
        return replace(prompt, turns=(*prompt.turns, Turn("assistant", (said,)), Turn("user", (SLOT_QUESTION,))))
    *before, last = prompt.turns
    return replace(prompt, turns=(*before, Turn("user", (*last.pieces, f"\n\n{SLOT_QUESTION}"))))


def _share(rated: Sequence[Loglikelihood]) -> float:
    good, bad = (one.total for one in rated)
    return 1 / (1 + math.exp(min(700.0, bad - good)))
