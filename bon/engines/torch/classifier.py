"""Reward models in this process: a classification head on a decoder or an encoder, through transformers.

Conversations are read by prefill alone, neighbours in length together, each padded on the right. Decoders keep no keys
and values, and nothing is shared between conversations: a template may put its marks anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from bon.engines.base import Classification, Prompt, too_long
from bon.engines.text.render import Renderer
from bon.engines.text.vocabulary import PlainEncoder
from bon.engines.torch.onepass import OnePass
from bon.engines.torch.reading import in_batches, padded
from bon.engines.torch.worker import Call
from bon.errors import InputError
from bon.mini import shown_name

_HEADS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
}
_STEP = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True)
class _Row:
    """What the model reads of one conversation.

    Args:
        ids: token ids.
        types: which of two texts each token belongs to, for models that are told.
        ends: index of the last token of each step.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()


class TorchClassifier(OnePass):
    """A model with a classification head in this process.

    A sequence classifier reads a conversation through the chat template of its tokenizer, the response as the
    assistant's last turn; without a template it reads two texts, the conversation and the response. A token classifier
    is a process reward model in TRL's layout: the conversation and the steps of the response, each followed by the
    separator, whose last token has the step's logits. A response's steps are its parts between blank lines.

    Args:
        model: a folder or a Hugging Face name.
        device, dtype, threads, revision, trust_remote_code, chat_template, chat_template_kwargs: as ``TorchEngine``.
        max_model_len: tokens of a conversation; None takes the lesser of the model's and the tokenizer's own limit.
        max_batch_tokens: tokens of one pass, padding included; None takes what keeps the layers' memory small.
        step_separator: what a process reward model was trained to see behind each step.

    Attributes:
        labels: of the head.
        stepwise: whether it judges each step.

    Raises:
        ModelNotFoundError: the model is neither on disk nor can be fetched.
        InputError: no classification head, or a value out of range.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_model_len: int | None = None,
        max_batch_tokens: int | None = None,
        threads: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        step_separator: str = "\n",
    ) -> None:
        if not isinstance(step_separator, str):
            raise InputError(f"step_separator is a text such as '\\n', got {step_separator!r}.")
        super().__init__(
            model,
            classification_model,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
            max_batch_tokens=max_batch_tokens,
            threads=threads,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        tokenizer = self._tokenizer
        self._own_pad = self._config.pad_token_id
        self.stepwise = type(self._model).__name__.endswith("ForTokenClassification")
        names = self._model.config.id2label
        self.labels = tuple(str(names[i]) for i in range(self._model.config.num_labels))
        self._template: Renderer | None = None
        if self.stepwise:
            self._bos = () if tokenizer.bos_token_id is None else (int(tokenizer.bos_token_id),)
            self._separator, self._plain = step_separator, PlainEncoder(tokenizer)
        elif tokenizer.chat_template or chat_template:
            self._template = Renderer(tokenizer, chat_template_kwargs, chat_template=chat_template)
        else:
            self._layout, self._plain = layout_of(tokenizer, "a", "b"), PlainEncoder(tokenizer)

    async def classify(self, conversations: Sequence[Prompt]) -> list[Classification]:
        """Classify conversations; see ``Classifies.classify``."""
        return await self._each(conversations, self._read)

    def _read(self, conversations: Sequence[Prompt], call: Call) -> None:
        rows: dict[int, _Row] = {}
        for index, conversation in enumerate(conversations):
            try:
                rows[index] = self._row(conversation)
            except InputError as error:
                call.emit((index, Classification.failed(error)))
        lengths = [len(row.ids) for row in rows.values()]
        places = [*rows]
        for at, excess in too_long(lengths, self.max_model_len, "prompt and response").items():
            call.emit((places[at], Classification.failed(excess)))
            del rows[places[at]]
        for batch in in_batches({index: row.ids for index, row in rows.items()}, self.max_batch_tokens):
            call.check()
            for index, logits in zip(batch, self._logits([rows[index] for index in batch]), strict=True):
                call.emit((index, Classification(logits, len(rows[index].ids))))

    def _row(self, conversation: Prompt) -> _Row:
        conversation.refuse_tools("a reward model")
        if self._template is not None:
            return _Row(self._template.render(conversation, generation=False))
        *before, response = (turn.text for turn in conversation.turns)
        asked = "\n\n".join(before)
        if not self.stepwise:
            texts = [self._plain.encode(asked), self._plain.encode(response)]
            pairs = [(i, kind) for which, own, kind in self._layout for i in (own if which is None else texts[which])]
            return _Row(tuple(i for i, _ in pairs), tuple(kind for _, kind in pairs))
        ids, ends = [*self._bos, *self._plain.encode(asked)], list[int]()
        for step in _STEP.split(response.strip()):
            ids += [*self._plain.encode(step), *self._plain.encode(self._separator)]
            ends.append(len(ids) - 1)
        return _Row(tuple(ids), ends=tuple(ends))

    def _logits(self, rows: Sequence[_Row]) -> list[tuple[tuple[float, ...], ...]]:
        """Logits of each row (1, labels), or of each of its steps (steps, labels)."""
        if self._own_pad is None:
            # A decoder's head looks at the last token that is not the padding token: take one that ends no row.
            last = {row.ids[-1] for row in rows}
            self._config.pad_token_id = next(i for i in range(len(last) + 1) if i not in last)
        device = self._model.device
        inputs = {
            "attention_mask": padded([(1,) * len(row.ids) for row in rows], 0, device),
            "token_type_ids": padded([row.types for row in rows], 0, device) if rows[0].types else None,
            "use_cache": False,
        }
        accepted = {k: v for k, v in inputs.items() if k in self._accepted and v is not None}
        ids = padded([row.ids for row in rows], self._config.pad_token_id, device)
        logits = self._model(input_ids=ids, **accepted).logits.float().cpu()
        if not self.stepwise:
            logits = logits.unsqueeze(1)
        ends = [list(row.ends) if self.stepwise else [0] for row in rows]
        return [tuple(map(tuple, own[at].tolist())) for own, at in zip(logits, ends, strict=True)]


def classification_model(source: str, config: Any, **options: Any) -> Any:
    """A sequence or token classifier, as its configuration says.

    Raises:
        InputError: the configuration or the weights have no classification head.
    """
    kind = next(iter(config.architectures or ()), config.model_type)
    auto: Any = next((auto for ending, auto in _HEADS.items() if kind.endswith(ending)), None)
    if auto is None:
        raise InputError(
            f"{shown_name(source)!r} is a {kind}, which has no classification head, so it is no reward model; a "
            "language model scores as judge:NAME or flip:NAME."
        )
    made, found = auto.from_pretrained(source, config=config, output_loading_info=True, **options)
    if missing := found["missing_keys"]:  # transformers would draw them at random
        raise InputError(f"the weights of {source!r} are not complete: {min(missing)} is missing. Get the model again.")
    return made


def layout_of(tokenizer: Any, *texts: str) -> list[tuple[int | None, tuple[int, ...], int]]:
    """How a tokenizer writes a text or two: (which text, or None for tokens of its own; these tokens; token type)."""
    pair = tokenizer(*texts)
    # Types are made also by tokenizers whose models are told none.
    types = pair.get("token_type_ids", [0] * len(pair["input_ids"]))
    marked = zip(pair.sequence_ids(), pair["input_ids"], types, strict=True)
    runs = [(key, [i for _, i, _ in run]) for key, run in groupby(marked, key=lambda each: (each[0], each[2]))]
    return [(which, tuple(ids), kind) for (which, kind), ids in runs]
