"""What HTTP requests ask for: their bodies, streams that may be given up, several prompts at once; and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from bon.engines.base import Completion, Keep, Partial, Request
from bon.engines.http import wire
from bon.engines.http.link import Link, events, room
from bon.engines.http.model import Model
from bon.errors import PromptTooLongError
from bon.types import NO_LIMIT

BATCH = "batch"
PIECES_PER_TOKEN = 8  # some servers send each letter by itself
MOST_TOGETHER = 64
"""Samples or prompts in one HTTP request: what one failure costs is bounded, and so is the size of an answer."""


class Job:
    """One request of a call of ``generate``; ``ids`` are the prompt's tokens, sent in place of its messages."""

    def __init__(
        self,
        model: Model,
        index: int,
        request: Request,
        at_once: int | None,
        keep: Keep | None,
        ids: tuple[int, ...] | None = None,
        as_tokens: wire.AsTokens | None = None,
    ) -> None:
        self.index, self.request = index, request
        self._model, self._ids, self._as_tokens = model, ids, as_tokens
        self._at_once = at_once or (model.endpoints.share(request.n, MOST_TOGETHER) if request.together else 1)
        self._options = {**model.extra_body, **wire.sampling_fields(request.sampling)}
        self._optional = model.optional.difference(request.sampling.extra)
        self._keep = None if wire.TOOLS & self._options.keys() else keep
        self._bodies: dict[tuple[str, bool], wire.Body] = {}

    def groups(self) -> list[range]:
        """The samples of each HTTP request."""
        most, samples = 1 if self._keep else self._at_once, self.request.samples
        return [samples[start : start + most] for start in range(0, len(samples), most)]

    def joins(self, other: Job) -> bool:
        """Whether both can be made with one HTTP request: one sample each, and only the prompts differ."""
        a, b = self.request, other.request
        alike = (a.n, a.first_sample, a.prompt.template) == (1, b.first_sample, b.prompt.template) and b.n == 1
        plain = self._keep is None is other._keep and not wire.TOOLS & self._options.keys()
        return alike and plain and a.together and b.together and a.sampling == b.sampling and self._ids is other._ids

    async def make(self, samples: Sequence[int], until: float | None) -> list[Completion]:
        """Make some samples with one request and its retries; a server may give fewer.

        The request is a stream where there is a ``keep``, until ``keep`` has seen something of it: ``keep`` may hold on
        to what it saw of a text (a bound that only tightens), so a text that starts again is not shown but made by a
        plain request. So is one whose stream could not be read.

        Raises:
            BonError: none could be made.
        """
        keep = self._keep

        def show(partial: Partial) -> bool:
            nonlocal keep
            keep = None
            assert self._keep is not None
            return self._keep(partial)

        async def send(link: Link) -> list[Completion]:
            nonlocal keep
            try:
                return await self._send(link, samples, show if keep else None)
            except wire.BadAnswerError:
                keep = None
                raise

        return await self._model.endpoints.call(send, until)

    async def _send(self, link: Link, samples: Sequence[int], keep: Keep | None) -> list[Completion]:
        refused = link.endpoint.refused
        if self._ids is not None and "token ids" not in refused:
            try:
                return await self._ask(wire.PLAIN, link, samples, keep)
            except wire.StatusError as error:
                if error.status not in (400, 404, 422):
                    raise
                done = await self._ask(wire.CHAT, link, samples, keep)
                if error.status == 404 or "prompt" in error.message:
                    self._model.endpoints.learn(link.endpoint, "token ids", error.message)
                return done
        return await self._ask(wire.CHAT, link, samples, keep)

    async def _ask(self, path: str, link: Link, samples: Sequence[int], keep: Keep | None) -> list[Completion]:
        await self._model.name_at(link)  # so that the length of its context is known, where it says
        key = path, keep is not None
        body = self._bodies.get(key) or self._bodies.setdefault(key, self._body(*key))
        varying = self._varying(path, samples, link.endpoint.max_model_len)
        tokens = len(samples) * self.request.sampling.max_tokens
        if keep is None:
            fetch = partial(link.fetch, most=room(tokens))
            data, dropped = await self._model.ask(link, path, body, varying, fetch, self._optional)
            done = wire.read_answer(data, self._places(samples), self._as_tokens)
            if len(data["choices"]) < len(samples) and "n" not in dropped:
                link.endpoint.refused.add("n")
            return done
        growing, aborted = wire.Growing(), False
        response, _ = await self._model.ask(link, path, body, varying, link.open, self._optional)
        try:
            async with aclosing(events(response, room(tokens))) as stream:
                async for event in stream:
                    grew = growing.add(event)
                    if growing.events > PIECES_PER_TOKEN * tokens:
                        raise wire.BadAnswerError(f"sent more than the {tokens} tokens that it was asked for.")
                    if grew and not keep(Partial(self.index, samples[0], growing.text, growing.tokens)):
                        aborted = True
                        break
        finally:
            response.close()
        done = wire.read_answer(growing.answer(aborted=aborted), self._places(samples), self._as_tokens)
        return [replace(done[0], finish_reason="abort")] if aborted else done

    def _places(self, samples: Sequence[int]) -> list[wire.Place]:
        return [(self.index, sample) for sample in samples]

    def _varying(self, path: str, samples: Sequence[int], max_model_len: int | None) -> dict[str, int]:
        """The fields that differ between the requests for this prompt."""
        sampling, varying = self.request.sampling, dict[str, int]()
        if path == wire.PLAIN and self._ids is not None and max_model_len is not None:
            varying["max_tokens"] = min(sampling.max_tokens, max_model_len - len(self._ids))
        elif sampling.max_tokens < (max_model_len or NO_LIMIT):
            varying["max_tokens"] = sampling.max_tokens  # else: whatever room the context has
        if len(samples) > 1:
            varying["n"] = len(samples)
        if sampling.seed is not None and sampling.temperature != 0:
            varying["seed"] = wire.seed_of(sampling.seed, samples[0])
        return varying

    def _body(self, path: str, streamed: bool) -> wire.Body:
        prompt, fields = self.request.prompt, dict(self._options)
        if path == wire.CHAT:
            if prompt.template:
                fields["chat_template_kwargs"] = {**fields.get("chat_template_kwargs", {}), **prompt.template}
        else:
            fields |= {"prompt": self._ids, "return_token_ids": True}
        if self.request.sampling.logprobs:
            top = self.request.sampling.top_logprobs
            fields["logprobs"] = True if path == wire.CHAT else top
            if path == wire.CHAT and top:
                fields["top_logprobs"] = top
        turns = prompt.turns if path == wire.CHAT else ()
        return wire.Body(fields | (wire.STREAM if streamed else {}), f"prompt {self.index}", turns)


