"""The embedded engine: any decoder-only Hugging Face model through transformers, on a CPU or a GPU.

Everything that a call asks for runs in fused batches: all samples of all prompts decode in step, rows that end leave
the batch, and what waits takes their places. The model runs in one worker thread; the event loop gets each completion
the moment it ends. One call at a time holds the model, and others wait, but for calls of ``generate`` that draw tokens
in the same way: they join. It runs no encoder-decoder model and spreads no model over several devices.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bon.engines.base import (
    MOST_DRAFT,
    Completion,
    Keep,
    Loglikelihood,
    Partial,
    Prompt,
    Reading,
    Request,
    check_pairs,
    too_long,
)
from bon.engines.defaults import own_drawing
from bon.engines.loading import load
from bon.engines.lora import Change, added, named_adapter
from bon.engines.memory import available_bytes, give_back, kv_bytes_per_token, out_of_memory
from bon.engines.text.render import Renderer
from bon.engines.torch.decode import Batch, Job, KeepAll, Source
from bon.engines.torch.pack import pack
from bon.engines.torch.paths import Paths
from bon.engines.torch.prefix.shared import Store
from bon.engines.torch.reading import fingerprint, in_batches, read
from bon.engines.torch.rows import Measure, Rows, Run, Stats, confidence, token_logprobs
from bon.engines.torch.threads import choose_threads
from bon.engines.torch.worker import Call, StoppedError, Worker
from bon.errors import BonError, EngineError, InputError, UnknownNameError, whole_number
from bon.mini import shown_name
from bon.types import Drawing

_MEMORY_SHARE = 0.25  # of the memory that is free once the weights are there, for keys and values
_MOST_ON_CPU = 3 << 27  # bytes of keys and values, or half of the weights: more rows make a CPU no faster
_MOST_BATCH_TOKENS = 1 << 19
_KEPT = 0.25  # share of the tokens of a batch that may be prompts of which more samples will be asked
_PADDING = 0.1  # share of the tokens of a rating batch that may be padding
_RATED_PASSES = 8  # of one rating batch: contexts that several of its prompts share are kept meanwhile
_PASS = {"cpu": (24 << 20, 1 << 26), "cuda": (1 << 29, 1 << 28)}  # bytes of one pass: in a layer, and of logits
_PASS_TOKENS = (512, 1 << 14)  # at least, so that a pass is worth its overhead; and at most


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a call of ``generate`` wants.

    Args:
        engine: which was called; a view runs with its own adapter.
        requests, keep: see ``Generates.generate``.
        drawings: the ways in which the requests draw tokens.
    """

    engine: TorchEngine
    requests: Sequence[Request]
    keep: Keep | None
    drawings: set[Drawing]

    @property
    def continued(self) -> bool:
        """Whether more samples of a prompt will be asked."""
        return any(request.continued for request in self.requests)


