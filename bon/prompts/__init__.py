"""Prompt styles: how a response is shown to the model that infers the instruction, and in what form it answers.

A style is two text files, ``system.txt`` and ``user.txt``, read with ``str.format`` semantics: ``{response}`` is
required in the user file, ``{context}`` is optional, literal braces are doubled. Users' own files (the FLIP paper's
``FLIP_SYSTEM.prompt`` and ``FLIP_USER.prompt`` as they are, for instance) have the same format. ``examples.jsonl``
beside them has examples, which become turns of the conversation: small models go on with a response, or repeat it,
unless they see that others were answered with a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import orjson

from bon.engines.base import Piece, Prompt, Turn
from bon.errors import InputError, UnknownNameError
from bon.task import Task

Output = Literal["text", "json"]

STYLES: dict[str, Output] = {"direct": "text", "turns": "text", "json": "json"}

JSON_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"reasoning": {"type": "string"}, "instruction": {"type": "string"}},
    "required": ["reasoning", "instruction"],
    "additionalProperties": False,
}
"""What the style "json" asks for; engines that can be held to it are."""

CONTEXT_HEADING = "Conversation before the response:\n"


@dataclass(frozen=True, slots=True)
class Style:
    """A way to ask for the instruction behind a response.

    Args:
        name: what to call it in a table.
        system: the system message, or "" for none.
        user: the user message as (literal text, field) pairs in order; the field is "response", "context" or None.
        output: "text" when the answer is the bare instruction, "json" when it is an object with a field for it.
        context_heading: put before a context, together with a blank line after it; None inserts the bare context.
        schema: JSON schema of the answer, where it is known.
        examples: (response, answer) pairs, each shown as a user's and an assistant's turn before the response.
    """

    name: str
    system: str
    user: tuple[tuple[str, str | None], ...]
    output: Output
    context_heading: str | None = None
    schema: Mapping[str, Any] | None = None
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def shows_context(self) -> bool:
        """Whether the template has a place for the context."""
        return any(name == "context" for _, name in self.user)

    def prompt(self, task: Task, response: Piece, template: Mapping[str, Any] | None = None) -> Prompt:
        """Ask for the instruction of ``task`` from one response.

        Static text, context and response are pieces of their own, so that what prompts share is the same tokens.

        Args:
            task: its context is shown where the template has a place for it; its instruction never is.
            response: the response, without thinking.
            template: variables for the chat template.
        """
        turns = [Turn("system", (self.system,))] if self.system else []
        for shown, answer in self.examples:
            turns += [self._turn("", shown), Turn("assistant", (answer,))]
        return Prompt((*turns, self._turn(self._context(task.context), response)), template or {})

    def _turn(self, context: str, response: Piece) -> Turn:
        values: dict[str | None, Piece] = {"context": context, "response": response, None: ""}
        return Turn("user", tuple(p for literal, name in self.user for p in (literal, values[name]) if p != ""))

    def _context(self, context: str) -> str:
        if self.context_heading is None or not context:
            return context
        return f"{self.context_heading}{context}\n\n"


def load_style(style: str | Path | Style) -> Style:
    """Look a style up by name (``STYLES``), or read one from a folder; a style object passes through.

    A folder holds ``user.txt`` and, where there are such, ``system.txt`` and ``examples.jsonl``; see ``from_files``.

    Raises:
        UnknownNameError: no such style.
        InputError: something else, or a folder whose templates are none.
    """
    if isinstance(style, Style):
        return style
    if not isinstance(style, str | Path):
        raise InputError(f"a style is a name, a folder or a Style, not {style!r:.60}.")
    own = Path(style)
    if str(style) not in STYLES and (own / "user.txt").is_file():
        system, examples = (path if path.is_file() else None for path in (own / "system.txt", own / "examples.jsonl"))
        return replace(from_files(system, own / "user.txt", examples=examples), name=own.name)
    if str(style) not in STYLES:
        raise UnknownNameError("prompt style", str(style), STYLES)
    name = str(style)
    folder = Path(__file__).parent / name
    read = _read(name, folder / "system.txt", folder / "user.txt", STYLES[name], CONTEXT_HEADING)
    if (examples := folder / "examples.jsonl").is_file():
        read = replace(read, examples=_examples(examples))
    return replace(read, schema=JSON_SCHEMA) if read.output == "json" else read


def from_files(
    system: str | Path | None,
    user: str | Path,
    *,
    output: Output | None = None,
    examples: str | Path | None = None,
) -> Style:
    """Read a style from template files.

    Args:
        system: file with the system message; None for no system message.
        user: file with the user message, ``{response}`` in it and optionally ``{context}``.
        output: whether the model is asked for bare "text" or for "json"; None looks whether the files mention JSON.
        examples: file with a JSON object on each line: "response", and "instruction", what is to be answered to it.

    Raises:
        InputError: a file that is missing or not UTF-8, or a template without {response}, with other fields, or with
            a brace that is neither a field nor doubled; the message names the file.
    """
    if output not in (None, "text", "json"):
        raise UnknownNameError("prompt output", output, ["text", "json"])
    read = _read(Path(user).stem, None if system is None else Path(system), Path(user), output, None)
    return read if examples is None else replace(read, examples=_examples(Path(examples)))


def _read(name: str, system: Path | None, user: Path, output: Output | None, heading: str | None) -> Style:
    system_text = "".join(literal for literal, _ in parse_template(system, ())) if system else ""
    parts = tuple(parse_template(user, ("response", "context")))
    if not any(field_name == "response" for _, field_name in parts):
        raise InputError(f"the prompt template {user} has no {{response}}: put it where the response goes.")
    if output is None:
        text = system_text + "".join(literal for literal, _ in parts)
        output = "json" if "json" in text.lower() else "text"
    return Style(name, system_text, parts, output, heading)


def _examples(path: Path) -> tuple[tuple[str, str], ...]:
    pairs = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            row = orjson.loads(line)
            pair = row["response"], row["instruction"]
        except (orjson.JSONDecodeError, LookupError, TypeError):
            pair = None, None
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise InputError(f'{path}, line {number}: an example is {{"response": TEXT, "instruction": TEXT}}.')
        pairs.append(pair)
    return tuple(pairs)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt template {path} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise InputError(f"the prompt template {path} cannot be read: {error.strerror}.") from error


def parse_template(path: Path, fields: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """Read a template as (literal text, field) pairs.

    Raises:
        InputError: what cannot be read, a field that is not one of ``fields``, or a brace that is neither a field nor
            doubled.
    """
    text = _text(path)
    parts: list[tuple[str, str | None]] = []
    try:
        for literal, name, spec, conversion in Formatter().parse(text.rstrip("\n")):
            if name is not None and (name not in fields or spec or conversion):
                shown = "{" + name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "") + "}"
                known = " and ".join(f"{{{f}}}" for f in fields) or "none here"
                raise InputError(
                    f"the prompt template {path} has an unknown field {shown[:60]!r}. Fields: {known}; "
                    "double the braces of literal text, as in {{ and }}."
                )
            parts.append((literal, name))
    except ValueError as error:
        raise InputError(
            f"the prompt template {path} has a malformed brace ({error}). "
            "Double the braces of literal text, as in {{ and }}."
        ) from error
    return _merged(parts)


def _merged(parts: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Join neighbouring literals, which a doubled brace splits."""
    merged: list[tuple[str, str | None]] = []
    for literal, name in parts:
        if merged and merged[-1][1] is None:
            merged[-1] = (merged[-1][0] + literal, name)
        else:
            merged.append((literal, name))
    return merged
