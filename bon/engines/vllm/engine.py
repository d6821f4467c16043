"""The production engine: vLLM in this process, with continuous batching.

Every sample is a request of its own that joins the running batch, so each can be handed over, pruned and aborted by
itself; the prompt's keys and values are shared through vLLM's prefix cache. vLLM's engine lives on bon's background
event loop; callers may be on any. It serves no pooling models and no images.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import json
import math
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from bon import portal
from bon.engines.base import MOST_DRAFT, Completion, Keep, Loglikelihood, Prompt
from bon.engines.text.render import Renderer
from bon.engines.vllm.request import KEEP_EVERY, Request, last
from bon.engines.vllm.start import (
    EngineDeadError,
    LoRARequest,
    RequestOutputKind,
    SamplingParams,
    Started,
    StructuredOutputsParams,
    VLLMClientError,
    start,
)
from bon.errors import BonError, EngineError, InputError, ModelNotFoundError, PromptTooLongError, UnknownNameError
from bon.types import Sampling

_LOGIT_BYTES = 1 << 28  # logits of one prompt that is read with a draft

# What Sampling has itself, what the engine decides, and what would change the meaning of a completion.
_NOT_EXTRA = {
    *("n", "temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "seed"),
    *("logprobs", "flat_logprobs", "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"),
    *("output_kind", "stream_interval", "skip_clone", "output_text_buffer_length", "logprob_token_ids"),
    *("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
}
EXTRA = tuple(f for f in SamplingParams.__struct_fields__ if not f.startswith("_") and f not in _NOT_EXTRA)
"""Names that ``Sampling.extra`` may hold, with vLLM's meaning."""


