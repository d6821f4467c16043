"""What vLLM's pooling servers say of a conversation: ``/classify``, else ``/pooling``, else ``/score``.

They stand beside ``/v1``. The server's chat template makes the first two's prompt, unless token ids are sent; the last
one takes two texts, for models without a template. All are asked for raw logits.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from bon.engines.base import Classification, Prompt
from bon.engines.http import wire
from bon.engines.http.link import Link
from bon.engines.http.model import NOTHING, Model
from bon.errors import InputError


async def ask_head(
    model: Model, conversation: Prompt, row: Sequence[int] | None, link: Link
) -> tuple[Classification, bool]:
    """Classify a conversation, and whether each of its steps got logits.

    Args:
        row: its token ids; None sends it as messages.

    Raises:
        InputError: the server has none of the three pages for this model.
        StatusError, BadAnswerError: as ``Model.ask``.
    """
    read: dict[str, Any] = {"messages": [turn.to_dict() for turn in conversation.turns]}
    read = read if row is None else {"input": row}
    *before, response = (turn.text for turn in conversation.turns)
    ways = {"classify": read, "pooling": read, "score": {"text_1": "\n\n".join(before), "text_2": response}}
    for way, fields in ways.items():
        if way in link.endpoint.refused:
            continue
        body = wire.Body({**model.extra_body, **fields, "use_activation": False}, "the conversation")
        try:
            data, _ = await model.ask(link, f"../{way}", body, {}, link.fetch, NOTHING)
        except wire.StatusError as error:
            said = error.message.lower()
            if "not support" not in said and (error.status not in (404, 405) or "model" in said):
                raise
            link.endpoint.refused.add(way)
            continue
        return _read(data)
    raise InputError(
        f"{link.endpoint.url} has no reward model: it answers neither {', '.join(ways)}. A server of vLLM's has with "
        "--runner pooling and a model with a classification head."
    )


def _read(data: Mapping[str, Any]) -> tuple[Classification, bool]:
    with wire.reading():
        [item] = data["data"]
        found = next(item[name] for name in ("probs", "data", "score") if name in item)
        nested = isinstance(found, list) and isinstance(found[0], list)
        rows = found if nested else [found if isinstance(found, list) else [found]]
        # NaN is no JSON, so some write null.
        logits = tuple(tuple(math.nan if value is None else float(value) for value in row) for row in rows)
        if not all(logits):
            raise wire.BadAnswerError(f"sent no logits: {reprlib.repr(data)}")
    tokens = wire.read_usage(data.get("usage"))[0]
    if nested and len(logits) == tokens:  # a head on every token: the last one has read all
        return Classification(logits[-1:], tokens), False
    return Classification(logits, tokens), nested
