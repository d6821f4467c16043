"""OpenAI's wire format: request bodies, answers, streams, and what a refusal is about.

Pure functions on JSON values; nothing here opens a connection. What a server leaves out is unknown; a choice that says
something unusable is an error, never an empty text.
"""

from __future__ import annotations

import hashlib
import math
import re
import reprlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

from bon.engines.base import Completion, Turn, developer_as_system, fold_system
from bon.errors import InputError, RefusedError, UnavailableError, UnknownNameError
from bon.task import canonical_calls
from bon.types import FinishReason, Sampling, Tokens

CHAT, PLAIN = "chat/completions", "completions"
CHAT_BATCH = f"{CHAT}/batch"  # vLLM: ``messages`` is a list of conversations, and each gets one choice


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields of a request that bon sets itself.
RESERVED = _names(
    "model messages prompt n stream stream_options temperature top_p top_k min_p max_tokens max_completion_tokens stop "
    "seed logprobs echo"
)
# What may be passed in Sampling.extra without being named to the engine: OpenAI's own fields.
EXTRAS = _names(
    "frequency_penalty presence_penalty logit_bias response_format tools tool_choice parallel_tool_calls "
    "reasoning_effort verbosity user safety_identifier prompt_cache_key service_tier metadata store "
    "chat_template_kwargs top_logprobs"
)
TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
# Roles that a server may refuse: a system message then goes before the first user's, a developer's becomes a system's.
SYSTEM, DEVELOPER = "the system role", "the developer role"
# What bon asks for and can do without where a server does not explain what it refuses.
GUESSED = _names("n logprobs top_logprobs chat_template_kwargs stream_options continuous_usage_stats return_token_ids")
# What it can do without where a server names it ("max_tokens" gets its newer name).
OPTIONAL = GUESSED | {"max_tokens", "temperature", SYSTEM, DEVELOPER}
STREAM = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
_ROLE = re.compile(r"\broles?\b|\b(?:system|developer) (?:message|prompt|instruction)", re.I)
_NAMES_N = re.compile(r"""['"`]n['"`]|\bn (?:must|should|is|has|=|>)|\bonly one (?:completion )?choice|\bbest_of\b""")
_FINISH: Mapping[str, FinishReason] = {"length": "length", "max_tokens": "length"}

AsTokens = Callable[[Sequence[int], str], Tokens | None]
Place = tuple[int, int]  # index of the request, index of the sample


class BadAnswerError(UnavailableError):
    """An answer that cannot be read; a retry may help."""


class RequestRefusedError(RefusedError):
    """A server refuses this one request, whatever it thinks of others."""


class UnwritableError(InputError):
    """A prompt or an option that JSON cannot hold."""


class StatusError(Exception):
    """An answer whose HTTP status is no success; ``code`` and ``param`` are "" where the server gives none."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(f"HTTP status {status}")  # not what the server says: that may repeat the key
        self.status, self.headers, self.whole = status, headers, body.decode(errors="replace")
        data: Any = None
        with suppress(orjson.JSONDecodeError):
            data = orjson.loads(body)
        error = (data.get("error") or data) if isinstance(data, Mapping) else None
        fields = error if isinstance(error, Mapping) else {"message": error}
        self.code, self.param = (v if isinstance(v := fields.get(name), str) else "" for name in ("code", "param"))
        said = (fields.get("message"), fields.get("detail"), self.whole)
        self.message = " ".join(next(text for text in said if isinstance(text, str)).split())


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


def sampling_fields(sampling: Sampling) -> dict[str, Any]:
    """Sampling options under the server's names, only where they are said; ``Job`` adds max_tokens and seed."""
    options = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "min_p", "stop")}
    return {name: value for name, value in options.items() if value not in (None, ())} | {**sampling.extra}


