"""Embeddings over HTTP: ``/v1/embeddings``, as of OpenAI, vLLM, llama.cpp, TEI."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from functools import partial

import numpy as np

from bon.engines.base import Embedding
from bon.engines.http import wire
from bon.engines.http.link import MOST_BODY, Link
from bon.engines.http.model import NOTHING, Model
from bon.errors import InputError

MOST_TEXTS = 32
"""Texts in one request."""


async def ask_embeddings(model: Model, texts: Sequence[str], link: Link) -> list[Embedding]:
    """Embed some texts; the tokens of all are counted with the first.

    Raises:
        InputError: the server has no such page, or a model that embeds nothing.
        StatusError, BadAnswerError: as ``Model.ask``.
    """
    where = "the text" if len(texts) == 1 else "a batch of texts"
    body = wire.Body({**model.extra_body, "input": [*texts], "encoding_format": "float"}, where)
    try:
        data, _ = await model.ask(link, "embeddings", body, {}, partial(link.fetch, most=MOST_BODY), NOTHING)
    except wire.StatusError as error:
        said = error.message.lower()
        if "not support" not in said and (error.status not in (404, 405, 501) or "model" in said):
            raise
        raise InputError(
            f"{link.endpoint.url} has no embedding model ({error.message:.200}). A server of vLLM's has with --runner "
            "pooling and an embedding model; without a server: consensus:embedding:NAME, or consensus:chrf without a "
            "model."
        ) from error
    with wire.reading():
        items = sorted(data["data"], key=lambda item: item["index"])
        # NaN is no JSON, so some write null.
        vectors = np.array([[np.nan if x is None else x for x in item["embedding"]] for item in items], np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.size:
            raise wire.BadAnswerError(f"sent no embedding of each text: {reprlib.repr(data)}")
    counts = [wire.read_usage(data.get("usage"))[0], *[0] * (len(texts) - 1)]
    return [Embedding(vector, count) for vector, count in zip(vectors, counts, strict=True)]
