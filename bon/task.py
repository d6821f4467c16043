"""What is asked: the messages of a conversation, and which part of them is the instruction to be inferred back.

Messages have OpenAI's chat format with plain text content. Calls of tools and their results travel with them: a policy
behind HTTP reads them as they are, and whoever reads text gets them in a canonical form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from bon.errors import InputError, UnknownNameError

ROLES = ("system", "developer", "user", "assistant", "tool")
_READ = frozenset({"role", "content", "refusal", "tool_calls", "tool_call_id"})
_UNUSED = frozenset(  # of no meaning to a model that reads text; what servers send comes back in histories
    {"name", "annotations", "reasoning", "reasoning_content", "reasoning_details", "thinking_blocks"}
    | {"provider_specific_fields", "parsed"}
)
IMAGE = "image_url"  # a part of a content that a policy behind HTTP may see
_NULL = frozenset({"audio", "function_call"})  # accepted where they say nothing


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: one of ``ROLES``.
        content: its text; an assistant that only called tools has none.
        tool_calls: an assistant's calls of tools, in OpenAI's format.
        tool_call_id: for the role "tool", which call this is the result of.
        parts: the whole content, in OpenAI's format, where it holds images.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    tool_call_id: str | None = None
    parts: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UnknownNameError("message role", self.role, ROLES)
        if not isinstance(self.content, str):
            said = f"the content of a {self.role} message must be text, not {type(self.content).__name__}."
            raise InputError(said, "content")
        for name, owner in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != owner:
                said = f"{name} belongs to a message of the role {owner!r}, not to one of {self.role!r}."
                raise InputError(said, name)

    @property
    def about_tools(self) -> dict[str, Any]:
        """The fields beyond role and text, in OpenAI's format; empty for an ordinary message."""
        fields = {"tool_calls": list(self.tool_calls), "tool_call_id": self.tool_call_id, "content": list(self.parts)}
        return {name: value for name, value in fields.items() if value not in ([], None)}

    @property
    def text(self) -> str:
        """The content, followed by the calls in their canonical form."""
        return "\n".join(part for part in (self.content, canonical_calls(self.tool_calls)) if part)

    def to_dict(self) -> dict[str, Any]:
        """The message in OpenAI's format."""
        return openai_message(self.role, self.content, self.about_tools)


Conversation = str | Sequence[Message | Mapping[str, Any]]


def as_messages(prompt: Conversation) -> tuple[Message, ...]:
    """Turn a prompt string or an OpenAI-style list of messages into checked messages.

    What servers add to their answers (``reasoning_content``, ``annotations``, ...) is accepted and not used, so that a
    history may hold them as they came. Content may be a list of text parts. A last message of the assistant is what its
    answer begins with.

    Raises:
        InputError: an empty prompt, no user message, or a message that is none; ``field`` says where.
    """
    if isinstance(prompt, str):
        messages: tuple[Message, ...] = (Message("user", prompt),)
    elif not isinstance(prompt, Sequence) or not prompt:
        raise InputError(f"a prompt must be text or a non-empty list of messages, not {prompt!r:.80}.")
    else:
        messages = tuple(m if isinstance(m, Message) else _message(m, f"messages[{i}]") for i, m in enumerate(prompt))
    last = messages[-1]
    if last.role not in ("user", "tool", "assistant"):
        raise InputError(f"the last message must come from the user, a tool or the assistant, not from {last.role!r}.")
    if last.role == "assistant" and (last.tool_calls or not last.content):
        problem = "calls tools, whose results are missing" if last.tool_calls else "is empty: leave it out"
        raise InputError(f"the last message, which the answer is to continue, {problem}.")
    asked = next((m for m in reversed(messages) if m.role == "user"), None)
    if asked is None:
        raise InputError("there is no user message: nothing is asked.")
    if not asked.content.strip():
        raise InputError("the prompt is empty: the last user message has no text.")
    return messages


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} must be an object with 'role' and 'content', not {message!r:.80}.", where)
    given = {name for name, value in message.items() if name not in _NULL or value is not None}
    if unknown := given - _READ - _UNUSED:
        field = f"{where}.{min(map(str, unknown)):.100}"
        raise InputError(f"{field}: there is no such field, or it cannot be honoured.", field)
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, list | tuple):
        raise InputError(f"{where}.tool_calls must be a list of objects, not {calls!r:.80}.", f"{where}.tool_calls")
    for index, call in enumerate(calls):
        _check_call(call, f"{where}.tool_calls[{index}]")
    identity = message.get("tool_call_id")
    if identity is not None and not isinstance(identity, str):
        raise InputError(f"{where}.tool_call_id must be text, not {identity!r:.80}.", f"{where}.tool_call_id")
    content = _content(message, f"{where}.content")
    try:
        return Message(message.get("role", ""), content, tuple(calls), identity, _images(message.get("content")))
    except InputError as error:
        field = f"{where}.{error.field or 'role'}"
        raise InputError(f"{field}: {error}", field) from error