def seed_of(seed: int, sample: int) -> int:
    """The seed to send for a request whose first sample is this one.

    A server that is asked for several gives choice i the seed plus i (vLLM does), so samples count on from a start;
    the start is a hash, so that two seeds share no sample.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (2**31 - 2**16) + sample


@dataclass
class Body:
    """A request's body, of which all but what varies between requests is encoded once.

    Args:
        fields: what it holds, but for the messages.
        where: what it is about, for errors.
        turns: the conversation to send as messages.
        batch: several conversations, in place of ``turns``.
    """

    fields: Mapping[str, Any]
    where: str = "the prompt"
    turns: tuple[Turn, ...] = ()
    batch: Sequence[tuple[Turn, ...]] = ()
    _heads: dict[tuple[str, frozenset[str]], bytes] = field(default_factory=dict)

    def encode(self, model: str, varying: Mapping[str, int], dropped: frozenset[str]) -> bytes:
        """The JSON, without the fields in ``dropped``.

        Raises:
            UnwritableError: something that JSON cannot hold.
        """
        if (model, dropped) not in self._heads:
            kept = {name: value for name, value in self.fields.items() if name not in dropped}
            if "continuous_usage_stats" in dropped and "stream_options" in kept:
                kept["stream_options"] = {"include_usage": True}
            if self.turns:
                kept["messages"] = _messages(self.turns, dropped)
            if self.batch:
                kept["messages"] = [_messages(turns, dropped) for turns in self.batch]
            try:
                self._heads[model, dropped] = orjson.dumps({**kept, "model": model})[:-1]
            except TypeError as error:
                raise UnwritableError(f"{self.where} is no JSON (an unpaired surrogate?): {error}") from error
        if "max_tokens" in dropped:  # which has a newer name
            varying = {"max_completion_tokens" if name == "max_tokens" else name: varying[name] for name in varying}
        tail = "".join([f',"{name}":{value}' for name, value in varying.items() if name not in dropped])
        return self._heads[model, dropped] + tail.encode() + b"}"

    def optional(self, varying: Collection[str], dropped: Collection[str]) -> set[str]:
        """What it holds that bon can do without."""
        roles = {turn.role for turns in (self.turns, *self.batch) for turn in turns}
        developer = "developer" in roles and DEVELOPER not in dropped
        asked = {SYSTEM: "system" in roles or ("developer" in roles and not developer), DEVELOPER: developer}
        held = {*self.fields, *varying, *(role for role, is_there in asked.items() if is_there)}
        if "stream_options" in held:
            held.add("continuous_usage_stats")
        return (held & OPTIONAL) - {*dropped}


def _messages(turns: tuple[Turn, ...], dropped: Collection[str]) -> list[dict[str, Any]]:
    if DEVELOPER in dropped:
        turns = developer_as_system(turns)
    if SYSTEM in dropped:
        turns = fold_system(turns) or turns
    return [turn.to_dict() for turn in turns]


def refused_field(error: StatusError, optional: Collection[str], sent: Collection[str]) -> str | None:
    """Which one of the optional fields a refusal names; None where it names none of them, or another that was sent."""
    text = f"{error.param} {error.message}".lower()
    if "max_tokens" in optional and "max_completion_tokens" in text:
        return "max_tokens"
    if "n" in optional and (error.param == "n" or _NAMES_N.search(text)):
        return "n"
    if error.param in sent and error.param not in optional:
        return None
    names = {name: re.search(rf"(?<![a-z_]){name}(?![a-z_])", text) for name in {*optional} - {"n", "max_tokens"}}
    places = {name: found.start() for name, found in names.items() if found}
    if "continuous_usage_stats" in places:
        return "continuous_usage_stats"  # which is a part of ``stream_options``
    if not places and _ROLE.search(text):
        return next((role for role in (DEVELOPER, SYSTEM) if role in optional), None)
    return min(places, key=places.__getitem__, default=None)


_LIMIT = re.compile(
    r"(?:context (?:length|size|window)[^\d]{0,40}|configured limit of |must be <= |n_ctx\D{1,4})(\d[\d,]{,11})", re.I
)
_LENGTH = re.compile(
    r"(\d[\d,]{,11}) (?:input tokens|in the messages|in the prompt|tokens from the input|`inputs` tokens)"
    r"|request \((\d[\d,]{,11}) tokens|resulted in (\d[\d,]{,11}) tokens|at least (\d[\d,]{,11}) input tokens",
    re.I,
)


def overflow(error: StatusError) -> tuple[int, int] | None:
    """(tokens of the prompt, tokens of the context) when an error says that a prompt or its answer does not fit."""
    limit, length = _LIMIT.search(error.whole), _LENGTH.search(error.whole)
    if not limit or not length:
        return None
    tokens = next(group for group in length.groups() if group)
    return int(tokens.replace(",", "")), int(limit[1].replace(",", ""))


@contextmanager
def reading() -> Iterator[None]:
    """Whatever goes wrong while an answer is read is the answer's fault."""
    try:
        yield
    except BadAnswerError:
        raise
    except Exception as error:
        raise BadAnswerError(f"sent an answer that cannot be read ({type(error).__name__}: {error}).") from error


