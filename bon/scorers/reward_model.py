"""Reward models: what a classification head says of the prompt with the response. Prefill only, nothing is decoded."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bon.engines.base import Classification, Classifies, Engine, Prompt, Turn
from bon.errors import InputError, UnknownNameError
from bon.scorers.base import ModelScorer, Pending, unscored
from bon.scorers.parsing import NO_RESPONSE, response_piece
from bon.types import Score, Usage

if TYPE_CHECKING:
    from bon.models import Model

_COMBINED: Mapping[str, Callable[[Sequence[float]], float]] = {
    "last": lambda values: values[-1],
    "min": min,
    "mean": fmean,
    "product": math.prod,
}


@dataclass(frozen=True, slots=True)
class StepDetails:
    """What a process reward model says of each step of the response, in [0, 1]."""

    step_scores: tuple[float, ...]


class RewardModel(ModelScorer):
    """Scores candidates by the logit of a classification head; a process reward model by probabilities of its steps.

    Args:
        model: a sequence or token classifier, by name, folder or URL (vLLM's ``/classify``, ``/pooling`` and
            ``/score``), or an engine that classifies.
        label: whose logit is the reward, by its name or its place from 0; a head with one logit needs none. A process
            reward model's is 1, the good one, unless said otherwise.
        steps: what the steps' probabilities become: the "last" one (the default), their "min", "mean" or "product".
        options: passed on when a model is loaded by name.

    Raises:
        UnknownNameError: a label that the head does not have, or another word for ``steps``.
        InputError: a head of several labels and no label; steps of a model that judges none.
    """

    ability: ClassVar[type] = Classifies
    hosts: ClassVar[Mapping[str | None, str]] = {None: "classifier", "torch": "classifier", "vllm": "vllm-classifier"}

    def __init__(
        self,
        model: str | Path | Model | Engine,
        *,
        label: str | int | None = None,
        steps: Literal["last", "min", "mean", "product"] | None = None,
        **options: Any,
    ) -> None:
        if steps is not None and steps not in _COMBINED:
            raise UnknownNameError("way to combine steps", steps, _COMBINED)
        self.label, self.steps = label, steps
        super().__init__(model, options)

    @property
    def name(self) -> str:
        """Kind and model."""
        return f"reward-model({self._model_name})"

    def _able(self, engine: Engine) -> Engine:
        able: Any = super()._able(engine)
        if able.labels:
            self._place(able, len(able.labels))
        return engine

    def _place(self, engine: Classifies, count: int) -> int:
        """Where in a row of logits the label is."""
        if self.steps is not None and engine.stepwise is False:
            raise InputError(f"{engine.name!r} judges a response as a whole: leave out steps={self.steps}.")
        known = engine.labels or [str(place) for place in range(count)]
        if self.label is None and (count == 1 or engine.stepwise):
            return min(1, count - 1)
        if self.label is None:
            raise InputError(
                f"{engine.name!r} has the labels {', '.join(known)}: say whose logit is the reward, label=NAME."
            )
        if str(self.label) in known:
            return known.index(str(self.label))
        if isinstance(self.label, int) and 0 <= self.label < count:
            return self.label
        raise UnknownNameError(f"label of {engine.name!r}", self.label, known)

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate once, all in one call of the engine."""
        asked: dict[int, Prompt] = {}
        for position, each in enumerate(pending):
            response = response_piece(each.candidate)
            if response is None:
                yield position, NO_RESPONSE
            else:
                # As text, so that the tokens are those that the model was trained on, whatever the policy chose.
                text = response if isinstance(response, str) else response.text
                asked[position] = Prompt((*Prompt.of(each.task.asked).turns, Turn("assistant", (text,))))
        found = await self.engine.classify([*asked.values()]) if asked else []
        for position, one in zip(asked, found, strict=True):
            yield position, self._score(one)

    def _score(self, one: Classification) -> Score:
        usage = Usage(scorer_prompt_tokens=one.prompt_tokens)
        if one.error is not None:
            return unscored(one.error, usage)
        odd = next((logit for row in one.logits for logit in row if not math.isfinite(logit)), None)
        if odd is not None:
            return Score(None, "failed", f"the model gives the logit {odd}", usage=usage)
        place = self._place(self.engine, len(one.logits[0]))
        if not self.engine.stepwise:
            return Score(one.logits[-1][place], usage=usage)
        values = tuple(_probability(row, place) for row in one.logits)
        return Score(_COMBINED[self.steps or "last"](values), details=StepDetails(values), usage=usage)


def _probability(logits: Sequence[float], place: int) -> float:
    """A label's share by softmax; by the logistic function where there is one logit."""
    row = logits if len(logits) > 1 else (*logits, 0.0)
    return 1 / sum(math.exp(min(700.0, other - row[place])) for other in row)
