"""Any OpenAI-compatible server as an engine: vLLM, SGLang, llama.cpp's server, TGI, hosted APIs.

Each sample is a request of its own where somebody looks at single ones, so that each candidate can be shown, scored,
retried and aborted by itself, and those that are there count when a deadline passes. Where whoever asks waits for all
of them (``Request.together``), one request brings all samples of a prompt, or, from a server that takes several
prompts (vLLM), one sample of each: most of what a short answer costs a server is its request. What a server leaves
out or refuses is asked for one by one. ``n_per_request`` sets how many samples one request asks for.

Tokens are streamed only where ``keep`` reads them; a completion that it gives up is aborted by closing the connection
(what it cost by then is known only of a stream). With ``tokenizer`` prompts are rendered here and sent as token ids, so
that prefixes match exactly, text never becomes a control token, and ``loglikelihood`` works; else they go to the chat
endpoint and the server renders them.

What the caller did not say is not sent, so that a server's own defaults apply. A field or a role that a server names as
refused is left out there from then on, with a line in the log; options of the user's own are not, but for temperature.

What it does not do: it does not count the tokens of a prompt beforehand without a tokenizer, so a prompt that is too
long is noticed when the server says so.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bon.engines.base import (
    Classification,
    Completion,
    Embedding,
    Keep,
    Loglikelihood,
    Prompt,
    Request,
    Wanted,
    check_pairs,
    too_long,
)
from bon.engines.http import wire
from bon.engines.http.classify import ask_head
from bon.engines.http.embed import MOST_TEXTS, ask_embeddings
from bon.engines.http.endpoints import Endpoints
from bon.engines.http.link import Endpoint, Link, room
from bon.engines.http.model import NOTHING, Model
from bon.engines.http.samples import BATCH, MOST_TOGETHER, Job, make_together
from bon.errors import BonError, InputError, ModelNotFoundError, PromptTooLongError, UnknownNameError, whole_number

if TYPE_CHECKING:
    from bon.engines.text.render import Renderer

# How to ask for the log-probabilities of a prompt: OpenAI's old way, the same where an answer must have a token, and
# vLLM's own way.
RATINGS: Sequence[Mapping[str, Any]] = (
    {"echo": True, "max_tokens": 0, "logprobs": 0},
    {"echo": True, "max_tokens": 1, "logprobs": 0},
    {"prompt_logprobs": 0, "max_tokens": 1},
)

T = TypeVar("T")
log = logging.getLogger("bon")

ASK_AGAIN_S = 0.02
"""How often requests that are not streamed are looked at: are they still wanted?"""


class HTTPEngine:
    """A model behind one or several OpenAI-compatible addresses.

    Args:
        base_url: such as ``http://127.0.0.1:8000/v1``; several, as a list or separated by commas, are replicas of one
            model. ``#name`` at the end names the model.
        model: None asks the server, which must then have only one.
        api_key: None takes BON_UPSTREAM_API_KEY, or OPENAI_API_KEY for https and loopback addresses.
        api_key_env: name of an environment variable that holds the key.
        tokenizer: folder or Hugging Face name of the model's tokenizer; prompts are then sent as token ids.
        extra_body: fields sent with every request, such as vLLM's ``{"repetition_penalty": 1.1}``;
            ``Sampling.extra`` may override them and name none but these and OpenAI's own.
        n_per_request: samples to ask for with one request, with ``keep`` always one; None takes all where the caller
            waits for all, else one.
        max_concurrency: requests under way at each address.
        timeout_s: seconds for one request.
        deadline_s: seconds for one call of ``generate`` or ``loglikelihood`` with all its retries; samples that are
            not there by then get finish_reason "error".
        retries: how often a request that failed for a passing reason (connection, 429, 5xx, timeout, an answer that
            cannot be read) is made again, with growing random pauses and never sooner than Retry-After says.
        cooldown_s: how long a failing replica is set aside at first.

    Raises:
        InputError: an address or option that cannot be.
        UnknownNameError: an option that does not exist.
    """

    concurrent = True
    labels = ()
    stepwise: bool | None = None

    def __init__(
        self,
        base_url: str | Sequence[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        api_key_env: str | None = None,
        tokenizer: str | Path | None = None,
        extra_body: Mapping[str, Any] | None = None,
        n_per_request: int | None = None,
        max_concurrency: int = 256,
        timeout_s: float = 600.0,
        deadline_s: float | None = None,
        retries: int = 3,
        cooldown_s: float = 5.0,
        **unknown: Any,
    ) -> None:
        for option in unknown:
            known = [p.name for p in inspect.signature(HTTPEngine).parameters.values() if p.kind is p.KEYWORD_ONLY]
            raise UnknownNameError("option of the HTTP engine", option, known)
        if not isinstance(extra_body, Mapping | None):
            raise InputError(f"extra_body must be an object such as {{'repetition_penalty': 1.1}}, got {extra_body!r}.")
        extra_body = dict(extra_body or {})
        wire.check_extra(extra_body, extra_body)
        self._tokenizer = tokenizer
        self._n_per_request = None if n_per_request is None else whole_number("n_per_request", n_per_request, 1)
        self._deadline_s = None if deadline_s is None else _seconds("deadline_s", deadline_s)
        urls = base_url if isinstance(base_url, list | tuple) else str(base_url).split(",")
        endpoints = [Endpoint(str(url)) for url in urls]
        if not endpoints:
            raise InputError("give at least one base URL, such as http://127.0.0.1:8000/v1.")
        self.endpoints = Endpoints(
            endpoints,
            _key(api_key, api_key_env, endpoints),
            whole_number("max_concurrency", max_concurrency, 1),
            _seconds("timeout_s", timeout_s),
            whole_number("retries", retries, 0),
            _seconds("cooldown_s", cooldown_s),
        )
        named = next((endpoint.named for endpoint in endpoints if endpoint.named), None)
        named = named if model is None else str(model)
        self._said = "temperature" in extra_body
        self._model = Model(self.endpoints, named, extra_body, measured=tokenizer is not None)

    @property
    def name(self) -> str:
        """The model's name, or where it is while that is not known."""
        asked = next((endpoint.model for endpoint in self.endpoints.all if endpoint.model), None)
        return self._model.name or asked or self.endpoints.all[0].url

    @property
    def max_model_len(self) -> int | None:
        """What the servers said; None before the first request, and for those that do not say."""
        return self._model.max_model_len

    @property
    def rates(self) -> bool:
        """Whether ``loglikelihood`` may work: it needs the model's tokenizer."""
        return self._tokenizer is not None

    def __repr__(self) -> str:
        return f"HTTPEngine({self.name!r} at {', '.join(e.url for e in self.endpoints.all)})"

    def generate(self, requests: Sequence[Request], *, keep: Keep | None = None) -> AsyncGenerator[Completion, None]:
        """Sample the completions of each request; see ``Generates.generate``.

        What goes wrong with one prompt or one sample, after all retries, is a completion with finish_reason "error",
        and the others go on. Without a tokenizer a prompt that is too long is noticed when the server says so.

        Raises:
            ModelNotFoundError: the server has no such model, or several and none was named.
            RefusedError: the server refuses the key, or whatever it is asked.
        """
        for request in requests:
            wire.check_extra(request.sampling.extra, self._model.extra_body)
            if request.sampling.temperature is None and not self._said:
                log.info("no temperature was given: %s applies its own default", self.endpoints)
                self._said = True
        return self._generate(requests, keep)

    async def _generate(self, requests: Sequence[Request], keep: Keep | None) -> AsyncGenerator[Completion, None]:
        until = self._until()
        rows, errors = await self._rendered(requests, until)
        wanted, read = (keep.check, None) if isinstance(keep, Wanted) else (None, keep)
        # No TaskGroup, because a generator must not yield inside one (PEP 789). The loop itself puts every task here
        # the moment it ends, however it ends, and ``result`` raises what it raised.
        ended: asyncio.Queue[asyncio.Task[list[Completion]]] = asyncio.Queue()
        asked: dict[asyncio.Task[list[Completion]], tuple[list[Job], Sequence[int]]] = {}

        def start(jobs: list[Job], samples: Sequence[int]) -> None:
            task = asyncio.create_task(self._make(jobs, samples, until))
            task.add_done_callback(ended.put_nowait)
            asked[task] = jobs, samples

        try:
            jobs: dict[int, Job] = {}
            for index in {*range(len(requests))} - errors.keys():
                as_tokens = None if rows[index] is None else self.renderer.as_tokens
                jobs[index] = Job(
                    self._model, index, requests[index], self._n_per_request, read, rows[index], as_tokens
                )
            for batch in self._batches([*jobs.values()]):
                for part in batch[0].groups():
                    start(batch, part)
            for index, error in errors.items():
                for sample in requests[index].samples:
                    yield Completion.failed(index, sample, error)
            while asked:
                task = await _wait(ended, None if wanted is None else ASK_AGAIN_S)
                for running, (batch, _) in asked.items():
                    unwanted = wanted is not None and not any(wanted(job.index) for job in batch)
                    if unwanted and not running.cancelling():
                        running.cancel()
                if task is None:
                    continue
                batch, samples = asked.pop(task)
                places = {(job.index, sample) for job in batch for sample in samples}
                aborted = [Completion(*place, "", "abort") for place in places] if task.cancelled() else None
                done = task.result() if aborted is None else aborted
                for index, left_out in sorted(places - {(one.request_index, one.sample_index) for one in done}):
                    start([jobs[index]], [left_out])
                for completion in done:
                    yield completion
        finally:
            await _cancel(asked)

    def _batches(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """The jobs of each HTTP request: one, or several where all servers are thought to take several prompts."""
        if self._n_per_request or all(BATCH in endpoint.refused for endpoint in self.endpoints.all):
            return [[job] for job in jobs]
        batches: list[list[Job]] = []
        most = self.endpoints.share(len(jobs), MOST_TOGETHER)
        for job in jobs:
            fitting = next((batch for batch in batches if len(batch) < most and batch[0].joins(job)), None)
            batches.append([job]) if fitting is None else fitting.append(job)
        return batches

    async def _make(self, jobs: Sequence[Job], samples: Sequence[int], until: float | None) -> list[Completion]:
        try:
            return await (make_together(jobs, until) if len(jobs) > 1 else jobs[0].make(samples, until))
        except BonError as error:
            if not _concerns_one(error):
                raise
            return [Completion.failed(job.index, sample, error) for job in jobs for sample in samples]

    async def loglikelihood(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, end: bool = True
    ) -> list[Loglikelihood]:
        """Rate continuations; see ``Rates.loglikelihood``. One that fails after all retries has an ``error`` as well.

        Raises:
            InputError: the engine has no tokenizer, or the server does not give log-probabilities of a prompt.
        """
        check_pairs(prompts, continuations)
        if self._tokenizer is None:
            raise InputError(
                f"{self.name!r} over HTTP can rate a text only with its tokenizer at hand: "
                f"HTTPEngine({self.endpoints.all[0].url!r}, tokenizer='<its name or folder>'). "
                "Or load the model itself (NAME,engine=torch), or score with Flip, which only samples."
            )
        renderer, until = self.renderer, self._until()
        starts = [renderer.render(prompt) for prompt in prompts]
        last = (renderer.end_id,) if end and renderer.end_id is not None else ()
        rows = [(*s, *renderer.encode(text), *last) for s, text in zip(starts, continuations, strict=True)]
        errors = await self._too_long([len(row) for row in rows], "prompt with continuation", until)

        async def rate(index: int) -> Loglikelihood:
            try:
                if index in errors:
                    raise errors[index]
                values, cached = await self.endpoints.call(partial(self._rate, rows[index]), until)
            except BonError as error:
                if not _concerns_one(error):
                    raise
                return Loglikelihood.failed(error)
            start = len(starts[index])
            return Loglikelihood(math.fsum(values[start:]), len(values) - start, start, cached)

        rating = [asyncio.create_task(rate(index)) for index in range(len(rows))]
        try:
            return await asyncio.gather(*rating)
        finally:
            await _cancel(rating)

    async def check(self) -> None:
        """Ask whether a server is there and takes the key, and what it calls its model.

        Raises:
            BonError: what is wrong.
        """
        await self.endpoints.call(partial(self._model.name_at, ask=True))

    async def classify(self, conversations: Sequence[Prompt]) -> list[Classification]:
        """Classify conversations; see ``Classifies.classify``. One that fails after all retries has an ``error``.

        With a tokenizer that has a chat template they are sent as token ids.

        Raises:
            InputError: the server answers none of ``/classify``, ``/pooling`` and ``/score``.
        """
        until = self._until()

        async def classify(conversation: Prompt) -> Classification:
            try:
                rendered = self._tokenizer is not None and self.renderer.tokenizer.chat_template
                row = self.renderer.render(conversation, generation=False) if rendered else None
            except InputError as error:
                return Classification.failed(error)
            try:
                found, self.stepwise = await self.endpoints.call(
                    partial(ask_head, self._model, conversation, row), until
                )
            except BonError as error:
                if not _concerns_one(error):
                    raise
                return Classification.failed(error)
            return found

        asked = [asyncio.create_task(classify(conversation)) for conversation in conversations]
        try:
            return await asyncio.gather(*asked)
        finally:
            await _cancel(asked)

    async def embed(self, texts: Sequence[str]) -> list[Embedding]:
        """Embed texts; see ``Embeds.embed``. One that fails after all retries has an ``error``.

        Raises:
            InputError: the server has no embedding model.
        """
        until, most = self._until(), self.endpoints.share(len(texts), MOST_TEXTS)

        async def embed(some: Sequence[str]) -> list[Embedding]:
            try:
                return await self.endpoints.call(partial(ask_embeddings, self._model, some), until)
            except BonError as error:
                if not _concerns_one(error):
                    raise
                if len(some) == 1 or error.retryable:
                    return [Embedding.failed(error) for _ in some]
            return [one for text in some for one in await embed([text])]

        asked = [asyncio.create_task(embed(texts[at : at + most])) for at in range(0, len(texts), most or 1)]
        try:
            return [one for some in await asyncio.gather(*asked) for one in some]
        finally:
            await _cancel(asked)

    async def aclose(self) -> None:
        """Close the connections."""
        await self.endpoints.aclose()

    @cached_property
    def renderer(self) -> Renderer:
        """What turns prompts into token ids; there is one only with a tokenizer.

        Raises:
            ModelNotFoundError: the tokenizer is neither on disk nor can be fetched.
        """
        from transformers import AutoTokenizer

        from bon.engines.text.render import Renderer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self._tokenizer))
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(f"cannot load a tokenizer from {str(self._tokenizer)!r}: {error}") from error
        return Renderer(tokenizer)

    async def _rendered(
        self, requests: Sequence[Request], until: float | None
    ) -> tuple[list[tuple[int, ...] | None], dict[int, BonError]]:
        """The token ids of each prompt, None where its messages are sent, and what is wrong with some of them."""
        rows: list[tuple[int, ...] | None] = [None] * len(requests)
        errors: dict[int, BonError] = {}
        renderer = None if self._tokenizer is None else self.renderer
        for index, request in enumerate(requests):
            options = request.sampling.extra.keys() | self._model.extra_body.keys()
            tools = wire.TOOLS & options or any(turn.about_tools for turn in request.prompt.turns)
            try:
                if renderer is None or tools:  # only the chat endpoint knows how its model sees tools
                    request.prompt.refuse_prefill(f"the server of {self.name!r}")
                else:
                    rows[index] = renderer.render(request.prompt)
            except InputError as error:
                errors[index] = error
        if renderer is None:
            return rows, errors
        return rows, await self._too_long([len(row or ()) for row in rows], "prompt", until) | errors

    async def _too_long(self, lengths: Sequence[int], what: str, until: float | None) -> dict[int, BonError]:
        await self.endpoints.call(self._model.name_at, until)
        limit = self.max_model_len
        return dict[int, BonError](too_long(lengths, None if limit is None else limit - 1, what))

    def _until(self) -> float | None:
        return None if self._deadline_s is None else asyncio.get_running_loop().time() + self._deadline_s

    async def _rate(self, row: tuple[int, ...], link: Link) -> tuple[list[float], int]:
        """Log-probabilities of a row of tokens (0.0 for the first, which has none), and how many were cached."""
        refused, refusal = link.endpoint.refused, None
        for attempt, way in enumerate(RATINGS):
            if f"rating {attempt}" in refused:
                continue
            body = wire.Body({**self._model.extra_body, "prompt": row, "temperature": 0.0, **way})
            send = partial(link.fetch, most=room(len(row)))
            try:
                data, _ = await self._model.ask(link, wire.PLAIN, body, {}, send, NOTHING)
            except wire.StatusError as error:
                if error.status not in (400, 404, 422):
                    raise
                if error.status != 404 and not any(name in error.message for name in way):
                    refusal = error  # which may be about this row alone
                    continue
                data = {}
            values = wire.prompt_logprobs(data, len(row))
            if values is not None:
                return values, wire.read_usage(data.get("usage"))[2]
            refused.add(f"rating {attempt}")
        if refusal is not None:
            raise refusal
        raise InputError(
            f"{link.endpoint.url} gives no log-probabilities of a prompt (neither echo nor prompt_logprobs). "
            "Load the model itself (NAME,engine=torch or engine=vllm), or score with Flip, which only samples."
        )