def read_answer(
    data: Mapping[str, Any], places: Sequence[Place], as_tokens: AsTokens | None = None
) -> list[Completion]:
    """The completions of an answer, one for each of ``places``; those whose choice cannot be read are left out.

    The tokens of one prompt are noted with the first of its samples; those of several are divided among them.

    Raises:
        BadAnswerError: no choice can be read.
    """
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BadAnswerError(f"sent no choices: {error_in(data) or reprlib.repr(data)}")
    read: list[dict[str, Any]] = []
    for (request, sample), choice in zip(places, sorted(choices, key=_position), strict=False):
        try:
            with reading():
                fields = _read_choice(choice, as_tokens)
                read.append({"request_index": request, "sample_index": sample, **fields})
        except BadAnswerError as error:
            problem = error
    if not read:
        raise problem
    prompt, completion, cached = read_usage(data.get("usage"))
    # Each choice has the tokens that it lists, else an equal share of what the request cost.
    if completion and (len(choices) == 1 or not all(fields["completion_tokens"] for fields in read)):
        _divide(completion, "completion_tokens", read, len(choices))
    prompts = read if len({request for request, _ in places}) > 1 else read[:1]
    for name, tokens in ("prompt_tokens", prompt), ("cached_tokens", cached):
        _divide(tokens, name, prompts, len(prompts))
    return [Completion(**fields) for fields in read]


def _divide(tokens: int, name: str, among: Sequence[dict[str, Any]], parts: int) -> None:
    share, more = divmod(tokens, parts)
    for i, fields in enumerate(among):
        fields[name] = share + (i < more)


def _position(choice: object) -> int:
    index = choice.get("index") if isinstance(choice, Mapping) else None
    return index if isinstance(index, int) else 0


def _read_choice(choice: Mapping[str, Any], as_tokens: AsTokens | None) -> dict[str, Any]:
    """The fields of ``Completion`` that a choice has."""
    message, reason = choice.get("message"), choice.get("finish_reason")
    calls: tuple[Mapping[str, Any], ...] = ()
    reasoning = refusal = ""
    if isinstance(message, Mapping):
        reasoning, refusal = said_apart(message)
        text = _content(message.get("content"))
        calls = tuple(message.get("tool_calls") or ())
    elif isinstance(choice.get("text"), str):
        text = choice["text"]
    else:
        raise BadAnswerError(f"sent a choice without a message: {reprlib.repr(choice)}")
    if reason in ("abort", "error"):
        raise BadAnswerError(f"gave up a completion (finish_reason {reason!r}).")
    ids = token_ids(choice)
    logprobs, pieces = read_logprobs(choice.get("logprobs"))
    fields = {
        "logprobs": logprobs,
        "cumulative_logprob": None if logprobs is None else math.fsum(logprobs),
        "pieces": pieces,
        "completion_tokens": len(ids or logprobs or ()),
    }
    if reason == "content_filter":
        withheld = RequestRefusedError("the server's content filter withheld this completion.")
        return {**fields, "text": "", "finish_reason": "error", "error": withheld}
    return {
        **fields,
        "text": "\n".join(part for part in (text, canonical_calls(calls)) if part) if calls else text,
        "finish_reason": _FINISH.get(str(reason), "stop"),
        "tokens": as_tokens(ids, text) if as_tokens and ids else None,
        "tool_calls": calls,
        "reasoning": reasoning,
        "refusal": refusal,
        "top_logprobs": top_logprobs(choice.get("logprobs")),
    }


def said_apart(message: Mapping[str, Any]) -> tuple[str, str]:
    """What a message, or a piece of one, says beside its content: what the model thought, and why it refuses."""
    thought, refusal = message.get("reasoning_content") or message.get("reasoning"), message.get("refusal")
    return thought if isinstance(thought, str) else "", refusal if isinstance(refusal, str) else ""


def _content(content: object) -> str:
    """Text of a message: a string, a list of parts, or nothing (a message that only calls tools)."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        return "".join(str(p.get("text") or "") for p in content if isinstance(p, Mapping))
    raise BadAnswerError(f"sent a message whose content is not text: {reprlib.repr(content)}")


def token_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The token ids of a choice; None where it has none."""
    ids = choice.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)):
        raise BadAnswerError(f"sent token ids that cannot be: {reprlib.repr(ids)}")
    return ids


def read_logprobs(logprobs: object) -> tuple[tuple[float, ...] | None, tuple[str, ...] | None]:
    """Log-probabilities and texts of the sampled tokens, from either API's shape; None where one is missing."""
    if not isinstance(logprobs, Mapping):
        return None, None
    content, values, texts = (logprobs.get(name) for name in ("content", "token_logprobs", "tokens"))
    if isinstance(content, list):
        items = [item if isinstance(item, Mapping) else {} for item in content]
        values, texts = [item.get("logprob") for item in items], [item.get("token") for item in items]
    if not isinstance(values, list) or not values or not all(map(_is_logprob, values)):
        return None, None
    known = isinstance(texts, list) and len(texts) == len(values) and all(isinstance(t, str) for t in texts)
    return tuple(map(float, values)), tuple(texts or ()) if known else None


