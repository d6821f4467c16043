"""OpenAI's wire format: request bodies, answers, streams, and what a refusal is about.

Pure functions on JSON values; nothing here opens a connection. Answers are read leniently (servers differ in what they
leave out), and one that has no usable choice is an error, never an empty text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import openai
import orjson

from bon.errors import InputError, UnavailableError, UnknownNameError
from bon.task import canonical_calls
from bon.types import FinishReason, Sampling

CHAT, PLAIN = "/chat/completions", "/completions"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields of a request that bon sets itself.
RESERVED = _names(
    "model messages prompt n stream stream_options temperature top_p top_k min_p max_tokens max_completion_tokens stop "
    "seed logprobs top_logprobs echo"
)
# What may be passed in Sampling.extra without being named to the engine: OpenAI's own fields.
EXTRAS = _names(
    "frequency_penalty presence_penalty logit_bias response_format tools tool_choice parallel_tool_calls "
    "reasoning_effort verbosity user safety_identifier prompt_cache_key service_tier metadata store"
)
TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
# What bon asks for and can do without: dropped where a server refuses it ("max_tokens" gets its newer name).
OPTIONAL = _names("n logprobs chat_template_kwargs stream_options continuous_usage_stats return_token_ids max_tokens")
_NAMES_N = re.compile(r"""['"`]n['"`]|\bn (?:must|should|is|has|=|>)|\bonly one (?:completion )?choice|\bbest_of\b""")
_FINISH: Mapping[str, FinishReason] = {"length": "length", "max_tokens": "length"}


