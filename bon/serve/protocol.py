"""OpenAI's requests, as far as they can be honoured, and their ``best_of_n`` extension.

Unknown fields are refused. Fields that do not concern the text (``user``, ``metadata``) are accepted and not used.
Fields that only a policy behind HTTP can honour (``tools``, ``response_format``) are handed to it, and so are the calls
of tools and their results in a conversation.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from typing import Annotated, Any, Literal, Self, TypeVar

import orjson
import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, ValidationError

from bon.serve.failures import ApiError, bad
from bon.task import ROLES
from bon.types import NO_LIMIT

_ABOUT_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_NEUTRAL = {
    "response_format": {"type": "text"},
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "top_logprobs": 0,
    **{"repetition_penalty": 1, "ignore_eos": False, "min_tokens": 0},  # vLLM's, which its own clients send
}
# Handed to the policy's engine when they change anything.
POLICY_FIELDS = (*_ABOUT_TOOLS, *_NEUTRAL, "reasoning_effort", "verbosity", "chat_template_kwargs")


# Entries of a list or an object, as OpenAI has it: a body of 4 MB could bring a million, each with work of its own.
MOST = 2048
# A list that is left at its first error, as a client is told of one.
FirstError = Field(fail_fast=True, max_length=MOST)


class Body(BaseModel):
    """An object in a request; fields that it does not have are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.keys() <= cls.__pydantic_fields__.keys():
            first = next(name for name in data if name not in cls.__pydantic_fields__)
            told = InitErrorDetails(type="extra_forbidden", loc=(first,), input=[*cls.__pydantic_fields__])
            raise ValidationError.from_exception_data(cls.__name__, [told])
        return data


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MOST:
        raise PydanticCustomError("too_long", "must have at most {max_length} items", {"max_length": MOST})
    return value


def _refuse_others(value: Any) -> Any:
    if value:
        raise PydanticCustomError("unsupported", "can only be {only} here", {"only": str(type(value)()).lower()})
    return value


No = Annotated[bool, AfterValidator(_refuse_others), WithJsonSchema({"const": False})]
# Log-probabilities are known of the chosen tokens only.
Zero = Annotated[int, AfterValidator(_refuse_others), WithJsonSchema({"type": "integer", "const": 0})]
Text = Annotated[str, Field(min_length=1)]
Length = Literal[-1] | Annotated[int, Field(ge=1, le=NO_LIMIT)]  # -1 is no limit, as in other servers
# ``bon.task`` reads messages, here as in files and in Python; this is what it takes, less what it does not use.
_PART = {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["text", "image_url"]}}}
MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]},
        "tool_calls": {"type": "array", "items": {"type": "object", "required": ["function"]}},
        "tool_call_id": {"type": "string"},
    },
}
Messages = Annotated[list[Annotated[Any, WithJsonSchema(MESSAGE)]], FirstError, Field(min_length=1)]


class StreamOptions(Body):
    """What a stream holds besides the text."""

    include_usage: bool | None = Field(default=None, description="Send a last chunk with the usage.")
    include_obfuscation: bool | None = Field(default=None, description="Accepted and not done.")


class Options(Body):
    """What bon adds to every request."""

    scorer: str | None = Field(default=None, description="Which of the server's scorers; GET /v1/models lists them.")
    deadline_s: float | None = Field(default=None, gt=0, description="Seconds after which the best so far is returned.")
    instruction: str | None = Field(
        default=None, min_length=1, description="The part of the last user message that is the instruction proper."
    )


class BestOfNOptions(Options):
    """What bon adds to OpenAI's request."""

    n: Annotated[int, Field(ge=1)] | Annotated[str, Field(max_length=200)] | None = Field(
        default=None, description="Candidates to sample, or the spec of a budget: 'stop-at:0.9,most=16', 'adaptive'."
    )
    stop_at: float | None = Field(default=None, description="Stop everything once a candidate has this reward.")
    min_reward: float | None = Field(default=None, description="Refuse to answer when the best reward is below this.")
    return_candidates: bool = Field(
        default=False, description="Return every candidate with its score; a stream has their texts as they grow."
    )
    credit: bool = Field(default=False, description="Rate the winner again without each of its sentences.")


