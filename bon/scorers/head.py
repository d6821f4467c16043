"""A trained head as a scorer: the model reads prompt and response once, and the head rates its hidden states."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bon.engines.base import Engine, Reads
from bon.errors import InputError
from bon.heads.data import States, prompt_of
from bon.heads.file import TrainedHead
from bon.scorers.base import ModelScorer, Pending, unscored
from bon.scorers.parsing import NO_RESPONSE, response_piece
from bon.types import Score, Usage

if TYPE_CHECKING:
    from bon.models import Model


@dataclass(frozen=True, slots=True)
class HeadDetails:
    """What a head knows beside the reward and its spread.

    Args:
        factors: of a "bnrm" head, the factors that make most of the reward: number and share, most first.
    """

    factors: tuple[tuple[int, float], ...] = ()


class Head(ModelScorer):
    """Scores candidates by a head that ``bon train head`` made from your labelled ones. Prefill only.

    Rewards are comparable within one task. ``Score.spread`` is their standard deviation; the selector ``lcb`` uses it.

    Args:
        file: the head.
        model: what reads; the model that the file names, unless this says otherwise. It must be the same model.
        options: passed on when a model is loaded by name.

    Raises:
        InputError: a file that holds no head; another model than the head's, once it is loaded.
    """

    ability: ClassVar[type] = Reads

    def __init__(self, file: str | Path, model: str | Path | Model | Engine | None = None, **options: Any) -> None:
        self.file = Path(file)
        self.head = TrainedHead.load(self.file)
        self.version = self.head.digest
        super().__init__(self.head.header.model if model is None else model, options)

    @property
    def name(self) -> str:
        """Kind and model."""
        return f"{self.head.header.kind}({self._model_name})"

    def _able(self, engine: Engine) -> Engine:
        super()._able(engine)
        if engine.fingerprint != self.head.header.fingerprint:  # type: ignore[attr-defined]
            raise InputError(
                f"the head {str(self.file)!r} was trained on hidden states of {self.head.header.model!r}, and "
                f"{engine.name!r} is another model. Name that one with model=, or train a head for this one."
            )
        return engine

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate once, all in one call of the engine."""
        texts: dict[int, str] = {}
        for position, each in enumerate(pending):
            response = response_piece(each.candidate)
            if response is None:
                yield position, NO_RESPONSE
            else:
                texts[position] = response if isinstance(response, str) else response.text
        layers = self.head.header.settings["layers"]
        prompts = [prompt_of(pending[position].task) for position in texts]
        readings = await self.engine.hidden_states(prompts, [*texts.values()], layers=layers) if prompts else []
        read = {}
        for position, one in zip(texts, readings, strict=True):
            if one.error is None:
                read[position] = one
            else:
                yield position, unscored(one.error)
        if not read:
            return
        found = await asyncio.to_thread(self.head.rewards, States.of(layers, [*read.values()]))
        for at, (position, one) in enumerate(read.items()):
            details = HeadDetails(found.factors[at]) if found.factors else None
            yield (
                position,
                Score(
                    float(found.mean[at]),
                    details=details,
                    spread=float(found.spread[at]),
                    usage=Usage(scorer_prompt_tokens=one.tokens),
                ),
            )
