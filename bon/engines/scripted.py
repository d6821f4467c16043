"""The deterministic fake that ships: an engine that answers from a script.

It fulfils the engine contract without a model, so tests and documentation run the real pipeline in milliseconds. A
"token" is a word with the white space before it; log-probabilities are a fixed hash of the text that precedes them.
It says nothing about quality.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bon.engines.base import Completion, Keep, Loglikelihood, Partial, Prompt, Request, check_pairs, too_long
from bon.errors import EngineError, InputError, UnknownNameError
from bon.types import Sampling

Script = Callable[[str, int], str] | Mapping[str, Sequence[str]] | Sequence[str]


def echo_script(text: str, draw: int) -> str:
    """Answer a prompt with some of its own words, and an inversion prompt with the response it holds.

    The first draw of a prompt keeps every word and the later ones drop some, so that rewards differ.
    """
    _, is_inversion, response = text.rpartition("Response:\n")
    if is_inversion:
        return response
    words = text.split()
    return " ".join(w for i, w in enumerate(words) if draw % 7 == 0 or _fraction(f"{draw} {i} {w}") < 0.7) or words[0]


@dataclass
class ScriptedEngine:
    """Answers from ``script``, one word a step, all requests in step.

    Args:
        script: a function of (text of the last turn, draw) to a completion; or a mapping from that text to the
            completions of its draws; or the completions themselves, whatever the prompt. Draws beyond the script's
            end start again. A draw is the sample index, or with a seed a hash of seed and index.
        max_model_len: context in words.
        concurrent: what the engine claims; tests use both.
        step_seconds: how long one step takes.
        fail_after: raise ``EngineError`` once this many words have been decoded in all.
        name: shown in tables.
    """

    script: Script = echo_script
    max_model_len: int | None = None
    concurrent: bool = True
    step_seconds: float = 0.0
    fail_after: int | None = None
    name: str = "scripted"
    decoded: int = field(default=0, init=False)
    running: int = field(default=0, init=False)
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not callable(self.script) and (isinstance(self.script, str) or not self.script):
            raise InputError(f"a script is a function, a mapping or a non-empty list of texts, not {self.script!r}.")

    def generate(self, requests: Sequence[Request], *, keep: Keep | None = None) -> AsyncGenerator[Completion, None]:
        """Sample the completions of each request; see ``Generates.generate``."""
        for request in requests:
            for option in request.sampling.extra:
                raise UnknownNameError("option of the scripted engine", option, [])
            request.prompt.refuse_tools(self.name)
        return self._generate(requests, keep)

    async def _generate(self, requests: Sequence[Request], keep: Keep | None) -> AsyncGenerator[Completion, None]:
        self.calls += 1
        lengths = [_count(request.prompt) for request in requests]
        long = too_long(lengths, None if self.max_model_len is None else self.max_model_len - 1, "prompt")
        for index, error in long.items():
            for sample in requests[index].samples:
                yield Completion.failed(index, sample, error)
        fitting = [(index, request) for index, request in enumerate(requests) if index not in long]
        unread = {index: lengths[index] for index, _ in fitting}
        rows = [_Row(i, r, s, self._draw(r.prompt, s, r.sampling), unread) for i, r in fitting for s in r.samples]
        self.running += len(rows)
        left = len(rows)
        try:
            while rows:
                await asyncio.sleep(self.step_seconds)
                finished = [done for row in rows if (done := self._step(row, keep))]
                rows = [row for row in rows if not row.done]
                for done in finished:
                    left -= 1
                    self.running -= 1
                    yield done
        finally:
            self.running -= left

    def _step(self, row: _Row, keep: Keep | None) -> Completion | None:
        sampling, prompt = row.request.sampling, row.request.prompt
        if row.at == len(row.words):
            return row.finish("stop", row.text)
        row.at += 1
        self.decoded += 1
        if self.fail_after is not None and self.decoded > self.fail_after:
            raise EngineError(f"the scripted engine was told to fail after {self.fail_after} words.")
        text = row.text
        if hits := [text.index(stop) for stop in sampling.stop if stop in text]:
            return row.finish("stop", text[: min(hits)])
        room = math.inf if self.max_model_len is None else self.max_model_len - _count(prompt)
        if row.at >= min(sampling.max_tokens, room):
            return row.finish("length", text)
        if keep and not keep(Partial(row.request_index, row.sample_index, text, row.at)):
            return row.finish("abort", text)
        return None

    async def loglikelihood(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, end: bool = True
    ) -> list[Loglikelihood]:
        """Rate continuations; see ``Rates.loglikelihood``."""
        check_pairs(prompts, continuations)
        await asyncio.sleep(self.step_seconds)
        self.calls += 1
        lengths = [_count(p) + len(_words(c)) for p, c in zip(prompts, continuations, strict=True)]
        long = too_long(
            lengths, None if self.max_model_len is None else self.max_model_len - 1, "prompt and continuation"
        )
        rated = []
        for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            if index in long:
                rated.append(Loglikelihood.failed(long[index]))
                continue
            values = list(_logprobs(prompt, _words(continuation), end))
            rated.append(Loglikelihood(math.fsum(values), len(values), _count(prompt)))
        return rated

    async def aclose(self) -> None:
        """Nothing to free."""

    def _draw(self, prompt: Prompt, sample_index: int, sampling: Sampling) -> list[str]:
        draw = 0 if sampling.temperature == 0 else sample_index
        text = prompt.turns[-1].text
        if sampling.seed is not None and draw:
            draw = int(_fraction(f"{sampling.seed} {text} {sample_index}") * 2**31)
        if callable(self.script):
            return _words(self.script(text, draw))
        if isinstance(self.script, Mapping):
            if text not in self.script:
                raise EngineError(f"the script has no answer to {text!r}.")
            answers = self.script[text]
        else:
            answers = self.script
        return _words(answers[draw % len(answers)])


@dataclass
class _Row:
    request_index: int
    request: Request
    sample_index: int
    words: list[str]
    unread: dict[int, int]  # requests -> tokens of their prompts, until their first sample ends
    at: int = 0
    done: bool = False

    @property
    def text(self) -> str:
        return "".join(self.words[: self.at])

    def finish(self, reason: str, text: str) -> Completion:
        self.done = True
        ended = reason == "stop" and self.at == len(self.words)
        logprobs = tuple(_logprobs(self.request.prompt, self.words[: self.at], ended))
        return Completion(
            self.request_index,
            self.sample_index,
            text,
            reason,  # type: ignore[arg-type]
            cumulative_logprob=math.fsum(logprobs),
            logprobs=logprobs,
            pieces=(*self.words[: self.at], *([""] if ended else [])),
            prompt_tokens=self.unread.pop(self.request_index, 0),
            completion_tokens=len(logprobs),
        )


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+|\s+$", text)


def _count(prompt: Prompt) -> int:
    return sum(len(_words(turn.text)) for turn in prompt.turns)


def _logprobs(prompt: Prompt, words: Sequence[str], end: bool) -> Iterator[float]:
    seen = "\n".join(turn.text for turn in prompt.turns)
    for word in [*words, *(["\0"] if end else [])]:
        yield -3.0 * _fraction(seen + "\0" + word) - 1e-3
        seen += word


def _fraction(text: str) -> float:
    """A fixed number in [0, 1) for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) / 2**56
