"""Any OpenAI-compatible server as an engine: vLLM, SGLang, llama.cpp's server, TGI, hosted APIs.

By default each sample is a request of its own, so that each candidate can be shown, scored, retried and aborted by
itself, and those that are there count when a deadline passes. ``n_per_request`` asks for more at once; a server that
ignores or refuses n is topped up with single requests, and that is remembered. What a request costs, client and server
together, is some 7 ms of CPU time: on two busy cores that both shared, N single requests to vLLM took as long as one
with n=N for answers of 200 tokens, and 1.4 to 2.7 times as long for answers of 15 tokens (N = 8 to 32, a model of 1.1M
parameters). So ask for more at once where answers are that short, or where a prompt is billed with each request.

Tokens are streamed only where ``keep`` wants to see them; a completion that it gives up is aborted by closing its
stream. With ``tokenizer`` prompts are rendered here and sent as token ids, so that prefixes match exactly, text never
becomes a control token, and ``loglikelihood`` works; else they go to the chat endpoint and the server renders them.

What it does not do: it does not count the tokens of a prompt beforehand without a tokenizer, so a prompt that is too
long is noticed when the server says so.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import openai

from bon.engines import wire
from bon.engines.base import Completion, Keep, Loglikelihood, Prompt
from bon.engines.http.endpoints import Endpoints, Link
from bon.engines.http.samples import Job, Samples, cancel
from bon.errors import InputError, ModelNotFoundError, PromptTooLongError
from bon.types import Sampling

if TYPE_CHECKING:
    from bon.engines.text.render import Renderer

T = TypeVar("T")

# How to ask for the log-probabilities of a prompt: OpenAI's old way, the same where an answer must have a token, and
# vLLM's own way.
RATINGS: Sequence[Mapping[str, Any]] = (
    {"echo": True, "max_tokens": 0, "logprobs": 0},
    {"echo": True, "max_tokens": 1, "logprobs": 0},
    {"prompt_logprobs": 0, "max_tokens": 1},
)


class OpenAIEngine:
    """A model behind one or several OpenAI-compatible addresses.

    Args:
        base_url: such as ``http://127.0.0.1:8000/v1``; several, as a list or separated by commas, are replicas of one
            model. ``#name`` at the end names the model.
        model: None asks the server, which must then have only one.
        api_key: None takes BON_UPSTREAM_API_KEY, or OPENAI_API_KEY for https and loopback addresses.
        tokenizer: folder or Hugging Face name of the model's tokenizer; prompts are then sent as token ids.
        extra_body: fields sent with every request, such as vLLM's ``{"repetition_penalty": 1.1}``;
            ``Sampling.extra`` may override them and name none but these and OpenAI's own.
        n_per_request: samples to ask for with one request; with ``keep`` always one.
        max_concurrency: requests under way at each address.
        timeout_s: seconds for one request.
        deadline_s: seconds for one call of ``generate`` or ``loglikelihood`` with all its retries; samples that are
            not there by then get finish_reason "error".
        retries: how often a request that failed for a passing reason (connection, 429, 5xx, timeout, an answer that
            cannot be read) is made again, with growing random pauses and never sooner than Retry-After says.
        cooldown_s: how long a failing replica is set aside at first.

    Raises:
        InputError: an address or option that cannot be.
        ModelNotFoundError: the tokenizer is neither on disk nor can be fetched.
    """

    overlaps = True

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        tokenizer: str | Path | None = None,
        extra_body: Mapping[str, Any] | None = None,
        n_per_request: int = 1,
        max_concurrency: int = 256,
        timeout_s: float = 600.0,
        deadline_s: float | None = None,
        retries: int = 3,
        cooldown_s: float = 5.0,
    ) -> None:
        urls = base_url.split(",") if isinstance(base_url, str) else [*base_url]
        for name, value, least in (("n_per_request", n_per_request, 1), ("max_concurrency", max_concurrency, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number >= {least}, got {value!r}.")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise InputError(f"retries must be a whole number >= 0, got {retries!r}.")
        for name, seconds in (("timeout_s", timeout_s), ("deadline_s", deadline_s), ("cooldown_s", cooldown_s)):
            if seconds is not None and not seconds > 0:
                raise InputError(f"{name} must be above 0 seconds, got {seconds!r}.")
        self.extra_body = dict(extra_body or {})
        wire.check_extra(self.extra_body, self.extra_body)
        self._optional = wire.OPTIONAL - self.extra_body.keys()
        self._model = model or next((name for url in urls if (name := urlsplit(str(url)).fragment)), None)
        self._n_per_request, self._deadline_s = n_per_request, deadline_s
        self._tokenizer = tokenizer
        self.endpoints = Endpoints(
            urls,
            api_key or _key_from_environment(urls),
            max_concurrency=max_concurrency,
            timeout_s=timeout_s,
            retries=retries,
            cooldown_s=cooldown_s,
        )

    @property
    def name(self) -> str:
        """The model's name, or where it is while that is not known."""
        first = self.endpoints.all[0]
        return self._model or first.model or first.url

    @property
    def max_model_len(self) -> int | None:
        """What the servers said; None before the first request, and for those that do not say."""
        return min((e.max_model_len for e in self.endpoints.all if e.max_model_len is not None), default=None)

    def __repr__(self) -> str:
        return f"OpenAIEngine({self.name!r} at {', '.join(e.url for e in self.endpoints.all)})"

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1, *, keep: Keep | None = None
    ) -> AsyncIterator[Completion]:
        """Sample n completions of each prompt; see ``Engine.generate``.

        One that cannot be made, after all retries, is yielded with finish_reason "error" and the others go on. Without
        a tokenizer a prompt that is too long is noticed late: when others have been yielded by then, it ends the same
        way.

        Raises:
            ModelNotFoundError: the server has no such model, or several and none was named.
            RefusedError: the server refuses the key or the request.
        """
        if n < 1:
            raise InputError(f"n must be at least 1, got {n}.")
        wire.check_extra(sampling.extra, self.extra_body)
        return self._generate(prompts, sampling, n, keep)

    async def _generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, n: int, keep: Keep | None
    ) -> AsyncIterator[Completion]:
        until = self._until()
        jobs = await self._jobs(prompts, sampling, until)
        done: asyncio.Queue[Completion | Exception] = asyncio.Queue()
        at_once = 1 if keep else self._n_per_request
        groups = [range(first, min(first + at_once, n)) for first in range(0, n, at_once)]
        making = [
            asyncio.create_task(Samples(self, job, sampling, keep, until, done).make(group))
            for job in jobs
            for group in groups
        ]
        try:
            for count in range(len(jobs) * n):
                completion = await done.get()
                if isinstance(completion, Exception):
                    raise completion
                if isinstance(completion.error, PromptTooLongError) and count == 0:
                    raise completion.error
                yield completion
        finally:
            await cancel(making)

    async def loglikelihood(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, end: bool = True
    ) -> list[Loglikelihood]:
        """Rate continuations; see ``Engine.loglikelihood``.

        Raises:
            InputError: the engine has no tokenizer, or the server does not give log-probabilities of a prompt.
        """
        if self._tokenizer is None:
            raise InputError(
                f"{self.name!r} over HTTP can rate a text only with its tokenizer at hand: "
                f"OpenAIEngine({self.endpoints.all[0].url!r}, tokenizer='<its name or folder>'). "
                "Or load the model itself (engine='torch'), or score with Flip, which only samples."
            )
        renderer, until = self.renderer, self._until()
        starts = [renderer.render(prompt) for prompt in prompts]
        last = (renderer.end_id,) if end and renderer.end_id is not None else ()
        ends = [(*renderer.encode(continuation), *last) for continuation in continuations]
        rows = [start + tail for start, tail in zip(starts, ends, strict=True)]
        await self._check_lengths(rows, until)
        rating = [asyncio.create_task(self.endpoints.call(partial(self._rate, row), until)) for row in rows]
        try:
            rated = await asyncio.gather(*rating)
        finally:
            await cancel(rating)
        return [
            Loglikelihood(math.fsum(values[len(start) :]), len(values) - len(start), len(start), cached)
            for start, (values, cached) in zip(starts, rated, strict=True)
        ]

    async def aclose(self) -> None:
        """Close the connections."""
        await self.endpoints.aclose()

    @cached_property
    def renderer(self) -> Renderer:
        """What turns prompts into token ids; there is one only with a tokenizer."""
        from transformers import AutoTokenizer

        from bon.engines.text.render import Renderer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self._tokenizer))
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"cannot load a tokenizer from {str(self._tokenizer)!r}: {error}") from error
        return Renderer(tokenizer)

    async def model_of(self, link: Link) -> str:
        """The name to send: the one that was given, else the only one that the server has.

        Raises:
            ModelNotFoundError: the server has none, or several.
        """
        endpoint = link.endpoint
        if self._model is not None and (self._tokenizer is None or endpoint.max_model_len is not None):
            return self._model
        async with link.asking_for_model:
            if endpoint.model is None:
                cards = await self._cards(link)
                names = [str(card.get("id")) for card in cards]
                name = self._model or (names[0] if len(names) == 1 else None)
                if name is None:
                    listed = ", ".join([*names[:8], *(["…"] if names[8:] else [])])
                    has = f"several models ({listed})" if names else "no model"
                    raise ModelNotFoundError(f"{endpoint.url} has {has}; name one: {endpoint.url}#name, or model=.")
                room = next((card.get("max_model_len") for card in cards if card.get("id") == name), None)
                endpoint.max_model_len = room if isinstance(room, int) else endpoint.max_model_len
                endpoint.model = name
        return endpoint.model

    async def _cards(self, link: Link) -> list[Mapping[str, Any]]:
        try:
            data = (await link.get("/models")).get("data")
        except (openai.NotFoundError, openai.PermissionDeniedError):
            if self._model is not None:
                return []
            raise
        return [card for card in data if isinstance(card, Mapping)] if isinstance(data, list) else []

    async def _jobs(self, prompts: Sequence[Prompt], sampling: Sampling, until: float | None) -> list[Job]:
        about_tools = wire.TOOLS & (sampling.extra.keys() | self.extra_body.keys()) or any(
            turn.about_tools for prompt in prompts for turn in prompt.turns
        )
        if self._tokenizer is None or about_tools:  # the server's chat endpoint knows how its model sees tools
            return [Job(i, _chat(prompt)) for i, prompt in enumerate(prompts)]
        rows = [self.renderer.render(prompt) for prompt in prompts]
        await self._check_lengths(rows, until)
        return [Job(i, _chat(prompt), ids) for i, (prompt, ids) in enumerate(zip(prompts, rows, strict=True))]

    async def _check_lengths(self, rows: Sequence[Sequence[int]], until: float | None) -> None:
        """Refuse rows of tokens that leave no room in the context."""
        await self.endpoints.call(self.model_of, until)
        limit = self.max_model_len
        too_long = [i for i, row in enumerate(rows) if limit is not None and len(row) >= limit]
        if too_long and limit is not None:
            raise PromptTooLongError(len(rows[too_long[0]]), limit - 1, f"prompt {too_long[0]}", too_long)

    def _until(self) -> float | None:
        return None if self._deadline_s is None else asyncio.get_running_loop().time() + self._deadline_s

    async def ask(
        self,
        link: Link,
        path: str,
        body: Mapping[str, Any],
        send: Callable[[str, Mapping[str, Any]], Awaitable[T]],
        optional: Collection[str] | None = None,
    ) -> T:
        """Send a body without what the server is known to refuse, and learn what else it refuses.

        Args:
            link: where to.
            path, body: what to send; the model's name is added.
            send: how.
            optional: fields that may be left out; None for all that bon can do without.

        Raises:
            openai.APIError: what remains.
            PromptTooLongError: the server says so.
        """
        optional = self._optional if optional is None else optional
        refused, guessed = link.endpoint.refused, set[str]()
        body = {**body, "model": await self.model_of(link)}
        while True:
            fit = wire.fitted(body, (refused | guessed) & {*optional})
            try:
                answer = await send(path, fit)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if sizes := wire.overflow(error):
                    body = self._shortened(link, body, *sizes)
                    continue
                fields, said = wire.refusal(error, fit, optional)
                if not fields:
                    raise
                (refused if said else guessed).update(fields)
            else:
                refused |= guessed
                return answer

    def _shortened(self, link: Link, body: Mapping[str, Any], tokens: int, limit: int) -> Mapping[str, Any]:
        """The body with max_tokens that fit beside a prompt of so many tokens."""
        link.endpoint.max_model_len = link.endpoint.max_model_len or limit
        room = limit - tokens
        if room < 1 or body.get("max_tokens", 0) <= room:
            raise PromptTooLongError(tokens, limit - 1)
        return {**body, "max_tokens": room}

    async def _rate(self, row: tuple[int, ...], link: Link) -> tuple[list[float], int]:
        """Log-probabilities of a row of tokens (0.0 for the first, which has none), and how many were cached."""
        for attempt, way in enumerate(RATINGS):
            if f"rating {attempt}" in link.endpoint.refused:
                continue
            body = {**self.extra_body, "prompt": list(row), "temperature": 0.0, **way}
            try:
                data = await self.ask(link, wire.PLAIN, body, link.post, optional=())
            except (openai.BadRequestError, openai.UnprocessableEntityError, openai.NotFoundError):
                data = {}
            values = wire.prompt_logprobs(data, len(row))
            if values is not None:
                return [value or 0.0 for value in values], wire.read_usage(data.get("usage")).cached
            link.endpoint.refused.add(f"rating {attempt}")
        raise InputError(
            f"{link.endpoint.url} gives no log-probabilities of a prompt (neither echo nor prompt_logprobs). "
            "Load the model itself (engine='torch' or 'vllm'), or score with Flip, which only samples."
        )


def _chat(prompt: Prompt) -> Mapping[str, Any]:
    messages = [turn.to_dict() for turn in prompt.turns]
    return {"messages": messages, **({"chat_template_kwargs": dict(prompt.template)} if prompt.template else {})}


def _key_from_environment(urls: Sequence[object]) -> str | None:
    if key := os.environ.get("BON_UPSTREAM_API_KEY"):
        return key
    # OpenAI's key goes to no address where it would travel in the clear.
    parts = [urlsplit(str(url)) for url in urls]
    safe = all(p.scheme == "https" or p.hostname in ("127.0.0.1", "localhost", "::1") for p in parts)
    return os.environ.get("OPENAI_API_KEY") if safe else None
