"""One sample on its way through vLLM: from a request to a completion, with stop strings, ``keep`` and drafts."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from bon.engines.base import Completion, Keep, Partial
from bon.engines.text.render import Renderer, TextStream
from bon.errors import EngineError
from bon.types import FinishReason

KEEP_EVERY = 4
"""Tokens between two calls of ``keep`` for one completion."""


class Host(Protocol):
    """The engine that a request is for."""

    name: str
    renderer: Renderer

    def stream(self, ids: Sequence[int], params: Any) -> AsyncIterator[Any]:
        """Outputs of one request to vLLM."""

    async def prefill(self, context: Sequence[int], target: Sequence[int]) -> Any:
        """vLLM's output for context and target, with log-probabilities of the target's tokens, and one more token."""


@dataclass
class Request:
    """One sample.

    Args:
        engine: where it runs.
        prompt_index, sample_index: which one it is.
        prompt: token ids.
        params: vLLM's sampling parameters.
        stop: stop strings.
        keep: see ``Engine.generate``.
        draft: tokens to be read along with the prompt; for greedy samples without stop strings.
    """

    engine: Host
    prompt_index: int
    sample_index: int
    prompt: tuple[int, ...]
    params: Any
    stop: tuple[str, ...]
    keep: Keep | None
    draft: tuple[int, ...] = ()
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cached: int | None = None
    drafted: int = 0

    def __post_init__(self) -> None:
        self._text = TextStream(self.engine.renderer)
        self._rated = self.params.logprobs is not None
        self._ends = {*self.engine.renderer.end_ids, *self.params.stop_token_ids}

    async def run(self) -> Completion:
        """Sample to the end, or to where a stop string or ``keep`` ends it."""
        if self.draft and (completion := await self._read()):
            return completion
        params = self.params
        if self.ids:
            params = params.clone()
            params.max_tokens -= len(self.ids)
        async with aclosing(self.engine.stream((*self.prompt, *self.ids), params)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                if completion := self._take(output):
                    return completion
        raise EngineError(f"{self.engine.name!r} ended a request without a result.")

    async def _read(self) -> Completion | None:
        """Read the draft along with the prompt and keep the tokens that are the model's first choice."""
        output = await self.engine.prefill(self.prompt, self.draft)
        self.cached = output.num_cached_tokens
        for token, (logprob, rank) in zip(self.draft, last(output.prompt_logprobs, len(self.draft)), strict=True):
            if rank != 1:
                break
            self._add(token, logprob)
            self.drafted += 1
        else:
            [sample] = output.outputs
            self._add(sample.token_ids[0], chosen(sample.logprobs)[0])
            if self.ids[-1] in self._ends:
                return self._finish("stop")
            if len(self.ids) == self.params.max_tokens:
                return self._finish("length")
        if self.keep is not None and self.ids:
            text = self._text.push(self.ids)
            if not self.keep(Partial(self.prompt_index, self.sample_index, text, len(self.ids))):
                return self._finish("pruned", text)
        return None

    def _add(self, token: int, logprob: float) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)

    def _take(self, output: Any) -> Completion | None:
        """Read what vLLM has sampled since the last time, token by token; however it comes, the outcome is the same."""
        [sample] = output.outputs
        if self.cached is None:
            self.cached = output.num_cached_tokens
        reason: str | None = sample.finish_reason
        values = chosen(sample.logprobs) if self._rated else [0.0] * len(sample.token_ids)
        fresh = list(zip(sample.token_ids, values, strict=True))
        for position, (token, logprob) in enumerate(fresh, 1):
            self._add(token, logprob)
            if self.stop or self.keep:
                last = reason is not None and position == len(fresh)
                if completion := self._watch(last, ended=last and reason == "stop"):
                    return completion
        if reason is None:
            return None
        if reason in ("abort", "error"):
            raise EngineError(f"vLLM gave up a request of {self.engine.name!r} ({reason}).")
        return self._finish("length" if reason == "length" else "stop")

    def _watch(self, last: bool, ended: bool) -> Completion | None:
        """Look at the text after a token for stop strings, and ask ``keep`` now and then."""
        ask = self.keep is not None and not last and len(self.ids) % KEEP_EVERY == 0
        if not self.stop and not ask:
            return None
        before = len(self._text.text)
        until = len(self.ids) - (ended and self.ids[-1] in self._ends)
        text = self._text.push(self.ids[self._text.count : until])
        hits = [at for stop in self.stop if (at := text.find(stop, max(0, before - len(stop) + 1))) >= 0]
        if hits:
            return self._finish("stop", text[: min(hits)])
        partial = Partial(self.prompt_index, self.sample_index, text, len(self.ids))
        if ask and self.keep is not None and not self.keep(partial):
            return self._finish("pruned", text)
        return None

    def _finish(self, reason: FinishReason, text: str | None = None) -> Completion:
        renderer = self.engine.renderer
        ids = self.ids[:-1] if text is None and self.ids and self.ids[-1] in self._ends else self.ids
        text = renderer.decode(ids) if text is None else text
        return Completion(
            self.prompt_index,
            self.sample_index,
            text,
            reason,
            tokens=renderer.as_tokens(ids, text),
            cumulative_logprob=math.fsum(self.logprobs) if self._rated else None,
            logprobs=tuple(self.logprobs) if self._rated else None,
            pieces=renderer.pieces(self.ids) if self._rated else None,
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.ids),
            cached_tokens=self.cached or 0,
            drafted_tokens=self.drafted,
        )


def chosen(logprobs: Any) -> list[float]:
    """Log-probabilities of the actual tokens: the first entry of each position; 0 where there is none."""
    if logprobs is None:
        return []
    values = logprobs.logprobs
    spans = zip(logprobs.start_indices, logprobs.end_indices, strict=True)
    return [float(values[begin]) if begin < end else 0.0 for begin, end in spans]


def last(logprobs: Any, count: int) -> list[tuple[float, int]]:
    """Log-probability and rank of the last ``count`` tokens of a prompt.

    Counted from the end: for tokens that came from the cache one of vLLM's model runners lists nothing (the usual one
    on a GPU), the other uninitialised memory (on a CPU).
    """
    starts = logprobs.start_indices[len(logprobs.start_indices) - count :]
    return [(float(logprobs.logprobs[start]), int(logprobs.ranks[start])) for start in starts]
