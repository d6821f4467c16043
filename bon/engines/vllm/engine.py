"""The production engine: vLLM in this process, with continuous batching.

Every sample is a vLLM request of its own that joins the running batch, so each can be returned and aborted by itself;
the prompt's keys and values are shared through vLLM's prefix cache. vLLM's engine lives on bon's background event
loop; callers may be on any. It serves no pooling models and no images.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import hashlib
import itertools
import math
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from bon import portal
from bon.engines.base import MOST_DRAFT, Completion, Keep, Loglikelihood, Prompt, Request, check_pairs, too_long
from bon.engines.defaults import PENALTY, own_drawing
from bon.engines.loading import empty_model
from bon.engines.lora import Adapter, adapter_of, named_adapter
from bon.engines.text.render import Renderer
from bon.engines.text.watch import KEEP_EVERY
from bon.engines.torch.reading import fingerprint_on_disk
from bon.engines.vllm.running import Running, SharedPrompt, last
from bon.engines.vllm.start import (
    EngineDeadError,
    LoRARequest,
    RequestOutputKind,
    SamplingParams,
    Started,
    StructuredOutputsParams,
    VLLMClientError,
    refuse_unknown,
    start,
)
from bon.errors import BonError, EngineError, InputError
from bon.mini import shown_name

_LOGIT_BYTES = 1 << 28  # logits of one prompt that is read with a draft
_ONLY_THE_FIRST_TOKEN = 1 << 30  # as an interval between outputs: vLLM sends the first token and then the end

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
        model: a folder or a Hugging Face name; the folder of a LoRA adapter stands for its base with the adapter.
        chat_template: what to use in place of the tokenizer's own template: Jinja text, or the file that holds it.
        chat_template_kwargs: passed to the chat template, for instance ``{"enable_thinking": False}``.
        lora: folder of a LoRA adapter to apply.
        adapters: folders of LoRA adapters that ``adapted`` may be asked for: vLLM has to know how many, how large.
        threads: of the arithmetic on a CPU; None leaves one core to the rest.
        options: fields of vLLM's ``AsyncEngineArgs``: ``max_model_len``, ``tensor_parallel_size``,
            ``gpu_memory_utilization``, ``kv_cache_memory_bytes``, ``quantization``, ...

    Attributes:
        adapter: digest of the LoRA adapter that ``adapted`` added, or "".

    Raises:
        UnknownNameError: an option that vLLM does not have.
        ModelNotFoundError: the model is neither on disk nor can be fetched.
        InputError: a value that vLLM refuses, or a model without a tokenizer.
        EngineError: the engine did not come up; the message has vLLM's reason, with its numbers.
    """

    concurrent = True

    def __init__(
        self,
        model: str | Path,
        *,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora: str | Path | None = None,
        adapters: Sequence[str | Path] = (),
        threads: int | None = None,
        **options: Any,
    ) -> None:
        self.name = shown_name(model)
        if lora is None and (adapter := adapter_of(model)) is not None:
            model, lora = adapter.base, model
        known = [named_adapter(folder) for folder in ([lora] if lora is not None else adapters)]
        self._lora = None if lora is None else _request(known[0])
        lora_options = _lora_options(known)
        if lora is not None and known[0].tokenizer is not None:
            lora_options["tokenizer"] = known[0].tokenizer
        self._engine: Started | None = start(model, {**lora_options, **options}, threads)
        self.adapter = ""
        self._of: VLLMEngine | None = None  # what a view was made of, and keeps alive
        self._failure: EngineError | None = None
        self._finalizer = weakref.finalize(self, self._engine.stop)
        try:
            llm = self._engine.llm
            tokenizer = llm.renderer.tokenizer
            if tokenizer is None:
                raise InputError(f"{self.name!r} has no tokenizer here; name one with tokenizer=...")
            config = llm.model_config.try_get_generation_config() or {}
            self._drawing, self._penalty = own_drawing(self.name, config, penalises=True)
            eos = config.get("eos_token_id")
            ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
            self.renderer = Renderer(tokenizer, chat_template_kwargs, chat_template=chat_template, eos_ids=ends)
            self.max_model_len = int(llm.model_config.max_model_len)
            self._vocabulary = int(llm.model_config.get_vocab_size())
            self._max_num_seqs = int(llm.vllm_config.scheduler_config.max_num_seqs)
            # On a GPU; it can give log-probabilities of a prompt's end without logits of its beginning.
            self._rates_the_end = bool(llm.vllm_config.use_v2_model_runner)
        except BaseException:
            self._finalizer()
            raise
        self._ids = itertools.count()
        self._weighing = asyncio.Semaphore(1)  # a row's log-probabilities of the whole vocabulary are large

    def adapted(self, folder: str | Path) -> VLLMEngine:
        """The same engine with a LoRA adapter; see ``Adapts``. vLLM reads it with the first request.

        Raises:
            InputError: as ``Adapts``, or vLLM was started for fewer or smaller adapters (``adapters``).
        """
        adapter = named_adapter(folder)
        if self._engine is None:
            raise self._failure or EngineError(f"the engine {self.name!r} is closed.")
        config, limits = self._engine.llm.model_config, self._engine.llm.vllm_config.lora_config
        with suppress(ValueError):  # a model that transformers does not know
            skeleton = empty_model(config.hf_config)
            adapter.changes(skeleton)  # vLLM would die of one that does not fit
            own = fingerprint_on_disk(skeleton, config.model, self.renderer.fingerprint)
            if own is not None:
                adapter.check_base(self.name, own)
        if limits is None or limits.max_lora_rank < adapter.rank or not adapter.modules <= {*limits.target_modules}:
            raise InputError(
                f"{self.name!r} was started without room for the LoRA adapter {str(adapter.folder)!r} of rank "
                f"{adapter.rank}. Name it at the start (adapters=[...]), or policy and scorer together."
            )
        view = copy.copy(self)
        view._lora, view._of, view.adapter = _request(adapter), self, adapter.digest
        view.name = f"{self.name}+{adapter.folder.name}"
        return view

    def generate(self, requests: Sequence[Request], *, keep: Keep | None = None) -> AsyncGenerator[Completion, None]:
        """Sample completions; see ``Generates.generate``.

        ``Sampling.extra`` takes vLLM's own names (``EXTRA``), for instance ``{"repetition_penalty": 1.1}`` or
        ``{"structured_outputs": {"json": schema}}``. The same seed gives the same completion whatever else is running,
        up to rounding of the model's arithmetic. Log-probabilities are the model's own, before temperature and filters
        (under structured output: among the tokens that the grammar allows).
        """
        prompts = [self.renderer.render(request.prompt) for request in requests]
        errors = too_long([len(ids) for ids in prompts], self.max_model_len - 1, "prompt")
        failed, running = [], []
        for index, (request, ids) in enumerate(zip(requests, prompts, strict=True)):
            samples = {sample: self._params(request, ids, sample, keep) for sample in request.samples}
            if index in errors:
                failed += [Completion.failed(index, sample, errors[index]) for sample in samples]
                continue
            prompt, draft = SharedPrompt(ids), self._draft(request, ids)
            running += [
                Running(self, index, sample, prompt, params, request.sampling.stop, keep, draft)
                for sample, params in samples.items()
            ]
        return portal.across(self._run(failed, running))

    async def loglikelihood(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, end: bool = True
    ) -> list[Loglikelihood]:
        """Rate continuations by prefill alone; see ``Rates.loglikelihood``. One token of the context stays free."""
        return await self._read(prompts, continuations, end, self._rate)

    async def _read(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[str],
        end: bool,
        rate: Callable[[Sequence[int], Sequence[int]], Awaitable[Loglikelihood]],
    ) -> list[Loglikelihood]:
        """What ``rate`` says of each context and target; an error of those that do not fit."""
        check_pairs(prompts, continuations)
        end_ids = () if not end or self.renderer.end_id is None else (self.renderer.end_id,)
        contexts = [self.renderer.render(prompt) for prompt in prompts]
        targets = [(*self.renderer.encode(text), *end_ids) for text in continuations]
        lengths = [len(context) + len(target) for context, target in zip(contexts, targets, strict=True)]
        errors = too_long(lengths, self.max_model_len - 1, "prompt and continuation")

        async def one(index: int) -> Loglikelihood:
            if index in errors:
                return Loglikelihood.failed(errors[index])
            if not targets[index]:
                return Loglikelihood(0.0, 0, len(contexts[index]))
            return await rate(contexts[index], targets[index])

        async def rate_all() -> list[Loglikelihood]:
            return await asyncio.gather(*map(one, range(len(lengths))))

        return await portal.there(rate_all())

    async def confidence(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, top: int | None = None
    ) -> list[Loglikelihood]:
        """How sure the model is of continuations, by prefill alone; see ``Weighs.confidence``.

        vLLM sorts the vocabulary at each place, the prompt's included, so the whole of it costs 0.9 ms a token of the
        response where it has 2,028 tokens (a likelihood 0.3), and 110 ms where it has 152,000 (two CPU cores; responses
        one after the other). ``TorchEngine`` sorts nothing.
        """
        return await self._read(prompts, continuations, False, partial(self._weigh, top=top))

    @property
    def full(self) -> bool:
        """See ``bon.engines.base.Batches``."""
        return self._engine is not None and self._engine.llm.get_num_unfinished_requests() >= self._max_num_seqs

    def json_options(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """See ``bon.engines.base.WritesJSON``."""
        return {"structured_outputs": {"json": dict(schema)}}

    async def aclose(self) -> None:
        """Abort what is running, end vLLM's processes and free their memory; a view leaves that to its base."""
        if self._engine is not None:
            self._failure = self._failure or EngineError(f"the engine {self.name!r} is closed.")
            self._engine = None
            if self._of is None:
                await asyncio.to_thread(self._finalizer)

    async def _run(self, failed: Sequence[Completion], samples: Sequence[Running]) -> AsyncGenerator[Completion, None]:
        """Run samples at the same time and yield each completion as it comes; leaving aborts the rest."""
        for completion in failed:
            yield completion
        tasks = [asyncio.create_task(sample.run()) for sample in samples]
        try:
            for finished in asyncio.as_completed(tasks):
                yield await finished
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _rate(self, context: Sequence[int], target: Sequence[int]) -> Loglikelihood:
        if self._rates_the_end:
            rows = {"prompt_logprob_token_ids": [[token] for token in target], "prompt_logprob_start": len(context) - 1}
            output = await self.prefill(context, target, **rows)
            total = math.fsum(output.prompt_token_id_logprobs[:, 0].tolist())
        else:
            output = await self.prefill(context, target)
            total = math.fsum(logprob for logprob, _ in last(output.prompt_logprobs, len(target)))
        return Loglikelihood(total, len(target), len(context), output.num_cached_tokens)

    async def _weigh(self, context: Sequence[int], target: Sequence[int], top: int | None) -> Loglikelihood:
        if top is None:
            from bon.engines.vllm.weigh import WHOLE

            async with self._weighing:
                output = await self.prefill(context, target, prompt_logprobs=WHOLE)
            total = math.fsum(output.prompt_logprobs[-len(target) :]) + len(target) * math.log(self._vocabulary)
        else:
            most = min(top, self._vocabulary)
            output = await self.prefill(context, target, prompt_logprobs=most, flat_logprobs=True)
            listed = output.prompt_logprobs
            # At each place the token that is there comes first, and then the likeliest ones.
            starts = listed.start_indices[-len(target) :]
            total = math.fsum(math.fsum(listed.logprobs[at + 1 : at + 1 + most]) / most for at in starts)
        return Loglikelihood(total, len(target), len(context), output.num_cached_tokens)

    async def prefill(self, context: Sequence[int], target: Sequence[int], **rated: Any) -> Any:
        """vLLM's output for context and target, and one more token; by default with logprobs of all tokens."""
        rated = rated or {"logprobs": 0, "prompt_logprobs": 0, "flat_logprobs": True}
        for cached in (True, False):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=1,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_reading_prefix_cache=not cached,
                **rated,
            )
            async with aclosing(self.stream((*context, *target), params)) as outputs:
                output = [output async for output in outputs][-1]
            # vLLM gives no numbers, or meaningless ones, for what it took from the cache: position i needs token i - 1.
            if output.num_cached_tokens < len(context):
                break
        return output

    def _draft(self, request: Request, ids: Sequence[int]) -> tuple[int, ...]:
        """As much of a prompt's draft as leaves room for a token; none where the logits of the reading would be large.

        vLLM makes logits of the whole prompt to rate its end.
        """
        sampling = request.sampling
        if not request.prompt.draft or request.n > 1 or sampling.temperature != 0 or sampling.stop or sampling.extra:
            return ()
        most = min(MOST_DRAFT, sampling.max_tokens - 1, self.max_model_len - len(ids) - 1)
        draft = self.renderer.encode(request.prompt.draft)[:most]
        return draft if 4 * self._vocabulary * (len(ids) + len(draft)) <= _LOGIT_BYTES else ()

    async def stream(self, ids: Sequence[int], params: Any) -> AsyncGenerator[Any, None]:
        """Outputs of one request to vLLM, as vLLM gives them; on the background loop only. Closing it aborts."""
        failure = self._failure or (self._of and self._of._failure)
        if failure:
            raise failure
        assert self._engine is not None
        with self._errors():
            request = self._engine.llm.generate(
                {"prompt_token_ids": list(ids)}, params, f"bon-{next(self._ids)}", lora_request=self._lora
            )
            async with aclosing(request) as outputs:
                async for output in outputs:
                    yield output

    async def pool(self, ids: Sequence[int], params: Any) -> Any:
        """vLLM's output for tokens of a pooling model; on the background loop only."""
        if self._failure is not None:
            raise self._failure
        assert self._engine is not None
        with self._errors():
            outputs = self._engine.llm.encode({"prompt_token_ids": list(ids)}, params, f"bon-{next(self._ids)}")
            return [output async for output in outputs][-1]

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

    def _params(self, request: Request, ids: Sequence[int], sample: int, keep: Keep | None) -> Any:
        """vLLM's sampling parameters of one sample."""
        sampling, extra = request.sampling, dict(request.sampling.extra)
        drawing = sampling.drawing_on(self._drawing)
        if self._penalty is not None and drawing.temperature > 0:
            extra.setdefault(PENALTY, self._penalty)
        refuse_unknown("sampling option of the vllm engine", extra, EXTRA)
        ends = [] if extra.get("ignore_eos") else sorted(self.renderer.end_ids)
        extra["stop_token_ids"] = [*ends, *extra.get("stop_token_ids", ())]
        interval = None
        if sampling.stop:
            interval = 1
        elif keep:
            interval = KEEP_EVERY
        elif request.n > 1 and sample == request.first_sample:
            interval = _ONLY_THE_FIRST_TOKEN  # so that it is known what of the prompt was cached when another one ends
        with self._errors():
            if isinstance(extra.get("structured_outputs"), Mapping):
                known = [f.name for f in dataclasses.fields(StructuredOutputsParams) if f.init]
                refuse_unknown("kind of structured output", extra["structured_outputs"], known)
                extra["structured_outputs"] = StructuredOutputsParams(**extra["structured_outputs"])
            return SamplingParams(
                **drawing._asdict(),
                max_tokens=max(1, min(sampling.max_tokens, self.max_model_len - len(ids))),
                seed=None if sampling.seed is None else _seed(sampling.seed, ids, sample),
                logprobs=0 if sampling.logprobs else None,
                flat_logprobs=sampling.logprobs,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA if interval else RequestOutputKind.FINAL_ONLY,
                stream_interval=interval,
                **extra,
            )


def _seed(seed: int, prompt: Sequence[int], sample: int) -> int:
    """A seed of its own for every sample; neighbouring seeds of the user share none."""
    content = f"{seed} {sample} {','.join(map(str, prompt))}"
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest()) >> 1


def _request(adapter: Adapter) -> Any:
    """An adapter as vLLM's request; by its digest vLLM tells it from every other."""
    return LoRARequest(f"{adapter.folder.name}-{adapter.digest}", int(adapter.digest[:7], 16) + 1, str(adapter.folder))


def _lora_options(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What vLLM has to be told before it can run these."""
    if not adapters:
        return {}
    rank = max(adapter.rank for adapter in adapters)
    allowed = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
    # Unless the layers are named, the logits have room for an adapter too, and vLLM's CPU build dies of the
    # log-probabilities of several prompts at a time (einsum: it takes rows of logits for sequences).
    modules = sorted(set[str]().union(*(adapter.modules for adapter in adapters)))
    return {
        "enable_lora": True,
        "max_lora_rank": allowed,
        "max_loras": len(adapters),
        "lora_target_modules": modules,
    }