class TorchEngine:
    """A language model in this process.

    Args:
        model: a folder, a GGUF file, or a name: a Hugging Face one, or one that ``bon fetch`` knows.
        device: "cpu", "cuda", ...; None takes CUDA where there is one.
        dtype: "auto", "float32", "bfloat16", ...; None means float32 on a CPU and bfloat16 on CUDA.
        chat_template: what to use in place of the tokenizer's own template: Jinja text, or the file that holds it.
        chat_template_kwargs: passed to the chat template, for instance ``{"enable_thinking": False}``.
        max_model_len: tokens of prompt and completion together; None takes the model's own limit.
        max_batch_tokens: tokens whose keys and values one batch may hold; longer work is split. None takes what fits a
            quarter of the memory that is free, on a CPU no more than 384 MiB or half of what the weights take.
        threads: of the arithmetic on a CPU; None follows the rule of ``bon.engines.torch.threads``.
        revision: branch, tag or commit of a Hugging Face name.
        trust_remote_code: whether the model may bring its own code.
        share_prefix: compute and store what prompts have in common once. Models for which that does not work take the
            plain path in any case, and a log line says so.

    Attributes:
        stats: what was computed and stored so far.
        renderer: messages to token ids and back.
        fingerprint, layers: see ``Reads``.
        adapter: digest of the LoRA adapter that ``adapted`` added, or "".

    Raises:
        UnknownNameError: an option that does not exist.
        ModelNotFoundError: the model is neither on disk nor can be fetched.
        InputError: not a decoder-only model, or a value out of range.
    """

    concurrent = False
    queues = True

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        chat_template: str | Path | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_model_len: int | None = None,
        max_batch_tokens: int | None = None,
        threads: int | None = None,
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
        if threads is not None:
            whole_number("threads", threads, 1)
        self.name = shown_name(model)
        self._model, tokenizer = load(
            model, device=device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        self._device = self._model.device
        config = self._model.config.get_text_config(decoder=True)
        self.renderer = Renderer(
            tokenizer, chat_template_kwargs, chat_template=chat_template, eos_ids=_eos_ids(self._model)
        )
        self._drawing, _ = own_drawing(self.name, _generation_config(self._model), penalises=False)
        self.max_model_len = context_of(config, max_model_len)
        self.max_batch_tokens = max_batch_tokens or _affordable_tokens(config, self._model)
        self.layers = int(config.num_hidden_layers)
        self.fingerprint = self._base = fingerprint(self._model, self.renderer.fingerprint)
        pack(self._model)
        self.stats = Stats()
        self._store = Store(int(_KEPT * self.max_batch_tokens))
        self._pass = pass_limits(config, self._model)
        self._paths = Paths(Run(self._model, self.stats, *self._pass), share_prefix)
        on_cpu = self._device.type == "cpu"
        wanted = (threads or choose_threads()) if on_cpu else torch.get_num_threads()
        self._worker = Worker(self.name, lambda: torch.set_num_threads(wanted))  # holds for the thread that calls it
        self.adapter = ""
        self._changes: list[Change] | None = None  # what the adapter of a view adds

    def adapted(self, folder: str | Path) -> TorchEngine:
        """The same model with a LoRA adapter; see ``Adapts``.

        All share the weights and the worker thread, where calls run one after the other, so no call of one sees the
        adapter of another. The adapter's products are computed beside the layers' own, which takes a tenth to a third
        longer; the adapter's folder as the model merges it, with weights of its own.
        """
        adapter = named_adapter(folder)
        adapter.check_base(self.name, self._base)
        view = copy.copy(self)
        view._changes = [
            Change(module, *(part.to(self._model.device, self._model.dtype) for part in parts))
            for module, *parts in adapter.changes(self._model)
        ]
        view.name = f"{self.name}+{adapter.folder.name}"
        view.adapter = adapter.digest
        view._store = Store(int(_KEPT * self.max_batch_tokens))
        view.fingerprint = f"{self._base}+{view.adapter}"
        return view

    def generate(self, requests: Sequence[Request], *, keep: Keep | None = None) -> AsyncGenerator[Completion, None]:
        """Sample completions; see ``Generates.generate``.

        Requests that draw tokens in the same way (temperature, top-p, top-k and min-p) run in one fused batch. Under a
        seed a completion is the same whatever runs beside it, up to rounding of the model's arithmetic.
        Log-probabilities are the model's own, before temperature and filters. ``keep`` is called in the event loop.
        """
        for option in (option for request in requests for option in request.sampling.extra):
            raise UnknownNameError("sampling option of the torch engine", option, [])
        asked = _Asked(self, requests, keep, {request.sampling.drawing_on(self._drawing) for request in requests})
        return self._stream(lambda call: self._sample(asked, call), asked)

    async def loglikelihood(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, end: bool = True
    ) -> list[Loglikelihood]:
        """Rate continuations by prefill alone; see ``Rates.loglikelihood``."""
        return await self._rated(prompts, continuations, end, token_logprobs)

    async def confidence(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, top: int | None = None
    ) -> list[Loglikelihood]:
        """How sure the model is of continuations, by prefill alone; see ``Weighs.confidence``."""
        return await self._rated(prompts, continuations, False, partial(confidence, top=top))

    async def _rated(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], end: bool, measure: Measure
    ) -> list[Loglikelihood]:
        check_pairs(prompts, continuations)
        results = self._stream(lambda call: self._rate(prompts, continuations, end, measure, call))
        rated: dict[int, Loglikelihood] = {index: value async for index, value in results}
        return [rated[i] for i in range(len(prompts))]

    async def hidden_states(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, layers: Sequence[int]
    ) -> list[Reading]:
        """Read responses by prefill alone, each with a context of its own; see ``Reads.hidden_states``."""
        check_pairs(prompts, responses)
        for layer in layers:
            if not 0 <= layer <= self.layers:
                raise InputError(f"{self.name!r} has the layers 0 to {self.layers}, and no layer {layer}.")
        results = self._stream(lambda call: self._read(prompts, responses, layers, call))
        found: dict[int, Reading] = {index: value async for index, value in results}
        return [found[i] for i in range(len(prompts))]

    async def aclose(self) -> None:
        """Stop what is running after its current step and free the model; a view frees nothing but its adapter."""
        if self._changes is not None:
            self._model, self._changes = None, []
            self._store.clear()
            return
        await self._worker.aclose()
        self._paths.close()
        self._store.clear()
        self._model = None
        give_back()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the next model, or another process, may need it

    @property
    def _less(self) -> str:
        return f"max_batch_tokens (now {self.max_batch_tokens}), max_tokens or n"

    def _stream(self, work: Callable[[Call], None], plan: Any = None) -> AsyncGenerator[Any, None]:
        def run(call: Call) -> None:
            if self._model is None:
                raise EngineError(f"the engine {self.name!r} is closed.")
            with torch.inference_mode(), torch_errors(self.name, self._less), added(self._changes or []):
                work(call)

        return self._worker.stream(run, plan)

    def _sample(self, asked: _Asked, call: Call) -> None:
        """Run what a call wants sampled; calls that wait behind it and draw in the same way run along."""
        rendered, groups = self._grouped(asked, call)
        for drawing, group in groups.items():
            last = drawing == [*groups][-1]
            sources: list[Source] = []

            def check(sources: list[Source] = sources) -> None:
                if all(source.stopped() for source in sources):
                    raise StoppedError

            sources.append(own := self._source(asked, call, rendered, drawing, group, check, last=last))
            kept = self._store.most if asked.continued else self._store.tokens
            joining = partial(self._joining, asked, drawing, check) if last and self._paths.unlimited else None
            try:
                while own.jobs:
                    with torch_errors(self.name, self._less):
                        Batch(sources, self.max_batch_tokens - kept, self.renderer, drawing, joining).run()
            except BaseException as error:
                for source in sources:
                    source.fail(error)
                raise

    def _joining(self, asked: _Asked, drawing: Drawing, check: Callable[[], object]) -> Source | None:
        """What the call wants that waits first, where it can run along with what another asked for."""

        def fits(plan: Any) -> bool:
            alike = isinstance(plan, _Asked) and plan.engine is self and plan.drawings == {drawing}
            return alike and plan.continued <= asked.continued  # there is room for prompts that are kept, or is not

        while (call := self._worker.along(fits)) is not None:
            failure = None
            try:
                with torch_errors(self.name, self._less):
                    rendered, groups = self._grouped(call.plan, call)
                    for group in groups.values():
                        return self._source(call.plan, call, rendered, drawing, group, check, last=True)
            except Exception as error:
                failure = error
            self._worker.end(call, failure)  # there is nothing to sample
        return None

    def _grouped(self, asked: _Asked, call: Call) -> tuple[list[tuple[int, ...]], dict[Drawing, list[int]]]:
        """Token ids of the prompts of a call, and which requests draw in the same way; those too long have failed."""
        requests = asked.requests
        rendered = [self.renderer.render(request.prompt) for request in requests]
        limit = None if self.max_model_len is None else self.max_model_len - 1
        errors = too_long(list(map(len, rendered)), limit, "prompt")
        for i, error in errors.items():
            for sample in requests[i].samples:
                call.emit(Completion.failed(i, sample, error))
        groups: dict[Drawing, list[int]] = {}
        for i, request in enumerate(requests):
            if i not in errors:
                groups.setdefault(request.sampling.drawing_on(self._drawing), []).append(i)
        return rendered, groups

    def _source(
        self,
        asked: _Asked,
        call: Call,
        rendered: Sequence[tuple[int, ...]],
        drawing: Drawing,
        group: Sequence[int],
        check: Callable[[], object],
        *,
        last: bool,
    ) -> Source:
        """The requests of a call that draw in one way; with the ``last`` of them the call ends."""
        requests = asked.requests
        drafts = drawing.temperature == 0 and all(requests[i].n == 1 for i in group)
        jobs = [self._job(i, requests[i], rendered[i], drafts) for i in group]
        path = self._paths.choose([job.ids for job in jobs], max(len(job.ids) + job.limit for job in jobs), check)

        def fresh(some: Sequence[Job]) -> Rows:
            return path.rows(self._store, keep=any(requests[job.index].continued for job in some))

        def fail(error: BaseException) -> None:
            self._worker.end(call, error)

        return Source(
            deque(jobs[at] for at in path.order),
            fresh,
            path.cost,
            call.emit,
            None if asked.keep is None else _in_event_loop(asked.keep, call),
            lambda: call.stopped,
            (lambda: self._worker.end(call)) if last else (lambda: None),
            fail,
        )

    def _job(self, index: int, request: Request, ids: tuple[int, ...], drafts: bool) -> Job:
        sampling = request.sampling
        room = sampling.max_tokens
        if self.max_model_len is not None:
            room = min(room, self.max_model_len - len(ids))
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        draft = self.renderer.encode(request.prompt.draft)[: min(MOST_DRAFT, room - 1)] if drafts else ()
        return Job(index, ids, request.samples, room, seed, sampling.stop, draft)

    def _rate(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], end: bool, measure: Measure, call: Call
    ) -> None:
        last = () if not end or self.renderer.end_id is None else (self.renderer.end_id,)
        contexts = [self.renderer.render(p) for p in prompts]
        targets = [(*self.renderer.encode(text), *last) for text in continuations]
        lengths = [len(a) + len(b) for a, b in zip(contexts, targets, strict=True)]
        errors = too_long(lengths, self.max_model_len, "prompt and continuation")
        rated = [i for i, target in enumerate(targets) if target and i not in errors]
        for i in set(range(len(prompts))) - set(rated):
            failed = Loglikelihood.failed(errors[i]) if i in errors else Loglikelihood(0.0, 0, len(contexts[i]))
            call.emit((i, failed))
        path = self._paths.choose([contexts[i] for i in rated], max((lengths[i] for i in rated), default=0), call.check)
        wanted = [len(target) for target in targets]
        own = dict(zip(rated, path.own, strict=True))
        fresh = [own.get(i, 0) + wanted[i] for i in range(len(prompts))]
        for batch in self._rating_batches([rated[i] for i in path.order], fresh, lengths, wanted, path.pads):
            rows = path.rows()
            totals = rows.rate([contexts[i] for i in batch], [targets[i] for i in batch], measure)
            for at, i in enumerate(batch):
                call.emit((i, Loglikelihood(totals[at], len(targets[i]), len(contexts[i]), rows.cached[at])))

    def _rating_batches(
        self, order: Sequence[int], own: Sequence[int], lengths: Sequence[int], wanted: Sequence[int], pads: bool
    ) -> Iterator[list[int]]:
        """Neighbours in ``order`` together while the batch stays small.

        Args:
            order: which to rate, in which order.
            own: tokens that the neighbour before has not, with those of the continuation.
            lengths: tokens of prompt and continuation.
            wanted: tokens of the continuation.
            pads: whether rows are padded: then a batch is one pass through the model, with little padding.
        """
        most, positions = self._pass
        batch: list[int] = []
        real = longest = asked = 0  # tokens in sum, of the longest, and of the longest continuation
        for i in order:
            real, longest, asked = real + own[i], max(longest, lengths[i]), max(asked, wanted[i])
            large = real > min(self.max_batch_tokens, _RATED_PASSES * most)
            if pads:
                rows = len(batch) + 1
                tokens = rows * longest
                large = tokens > min(most, self.max_batch_tokens) or tokens - real > _PADDING * tokens
                large |= rows * asked > positions
            if batch and large:
                yield batch
                batch, real, longest, asked = [], own[i], lengths[i], wanted[i]
            batch.append(i)
        if batch:
            yield batch

    def _read(self, prompts: Sequence[Prompt], responses: Sequence[str], layers: Sequence[int], call: Call) -> None:
        contexts = [self.renderer.render(prompt) for prompt in prompts]
        answers = [self.renderer.encode(text) for text in responses]
        lengths = [len(a) + len(b) for a, b in zip(contexts, answers, strict=True)]
        errors: dict[int, BonError] = {**too_long(lengths, self.max_model_len, "prompt and response")}
        errors |= {i: InputError("the response has no tokens.") for i, answer in enumerate(answers) if not answer}
        for i, error in errors.items():
            call.emit((i, Reading.failed(error)))
        self._paths.plain()
        rows = {i: (*contexts[i], *answers[i]) for i in range(len(prompts)) if i not in errors}
        for batch in in_batches(rows, min(self._pass[0], self.max_batch_tokens)):
            call.check()
            found = read(self._model, [rows[i] for i in batch], [len(contexts[i]) for i in batch], layers)
            for i, reading in zip(batch, found, strict=True):
                call.emit((i, reading))


