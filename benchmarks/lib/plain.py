"""Best-of-N as a good engineer writes it against vLLM's own engine, to be compared with bon.

All candidates are sampled, then all are scored: one by one, or all at once. Every candidate and every reconstruction
is a request of its own, as in bon, because only so can each have a length and a seed of its own; one request for n
samples costs the same (``sample_together`` shows it). The token ids, seeds, lengths, scoring prompts and rewards are
bon's. What bon does besides is left out: log-probabilities, text as it grows, drafts, scoring identical candidates
once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from bon.engines.base import Keep, Prompt, Request
from bon.engines.vllm.engine import VLLMEngine
from bon.engines.vllm.start import RequestOutputKind, SamplingParams
from bon.scorers.flip import Flip
from bon.scorers.parsing import response_piece
from bon.task import Task
from bon.types import Candidate, Result, Sampling


@dataclass(frozen=True, slots=True)
class Job:
    """What every side of a comparison does in one round.

    Args:
        task: what is asked.
        sampling: of the candidates.
        scorer: what scores them.
        lengths: tokens of each candidate; None lets the model end them.
    """

    task: Task
    sampling: Sampling
    scorer: Flip
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one side made of a job.

    Args:
        reward: the winner's.
        policy_tokens, scorer_tokens: decoded; what was read as a draft is not.
        prompt_tokens: of the candidates' prompt, once, and of all scoring prompts.
        cached_tokens: of those, how many came from the prefix cache.
        ready: seconds after the start at which each candidate was there; bon's and the plain sides' own clocks.
        scoring: seconds that each candidate's score took.
    """

    reward: float | None
    policy_tokens: int
    scorer_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ready: tuple[float, ...] = ()
    scoring: tuple[float, ...] = ()

    @classmethod
    def of(cls, result: Result) -> Outcome:
        """What bon made of it."""
        usage = result.usage
        return cls(
            result.reward,
            usage.policy_completion_tokens,
            usage.scorer_completion_tokens - usage.drafted_tokens,
            usage.policy_prompt_tokens + usage.scorer_prompt_tokens,
            usage.cached_tokens,
            tuple(candidate.finished for candidate in result.candidates),
            tuple(score.finished - score.started for score in result.scores),
        )


class DrawnLengths(VLLMEngine):
    """A running engine on which sample i of every prompt has ``lengths[i]`` tokens; freed with the engine itself."""

    def __init__(self, engine: VLLMEngine, lengths: Sequence[int]) -> None:
        self.__dict__.update(vars(engine))
        self._lengths = lengths

    def _params(self, request: Request, ids: Sequence[int], sample: int, keep: Keep | None) -> Any:
        params = super()._params(request, ids, sample, keep)
        params.max_tokens = self._lengths[sample]
        return params


def policy_of(engine: VLLMEngine, job: Job) -> VLLMEngine:
    """The engine with the job's lengths."""
    return engine if job.lengths is None else DrawnLengths(engine, job.lengths)


class Plain:
    """A few lines around ``AsyncLLM.generate``."""

    def __init__(self, policy: VLLMEngine) -> None:
        self._policy = policy

    async def sample(self, job: Job, n: int) -> Outcome:
        """Sampling alone: n requests at a time, each answered when it is done."""
        _, outcome = await self._sample(job, n)
        return outcome

    async def sample_together(self, job: Job, n: int) -> Outcome:
        """Sampling alone as one request for n samples; they have other seeds, and the model ends them."""
        request = Request(Prompt.of(job.task.messages), job.sampling)
        ids = self._policy.renderer.render(request.prompt)
        params = _plain(self._policy._params(request, ids, 0, None))
        params.n = n
        output = await _ask(self._policy, ids, params)
        return Outcome(None, sum(len(sample.token_ids) for sample in output.outputs))

    async def one_by_one(self, job: Job, n: int) -> Outcome:
        """Sample all, then score one after the other."""
        candidates, sampled = await self._sample(job, n)
        return _total(sampled, [await self._score(job, candidate) for candidate in candidates])

    async def gather(self, job: Job, n: int) -> Outcome:
        """Sample all, then score all at once."""
        candidates, sampled = await self._sample(job, n)
        scored = await asyncio.gather(*(self._score(job, candidate) for candidate in candidates))
        return _total(sampled, scored)

    async def _sample(self, job: Job, n: int) -> tuple[list[Candidate], Outcome]:
        start = perf_counter()
        engine = policy_of(self._policy, job)
        request = Request(Prompt.of(job.task.messages), job.sampling)
        ids = engine.renderer.render(request.prompt)

        async def one(index: int) -> tuple[Any, float]:
            params = _plain(engine._params(request, ids, index, None))
            return await _ask(engine, ids, params), perf_counter() - start

        asked = await asyncio.gather(*(one(index) for index in range(n)))
        candidates = [_candidate(engine, index, output.outputs[0]) for index, (output, _) in enumerate(asked)]
        tokens = sum(len(output.outputs[0].token_ids) for output, _ in asked)
        cached = asked[0][0].num_cached_tokens
        ready = tuple(seconds for _, seconds in asked)
        return candidates, Outcome(None, tokens, prompt_tokens=len(ids), cached_tokens=cached, ready=ready)

    async def _score(self, job: Job, candidate: Candidate) -> Outcome:
        start = perf_counter()
        piece, engine, flip = response_piece(candidate), job.scorer.engine, job.scorer
        assert isinstance(engine, VLLMEngine)
        if piece is None:
            return Outcome(None, 0)
        request = Request(flip.style.prompt(job.task, piece, flip.template), flip.sampling)
        ids = engine.renderer.render(request.prompt)
        output = await _ask(engine, ids, _plain(engine._params(request, ids, 0, None)))
        [sample] = output.outputs
        inferred = flip.parser.parse(_candidate(engine, 0, sample).text, sample.finish_reason).instruction
        reward = None if inferred is None else flip.similarity(inferred, job.task.instruction).f1
        cached, seconds = output.num_cached_tokens, perf_counter() - start
        return Outcome(reward, 0, len(sample.token_ids), len(ids), cached, scoring=(seconds,))


def _total(sampled: Outcome, scored: Sequence[Outcome]) -> Outcome:
    return Outcome(
        max((s.reward for s in scored if s.reward is not None), default=None),
        sampled.policy_tokens,
        sum(s.scorer_tokens for s in scored),
        sampled.prompt_tokens + sum(s.prompt_tokens for s in scored),
        sampled.cached_tokens + sum(s.cached_tokens for s in scored),
        sampled.ready,
        tuple(seconds for s in scored for seconds in s.scoring),
    )


def _plain(params: Any) -> Any:
    """The same tokens, without the log-probabilities that bon reports."""
    params.logprobs, params.flat_logprobs = None, False
    params.output_kind = RequestOutputKind.FINAL_ONLY
    return params


async def _ask(engine: VLLMEngine, ids: Sequence[int], params: SamplingParams) -> Any:
    assert engine._engine is not None
    request = f"plain-{next(engine._ids)}"
    async for output in engine._engine.llm.generate({"prompt_token_ids": list(ids)}, params, request):
        final = output
    return final


def _candidate(engine: VLLMEngine, index: int, sample: Any) -> Candidate:
    ids = list(sample.token_ids)
    ids = ids[:-1] if ids and ids[-1] in engine.renderer.end_ids else ids
    text = engine.renderer.decode(ids)
    return Candidate(index, text, tokens=engine.renderer.as_tokens(ids, text))
