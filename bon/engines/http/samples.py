"""The samples of one prompt over HTTP: request bodies, streams that may be given up, and what a server left out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai

from bon.engines import wire
from bon.engines.base import Completion, Keep, Partial
from bon.engines.http.endpoints import Link
from bon.errors import BonError, PromptTooLongError, RefusedError
from bon.types import Sampling

if TYPE_CHECKING:
    from bon.engines.http.engine import OpenAIEngine


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt of a call: ``content`` is its field of the request body, ``ids`` its tokens where they are known."""

    index: int
    content: Mapping[str, Any]
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of one prompt in one call of ``generate``."""

    engine: OpenAIEngine
    job: Job
    sampling: Sampling
    keep: Keep | None
    until: float | None
    done: asyncio.Queue[Completion | Exception]

    async def make(self, samples: Sequence[int]) -> None:
        """Make some samples with one request, and with single ones those that the server left out."""
        try:
            answer = await self.engine.endpoints.call(_Request(self, samples), self.until)
        except PromptTooLongError as error:
            where = f"prompt {self.job.index}, as far as the server counted,"
            self._fail(samples, PromptTooLongError(error.tokens, error.limit, where, [self.job.index]))
            return
        except BonError as error:
            if error.retryable:
                self._fail(samples, error)
            else:
                self.done.put_nowait(error)
            return
        except Exception as error:
            self.done.put_nowait(error)
            return
        for sample, choice in zip(samples, answer.choices, strict=False):
            self.done.put_nowait(self._completion(sample, choice, answer))
        if left_out := samples[len(answer.choices) :]:
            await asyncio.gather(*(self.make([sample]) for sample in left_out))

    def _fail(self, samples: Sequence[int], error: BonError) -> None:
        for sample in samples:
            self.done.put_nowait(Completion(self.job.index, sample, "", "error", error=error))

    def _completion(self, sample: int, choice: wire.Choice, answer: wire.Answer) -> Completion:
        ids = choice.token_ids
        renderer = self.engine.renderer if self.job.ids is not None else None
        error = RefusedError("the server's content filter withheld this completion.") if choice.filtered else None
        return Completion(
            self.job.index,
            sample,
            "" if error else choice.text,
            "error" if error else choice.finish_reason,
            tokens=renderer.as_tokens(ids, choice.text) if renderer and ids is not None and not error else None,
            cumulative_logprob=None if choice.logprobs is None else math.fsum(choice.logprobs),
            logprobs=choice.logprobs,
            pieces=choice.pieces,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=choice.completion_tokens,
            cached_tokens=answer.cached_tokens,
            error=error,
            tool_calls=choice.tool_calls,
        )

    async def request(self, samples: Sequence[int], link: Link, keep: Keep | None) -> wire.Answer:
        """Ask one server for some samples, with a stream where there is a ``keep``; it may give fewer."""
        refused = link.endpoint.refused
        if self.job.ids is not None and "token ids" not in refused:
            try:
                return await self._send(wire.PLAIN, samples, link, keep)
            except (openai.BadRequestError, openai.UnprocessableEntityError, openai.NotFoundError):
                answer = await self._send(wire.CHAT, samples, link, keep)
                refused.add("token ids")
                return answer
        return await self._send(wire.CHAT, samples, link, keep)

    async def _send(self, path: str, samples: Sequence[int], link: Link, keep: Keep | None) -> wire.Answer:
        await self.engine.model_of(link)  # so that the length of its context is known, where it says
        body = self._body(path, samples, link.endpoint.max_model_len)
        if keep is not None:
            return await self._stream(path, body, samples[0], link, keep)
        answer = wire.read_answer(await self.engine.ask(link, path, body, link.post))
        if len(answer.choices) < len(samples):
            link.endpoint.refused.add("n")
        return answer

    async def _stream(self, path: str, body: Mapping[str, Any], sample: int, link: Link, keep: Keep) -> wire.Answer:
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {**body, "stream": True, "stream_options": options}
        growing = wire.Growing()
        async with await self.engine.ask(link, path, body, link.stream) as events:
            async for event in events:
                if growing.add(event) and not keep(Partial(self.job.index, sample, growing.text, growing.tokens)):
                    return growing.answer(pruned=True)
        return growing.answer()

    def _body(self, path: str, samples: Sequence[int], max_model_len: int | None) -> dict[str, Any]:
        engine = self.engine
        body = {
            **engine.extra_body,
            **wire.sampling_fields(self.sampling, samples[0], max_model_len),
            **self.sampling.extra,
        }
        if len(samples) > 1:
            body["n"] = len(samples)
        if path == wire.CHAT:
            template = {**body.get("chat_template_kwargs", {}), **self.job.content.get("chat_template_kwargs", {})}
            body |= self.job.content
            if template:
                body["chat_template_kwargs"] = template
            if self.sampling.logprobs:
                body["logprobs"] = True
        else:
            ids = self.job.ids or ()
            body |= {"prompt": list(ids), "return_token_ids": True}
            if max_model_len is not None:
                body["max_tokens"] = min(self.sampling.max_tokens, max_model_len - len(ids))
            if self.sampling.logprobs:
                body["logprobs"] = 0
        return body


class _Request:
    """One request with its retries: a stream where ``keep`` is given, until ``keep`` has seen something of it.

    ``keep`` may hold on to what it saw of a text (a bound that only tightens), so a text that starts anew is not shown
    but made by a plain request. So is one whose stream could not be read.
    """

    def __init__(self, call: Samples, samples: Sequence[int]) -> None:
        self._call, self._samples = call, samples
        options = call.sampling.extra.keys() | call.engine.extra_body.keys()
        self._keep = None if wire.TOOLS & options else call.keep

    async def __call__(self, link: Link) -> wire.Answer:
        try:
            return await self._call.request(self._samples, link, self._show if self._keep else None)
        except wire.BadAnswerError:
            self._keep = None
            raise

    def _show(self, partial: Partial) -> bool:
        self._keep = None
        assert self._call.keep is not None
        return self._call.keep(partial)


async def cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