class _Common(Body):
    model: str | None = Field(default=None, description="One of GET /v1/models; the first of them if left out.")
    best_of_n: BestOfNOptions | None = None
    n: int | None = Field(default=None, ge=1, le=128, description="The n best are returned, best first.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    max_tokens: Length | None = None
    stop: Text | Annotated[list[Text], FirstError] | None = None
    seed: int | None = Field(default=None, ge=-1, le=2**63 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str] | None, BeforeValidator(_few)] = None
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few)] = None
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)

    @property
    def options(self) -> BestOfNOptions:
        """The extension's fields."""
        return self.best_of_n or BestOfNOptions()

    @property
    def candidates(self) -> tuple[str, int | str | None]:
        """The field that says how many candidates to sample, and its value."""
        return ("n", None) if self.options.n is None else ("best_of_n.n", self.options.n)

    @property
    def returned(self) -> int:
        """How many of the best are returned."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...] | None:
        """Stop strings; None when the request does not say."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return None if stops is None else tuple(stops)

    @property
    def length(self) -> int | None:
        """Tokens of one completion at most."""
        return self.max_tokens

    @property
    def passed(self) -> dict[str, Any]:
        """Fields for the policy's engine alone, without those that change nothing."""
        given = {name: getattr(self, name) for name in POLICY_FIELDS if getattr(self, name, None) is not None}
        if not given.get("tools"):
            given = {name: value for name, value in given.items() if name not in _ABOUT_TOOLS}
        return {name: value for name, value in given.items() if value != _NEUTRAL.get(name)}


class ChatRequest(_Common):
    """Body of ``POST /v1/chat/completions``."""

    messages: Messages
    continue_final_message: bool | None = Field(default=None, description="A last message of the assistant is, always.")
    add_generation_prompt: bool | None = None
    max_completion_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="For a policy behind HTTP.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="For a policy behind HTTP.")
    tools: Annotated[list[dict[str, Any]], FirstError] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    store: No | None = None
    service_tier: Literal["auto", "default"] | None = None
    modalities: Annotated[list[Literal["text"]], FirstError] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def each(self) -> list[Self]:
        """The request itself, which has one conversation."""
        return [self]

    @property
    def conversation(self) -> list[Any]:
        """What the policy continues."""
        return self.messages

    @property
    def length(self) -> int | None:
        """Tokens of one completion at most."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise bad("max_tokens", "contradicts max_completion_tokens; give one of them.")
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Common):
    """Body of ``POST /v1/completions``; each prompt is taken as a user's message."""

    prompt: Text | Annotated[list[Text], FirstError, Field(min_length=1)]
    best_of: int | None = Field(default=None, ge=1, le=128, description="Candidates to sample, as best_of_n.n.")
    echo: No | None = None
    logprobs: Zero | None = None
    suffix: Literal[""] | None = None

    @property
    def candidates(self) -> tuple[str, int | str | None]:
        """The field that says how many candidates to sample, and its value."""
        if self.best_of is None:
            return super().candidates
        if self.options.n not in (None, self.best_of):
            raise bad("best_of", "contradicts best_of_n.n; give one of them.")
        return "best_of", self.best_of

    @property
    def conversation(self) -> str:
        """What the policy continues, of a request with one prompt."""
        return str(self.prompt)

    @property
    def each(self) -> list[Self]:
        """One request for each prompt."""
        prompts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        if self.stream and len(prompts) > 1:
            raise bad("prompt", f"a stream is of one prompt, and here are {len(prompts)}.")
        return [self.model_copy(update={"prompt": prompt}) for prompt in prompts]


B = TypeVar("B", bound=Body)


def parse(kind: type[B], body: bytes) -> B:
    """Read a request body.

    Raises:
        ApiError: 400, with the field at fault.
    """
    try:
        data = orjson.loads(body)
        json.loads(body, object_pairs_hook=_no_duplicates)
        if not isinstance(data, dict):
            raise ApiError(400, f"the body must be a JSON object, not {type(data).__name__}.", "invalid_json")
        return kind.model_validate(data)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}.", "invalid_json") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply.", "invalid_json") from error
    except pydantic.ValidationError as error:
        raise _failure(error.errors(include_url=False), data) from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise bad(name[:100], "is given twice.", "duplicate_field")
    return names


def _failure(errors: list[ErrorDetails], data: dict[str, Any]) -> ApiError:
    """Name the field at fault: the deepest one with an error, as a union reports the errors of all its members."""
    found = [(_path(error, data), error) for error in errors]
    path, worst = max(found, key=lambda pair: len(pair[0]))
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:100]}" for step in path)[1:] or "body"
    if worst["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(path[-1]), worst["input"], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return bad(name, f"there is no such field, or it cannot be honoured.{hint}", "unknown_parameter")
    first, *others = dict.fromkeys(_wanted(error) for where, error in found if where == path)
    got = f", got {json.dumps(worst['input'], default=str):.60}" if first.startswith("must ") else ""
    return bad(name, f"{' or '.join([first, *(other.removeprefix('must be ') for other in others)])}{got}.")


# pydantic's types of errors, in the words of JSON.
_WANTED = {
    "missing": "is missing",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
}


def _wanted(error: ErrorDetails) -> str:
    kind = error["type"]
    return _WANTED[kind].format(**error.get("ctx", {})) if kind in _WANTED else error["msg"]


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
