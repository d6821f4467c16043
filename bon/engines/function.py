"""A plain function as an engine: wrap any generator, sync or async.

The function is called as ``f(prompt)`` and returns one text, or as ``f(prompt, n)`` where it takes ``n`` (by that name,
or as its second positional parameter) and returns a list of n texts. ``prompt`` is the text when the conversation is a
single user message, else the list of role-and-content dicts. A function that is not async runs in a thread of its own,
one call at a time.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from bon.engines.base import Completion, Keep, Request
from bon.errors import BonError, InputError
from bon.usercode import UserFunction


class FunctionEngine:
    """An engine around a function; it can be sampled and cannot rate.

    How a function samples is its own business: temperature, seed and the like do not reach it, and it counts no tokens.

    Args:
        function: see the module's docstring.
        name: shown in tables and errors; the function's own name by default.
    """

    max_model_len: int | None = None
    concurrent = True

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self._call = UserFunction(function, "function", name)
        self.name = self._call.name
        self._takes_n = _takes_n(function)

    def generate(self, requests: Sequence[Request], *, keep: Keep | None = None) -> AsyncGenerator[Completion, None]:
        """Call the function for each sample, or for each request; see ``Generates.generate``.

        A call that fails is a completion with finish_reason "error" for each sample that it was to make. ``keep`` has
        nothing to stop.
        """
        if unknown := {option for request in requests for option in request.sampling.extra}:
            options = ", ".join(sorted(unknown))
            raise InputError(f"{self.name!r} is a function and takes no sampling options: {options}.")
        for request in requests:
            request.prompt.refuse_prefill(f"the function {self.name!r}")
        return self._generate(requests)

    async def _generate(self, requests: Sequence[Request]) -> AsyncGenerator[Completion, None]:
        calls = [
            asyncio.ensure_future(self._completions(index, request, samples))
            for index, request in enumerate(requests)
            for samples in ([request.samples] if self._takes_n else [range(s, s + 1) for s in request.samples])
        ]
        try:
            for call in asyncio.as_completed(calls):
                for completion in await call:
                    yield completion
        finally:
            for pending in calls:
                pending.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def _completions(self, index: int, request: Request, samples: range) -> list[Completion]:
        messages = [turn.to_dict() for turn in request.prompt.turns]
        try:
            texts = await self._call(messages, len(samples)) if self._takes_n else [await self._call(messages)]
            self._check(texts, samples, messages[-1]["content"])
        except BonError as error:
            return [Completion.failed(index, sample, error) for sample in samples]
        return [Completion(index, s, text, "stop") for s, text in zip(samples, texts, strict=True)]

    def _check(self, texts: Any, samples: range, prompt: Any) -> None:
        wanted = f"a list of {len(samples)} texts" if self._takes_n else "one text"
        wrong = None
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            wrong = f"{texts!r:.80}"
        elif len(texts) != len(samples):
            wrong = f"{len(texts)}"
        else:
            pairs = zip(samples, texts, strict=True)
            wrong = next((f"{text!r:.80} as sample {s}" for s, text in pairs if not isinstance(text, str)), None)
        if wrong is not None:
            raise self._call.error(f"must return {wanted}, but returned {wrong} (prompt: {prompt!r:.60}).")

    async def aclose(self) -> None:
        """Let the function's thread go."""
        self._call.close()


def _takes_n(function: Callable[..., Any]) -> bool:
    """Whether the function wants to know how many texts to return."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1 and (positional[1].name == "n" or positional[1].default is inspect.Parameter.empty)