class BadAnswerError(UnavailableError):
    """An answer that cannot be read; a retry may help."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One completion as the server sent it; the fields are those of ``bon.engines.base.Completion``."""

    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None = None
    pieces: tuple[str, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    completion_tokens: int = 0
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    filtered: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """All choices of one request, and what its prompt cost."""

    choices: tuple[Choice, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0


def check_extra(extra: Collection[str], listed: Collection[str]) -> None:
    """Refuse options that neither OpenAI's API nor the engine's ``extra_body`` names.

    Raises:
        UnknownNameError: such an option.
        InputError: a field that bon sets itself.
    """
    for name in extra:
        if name in RESERVED:
            raise InputError(f"{name!r} is set by bon itself; use the fields of Sampling.")
        if name not in EXTRAS and name not in listed:
            raise UnknownNameError(
                "option of an OpenAI-compatible server (list the server's own in extra_body=)", name, EXTRAS | {*listed}
            )


def sampling_fields(sampling: Sampling, first_sample: int, max_model_len: int | None) -> dict[str, Any]:
    """Sampling options under the server's names, only where they are set.

    With n > 1 a server gives choice i the seed plus i (vLLM does), so sample s has seed + s however it was asked for.
    """
    fields: dict[str, Any] = {"temperature": sampling.temperature}
    if sampling.top_p < 1:
        fields["top_p"] = sampling.top_p
    if sampling.top_k:
        fields["top_k"] = sampling.top_k
    if sampling.min_p:
        fields["min_p"] = sampling.min_p
    if max_model_len is None or sampling.max_tokens < max_model_len:
        fields["max_tokens"] = sampling.max_tokens  # else: whatever room the context has
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    if sampling.seed is not None:
        fields["seed"] = sampling.seed + first_sample
    return fields


def fitted(body: Mapping[str, Any], refused: Collection[str]) -> dict[str, Any]:
    """A body without what a server was found to refuse."""
    fit = {name: value for name, value in body.items() if name not in refused}
    if "continuous_usage_stats" in refused and "stream_options" in fit:
        fit["stream_options"] = {"include_usage": True}
    if "max_tokens" in refused and "max_tokens" in body:
        fit["max_completion_tokens"] = body["max_tokens"]
    return fit


def refusal(error: openai.APIStatusError, body: Mapping[str, Any], optional: Collection[str]) -> tuple[set[str], bool]:
    """Which optional fields of a body a 400 or 422 is about, and whether it says so (else: all of them, a guess)."""
    present = {name for name in optional if name in body}
    if "continuous_usage_stats" in body.get("stream_options", {}):
        present |= {"continuous_usage_stats"} & {*optional}
    text = f"{error.param or ''} {server_message(error)}".lower()
    named = {name for name in present - {"n", "max_tokens"} if re.search(rf"(?<![a-z_]){name}(?![a-z_])", text)}
    if "continuous_usage_stats" in named:
        named.discard("stream_options")  # which it is a part of
    if "n" in present and (error.param == "n" or _NAMES_N.search(text)):
        named.add("n")
    if "max_tokens" in present and "max_completion_tokens" in text:
        named.add("max_tokens")
    return (named, True) if named else (present - {"max_tokens"}, False)


def server_message(error: openai.APIStatusError) -> str:
    """What the server said, in one line."""
    body = error.body
    if isinstance(body, Mapping):
        body = body.get("message") or body.get("detail") or body.get("error") or dict(body)
    text = " ".join(str(body if body is not None else error.message).split())
    return text if len(text) <= 400 else text[:400] + "…"


_LIMIT = re.compile(
    r"(?:context (?:length|size|window)[^\d]{0,40}|configured limit of |must be <= |n_ctx\D{1,4})(\d[\d,]*)", re.I
)
_LENGTH = re.compile(
    r"(\d[\d,]*) (?:input tokens|in the messages|in the prompt|tokens from the input|`inputs` tokens)"
    r"|request \((\d[\d,]*) tokens|resulted in (\d[\d,]*) tokens|at least (\d[\d,]*) input tokens",
    re.I,
)


def overflow(error: openai.APIStatusError) -> tuple[int, int] | None:
    """(tokens of the prompt, tokens of the context) when an error says that a prompt or its answer does not fit."""
    text = f"{error.body} {error.message}"
    limit, length = _LIMIT.search(text), _LENGTH.search(text)
    if error.status_code not in (400, 413, 422) or not limit or not length:
        return None
    tokens = next(group for group in length.groups() if group)
    return int(tokens.replace(",", "")), int(limit[1].replace(",", ""))


def read_answer(data: Mapping[str, Any]) -> Answer:
    """Read the answer to a chat or a plain completion request.

    Raises:
        BadAnswerError: no choices, or one that holds no text.
    """
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BadAnswerError(f"sent no choices: {_error_in(data) or orjson.dumps(data, default=str)[:120].decode()}")
    if not all(isinstance(choice, Mapping) for choice in choices):
        raise BadAnswerError(f"sent choices that cannot be read: {str(choices)[:120]}")
    ordered = sorted(choices, key=lambda c: c["index"] if isinstance(c.get("index"), int) else 0)
    usage = read_usage(data.get("usage"))
    read = [_read_choice(choice) for choice in ordered]
    return Answer(tuple(_share_out(read, usage.completion)), usage.prompt, usage.cached)


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """A usage block; 0 where the server says nothing."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


def read_usage(usage: object) -> TokenUsage:
    """Read a usage block."""
    if not isinstance(usage, Mapping):
        return TokenUsage()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    return TokenUsage(_count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens")), _count(cached))


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _share_out(choices: Sequence[Choice], total: int) -> list[Choice]:
    """Give each choice its tokens: those it lists, else an equal share of what the request cost."""
    listed = [len(c.token_ids or c.logprobs or ()) for c in choices]
    if len(choices) == 1 or not all(listed):
        share, more = divmod(total, len(choices))
        listed = [share + (i < more) for i in range(len(choices))] if total else listed
    return [replace(choice, completion_tokens=tokens) for choice, tokens in zip(choices, listed, strict=True)]


def _read_choice(choice: Mapping[str, Any]) -> Choice:
    message = choice.get("message")
    calls: tuple[Mapping[str, Any], ...] = ()
    if isinstance(message, Mapping):
        text = _content(message.get("content"))
        calls = tuple(c for c in message.get("tool_calls") or () if isinstance(c, Mapping))
    elif isinstance(choice.get("text"), str):
        text = choice["text"]
    else:
        raise BadAnswerError(f"sent a choice without a message: {str(choice)[:120]}")
    reason = choice.get("finish_reason")
    if reason in ("abort", "error"):
        raise BadAnswerError(f"gave up a completion (finish_reason {reason!r}).")
    ids = choice.get("token_ids")
    return Choice(
        "\n".join(part for part in (text, canonical_calls(calls)) if part),
        _FINISH.get(str(reason), "stop"),
        read_logprobs(choice.get("logprobs")),
        read_pieces(choice.get("logprobs")),
        tuple(ids) if isinstance(ids, list) and all(isinstance(i, int) for i in ids) else None,
        tool_calls=calls,
        filtered=reason == "content_filter",
    )


def _content(content: object) -> str:
    """Text of a message: a string, a list of parts, or nothing (a message that only calls tools)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(p.get("text") or "") for p in content if isinstance(p, Mapping))
    raise BadAnswerError(f"sent a message whose content is not text: {str(content)[:120]}")


def read_logprobs(logprobs: object) -> tuple[float, ...] | None:
    """Log-probabilities of the sampled tokens, from either API's shape; None when one is missing."""
    if not isinstance(logprobs, Mapping):
        return None
    content, values = logprobs.get("content"), logprobs.get("token_logprobs")
    if isinstance(content, list):
        values = [item.get("logprob") if isinstance(item, Mapping) else None for item in content]
    if not isinstance(values, list) or not values:
        return None
    numbers = tuple(float(v) for v in values if isinstance(v, int | float) and math.isfinite(v))
    return numbers if len(numbers) == len(values) else None


def read_pieces(logprobs: object) -> tuple[str, ...] | None:
    """Texts of the sampled tokens, from either API's shape; None when one is missing."""
    if not isinstance(logprobs, Mapping):
        return None
    content, values = logprobs.get("content"), logprobs.get("tokens")
    if isinstance(content, list):
        values = [item.get("token") if isinstance(item, Mapping) else None for item in content]
    return tuple(values) if isinstance(values, list) and all(isinstance(v, str) for v in values) else None


def prompt_logprobs(data: Mapping[str, Any], length: int) -> list[float | None] | None:
    """Log-probabilities of a prompt's own tokens (the first has none); None when the answer does not have them."""
    choices = data.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, Mapping):
        return None
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, Mapping) else None
    if isinstance(choice.get("prompt_logprobs"), list):  # vLLM: a mapping from token id to its log-probability, each
        values = [
            next(iter(at.values())).get("logprob") if isinstance(at, Mapping) and len(at) == 1 else None
            for at in choice["prompt_logprobs"]
        ]
    if not isinstance(values, list) or not length <= len(values) <= length + 1:
        return None
    return values[:length] if all(isinstance(v, int | float) for v in values[1:length]) else None


