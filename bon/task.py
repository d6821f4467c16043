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
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: one of ``ROLES``.
        content: its text; an assistant that only called tools has none.
        tool_calls: an assistant's calls of tools, in OpenAI's format.
        tool_call_id: for the role "tool", which call this is the result of.
    """

    role: str
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    tool_call_id: str | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UnknownNameError("message role", self.role, ROLES)
        if not isinstance(self.content, str):
            raise InputError(f"the content of a {self.role} message must be text, not {type(self.content).__name__}.")
        for name, owner in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != owner:
                raise InputError(f"{name} belongs to a message of the role {owner!r}, not to one of {self.role!r}.")

    @property
    def about_tools(self) -> dict[str, Any]:
        """The fields beyond role and content, in OpenAI's format; empty for an ordinary message."""
        calls = {"tool_calls": list(self.tool_calls)} if self.tool_calls else {}
        return calls if self.tool_call_id is None else {**calls, "tool_call_id": self.tool_call_id}

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

    Raises:
        InputError: an empty prompt, no user message, a message that is not role and content, an assistant's at the end.
    """
    if isinstance(prompt, str):
        messages: tuple[Message, ...] = (Message("user", prompt),)
    elif not isinstance(prompt, Sequence) or not prompt:
        raise InputError(f"a prompt must be text or a non-empty list of messages, not {prompt!r}.")
    else:
        messages = tuple(_as_message(m, i) for i, m in enumerate(prompt))
    if messages[-1].role not in ("user", "tool"):
        raise InputError(f"the last message must come from the user or from a tool, not from {messages[-1].role!r}.")
    asked = next((m for m in reversed(messages) if m.role == "user"), None)
    if asked is None:
        raise InputError("there is no user message: nothing is asked.")
    if not asked.content.strip():
        raise InputError("the prompt is empty: the last user message has no text.")
    return messages


def _as_message(message: Any, index: int) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys() | _without_text(message):
        raise InputError(f"message {index} must have 'role' and 'content', got {message!r}.")
    if extra := message.keys() - {*_FIELDS}:
        raise InputError(f"message {index} has fields that bon does not know: {', '.join(sorted(extra))}.")
    calls, call = message.get("tool_calls") or (), message.get("tool_call_id")
    if not isinstance(calls, list | tuple) or not all(isinstance(one, Mapping) for one in calls):
        raise InputError(f"'tool_calls' of message {index} must be a list of objects, got {calls!r}.")
    if call is not None and not isinstance(call, str):
        raise InputError(f"'tool_call_id' of message {index} must be text, got {call!r}.")
    content = "" if calls and message.get("content") is None else message["content"]
    return Message(message["role"], content, tuple(calls), call)


def _without_text(message: Mapping[str, Any]) -> set[str]:
    return {"content"} if message.get("tool_calls") else set()


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


@dataclass(frozen=True, slots=True)
class Task:
    """What is asked: the conversation, and which part of it is the instruction to be inferred back.

    Args:
        messages: the conversation that the policy continues.
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
        asked = messages[at].content
        before, after = (
            [f"{m.role.capitalize()}: {m.text}" for m in some] for some in (messages[:at], messages[at + 1 :])
        )
        if instruction is None:
            return cls(messages, asked, "\n".join([*before, *after]))
        if not instruction.strip():
            raise InputError("the instruction is empty.")
        if instruction not in asked:
            raise InputError(f"the instruction must be part of the last user message; {instruction[:60]!r} is not.")
        rest = "\n".join(part.strip() for part in asked.split(instruction, 1) if part.strip())
        return cls(messages, instruction, "\n".join([*before, *([rest] if rest else []), *after]))
