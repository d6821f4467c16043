"""The engine contract: what a language model behind bon can do, each ability a small protocol of its own.

An engine has a name, a context and ``aclose``; beyond that ``Generates`` samples completions, ``Rates`` gives
log-probabilities of given ones, ``Weighs`` how they are spread over the vocabulary, ``Classifies`` the logits of a
classification head, ``Embeds`` texts as vectors and ``Reads`` hidden states. Which of them an engine has is found by
``isinstance``, never by trying. Nothing here imports torch, vllm or an HTTP client.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from bon.errors import BonError, InputError, PromptTooLongError
from bon.task import Message, openai_message
from bon.types import FinishReason, Sampling, Tokens

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
        about_tools: calls of tools, whose result it is, or a content with images, in OpenAI's format; for engines that
            send messages on.
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


def developer_as_system(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turns for a model that knows no developers."""
    return tuple(replace(turn, role="system") if turn.role == "developer" else turn for turn in turns)


def fold_system(turns: Sequence[Turn]) -> tuple[Turn, ...] | None:
    """Put the system text in front of the first user turn; None where there is nothing to fold."""
    system: tuple[Piece, ...] = tuple(p for t in turns if t.role == "system" for p in (*t.pieces, "\n\n"))
    rest = [t for t in turns if t.role != "system"]
    first = next((i for i, t in enumerate(rest) if t.role == "user"), None)
    if not system or first is None:
        return None
    user = rest[first]
    merged = replace(user, pieces=(*system, *user.pieces))
    if images := user.about_tools.get("content"):
        text = {"type": "text", "text": Turn("system", system).text}
        merged = replace(merged, about_tools={**user.about_tools, "content": [text, *images]})
    return (*rest[:first], merged, *rest[first + 1 :])


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an engine continues.

    Args:
        turns: the conversation so far; a last one of the assistant is continued.
        template: variables for the chat template, such as ``{"enable_thinking": False}``; they take precedence over
            those that the engine was built with, so that one engine can think as a policy and not as a scorer.
        draft: a guess at the completion. At temperature 0 an engine may read it along with the prompt, keep the tokens
            that it would have chosen itself and decode from where its own choice departs, which is one pass instead of
            one for each token. It changes what a completion costs, never what it is (up to rounding of the model's
            arithmetic), and an engine may ignore it.
        open: the last turn is continued whoever's it is, so that a model may write what a user would.
    """

    turns: tuple[Turn, ...]
    template: Mapping[str, Any] = field(default_factory=dict)
    draft: str = ""
    open: bool = False

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Prompt:
        """Messages as a prompt, each content one piece."""
        return cls(tuple(Turn(m.role, (m.content,), m.about_tools) for m in messages))

    @property
    def prefilled(self) -> bool:
        """Whether the completion goes on from a turn that is there already: one of the assistant, or an open one."""
        return self.open or self.turns[-1].role == "assistant"

    def refuse_prefill(self, name: str) -> None:
        """Raise an InputError where the last turn is to be continued; for engines that cannot go on from there."""
        if self.prefilled:
            raise InputError(
                f"the last message is the {self.turns[-1].role}'s, and {name} cannot continue it; engines that run the "
                "model here can, and one behind HTTP whose tokenizer=... is named.",
                "messages",
            )

    def refuse_tools(self, name: str) -> None:
        """Raise an InputError where a turn has calls of tools, their results or images; for engines that read text."""
        for index, turn in enumerate(self.turns):
            if turn.about_tools:
                names = ["images" if field == "content" else field for field in turn.about_tools]
                raise InputError(
                    f"message {index} has {', '.join(names)}, and {name} reads only text; a policy behind HTTP may "
                    "read them (policy='http://...')."
                )


@dataclass(frozen=True, slots=True)
class Request:
    """Some samples of one prompt.

    Sample i of a prompt under a seed is the same however the samples are divided into requests, so a later request
    with ``first_sample=k`` continues one that asked for k samples.

    Args:
        prompt: what to continue.
        sampling: how.
        n: how many completions.
        first_sample: index of the first of them.
        together: whoever asks waits for all completions of the call, so an engine may bring them at once.
        continued: more samples of the prompt may be asked for later, so an engine may keep what it read of it.

    Raises:
        InputError: n < 1 or first_sample < 0.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    first_sample: int = 0
    together: bool = False
    continued: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.first_sample < 0:
            raise InputError(f"n must be at least 1 and first_sample at least 0, got {self.n} and {self.first_sample}.")

    @property
    def samples(self) -> range:
        """The sample indices that are asked for."""
        return range(self.first_sample, self.first_sample + self.n)