def _error_in(data: Mapping[str, Any]) -> str | None:
    error = data.get("error")
    return str(error.get("message", error) if isinstance(error, Mapping) else error) if error else None


@dataclass
class Growing:
    """A completion that comes in pieces.

    Raises (from ``add``):
        BadAnswerError: an event that is not a completion chunk.
    """

    text: str = ""
    events: int = 0  # chunks with text: about one token each
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    usage: TokenUsage = field(default_factory=TokenUsage)

    def add(self, event: object) -> bool:
        """Take in one event; True when the text grew and the completion goes on."""
        if not isinstance(event, Mapping):
            raise BadAnswerError(f"sent an event that is not an object: {str(event)[:120]}")
        if event.get("usage"):
            self.usage = read_usage(event["usage"])
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
            return False
        choice = choices[0]
        delta = choice.get("delta")
        piece = _content(delta.get("content") if isinstance(delta, Mapping) else choice.get("text"))
        self.text += piece
        self.events += bool(piece)
        self.logprobs += read_logprobs(choice.get("logprobs")) or ()
        self.pieces += read_pieces(choice.get("logprobs")) or ()
        self.token_ids += choice.get("token_ids") or ()
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return bool(piece) and self.finish_reason is None

    @property
    def tokens(self) -> int:
        """Tokens so far, as well as they are known."""
        return self.usage.completion or len(self.token_ids) or len(self.logprobs) or self.events

    def answer(self, *, pruned: bool = False) -> Answer:
        """What there is, as the only choice of an answer.

        Raises:
            BadAnswerError: the stream ended before the completion did.
        """
        if not pruned and (self.finish_reason is None or self.finish_reason in ("abort", "error")):
            raise BadAnswerError("broke off in the middle of an answer.")
        reason: FinishReason = "pruned" if pruned else _FINISH.get(str(self.finish_reason), "stop")
        logprobs = tuple(self.logprobs) if len(self.logprobs) >= self.events else None
        choice = Choice(
            self.text,
            reason,
            logprobs or None,
            tuple(self.pieces) or None,
            tuple(self.token_ids) or None,
            self.tokens,
            filtered=self.finish_reason == "content_filter",
        )
        return Answer((choice,), self.usage.prompt, self.usage.cached)