@contextlib.contextmanager
def torch_errors(name: str, less: str) -> Iterator[None]:
    """Turn what torch raises into errors that say what to change.

    Args:
        name: of the engine.
        less: what to lower where memory runs out.
    """
    try:
        yield
    except BonError:
        raise
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise EngineError(f"{name!r} ran out of memory. Lower {less}, or take a smaller model.") from error
        text = str(error)
        raise EngineError(f"{name!r} failed: {text.splitlines()[0] if text else error!r}") from error


def _in_event_loop(keep: Keep, call: Call) -> KeepAll:
    """``keep`` for many completions at once, called in the caller's event loop: it needs no lock of its own."""

    def ask(partials: Sequence[Partial]) -> list[bool]:
        return call.ask(lambda: [keep(partial) for partial in partials])

    return ask


def _generation_config(model: Any) -> dict[str, Any]:
    """What a model's generation_config.json says."""
    config = getattr(model, "generation_config", None)
    return {} if config is None else dict(config.to_diff_dict())


def _eos_ids(model: Any) -> tuple[int, ...]:
    """End tokens of the generation config, which may name none, one or several."""
    eos = _generation_config(model).get("eos_token_id")
    return tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),)


def context_of(config: Any, wanted: int | None) -> int | None:
    """Tokens that fit: the model's own limit, or a smaller one that is wanted."""
    own = getattr(config, "max_position_embeddings", None)
    if own is None:
        return wanted
    if wanted is not None and wanted > own:
        raise InputError(f"max_model_len is {wanted}, but the model's own limit is {own} tokens.")
    return int(wanted or own)


def pass_limits(config: Any, model: Any) -> tuple[int, int]:
    """Tokens of one pass through the model, and positions whose logits it makes."""
    layer_bytes, logit_bytes = _PASS.get(model.device.type, _PASS["cuda"])
    width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner  # one for each layer, in some models
    # What a layer holds of a token at a time: three of the feed-forward's vectors, and some of the width.
    per_token = (3 * inner + 8 * width) * model.dtype.itemsize
    tokens = min(max(layer_bytes // per_token, _PASS_TOKENS[0]), _PASS_TOKENS[1])
    return tokens, max(MOST_DRAFT + 1, logit_bytes // (4 * int(config.vocab_size)))


def _affordable_tokens(config: Any, model: Any) -> int:
    """Tokens whose keys and values fit the share of the memory that one batch may take."""
    per_token = kv_bytes_per_token(config, model.dtype.itemsize)
    free, most = available_bytes(), max(_MOST_ON_CPU, model.get_memory_footprint() // 2)
    if model.device.type == "cuda":
        free = most = torch.cuda.mem_get_info(model.device)[0]
    return max(1024, min(_MOST_BATCH_TOKENS, int(min(_MEMORY_SHARE * free, most) / per_token)))
