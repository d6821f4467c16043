"""Embedding models in this process, through transformers: texts in, a vector each out.

Texts are read by neighbours in length together, padded on the right. How the states of a text's tokens become one
vector is what the model's folder says in the layout of sentence-transformers (``modules.json``), else their mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel
from transformers.utils import cached_file

from bon.engines.base import Embedding, too_long
from bon.engines.text.vocabulary import PlainEncoder
from bon.engines.torch.classifier import layout_of
from bon.engines.torch.onepass import OnePass
from bon.engines.torch.reading import in_batches, padded
from bon.engines.torch.worker import Call
from bon.errors import InputError, UnknownNameError

POOLINGS = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}
"""How the states of a text's tokens become one vector: sentence-transformers' names, and vLLM's."""
_CHAT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class TorchEmbedder(OnePass):
    """An embedding model in this process.

    Args:
        model, device, dtype, threads, revision, trust_remote_code: as ``TorchEngine``.
        pooling: "mean" of the tokens' states, the "cls" token's, or "lasttoken"; None takes what the model's folder
            says, else the mean.
        max_model_len: tokens of a text; None takes the lesser of the model's and the tokenizer's own limit.
        max_batch_tokens: tokens of one pass, padding included; None takes what keeps the layers' memory small.

    Raises:
        ModelNotFoundError: the model is neither on disk nor can be fetched.
        InputError: a language model whose folder says nothing of pooling, or a value out of range.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        pooling: str | None = None,
        max_model_len: int | None = None,
        max_batch_tokens: int | None = None,
        threads: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if pooling is not None and pooling not in POOLINGS:
            raise UnknownNameError("pooling", pooling, POOLINGS)
        self.pooling = pooling

        def make(source: str, config: Any, **options: Any) -> Any:
            self.pooling = self.pooling or pooling_of(source, config, **options)
            made, found = AutoModel.from_pretrained(source, config=config, output_loading_info=True, **options)
            missing = {key for key in found["missing_keys"] if "pooler" not in key}  # which is not asked
            if missing:  # transformers would draw them at random
                raise InputError(f"the weights of {source!r} are not complete: {min(missing)} is missing.")
            return made

        super().__init__(
            model,
            make,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_batch_tokens=max_batch_tokens,
            threads=threads,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        self._rows = TextRows(self._tokenizer)
        pads = (self._config.pad_token_id, self._tokenizer.pad_token_id)
        self._pad = next((i for i in pads if i is not None), 0)

    async def embed(self, texts: Sequence[str]) -> list[Embedding]:
        """Embed texts; see ``Embeds.embed``."""
        return await self._each(texts, self._read)

    def _read(self, texts: Sequence[str], call: Call) -> None:
        rows = {index: self._rows.row(text) for index, text in enumerate(texts)}
        for index, error in too_long([*map(len, rows.values())], self.max_model_len, "text").items():
            call.emit((index, Embedding.failed(error)))
            del rows[index]
        for batch in in_batches(rows, self.max_batch_tokens):
            call.check()
            vectors = self._pool([rows[index] for index in batch]).cpu().numpy()
            for index, vector in zip(batch, vectors, strict=True):
                call.emit((index, Embedding(vector, len(rows[index]))))

    def _pool(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """One vector for each row: shape (rows, width)."""
        device = self._model.device
        mask = padded([(1,) * len(row) for row in rows], 0, device)
        few = {"use_cache": False} if "use_cache" in self._accepted else {}
        ids = padded(rows, self._pad, device)
        states: Tensor = self._model(input_ids=ids, attention_mask=mask, **few).last_hidden_state.float()
        if self.pooling == "mean":
            return states.masked_fill(mask.unsqueeze(-1) == 0, 0.0).sum(1) / mask.sum(1, keepdim=True)
        last = mask.sum(1) - 1 if self.pooling == "lasttoken" else torch.zeros(len(rows), dtype=torch.long)
        return states[torch.arange(len(rows)), last]


class TextRows:
    """Texts as a tokenizer writes one, its own tokens around it; none of a text's becomes a control token."""

    def __init__(self, tokenizer: Any) -> None:
        self._layout, self._plain = layout_of(tokenizer, "a"), PlainEncoder(tokenizer)

    def row(self, text: str) -> tuple[int, ...]:
        """Token ids."""
        own = self._plain.encode(text)
        return tuple(i for which, ids, _ in self._layout for i in (own if which == 0 else ids))


def pooling_of(
    source: str, config: Any, *, revision: str | None = None, local_files_only: bool = False, **_: Any
) -> str:
    """How a model's folder says that the states of tokens become one vector; the mean where it says nothing.

    Raises:
        InputError: a language model whose folder says nothing, or something of sentence-transformers' that is not done.
    """
    kind = next(iter(config.architectures or ()), config.model_type)
    there = {"revision": revision, "local_files_only": local_files_only}
    listed = cached_file(source, "modules.json", _raise_exceptions_for_missing_entries=False, **there)
    if listed is None:
        if kind.endswith(_CHAT):
            raise InputError(
                f"{source!r} is a {kind}, a language model and no embedding model (it has no modules.json). Name one, "
                "such as consensus:embedding:sentence-transformers/all-MiniLM-L6-v2; or say how the states of its "
                f"tokens become a vector, pooling={'|'.join(POOLINGS)}; or take consensus:chrf, which needs no model."
            )
        return "mean"
    pooling = "mean"
    for module in json.loads(Path(listed).read_text()):
        name = module["type"].rpartition(".")[2]
        if name == "Pooling":
            said = json.loads(Path(cached_file(source, f"{module['path']}/config.json", **there)).read_text())
            set_ = [key for key, value in said.items() if key.startswith("pooling_mode_") and value is True]
            modes = [key.removeprefix("pooling_mode_").partition("_token")[0] for key in set_]
            pooling = said.get("pooling_mode", " and ".join(modes))
            name = f"pooling by {pooling}"
        if name not in ("Transformer", "Normalize", *(f"pooling by {known}" for known in POOLINGS)):
            raise InputError(
                f"{source!r} has a module that is not run here, {name}; serve the model, and name its address: "
                "consensus:embedding:http://HOST/v1"
            )
    return pooling