def _content(message: Mapping[str, Any], where: str) -> str:
    """A message's text; an assistant that refused, called tools or only thought may have none."""
    content = message.get("content")
    if content is None and message.get("role") == "assistant" and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    if isinstance(content, list | tuple):
        return "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))
    if content is None and (message.get("tool_calls") or message.get("reasoning_content")):
        return ""
    if not isinstance(content, str):
        raise InputError(f"{where} must be text or a list of text parts, not {content!r:.80}.", where)
    return content


def _images(content: Any) -> tuple[Mapping[str, Any], ...]:
    """The parts of a checked content where some of them are images."""
    return tuple(content) if isinstance(content, list | tuple) and any(p["type"] == IMAGE for p in content) else ()


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == IMAGE:
        return ""
    if kind not in ("text", "refusal"):
        raise InputError(f"{where}: only text and image_url can be honoured, not {kind or part!r:.80}.", where)
    if unknown := part.keys() - {"type", kind, "cache_control"}:
        field = f"{where}.{min(map(str, unknown)):.100}"
        raise InputError(f"{field}: there is no such field, or it cannot be honoured.", field)
    if not isinstance(part.get(kind), str):
        raise InputError(f"{where}.{kind} must be text, not {part.get(kind)!r:.80}.", f"{where}.{kind}")
    return str(part[kind])


def _check_call(call: Any, where: str) -> None:
    if not isinstance(call, Mapping):
        raise InputError(f"{where} must be an object, not {call!r:.80}.", where)
    if call.get("type", "function") != "function":
        raise InputError(f"{where}.type can only be 'function', not {call['type']!r:.80}.", f"{where}.type")
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}.function must be an object with a 'name'.", f"{where}.function")


def openai_message(role: str, content: str, about_tools: Mapping[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's format; one that only calls tools has the content null."""
    only_calls = not content and "tool_calls" in about_tools
    return {"role": role, "content": None if only_calls else content, **about_tools}


def canonical_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Tool calls as text that does not depend on ids, spaces or the order of arguments; "" when there are none."""
    plain = []
    for call in calls:
        function = call.get("function")
        function = function if isinstance(function, Mapping) else {}
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(orjson.JSONDecodeError):
                arguments = orjson.loads(arguments)
        plain.append({"name": function.get("name"), "arguments": arguments})
    return orjson.dumps(plain, option=orjson.OPT_SORT_KEYS).decode() if plain else ""


def without_calls(text: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """A text without the canonical form of tool calls at its end: what was said beside them."""
    return text.removesuffix(canonical_calls(calls)).removesuffix("\n") if calls else text


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked: the conversation, and which part of it is the instruction to be inferred back.

    Args:
        messages: the conversation that the policy continues; a last one of the assistant is what its answer begins
            with.
        instruction: x, the text that backward inference should recover; the last user message unless the caller says.
        context: what a reader of the response knew beforehand (the history, results of tools, the rest of a long
            prompt), or "".
        reference: a right answer, for scorers and verifiers that compare with one.
        metadata: the caller's own columns, which reach scorers and reward functions.
    """

    messages: tuple[Message, ...]
    instruction: str
    context: str = ""
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def prefill(self) -> str:
        """What every answer begins with, or ""."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else ""

    @property
    def asked(self) -> tuple[Message, ...]:
        """The messages that are answered: all but one that begins the answer."""
        return self.messages[:-1] if self.prefill else self.messages

    @classmethod
    def of(cls, prompt: Conversation | Task, instruction: str | None = None) -> Task:
        """Build a task; ``instruction`` names the part of the last user message that is the instruction proper.

        Raises:
            InputError: an empty prompt or instruction, or an instruction that is not part of the last user message.
        """
        if isinstance(prompt, Task):
            if instruction is None or instruction == prompt.instruction:
                return prompt
            return replace(cls.of(prompt.messages, instruction), reference=prompt.reference, metadata=prompt.metadata)
        messages = as_messages(prompt)
        at = max(i for i, message in enumerate(messages) if message.role == "user")
        end = len(messages) - (messages[-1].role == "assistant")  # which the answer begins with
        asked = messages[at].content
        before, after = (
            [f"{m.role.capitalize()}: {m.text}" for m in some] for some in (messages[:at], messages[at + 1 : end])
        )
        if instruction is None:
            return cls(messages, asked, "\n".join([*before, *after]))
        if not instruction.strip():
            raise InputError("the instruction is empty.")
        if instruction not in asked:
            raise InputError(f"the instruction must be part of the last user message; {instruction[:60]!r} is not.")
        rest = "\n".join(part.strip() for part in asked.split(instruction, 1) if part.strip())
        return cls(messages, instruction, "\n".join([*before, *([rest] if rest else []), *after]))