@dataclass(frozen=True, slots=True)
class Partial:
    """A completion under way, as ``keep`` sees it.

    Args:
        request_index, sample_index: which completion.
        text: what has been decoded so far; an unfinished multi-byte character is held back.
        completion_tokens: tokens so far.
    """

    request_index: int
    sample_index: int
    text: str
    completion_tokens: int


Keep = Callable[[Partial], bool]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A ``keep`` that looks at no text, so that an engine need not stream it.

    Args:
        check: whether the completions of a request, by its index, are still wanted.
    """

    check: Callable[[int], bool]

    def __call__(self, partial: Partial) -> bool:
        """Whether to go on with a completion."""
        return self.check(partial.request_index)


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion.

    Args:
        request_index: position of its request in the call.
        sample_index: which sample of the prompt, one of ``Request.samples``.
        text: decoded text without special tokens, cut before a stop string.
        finish_reason: "stop" (end token or stop string), "length" (max_tokens or context), "abort" (``keep`` said no),
            "error" (this one could not be made, others may be: it has no text, and ``error`` says why).
        tokens: the text's own token ids (special tokens and anything past a stop string removed), when the engine has
            them and they decode to the text.
        cumulative_logprob: sum of log p of the sampled tokens, the end token included, under the model itself
            (temperature 1, before top-p and the like), when the engine knows it; see ``Sampling.logprobs``.
        logprobs: the same, per sampled token.
        pieces: the text of each of these tokens, when the engine knows it; "" for special ones.
        prompt_tokens: tokens of the prompt that were read for this completion. Where the samples of a request share
            one reading (torch, vLLM), the first of them to end carries it and the others have 0; over HTTP every HTTP
            request reads the prompt. The sum over all completions is what was sent.
        completion_tokens: tokens sampled, the end token included.
        cached_tokens: of ``prompt_tokens``, those that were not computed, because another prompt had them in common.
        drafted_tokens: of the completion tokens, those that were read from the prompt's draft and not decoded.
        error: what went wrong; None unless finish_reason is "error".
        tool_calls: calls of tools in OpenAI's format, whose canonical form ends the text.
        reasoning: what the model thought, where a server separates it from the text.
        refusal: why the model will not answer, where a server says that apart from the text.
        top_logprobs: the likeliest tokens at each place, in OpenAI's format, where a server was asked for them.
    """

    request_index: int
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
    reasoning: str = ""
    refusal: str = ""
    top_logprobs: tuple[Sequence[Mapping[str, Any]], ...] = ()

    @classmethod
    def failed(cls, request_index: int, sample_index: int, error: BonError) -> Completion:
        """A completion that could not be made."""
        return cls(request_index, sample_index, "", "error", error=error)


@dataclass(frozen=True, slots=True)
class Loglikelihood:
    """How likely a model finds a continuation.

    Args:
        total: sum of log p(token | prompt and the tokens before it) over the continuation, in nats; NaN with an error.
        tokens: how many tokens that sum runs over.
        prompt_tokens: tokens of the prompt.
        cached_tokens: of these, those that were not computed, because another prompt had them in common.
        error: why it could not be rated (prompt and continuation do not fit the context); None when it was.
    """

    total: float
    tokens: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: BonError | None = None

    @classmethod
    def failed(cls, error: BonError) -> Loglikelihood:
        """A continuation that could not be rated."""
        return cls(math.nan, 0, error=error)

    @property
    def mean(self) -> float:
        """Log-probability per token, in nats; NaN where there is no token."""
        return self.total / self.tokens if self.tokens else math.nan