def _concerns_one(error: BonError) -> bool:
    """Whether an error says something about one sample or prompt, and nothing about the others."""
    return error.retryable or isinstance(error, PromptTooLongError | wire.RequestRefusedError | wire.UnwritableError)


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{name} must be above 0 seconds, got {value!r}.")
    return value


def _key(api_key: str | None, variable: str | None, endpoints: Sequence[Endpoint]) -> str | None:
    """The API key: the one given, the one that a variable holds, or one of those that the environment usually has."""
    key = api_key
    if variable is not None:
        if api_key is not None:
            raise InputError("give api_key or api_key_env, not both.")
        if not (key := os.environ.get(str(variable))):
            raise InputError(f"api_key_env={variable!r}: there is no such environment variable, or it is empty.")
    # OpenAI's key goes to no address where it would travel in the clear.
    safe = all(e.base.scheme == "https" or e.base.host in ("127.0.0.1", "localhost", "::1") for e in endpoints)
    key = key or os.environ.get("BON_UPSTREAM_API_KEY") or (os.environ.get("OPENAI_API_KEY") if safe else None)
    if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable()):
        raise InputError("the API key is no printable ASCII text (does it end in a line break?).")
    return key


async def _wait(queue: asyncio.Queue[T], seconds: float | None) -> T | None:
    """The next item, or None when there is none within some seconds."""
    try:
        async with asyncio.timeout(seconds):
            return await queue.get()
    except TimeoutError:
        return None


async def _cancel(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
