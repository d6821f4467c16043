"""OpenAI's requests, as far as they can be honoured, and their ``best_of_n`` extension.

Unknown fields are refused. Fields that say nothing about the text (``user``, ``metadata``) are taken and not used.
Fields that only a policy behind HTTP can honour (``tools``, ``response_format``) are handed to it, and so are the calls
of tools and their results in a conversation.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from bon.serve.failures import ApiError, bad
from bon.task import Message

# Handed to the policy's engine when they say anything.
POLICY_FIELDS = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "reasoning_effort",
    "verbosity",
    *("repetition_penalty", "ignore_eos", "min_tokens"),  # vLLM's, which its own clients send
)
_ABOUT_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_NEUTRAL = {
    "response_format": {"type": "text"},
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "repetition_penalty": 1,
    "ignore_eos": False,
    "min_tokens": 0,
}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _text_part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(kind, str) and kind != "text":
        raise PydanticCustomError("unsupported_content", "only text parts can be honoured, not {kind}", {"kind": kind})
    return part


class TextPart(_Body):
    """A part of a message's content; text is the only kind."""

    type: Literal["text"]
    text: str


def _refuse_true(value: bool) -> bool:
    if value:
        raise PydanticCustomError("unsupported", "cannot be honoured")
    return value


No = Annotated[bool, AfterValidator(_refuse_true), WithJsonSchema({"const": False})]
Nothing = Annotated[None, Field(description="Taken when null, as other servers send it back.")]


def _belongs(role: str) -> BeforeValidator:
    """Refuse a field in a message of another role."""

    def check(value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("role", role) != role:
            raise PydanticCustomError("misplaced", "belongs to messages of the role {role!r}", {"role": role})
        return value or None

    return BeforeValidator(check)


def _not_missing(value: Any, info: ValidationInfo) -> Any:
    if value is None and not info.data.get("tool_calls"):
        raise PydanticCustomError("missing", "must be text; only an assistant that called tools may have none")
    return value


class CalledFunction(BaseModel):
    """What was called."""

    model_config = ConfigDict(extra="allow", strict=True)
    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool by the assistant; servers add fields of their own, which go back to them."""

    model_config = ConfigDict(extra="allow", strict=True)
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(_Body):
    """One turn of the conversation. What is about tools is for a policy behind HTTP."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall] | None, _belongs("assistant")] = None
    tool_call_id: Annotated[str | None, _belongs("tool")] = None
    content: Annotated[
        str | list[Annotated[TextPart, BeforeValidator(_text_part)]] | None, BeforeValidator(_not_missing)
    ] = Field(default=None, validate_default=True)
    name: str | None = None
    refusal: Nothing = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: Nothing = None
    function_call: Nothing = None

    @property
    def message(self) -> Message:
        """The turn with its content as one string."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        calls = tuple(call.model_dump() for call in self.tool_calls or ())
        return Message(self.role, text, calls, self.tool_call_id)


class StreamOptions(_Body):
    """What a stream holds besides the text."""

    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage.")
    include_obfuscation: bool | None = Field(default=None, description="Taken and not done.")


class BestOfNOptions(_Body):
    """What bon adds to OpenAI's request."""

    n: int | None = Field(default=None, ge=1, description="Candidates to sample; the server's default if left out.")
    stop_at: float | None = Field(default=None, description="Stop everything once a candidate has this reward.")
    min_reward: float | None = Field(default=None, description="Refuse to answer when the best reward is below this.")
    scorer: str | None = Field(default=None, description="Which of the server's scorers; GET /v1/models lists them.")
    return_candidates: bool = Field(default=False, description="Return, or stream, every candidate with its score.")
    deadline_s: float | None = Field(default=None, gt=0, description="Seconds after which the best so far is returned.")
    instruction: str | None = Field(
        default=None, min_length=1, description="The part of the last user message that is the instruction proper."
    )


class _Common(_Body):
    model: str | None = Field(default=None, description="One of GET /v1/models; the first of them if left out.")
    best_of_n: BestOfNOptions | None = None
    n: int | None = Field(default=None, ge=1, le=128, description="The n best are returned, best first.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)

    @property
    def options(self) -> BestOfNOptions:
        """The extension's fields."""
        return self.best_of_n or BestOfNOptions()

    @property
    def stops(self) -> tuple[str, ...] | None:
        """Stop strings; None when the request does not say."""
        if self.stop is None:
            return None
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def passed(self) -> dict[str, Any]:
        """Fields for the policy's engine alone, without those that change nothing."""
        given = {name: getattr(self, name) for name in POLICY_FIELDS if getattr(self, name, None) is not None}
        if not given.get("tools"):
            given = {name: value for name, value in given.items() if name not in _ABOUT_TOOLS}
        return {name: value for name, value in given.items() if value != _NEUTRAL.get(name)}


class ChatRequest(_Common):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    store: No | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: list[Literal["text"]] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def about_tools(self) -> dict[str, Any]:
        """Path -> value of what the messages hold that only a policy behind HTTP can read."""
        turns = [
            (f"messages[{i}].{k}", v) for i, m in enumerate(self.messages) for k, v in m.message.about_tools.items()
        ]
        return dict(turns)

    @property
    def length(self) -> int | None:
        """Tokens of one completion at most."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise bad("max_tokens", "contradicts max_completion_tokens; give one of them.")
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Common):
    """Body of ``POST /v1/completions``; the prompt is taken as a user's message."""

    prompt: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]
    best_of: int | None = Field(default=None, ge=1, le=128, description="Candidates to sample, as best_of_n.n.")
    echo: No | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5)
    suffix: Literal[""] | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def length(self) -> int | None:
        """Tokens of one completion at most."""
        return self.max_tokens