@dataclass(frozen=True, slots=True)
class Classification:
    """What a model with a classification head says of a conversation.

    Args:
        logits: raw logits, a row of one for each label: one row for the conversation, or one for each of its steps.
        prompt_tokens: tokens that were read.
        error: why it could not be classified (it does not fit the context); None when it was.
    """

    logits: tuple[tuple[float, ...], ...]
    prompt_tokens: int = 0
    error: BonError | None = None

    @classmethod
    def failed(cls, error: BonError) -> Classification:
        """A conversation that could not be classified."""
        return cls((), error=error)


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """What an embedding model makes of a text.

    Args:
        vector: shape (width,), float32, of whatever length.
        prompt_tokens: tokens that were read.
        error: why it could not be embedded (it does not fit the context); None when it was.
    """

    vector: npt.NDArray[np.float32]
    prompt_tokens: int = 0
    error: BonError | None = None

    @classmethod
    def failed(cls, error: BonError) -> Embedding:
        """A text that could not be embedded."""
        return cls(np.zeros(0, np.float32), error=error)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What a model holds of a response after it has read it.

    Args:
        pools: shape (layers, width), float32: of each layer that was asked for, the mean hidden state over the
            response's tokens.
        last: shape (width,), float32: the last layer's hidden state at the response's last token, which is what the
            model goes on from; at the end of the turn, a token that chat models are not trained to continue, it says
            little.
        tokens: how many tokens were read, the prompt's among them.
        error: why it could not be read; None when it was.
    """

    pools: npt.NDArray[np.float32]
    last: npt.NDArray[np.float32]
    tokens: int = 0
    error: BonError | None = None

    @classmethod
    def failed(cls, error: BonError) -> Reading:
        """A response that could not be read."""
        return cls(np.zeros((0, 0), np.float32), np.zeros(0, np.float32), error=error)


@runtime_checkable
class Engine(Protocol):
    """What every engine has.

    Attributes:
        name: what to call it in a table or a log line.
        max_model_len: tokens that prompt and completion may have together; None when the engine does not know.
        concurrent: True when requests join a running batch (vLLM, HTTP), so that scoring may start while others are
            still sampled; False when one call at a time should bring everything (torch). One that is not may say
            ``queues = True``: calls may come at any time, and it runs together or in turn what they want.
    """

    @property
    def name(self) -> str:
        """What to call the engine in a table or a log line."""

    @property
    def max_model_len(self) -> int | None:
        """Tokens of prompt and completion together."""

    @property
    def concurrent(self) -> bool:
        """Whether requests join a running batch."""

    async def aclose(self) -> None:
        """Stop what is running and free the model."""


@runtime_checkable
class Generates(Engine, Protocol):
    """An engine that samples completions."""

    def generate(self, requests: Sequence[Request], *, keep: Keep | None = None) -> AsyncGenerator[Completion, None]:
        """Sample the completions of each request and yield each the moment it finishes, in any order.

        Closing the generator aborts what is still running. ``keep`` is called with the text so far, every few tokens
        and not after a completion's end, perhaps from another thread; where it returns False the completion ends with
        finish_reason "abort". A prompt that does not fit the context is a completion with finish_reason "error" and a
        ``PromptTooLongError``, once for each of its samples, and the other requests run.

        Raises:
            InputError: a sampling option that this engine does not know; raised by the call itself, before iteration.
            EngineError: the model failed.
        """


@runtime_checkable
class Rates(Engine, Protocol):
    """An engine that gives log-probabilities of given continuations."""

    async def loglikelihood(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, end: bool = True
    ) -> list[Loglikelihood]:
        """Rate continuations[i] as the answer to prompts[i], by prefill alone.

        One that does not fit the context together with its prompt comes back with a ``PromptTooLongError`` as its
        ``error``, and the others are rated.

        Args:
            prompts: as in ``Request``.
            continuations: the texts to rate, as many as there are prompts.
            end: count the end-of-turn token as the continuation's last token.

        Raises:
            InputError: the two lists differ in length.
            EngineError: the model failed.
        """


@runtime_checkable
class Weighs(Engine, Protocol):
    """An engine that tells how it spreads its probability at each token of given continuations."""

    async def confidence(
        self, prompts: Sequence[Prompt], continuations: Sequence[str], *, top: int | None = None
    ) -> list[Loglikelihood]:
        """Read continuations[i] as the answer to prompts[i], by prefill alone; what fails is as in ``loglikelihood``.

        The ``total`` of each is a sum over its tokens, the end of the turn not among them: of the mean of log(V p) over
        the whole vocabulary of V tokens, or of the mean of log p over the ``top`` likeliest. The lower, the surer.

        Raises:
            InputError: the two lists differ in length.
            EngineError: the model failed.
        """


@runtime_checkable
class Classifies(Engine, Protocol):
    """An engine whose model has a classification head.

    Attributes:
        labels: the head's labels in their order; empty where a server keeps them to itself.
        stepwise: whether it judges each step of a response; None where that shows in the first answer.
    """

    @property
    def labels(self) -> Sequence[str]:
        """The head's labels in their order."""

    @property
    def stepwise(self) -> bool | None:
        """Whether it judges each step of a response."""

    async def classify(self, conversations: Sequence[Prompt]) -> list[Classification]:
        """Classify conversations whose last turn is the response, in one call.

        One that does not fit the context, or that the model's template refuses, comes back with an ``error``, and the
        others are classified.

        Raises:
            InputError: the model has no classification head.
            EngineError: the model failed.
        """