def top_logprobs(logprobs: object) -> tuple[Sequence[Mapping[str, Any]], ...]:
    """The likeliest tokens at each place, in the format of a chat answer; () where the server gave none."""
    if not isinstance(logprobs, Mapping):
        return ()
    content = logprobs.get("content")
    items = (
        content if isinstance(content, list) else [{"top_logprobs": top} for top in logprobs.get("top_logprobs") or ()]
    )
    found = [item.get("top_logprobs") or [] for item in items if isinstance(item, Mapping)]
    likely = [
        [{"token": t, "logprob": v} for t, v in top.items()] if isinstance(top, Mapping) else top for top in found
    ]
    if not any(likely) or not all(
        isinstance(t, Mapping) and _is_logprob(t.get("logprob")) for ts in likely for t in ts
    ):
        return ()
    return tuple(likely)


def read_usage(usage: object) -> tuple[int, int, int]:
    """Prompt, completion and cached tokens of a usage block; 0 where the server says nothing."""
    usage = usage if isinstance(usage, Mapping) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    said = usage.get("prompt_tokens"), usage.get("completion_tokens"), cached
    prompt, completion, cached = (count if type(count) is int and count > 0 else 0 for count in said)
    return prompt, completion, cached


def prompt_logprobs(data: Mapping[str, Any], length: int) -> list[float] | None:
    """Log-probabilities of a prompt's own tokens, 0 for the first; None when the answer does not have them."""
    try:
        choice = data["choices"][0]
        if (rows := choice.get("prompt_logprobs")) is not None:  # vLLM: for each, a mapping from token id to log p
            values = [None, *(entry["logprob"] for (entry,) in (row.values() for row in rows[1:]))]
        else:
            values = choice["logprobs"]["token_logprobs"]
        own = values[1:length] if length <= len(values) <= length + 1 else [None]
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
    return [0.0, *own] if all(map(_is_logprob, own)) else None


def _is_logprob(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9


def error_in(data: Mapping[str, Any]) -> str | None:
    """The error that an answer or an event holds."""
    error = data.get("error")
    message = error.get("message") if isinstance(error, Mapping) else error
    return None if not error else message if isinstance(message, str) else reprlib.repr(error)


@dataclass
class Growing:
    """A completion that comes in pieces."""

    text: str = ""
    reasoning: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    events: int = 0  # chunks with text: about one token each
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    likely: list[Sequence[Mapping[str, Any]]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] | None = None

    def add(self, event: Mapping[str, Any]) -> bool:
        """Take in one event; True when the text grew and the completion goes on.

        Raises:
            BadAnswerError: an event that is not a completion chunk.
        """
        if said := error_in(event):
            raise BadAnswerError(f"broke off: {said}")
        self.usage = event.get("usage") or self.usage
        with reading():
            choice = (event.get("choices") or [{}])[0]
            if "message" in choice:  # the server does not stream
                self.whole = event
                return False
            delta = choice.get("delta")
            piece = _content(delta.get("content") if isinstance(delta, Mapping) else choice.get("text"))
            thought, refusal = said_apart(delta if isinstance(delta, Mapping) else {})
            self.reasoning.append(thought)
            self.refusal.append(refusal)
            logprobs, pieces = read_logprobs(choice.get("logprobs"))
            self.text += piece
            self.events += bool(piece)
            self.logprobs += logprobs or ()
            self.pieces += pieces or ()
            self.likely += top_logprobs(choice.get("logprobs"))
            self.ids += token_ids(choice) or ()
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return bool(piece) and self.finish_reason is None

    @property
    def tokens(self) -> int:
        """Tokens so far, as well as they are known."""
        return read_usage(self.usage)[1] or len(self.ids) or len(self.logprobs) or self.events

    def answer(self, *, aborted: bool = False) -> Mapping[str, Any]:
        """The answer that a plain request would have brought.

        Raises:
            BadAnswerError: the stream ended before the completion did.
        """
        if self.whole is not None:
            return self.whole
        if self.finish_reason is None and not aborted:
            raise BadAnswerError("broke off in the middle of an answer.")
        told = {"token_logprobs": self.logprobs, "tokens": self.pieces, "top_logprobs": self.likely}
        known = told if len(self.logprobs) >= self.events else None
        apart = {"reasoning": "".join(self.reasoning), "refusal": "".join(self.refusal)}
        message = {"content": self.text, **apart}
        choice = {"finish_reason": self.finish_reason, "token_ids": self.ids, "logprobs": known, "message": message}
        prompt, _, cached = read_usage(self.usage)
        usage = {"prompt_tokens": prompt, "completion_tokens": self.tokens}
        return {"choices": [choice], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": cached}}}
