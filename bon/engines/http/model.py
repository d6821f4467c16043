"""One model behind its endpoints: what each of them calls it, how long its context is, and what each refuses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from bon.engines.http import wire
from bon.engines.http.endpoints import Endpoints
from bon.engines.http.link import Link
from bon.errors import ModelNotFoundError, PromptTooLongError

T = TypeVar("T")

NOTHING: frozenset[str] = frozenset()


class Model:
    """Asks for one model, and learns from what its servers refuse.

    Args:
        name: what to ask for; None asks each server, which must then have only one model.
        measured: whether the length of the context is to be known before the first prompt is sent.
    """

    def __init__(
        self, endpoints: Endpoints, name: str | None, extra_body: Mapping[str, Any], *, measured: bool
    ) -> None:
        self.endpoints, self.name, self.extra_body, self._measured = endpoints, name, extra_body, measured
        self.optional = wire.OPTIONAL.difference(extra_body)  # what the user asked for is never left out

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and completion together, as the servers said; None while they did not."""
        return min((e.max_model_len for e in self.endpoints.all if e.max_model_len is not None), default=None)

    async def name_at(self, link: Link, *, ask: bool = False) -> str:
        """The name to send: the one that was given, unless the server is to be asked, else the only one that it has.

        Raises:
            ModelNotFoundError: the server has none, or several.
        """
        endpoint = link.endpoint
        if endpoint.model is not None:
            return endpoint.model
        if self.name is not None and not self._measured and not ask:
            return self.name
        async with link.asking_for_model:
            if endpoint.model is None:
                cards = await self._cards(link)
                names = [card["id"] for card in cards]
                name = self.name or (names[0] if len(names) == 1 else None)
                if name is None:
                    listed = ", ".join([*names[:8], *(["…"] if names[8:] else [])])
                    has = f"several models ({listed})" if names else "no model"
                    raise ModelNotFoundError(f"{endpoint.url} has {has}; name one: {endpoint.url}#name, or model=.")
                room = next((card.get("max_model_len") for card in cards if card["id"] == name), None)
                endpoint.max_model_len = room if type(room) is int and room > 0 else endpoint.max_model_len
                endpoint.model = name
        return endpoint.model

    async def _cards(self, link: Link) -> list[Mapping[str, Any]]:
        try:
            data = (await link.fetch("models")).get("data")
        except wire.StatusError as error:
            if self.name is not None and error.status in (403, 404):
                return []
            raise
        cards = data if isinstance(data, list) else []
        return [card for card in cards if isinstance(card, Mapping) and isinstance(card.get("id"), str)]

    async def ask(
        self,
        link: Link,
        path: str,
        body: wire.Body,
        varying: Mapping[str, int],
        send: Callable[[str, bytes], Awaitable[T]],
        optional: frozenset[str] | None = None,
    ) -> tuple[T, frozenset[str]]:
        """Send a body without what the server is known to refuse, and learn what else it refuses.

        A field is left out for good once the server has named it and has answered without it. After a refusal that
        explains nothing this one request is made again, without whatever bon can do without.

        Args:
            body, varying: what to send; the model's name is added.
            optional: fields that may be left out; None for all that bon can do without.

        Returns:
            The answer, and the fields that were left out.

        Raises:
            StatusError: what remains.
            PromptTooLongError: the server says so.
        """
        optional = self.optional if optional is None else optional
        name = await self.name_at(link)
        named, guessed = dict[str, str](), NOTHING
        while True:
            dropped = optional & (link.endpoint.refused | guessed | named.keys())
            try:
                answer = await send(path, body.encode(name, varying, dropped))
            except wire.StatusError as error:
                if error.status not in (400, 403, 413, 422, 500):  # llama.cpp: 500 where its template refuses a role
                    raise
                if sizes := wire.overflow(error):
                    tokens, limit = sizes
                    link.endpoint.max_model_len = link.endpoint.max_model_len or limit
                    if tokens >= limit:
                        where = f"{body.where}, as far as the server counted,"
                        raise PromptTooLongError(tokens, limit - 1, where) from error
                    if varying.get("max_tokens", 0) > limit - tokens:
                        varying = {**varying, "max_tokens": limit - tokens}
                        continue
                left = body.optional(varying, dropped) & optional
                if field := wire.refused_field(error, left, {*body.fields, *varying} - dropped):
                    named[field] = error.message
                elif error.status in (400, 413, 422) and left & wire.GUESSED:
                    guessed |= left & wire.GUESSED
                else:
                    raise
            else:
                for field, said in named.items():
                    self.endpoints.learn(link.endpoint, field, said)
                return answer, dropped
