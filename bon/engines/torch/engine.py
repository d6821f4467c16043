"""The embedded engine: any decoder-only Hugging Face model through transformers, on a CPU or a GPU.

Everything that a call asks for runs in fused batches: all samples of all prompts decode in step, and rows that end
leave the batch. The model runs in one worker thread; the event loop gets each completion the moment it ends. One call
at a time holds the model, others wait. It runs no encoder-decoder model and spreads no model over several devices.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import os
import secrets
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bon.engines.base import MOST_DRAFT, Completion, Keep, Loglikelihood, Prompt
from bon.engines.loading import load
from bon.engines.text.render import Renderer
from bon.engines.torch.decode import MAX_ROWS, Batch, Job, batches
from bon.engines.torch.paths import Paths
from bon.engines.torch.rows import Stats
from bon.errors import BonError, EngineError, InputError, PromptTooLongError, UnknownNameError
from bon.types import Sampling

_MEMORY_SHARE = 0.25  # of main memory, or of what is free on the GPU, for keys and values
_MOST_BATCH_TOKENS = 1 << 19
_PADDING = 0.1  # share of the tokens of a rating batch that may be padding
_LOGIT_BYTES = 1 << 28  # logits of one rating batch, and of the drafts of one decoding batch


class TorchEngine:
    """A language model in this process.

    Args:
        model: a folder or a Hugging Face name.
        device: "cpu", "cuda", ...; None takes CUDA where there is one.
        dtype: "auto", "float32", "bfloat16", ...; None means float32 on a CPU and bfloat16 on CUDA.
        chat_template_kwargs: passed to the chat template, for instance ``{"enable_thinking": False}``.
        max_model_len: tokens of prompt and completion together; None takes the model's own limit.
        max_batch_tokens: tokens whose keys and values one batch may hold; longer work is split. None takes what fits a
            quarter of the memory.
        revision: branch, tag or commit of a Hugging Face name.
        trust_remote_code: whether the model may bring its own code.
        share_prefix: compute and store what prompts have in common once. Models for which that does not work take the
            plain path in any case, and a log line says so.

    Attributes:
        stats: what was computed and stored so far.
        renderer: messages to token ids and back.

    Raises:
        UnknownNameError: an option that does not exist.
        ModelNotFoundError: the model is neither on disk nor can be fetched.
        InputError: not a decoder-only model, or a value out of range.
    """

    overlaps = False

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_model_len: int | None = None,
        max_batch_tokens: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        share_prefix: bool = True,
        **unknown: Any,
    ) -> None:
        for option in unknown:
            known = [p.name for p in inspect.signature(TorchEngine).parameters.values() if p.kind is p.KEYWORD_ONLY]
            raise UnknownNameError("option of the torch engine", option, known)
        for option, value in (("max_model_len", max_model_len), ("max_batch_tokens", max_batch_tokens)):
            if value is not None and (not isinstance(value, int) or value < 2):
                raise InputError(f"{option} must be a whole number of tokens, got {value!r}.")
        self.name = str(model)
        self._model, tokenizer = load(
            model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        config = self._model.config.get_text_config(decoder=True)
        self.renderer = Renderer(tokenizer, chat_template_kwargs, eos_ids=_eos_ids(self._model))
        self.max_model_len = _context(config, max_model_len)
        self.max_batch_tokens = max_batch_tokens or _affordable_tokens(config, self._model)
        self.stats = Stats()
        self._paths = Paths(self._model, share_prefix, self.stats)
        self._vocabulary = int(config.vocab_size)
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="bon-torch")
        self._calls: weakref.WeakSet[threading.Event] = weakref.WeakSet()
        self._closed = False

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1, *, keep: Keep | None = None
    ) -> AsyncIterator[Completion]:
        """Sample n completions of each prompt in one fused batch; see ``Engine.generate``.

        The same seed gives the same completion of a prompt whatever else is in the call, up to rounding of the
        model's arithmetic. Log-probabilities are the model's own, before temperature and filters.
        """
        if n < 1:
            raise InputError(f"n must be at least 1, got {n}.")
        for option in sampling.extra:
            raise UnknownNameError("sampling option of the torch engine", option, [])
        return self._stream(lambda emit, stop: self._sample(prompts, sampling, n, keep, emit, stop))

    async def loglikelihood(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, end: bool = True
    ) -> list[Loglikelihood]:
        """Rate continuations by prefill alone; see ``Engine.loglikelihood``."""
        if len(prompts) != len(continuations):
            raise InputError(f"there are {len(prompts)} prompts and {len(continuations)} continuations.")
        results = self._stream(lambda emit, stop: self._rate(prompts, continuations, end, emit, stop))
        rated: dict[int, Loglikelihood] = {index: value async for index, value in results}
        return [rated[i] for i in range(len(prompts))]

    async def aclose(self) -> None:
        """Stop what is running after its current step and free the model."""
        self._closed = True
        for call in list(self._calls):
            call.set()
        await asyncio.to_thread(self._worker.shutdown, cancel_futures=True)
        self._model = None

    async def _stream(self, work: Callable[[Callable[[Any], None], threading.Event], None]) -> AsyncIterator[Any]:
        """Run ``work`` in the worker thread and yield what it emits; leaving the iterator stops it."""
        if self._closed:
            raise EngineError(f"the engine {self.name!r} is closed.")
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Any] = asyncio.Queue()
        stop = threading.Event()

        def emit(item: Any) -> None:
            try:
                loop.call_soon_threadsafe(queue.put_nowait, item)
            except RuntimeError:  # the event loop is gone: nobody listens any more
                stop.set()

        def run() -> None:
            outcome: object = _DONE
            try:
                with torch.inference_mode(), self._errors():
                    work(emit, stop)
            except BaseException as error:
                outcome = error
            if self._closed and not isinstance(outcome, BaseException):
                outcome = EngineError(f"the engine {self.name!r} was closed.")
            emit(outcome)

        self._calls.add(stop)
        future = self._worker.submit(run)
        future.add_done_callback(lambda f: emit(EngineError("the engine was closed.")) if f.cancelled() else None)
        try:
            while (item := await queue.get()) is not _DONE:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            future.cancel()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what torch raises into errors that say what to change."""
        try:
            yield
        except BonError:
            raise
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            text = str(error)
            if not isinstance(error, RuntimeError) or "out of memory" in text or "can't allocate memory" in text:
                raise EngineError(
                    f"{self.name!r} ran out of memory. Lower max_batch_tokens (now {self.max_batch_tokens}), "
                    "max_tokens or n, or take a smaller model."
                ) from error
            raise EngineError(f"{self.name!r} failed: {text.splitlines()[0] if text else error!r}") from error

    def _sample(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        n: int,
        keep: Keep | None,
        emit: Callable[[Any], None],
        stop: threading.Event,
    ) -> None:
        rendered = [self.renderer.render(p) for p in prompts]
        self._check_lengths([len(ids) for ids in rendered], 1, "prompt")
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        jobs = [
            Job(i, ids, range(n), self._room(len(ids), sampling.max_tokens), 0 if sampling.seed is not None else i)
            for i, ids in enumerate(rendered)
        ]
        if n == 1 and sampling.temperature == 0:
            jobs = [replace(job, draft=self._draft(prompts[job.index], job.limit, len(jobs))) for job in jobs]
        path = self._paths.choose(rendered, max((len(j.ids) + j.limit for j in jobs), default=0))
        for batch in batches([jobs[i] for i in path.order], self.max_batch_tokens, path.cost):
            if stop.is_set():
                return
            Batch(path.rows(), batch, self.renderer, sampling, seed, keep).run(emit, stop)

    def _rate(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[str],
        end: bool,
        emit: Callable[[Any], None],
        stop: threading.Event,
    ) -> None:
        last = () if not end or self.renderer.end_id is None else (self.renderer.end_id,)
        contexts = [self.renderer.render(p) for p in prompts]
        targets = [(*self.renderer.encode(text), *last) for text in continuations]
        lengths = [len(a) + len(b) for a, b in zip(contexts, targets, strict=True)]
        self._check_lengths(lengths, 0, "prompt and continuation")
        rated = [i for i, target in enumerate(targets) if target]
        for i in set(range(len(prompts))) - set(rated):
            emit((i, Loglikelihood(0.0, 0, len(contexts[i]))))
        path = self._paths.choose([contexts[i] for i in rated], max(lengths, default=0))
        for batch in self._rating_batches([rated[i] for i in path.order], lengths, targets, path.pads):
            if stop.is_set():
                return
            rows = path.rows()
            totals = rows.rate([contexts[i] for i in batch], [targets[i] for i in batch])
            for at, i in enumerate(batch):
                emit((i, Loglikelihood(totals[at], len(targets[i]), len(contexts[i]), rows.cached[at])))

    def _rating_batches(
        self, order: Sequence[int], lengths: Sequence[int], targets: Sequence[Sequence[int]], pads: bool
    ) -> Iterator[list[int]]:
        """Neighbours in ``order`` together while the tokens and logits of a batch, and its padding, stay small."""
        batch: list[int] = []
        real = wanted = 0
        for i in order:
            real, wanted = real + lengths[i], wanted + len(targets[i])
            tokens, positions = real, wanted
            if pads:
                tokens = (len(batch) + 1) * max(lengths[j] for j in (*batch[-1:], i))
                positions = (len(batch) + 1) * max(len(targets[j]) for j in (*batch, i))
            large = tokens > self.max_batch_tokens or 4 * self._vocabulary * positions > _LOGIT_BYTES
            if batch and (large or tokens - real > _PADDING * tokens):
                yield batch
                batch, real, wanted = [], lengths[i], len(targets[i])
            batch.append(i)
        if batch:
            yield batch

    def _check_lengths(self, lengths: Sequence[int], spare: int, what: str) -> None:
        """Refuse what does not fit the context with ``spare`` tokens left."""
        limit = None if self.max_model_len is None else self.max_model_len - spare
        if limit is not None and (too_long := [i for i, length in enumerate(lengths) if length > limit]):
            where = f"{what} {too_long[0]}" if len(lengths) > 1 else f"the {what}"
            raise PromptTooLongError(lengths[too_long[0]], limit, where, too_long)

    def _draft(self, prompt: Prompt, limit: int, rows: int) -> tuple[int, ...]:
        """As much of a prompt's draft as leaves room for a token and keeps the logits of all rows small."""
        if not prompt.draft:
            return ()
        affordable = _LOGIT_BYTES // (4 * self._vocabulary * min(rows, MAX_ROWS))
        return self.renderer.encode(prompt.draft)[: min(MOST_DRAFT, limit - 1, affordable)]

    def _room(self, prompt: int, wanted: int) -> int:
        return wanted if self.max_model_len is None else min(wanted, self.max_model_len - prompt)


_DONE = object()


def _eos_ids(model: Any) -> tuple[int, ...]:
    """End tokens of the generation config, which may name none, one or several."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),)


def _context(config: Any, wanted: int | None) -> int | None:
    own = getattr(config, "max_position_embeddings", None)
    if own is None:
        return wanted
    if wanted is not None and wanted > own:
        raise InputError(f"max_model_len is {wanted}, but the model's own limit is {own} tokens.")
    return int(wanted or own)


def _affordable_tokens(config: Any, model: Any) -> int:
    """Tokens whose keys and values fit the share of the memory that one batch may take."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info(model.device)[0]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1024, min(_MOST_BATCH_TOKENS, int(_MEMORY_SHARE * memory / per_token)))
