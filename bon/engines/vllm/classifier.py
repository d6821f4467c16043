"""Reward models on vLLM in this process: a sequence classifier as a pooling model, its raw logits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bon import portal
from bon.engines.base import Classification, Prompt, too_long
from bon.engines.vllm.engine import VLLMEngine
from bon.engines.vllm.start import PoolingParams
from bon.errors import BonError, InputError


class VLLMClassifier(VLLMEngine):
    """A sequence classifier on vLLM. It reads conversations through the chat template of its tokenizer.

    Args:
        model, options: as ``VLLMEngine``.

    Attributes:
        labels: of the head.

    Raises:
        InputError: a tokenizer without a chat template, or a model without a classification head.
    """

    stepwise = False

    def __init__(self, model: str | Path, **options: Any) -> None:
        super().__init__(model, runner="pooling", **options)
        assert self._engine is not None
        config = self._engine.llm.model_config.hf_config
        kind = config.architectures[0]
        self.labels = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        if not kind.endswith("ForSequenceClassification") or not self.renderer.tokenizer.chat_template:
            self._finalizer()
            raise InputError(
                f"vLLM runs a {kind} here as a reward model only where it is a sequence classifier whose tokenizer has "
                "a chat template; engine=torch takes others."
            )

    async def classify(self, conversations: Sequence[Prompt]) -> list[Classification]:
        """Classify conversations; see ``Classifies.classify``."""
        rows: list[tuple[int, ...] | BonError] = []
        for conversation in conversations:
            try:
                rows.append(self.renderer.render(conversation, generation=False))
            except InputError as error:
                rows.append(error)
        lengths = [0 if isinstance(row, BonError) else len(row) for row in rows]
        for at, excess in too_long(lengths, self.max_model_len, "prompt and response").items():
            rows[at] = excess

        async def one(row: tuple[int, ...] | BonError) -> Classification:
            if isinstance(row, BonError):
                return Classification.failed(row)
            output = await self.pool(row, PoolingParams(task="classify", use_activation=False))
            return Classification((tuple(output.outputs.data.flatten().tolist()),), len(row))

        async def all_of_them() -> list[Classification]:
            return await asyncio.gather(*map(one, rows))

        return await portal.there(all_of_them())
