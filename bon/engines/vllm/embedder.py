"""Embedding models on vLLM in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bon import portal
from bon.engines.base import Embedding, too_long
from bon.engines.loading import load_config, local_folder
from bon.engines.torch.embedder import POOLINGS, TextRows, pooling_of
from bon.engines.vllm.engine import VLLMEngine
from bon.engines.vllm.start import PoolerConfig, PoolingParams
from bon.errors import UnknownNameError


class VLLMEmbedder(VLLMEngine):
    """An embedding model on vLLM.

    Args:
        model, options: as ``VLLMEngine``.
        pooling: as ``TorchEmbedder``.

    Raises:
        InputError: a language model whose folder says nothing of pooling.
    """

    def __init__(self, model: str | Path, *, pooling: str | None = None, **options: Any) -> None:
        if pooling is None:
            pooling = pooling_of(local_folder(model) or str(model), load_config(model))
        elif pooling not in POOLINGS:
            raise UnknownNameError("pooling", pooling, POOLINGS)
        config = PoolerConfig(pooling_type=POOLINGS[pooling])
        super().__init__(model, runner="pooling", convert="embed", pooler_config=config, **options)
        self._rows = TextRows(self.renderer.tokenizer)

    async def embed(self, texts: Sequence[str]) -> list[Embedding]:
        """Embed texts; see ``Embeds.embed``."""
        rows = [self._rows.row(text) for text in texts]
        errors = too_long([*map(len, rows)], self.max_model_len, "text")

        async def one(index: int) -> Embedding:
            if index in errors:
                return Embedding.failed(errors[index])
            output = await self.pool(rows[index], PoolingParams(task="embed", use_activation=False))
            return Embedding(output.outputs.data.float().numpy(), len(rows[index]))

        async def all_of_them() -> list[Embedding]:
            return await asyncio.gather(*map(one, range(len(rows))))

        return await portal.there(all_of_them())
