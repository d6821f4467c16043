"""vLLM's own offline engine, ``LLM.generate``, doing over again what bon did.

It gets the prompts of a run as token ids, all candidates first and then all reconstructions, and decodes as many tokens
for each as bon did. It shares nothing with bon's engine but the model and its options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bon.engines.base import Prompt
from bon.engines.vllm.engine import VLLMEngine
from bon.engines.vllm.start import SamplingParams
from bon.scorers.flip import Flip
from bon.scorers.parsing import response_piece
from bon.types import Result, Sampling


@dataclass(frozen=True, slots=True)
class Requests:
    """Prompts as token ids, and how many tokens to decode for each."""

    prompts: Sequence[Sequence[int]]
    tokens: Sequence[int]


def requests_of(engine: VLLMEngine, scorer: Flip, results: Sequence[Result]) -> tuple[Requests, Requests]:
    """What bon asked its engine for: the candidates, and the reconstructions of those that were scored."""
    sampled, scored = _Collected(), _Collected()
    for result in results:
        ids = engine.renderer.render(Prompt.of(result.task.messages))
        for candidate, score in zip(result.candidates, result.scores, strict=True):
            sampled.add(ids, candidate.completion_tokens)
            piece = response_piece(candidate)
            if piece is not None and score.same_as is None:
                scored.add(
                    engine.renderer.render(scorer.style.prompt(result.task, piece, scorer.template)), score.tokens
                )
    return sampled.requests(), scored.requests()


class _Collected:
    def __init__(self) -> None:
        self._asked: list[tuple[Sequence[int], int]] = []

    def add(self, ids: Sequence[int], tokens: int | None) -> None:
        if tokens:
            self._asked.append((ids, tokens))

    def requests(self) -> Requests:
        return Requests([ids for ids, _ in self._asked], [tokens for _, tokens in self._asked])


class Offline:
    """vLLM's ``LLM`` with the options of a running engine of bon's."""

    def __init__(self, engine: VLLMEngine) -> None:
        from vllm import LLM

        assert engine._engine is not None
        config = engine._engine.llm.vllm_config
        self._llm: Any = LLM(
            config.model_config.model,
            dtype=config.model_config.dtype,
            load_format=config.load_config.load_format,
            enforce_eager=config.model_config.enforce_eager,
            block_size=config.cache_config.block_size,
            gpu_memory_utilization=config.cache_config.gpu_memory_utilization,
            kv_cache_memory_bytes=config.cache_config.kv_cache_memory_bytes,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            enable_chunked_prefill=config.scheduler_config.enable_chunked_prefill,
            disable_log_stats=True,
        )

    def __call__(self, sampled: Requests, scored: Requests, sampling: Sampling) -> int:
        """Decode all candidates, then all reconstructions; the number of tokens."""
        return self._generate(sampled, sampling.drawing.temperature, sampling.seed) + self._generate(scored, 0.0, None)

    def forget(self) -> None:
        """Empty the prefix cache."""
        self._llm.reset_prefix_cache()

    def close(self) -> None:
        """End its process."""
        self._llm.llm_engine.engine_core.shutdown()

    def _generate(self, requests: Requests, temperature: float, seed: int | None) -> int:
        params = [
            SamplingParams(temperature=temperature, max_tokens=count, ignore_eos=True, seed=seed)
            for count in requests.tokens
        ]
        prompts = [{"prompt_token_ids": list(ids)} for ids in requests.prompts]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