@runtime_checkable
class Embeds(Engine, Protocol):
    """An engine whose model is an embedding model."""

    async def embed(self, texts: Sequence[str]) -> list[Embedding]:
        """Embed texts, in one call.

        One that does not fit the context comes back with an ``error``, and the others are embedded.

        Raises:
            InputError: the model is no embedding model.
            EngineError: the model failed.
        """


@runtime_checkable
class Reads(Engine, Protocol):
    """An engine that shows its hidden states.

    Attributes:
        fingerprint: tells the model from every other, in whatever dtype and on whatever device it runs.
        layers: how many there are; layer 0 is the embeddings.
    """

    @property
    def fingerprint(self) -> str:
        """Tells the model from every other."""

    @property
    def layers(self) -> int:
        """The number of the last layer."""

    async def hidden_states(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, layers: Sequence[int]
    ) -> list[Reading]:
        """Read responses[i] as the answer to prompts[i], by prefill alone.

        One that cannot be read (too long, no tokens, states that are no numbers) comes back with its ``error``, and
        the others are read.

        Args:
            prompts: as in ``Request``.
            responses: as many as there are prompts.
            layers: whose states are pooled.

        Raises:
            InputError: the two lists differ in length, or a layer that the model does not have.
            EngineError: the model failed.
        """


@runtime_checkable
class Adapts(Engine, Protocol):
    """An engine whose model can be had with a LoRA adapter as well, on the same weights."""

    def adapted(self, folder: str | Path) -> Engine:
        """The same engine with an adapter. It loads no model: closing it leaves the one that it was made of.

        Raises:
            ModelNotFoundError: the folder holds no adapter.
            InputError: an adapter of another base or of another kind.
        """


@runtime_checkable
class WritesJSON(Protocol):
    """An engine that can be held to a JSON schema."""

    def json_options(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """What to put into ``Sampling.extra`` for completions that are JSON of this schema and nothing else."""


@runtime_checkable
class Remote(Protocol):
    """An engine whose model runs elsewhere and may not be there; its name is an address until it has answered."""

    async def check(self) -> None:
        """Ask whether the model is there.

        Raises:
            BonError: what is wrong.
        """


@runtime_checkable
class Batches(Protocol):
    """An engine that knows how many requests run together."""

    @property
    def full(self) -> bool:
        """Whether its batch is full: then a token that is read takes as much of it as one that is decoded."""


def too_long(lengths: Sequence[int], limit: int | None, what: str) -> dict[int, PromptTooLongError]:
    """What does not fit: index -> its error. The one place where lengths are checked.

    Args:
        lengths: tokens of each prompt, or of each prompt and its continuation.
        limit: tokens that fit; None when that is not known.
        what: "prompt", for the message.
    """
    if limit is None:
        return {}
    where = f"the {what}" if len(lengths) == 1 else what + " {}"
    return {i: PromptTooLongError(n, limit, where.format(i)) for i, n in enumerate(lengths) if n > limit}


def check_pairs(prompts: Sequence[Prompt], continuations: Sequence[str]) -> None:
    """Raise an InputError where there are not as many continuations as prompts."""
    if len(prompts) != len(continuations):
        raise InputError(f"there are {len(prompts)} prompts and {len(continuations)} continuations.")