async def make_together(jobs: Sequence[Job], until: float | None) -> list[Completion]:
    """Make the only sample of each of several requests that differ in their prompts alone, where the server can.

    Nothing is returned where it cannot, or where it refuses one of the prompts: then each is asked for by itself.

    Raises:
        BonError: what concerns all of them.
    """
    first = jobs[0]
    fields = {**first._body(wire.CHAT, streamed=False).fields, "return_token_ids": True}
    body = wire.Body(fields, "a batch of prompts", batch=[job.request.prompt.turns for job in jobs])
    most = room(len(jobs) * first.request.sampling.max_tokens)

    async def send(link: Link) -> list[Completion]:
        if BATCH in (refused := link.endpoint.refused):
            return []
        await first._model.name_at(link)
        varying = first._varying(wire.CHAT, first.request.samples, link.endpoint.max_model_len)
        try:
            send_all = partial(link.fetch, most=most)
            data, _ = await first._model.ask(link, wire.CHAT_BATCH, body, varying, send_all, first._optional)
            if len(data.get("choices") or ()) == len(jobs):
                return wire.read_answer(data, [(job.index, job.request.first_sample) for job in jobs])
        except PromptTooLongError:
            return []
        except wire.StatusError as error:
            if error.status in (401, 429, 503):
                raise
            if error.status not in (404, 405, 501):
                return []
        except wire.BadAnswerError:
            pass
        refused.add(BATCH)
        return []

    return await first._model.endpoints.call(send, until)