B = TypeVar("B", bound=_Common)


def parse(kind: type[B], body: bytes) -> B:
    """Read a request body.

    Raises:
        ApiError: 400, with the field at fault.
    """
    try:
        data = orjson.loads(body)
        json.loads(body, object_pairs_hook=_no_duplicates)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}.", "invalid_json") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply.", "invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(data).__name__}.", "invalid_json")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _failure(kind, error.errors(include_url=False), data) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply.", "invalid_json") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise bad(name[:100], "is given twice.", "duplicate_field")
    return names


def _failure(kind: type[_Common], errors: list[ErrorDetails], data: dict[str, Any]) -> ApiError:
    """The deepest error is the one that knows most about the field at fault (unions report all their members)."""
    paths = [_path(error, data) for error in errors]
    unsupported = [path for error, path in zip(errors, paths, strict=True) if error["type"] == "unsupported_content"]
    deepest = max(paths, key=lambda path: (len(path), path in unsupported, -paths.index(path)))
    found = [error for error, path in zip(errors, paths, strict=True) if path == deepest]
    name = _written(deepest) or "body"
    if found[0]["type"] == "extra_forbidden":
        known = [*kind.model_fields] if len(deepest) == 1 else [*BestOfNOptions.model_fields]
        close = difflib.get_close_matches(str(deepest[-1]), known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return bad(name, f"there is no such field, or it cannot be honoured.{hint}", "unknown_parameter")
    code = "unsupported_content" if deepest in unsupported else "invalid_value"
    meant = [error for error in found if error["type"] == code] or found
    wanted = " or ".join(dict.fromkeys(error["msg"] for error in meant))
    return bad(name, f"{wanted[:1].lower()}{wanted[1:]}.", code)


def _path(error: ErrorDetails, data: Any) -> tuple[str | int, ...]:
    """Where in the request an error is: its location without the names of union members."""
    path: list[str | int] = []
    for step in error["loc"]:
        if (isinstance(data, dict) and step in data) or (isinstance(data, list) and isinstance(step, int)):
            data = data[step]  # type: ignore[index]
        elif not (error["type"] == "missing" and step == error["loc"][-1]):
            continue
        path.append(step)
    return tuple(path)


def _written(path: tuple[str | int, ...]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step[:100]}" if text else step[:100]
    return text
