"""A model in this process that reads each text once, by prefill alone: loading, limits, and a thread of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from bon.engines.loading import load
from bon.engines.memory import give_back
from bon.engines.torch.engine import context_of, pass_limits, torch_errors
from bon.engines.torch.threads import choose_threads
from bon.engines.torch.worker import Call, Worker
from bon.errors import whole_number
from bon.mini import shown_name

Item = TypeVar("Item")


class OnePass:
    """What reward models and embedding models have in common.

    Args:
        model, device, dtype, threads, revision, trust_remote_code: as ``TorchEngine``.
        make: see ``load``.
        max_model_len: tokens of a text; None takes the lesser of the model's and the tokenizer's own limit.
        max_batch_tokens: tokens of one pass, padding included; None takes what keeps the layers' memory small.

    Raises:
        ModelNotFoundError: the model is neither on disk nor can be fetched.
        InputError: what ``make`` says, or a value out of range.
    """

    concurrent = False
    queues = True

    def __init__(
        self,
        model: str | Path,
        make: Callable[..., Any],
        *,
        max_model_len: int | None,
        max_batch_tokens: int | None,
        threads: int | None,
        **options: Any,
    ) -> None:
        limits = {"max_model_len": max_model_len, "max_batch_tokens": max_batch_tokens, "threads": threads}
        for option, value in limits.items():
            if value is not None:
                whole_number(option, value, 1)
        self.name = shown_name(model)
        self._model, self._tokenizer = load(model, make=make, **options)
        self._config = self._model.config.get_text_config()
        self._accepted = inspect.signature(self._model.forward).parameters
        most = (context_of(self._config, max_model_len), None if max_model_len else self._tokenizer.model_max_length)
        self.max_model_len: int | None = min((limit for limit in most if limit is not None), default=None)
        self.max_batch_tokens: int = max_batch_tokens or pass_limits(self._config, self._model)[0]
        on_cpu = self._model.device.type == "cpu"
        wanted = (threads or choose_threads()) if on_cpu else torch.get_num_threads()
        self._worker = Worker(self.name, lambda: torch.set_num_threads(wanted))

    async def _each(self, items: Sequence[Item], read: Callable[[Sequence[Item], Call], None]) -> list[Any]:
        """What ``read`` emits as (index, it) for each item, in order; it runs on the model's own thread."""

        def run(call: Call) -> None:
            with torch.inference_mode(), torch_errors(self.name, f"max_batch_tokens (now {self.max_batch_tokens})"):
                read(items, call)

        found = {index: one async for index, one in self._worker.stream(run)}
        return [found[index] for index in range(len(items))]

    async def aclose(self) -> None:
        """Stop what is running after its current pass and free the model."""
        await self._worker.aclose()
        self._model = None
        give_back()
        torch.cuda.empty_cache()
