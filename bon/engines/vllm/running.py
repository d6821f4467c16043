"""One sample on its way through vLLM: from token ids to a completion, with stop strings, ``keep`` and drafts."""

from __future__ import annotations

import math
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bon.engines.base import Completion, Keep
from bon.engines.text.watch import KEEP_EVERY, Watch
from bon.errors import EngineError
from bon.types import FinishReason

if TYPE_CHECKING:
    from bon.engines.vllm.engine import VLLMEngine


@dataclass
class SharedPrompt:
    """A prompt whose keys and values the samples of a request share, so its tokens are counted once.

    Args:
        ids: its tokens.
        cached: how many of them the sample that vLLM scheduled first found in the cache; None until that is known.
    """

    ids: tuple[int, ...]
    cached: int | None = None
    counted: bool = False

    def count(self) -> tuple[int, int]:
        """A completion's ``prompt_tokens`` and ``cached_tokens``: the first that asks gets them, the others get 0."""
        if self.counted:
            return 0, 0
        self.counted = True
        return len(self.ids), self.cached or 0


@dataclass
class Running:
    """One sample, which is one request to vLLM.

    Args:
        engine: where it runs.
        request_index, sample_index: which one it is.
        prompt: what it continues.
        params: vLLM's sampling parameters.
        stop: stop strings.
        keep: see ``Generates.generate``.
        draft: tokens to read along with the prompt; for greedy samples without stop strings.
    """

    engine: VLLMEngine
    request_index: int
    sample_index: int
    prompt: SharedPrompt
    params: Any
    stop: tuple[str, ...] = ()
    keep: Keep | None = None
    draft: tuple[int, ...] = ()
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    drafted: int = 0

    def __post_init__(self) -> None:
        self._watch = Watch(self.engine.renderer, self.request_index, self.sample_index, self.stop, self.keep)
        self._rated = self.params.logprobs is not None
        self._ends = {*self.engine.renderer.end_ids, *self.params.stop_token_ids}

    async def run(self) -> Completion:
        """Sample to the end, or to where a stop string or ``keep`` ends it."""
        if self.draft and (completion := await self._read_draft()):
            return completion
        params = self.params
        if self.ids:
            params = params.clone()
            params.max_tokens -= len(self.ids)
        async with aclosing(self.engine.stream((*self.prompt.ids, *self.ids), params)) as outputs:
            async for output in outputs:
                if completion := self._take(output):
                    return completion
        raise EngineError(f"{self.engine.name!r} ended a request without a result.")

    async def _read_draft(self) -> Completion | None:
        """Read the draft along with the prompt and keep the tokens that are the model's first choice."""
        output = await self.engine.prefill(self.prompt.ids, self.draft)
        self.prompt.cached = output.num_cached_tokens
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
        over = self._watch.push(self.ids, ask=bool(self.ids)) if self.keep else None
        return self._finish(*over) if over else None

    def _take(self, output: Any) -> Completion | None:
        """Read what vLLM has sampled since the last time, token by token: however it comes, the outcome is the same."""
        [sample] = output.outputs
        if self.prompt.cached is None:
            self.prompt.cached = output.num_cached_tokens
        reason: str | None = sample.finish_reason
        count = len(sample.token_ids)
        values = chosen(sample.logprobs) if self._rated else [0.0] * count
        for position, (token, logprob) in enumerate(zip(sample.token_ids, values, strict=True), 1):
            self._add(token, logprob)
            if over := self._look(reason if position == count else None):
                return self._finish(*over)
        if reason is None:
            return None
        if reason in ("abort", "error"):
            raise EngineError(f"vLLM gave up a request of {self.engine.name!r} ({reason}).")
        return self._finish("length" if reason == "length" else "stop")

    def _add(self, token: int, logprob: float) -> None:
        self.ids.append(token)
        self.logprobs.append(logprob)

    def _look(self, reason: str | None) -> tuple[FinishReason, str] | None:
        """Look at the text after a token: for stop strings at each, for ``keep`` at every ``KEEP_EVERY``-th."""
        ask = self.keep is not None and reason is None and len(self.ids) % KEEP_EVERY == 0
        if not self.stop and not ask:
            return None
        until = len(self.ids) - (reason == "stop" and self.ids[-1] in self._ends)
        return self._watch.push(self.ids[self._watch.count : until], ended=reason is not None, ask=ask)

    def _finish(self, reason: FinishReason, text: str | None = None) -> Completion:
        renderer = self.engine.renderer
        ids = self.ids[:-1] if text is None and self.ids and self.ids[-1] in self._ends else self.ids
        text = renderer.decode(ids) if text is None else text
        prompt_tokens, cached_tokens = self.prompt.count()
        return Completion(
            self.request_index,
            self.sample_index,
            text,
            reason,
            tokens=renderer.as_tokens(ids, text),
            cumulative_logprob=math.fsum(self.logprobs) if self._rated else None,
            logprobs=tuple(self.logprobs) if self._rated else None,
            pieces=renderer.pieces(self.ids) if self._rated else None,
            prompt_tokens=prompt_tokens,
            completion_tokens=len(self.ids),
            cached_tokens=cached_tokens,
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