class VLLMEngine:
    """A language model on vLLM.

    On a CPU bon chooses float32, no compilation, blocks of 32 tokens, at most 64 sequences at a time, and keys and
    values for those within a quarter of the memory; on a GPU vLLM's own defaults hold. The context is the model's own,
    or what the memory holds where that is less. Any of it can be overridden.

    Args:
        model: a folder or a Hugging Face name.
        chat_template_kwargs: passed to the chat template, for instance ``{"enable_thinking": False}``.
        lora: folder of a LoRA adapter to apply.
        threads: of the arithmetic on a CPU; None leaves one core to the rest.
        options: fields of vLLM's ``AsyncEngineArgs``: ``max_model_len``, ``tensor_parallel_size``,
            ``gpu_memory_utilization``, ``kv_cache_memory_bytes``, ``quantization``, ...

    Raises:
        UnknownNameError: an option that vLLM does not have.
        ModelNotFoundError: the model is neither on disk nor can be fetched.
        InputError: a value that vLLM refuses, or a model without a tokenizer.
        EngineError: the engine did not come up; the message has vLLM's reason, with its numbers.
    """

    overlaps = True

    def __init__(
        self,
        model: str | Path,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora: str | Path | None = None,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        self.name = str(model)
        self._lora, lora_options = _lora(lora)
        self._engine: Started | None = start(model, {**lora_options, **options}, threads)
        self._failure: EngineError | None = None
        self._finalizer = weakref.finalize(self, self._engine.stop)
        try:
            llm = self._engine.llm
            tokenizer = llm.renderer.tokenizer
            if tokenizer is None:
                raise InputError(f"{self.name!r} has no tokenizer here; name one with tokenizer=...")
            eos = (llm.model_config.try_get_generation_config() or {}).get("eos_token_id")
            ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
            self.renderer = Renderer(tokenizer, chat_template_kwargs, eos_ids=ends)
            self.max_model_len: int | None = int(llm.model_config.max_model_len)
        except BaseException:
            self._finalizer()
            raise
        self._ids = itertools.count()
        self._under_way = 0

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1, *, keep: Keep | None = None
    ) -> AsyncIterator[Completion]:
        """Sample n completions of each prompt, each a request of its own; see ``Engine.generate``.

        ``Sampling.extra`` takes vLLM's own names (``EXTRA``), for instance ``{"repetition_penalty": 1.1}`` or
        ``{"structured_outputs": {"json": schema}}``. The same seed gives the same completion whatever else is running,
        up to rounding of the model's arithmetic. Log-probabilities are the model's own, before temperature and filters
        (under structured output: among the tokens that the grammar allows).
        """
        if n < 1:
            raise InputError(f"n must be at least 1, got {n}.")
        contexts = [self.renderer.render(prompt) for prompt in prompts]
        self._check_lengths([len(ids) for ids in contexts], "prompt")
        make = self._params(sampling, keep)
        requests = [
            Request(self, p, s, ids, make(ids, s), sampling.stop, keep)
            for p, ids in enumerate(contexts)
            for s in range(n)
        ]
        if n == 1 and sampling.temperature == 0 and not sampling.stop and not sampling.extra:
            for request in requests:
                request.draft = self._draft(prompts[request.prompt_index], request)
        return portal.across(self._together(requests))

    async def loglikelihood(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, end: bool = True
    ) -> list[Loglikelihood]:
        """Rate continuations by prefill alone; see ``Engine.loglikelihood``. One token of the context stays free."""
        if len(prompts) != len(continuations):
            raise InputError(f"there are {len(prompts)} prompts and {len(continuations)} continuations.")
        last = () if not end or self.renderer.end_id is None else (self.renderer.end_id,)
        contexts = [self.renderer.render(prompt) for prompt in prompts]
        targets = [(*self.renderer.encode(text), *last) for text in continuations]
        lengths = [len(context) + len(target) for context, target in zip(contexts, targets, strict=True)]
        self._check_lengths(lengths, "prompt and continuation")

        async def rate_all() -> list[Loglikelihood]:
            return list(await asyncio.gather(*map(self._rate, contexts, targets)))

        return await portal.there(rate_all())

    @property
    def full(self) -> bool:
        """See ``bon.engines.base.Batches``."""
        return (
            self._engine is not None and self._under_way >= self._engine.llm.vllm_config.scheduler_config.max_num_seqs
        )

    def json_options(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """See ``bon.engines.base.WritesJSON``."""
        return {"structured_outputs": {"json": dict(schema)}}

    async def aclose(self) -> None:
        """Abort what is running, end vLLM's processes and free their memory."""
        if self._engine is not None:
            self._failure = self._failure or EngineError(f"the engine {self.name!r} is closed.")
            self._engine = None
            await asyncio.to_thread(self._finalizer)

    async def _together(self, requests: Sequence[Request]) -> AsyncIterator[Completion]:
        """Run requests at the same time and yield each completion as it comes; leaving aborts the rest."""
        running = [asyncio.create_task(self._counted(request)) for request in requests]
        try:
            for finished in asyncio.as_completed(running):
                yield await finished
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _counted(self, request: Request) -> Completion:
        self._under_way += 1
        try:
            return await request.run()
        finally:
            self._under_way -= 1

    async def _rate(self, context: Sequence[int], target: Sequence[int]) -> Loglikelihood:
        if not target:
            return Loglikelihood(0.0, 0, len(context))
        assert self._engine is not None
        if self._engine.llm.vllm_config.use_v2_model_runner:  # on a GPU: logits of the target alone
            rows = {"prompt_logprob_token_ids": [[token] for token in target], "prompt_logprob_start": len(context) - 1}
            output = await self._prefill(context, target, **rows)
            total = math.fsum(output.prompt_token_id_logprobs[:, 0].tolist())
        else:
            output = await self.prefill(context, target)
            total = math.fsum(logprob for logprob, _ in last(output.prompt_logprobs, len(target)))
        return Loglikelihood(total, len(target), len(context), output.num_cached_tokens)

    async def prefill(self, context: Sequence[int], target: Sequence[int]) -> Any:
        """vLLM's output for context and target, with log-probabilities of the target's tokens, and one more token."""
        return await self._prefill(context, target, logprobs=0, prompt_logprobs=0, flat_logprobs=True)

    async def _prefill(self, context: Sequence[int], target: Sequence[int], **rated: Any) -> Any:
        for cached in (True, False):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=1,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_reading_prefix_cache=not cached,
                **rated,
            )
            async with aclosing(self.stream((*context, *target), params)) as outputs:  # type: ignore[type-var]
                output = [output async for output in outputs][-1]
            # vLLM gives no numbers, or meaningless ones, for what it took from the cache: position i needs token i - 1.
            if output.num_cached_tokens < len(context):
                break
        return output

    def _draft(self, prompt: Prompt, request: Request) -> tuple[int, ...]:
        """As much of a prompt's draft as leaves room for a token; none where the logits of the reading would be large.

        vLLM makes logits of the whole prompt to rate its end.
        """
        if not prompt.draft:
            return ()
        ids = self.renderer.encode(prompt.draft)[: min(MOST_DRAFT, request.params.max_tokens - 1)]
        assert self._engine is not None
        vocabulary = self._engine.llm.model_config.get_vocab_size()
        return ids if 4 * vocabulary * (len(request.prompt) + len(ids)) <= _LOGIT_BYTES else ()

    async def stream(self, ids: Sequence[int], params: Any) -> AsyncIterator[Any]:
        """Outputs of one request to vLLM, as vLLM gives them; on the background loop only. Closing it aborts."""
        if self._engine is None or self._failure is not None:
            raise self._failure or EngineError(f"the engine {self.name!r} is closed.")
        with self._errors():
            request = self._engine.llm.generate(
                {"prompt_token_ids": list(ids)}, params, f"bon-{next(self._ids)}", lora_request=self._lora
            )
            async with aclosing(request) as outputs:
                async for output in outputs:
                    yield output

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what vLLM raises into bon's errors; an engine that died stays dead and keeps saying why."""
        try:
            yield
        except EngineDeadError as error:
            if self._failure is None:
                assert self._engine is not None
                self._failure = EngineError(
                    f"the vLLM engine of {self.name!r} died: {self._engine.cause()}. Load it again to go on."
                )
            raise self._failure from error
        except BonError:
            raise
        except (VLLMClientError, ValueError, TypeError) as error:
            raise InputError(f"vLLM refuses the request: {error}") from error
        except Exception as error:
            raise EngineError(f"{self.name!r} failed: {error.__cause__ or error}") from error

    def _params(self, sampling: Sampling, keep: Keep | None) -> Callable[[tuple[int, ...], int], Any]:
        """What makes vLLM's sampling parameters for a prompt and a sample index."""
        extra = dict(sampling.extra)
        for option in extra:
            if option not in EXTRA:
                raise UnknownNameError("sampling option of the vllm engine", option, EXTRA)
        ends = [] if extra.get("ignore_eos") else sorted(self.renderer.end_ids)
        extra["stop_token_ids"] = [*ends, *extra.get("stop_token_ids", ())]
        watched = bool(sampling.stop or keep)
        options: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "logprobs": 0 if sampling.logprobs else None,
            "flat_logprobs": sampling.logprobs,
            "detokenize": False,
            "output_kind": RequestOutputKind.DELTA if watched else RequestOutputKind.FINAL_ONLY,
            "stream_interval": KEEP_EVERY if keep and not sampling.stop else None,
        }
        with self._errors():
            if isinstance(extra.get("structured_outputs"), Mapping):
                extra["structured_outputs"] = _structure(extra["structured_outputs"])
            SamplingParams(**options, **extra, max_tokens=sampling.max_tokens)  # refuse now what is refused later

        def make(ids: tuple[int, ...], sample: int) -> Any:
            assert self.max_model_len is not None
            room = self.max_model_len - len(ids)
            seed = None if sampling.seed is None else _seed(sampling.seed, ids, sample)
            return SamplingParams(**options, **extra, max_tokens=min(sampling.max_tokens, room), seed=seed)

        return make

    def _check_lengths(self, lengths: Sequence[int], what: str) -> None:
        assert self.max_model_len is not None
        limit = self.max_model_len - 1
        if too_long := [i for i, length in enumerate(lengths) if length > limit]:
            where = f"{what} {too_long[0]}" if len(lengths) > 1 else f"the {what}"
            raise PromptTooLongError(lengths[too_long[0]], limit, where, too_long)


def _structure(wanted: Mapping[str, Any]) -> Any:
    known = [f.name for f in dataclasses.fields(StructuredOutputsParams) if f.init]
    for name in wanted:
        if name not in known:
            raise UnknownNameError("kind of structured output", name, known)
    return StructuredOutputsParams(**wanted)


def _seed(seed: int, prompt: Sequence[int], sample: int) -> int:
    """A seed of its own for every sample; neighbouring seeds of the user share none."""
    content = f"{seed} {sample} {','.join(map(str, prompt))}"
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest()) >> 1


def _lora(adapter: str | Path | None) -> tuple[Any, dict[str, Any]]:
    """A LoRA adapter as vLLM's request and the options that it needs."""
    if adapter is None:
        return None, {}
    folder = Path(adapter).expanduser()
    try:
        rank = int(json.loads((folder / "adapter_config.json").read_text())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotFoundError(f"there is no LoRA adapter in {str(adapter)!r} (adapter_config.json).") from error
    allowed = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
    return LoRARequest(folder.name, 1, str(folder)), {"enable_lora": True, "max_lora_rank": allowed}
