"""Messages become token ids, and text never becomes a control token.

The chat template is rendered once per sequence of roles with placeholders instead of contents. Its own pieces may
hold control tokens (``<|im_end|>``, ``<think>``, ...); whatever comes from users and candidates is encoded by a copy
of the tokenizer that knows none of them, so the same characters inside a message are plain characters. For ordinary
conversations the ids are those of ``tokenizer.apply_chat_template(..., tokenize=True)``.

An assistant's turn at the end, or an open one, is continued: nothing of the template comes behind it. It knows no tools
and no images.
"""

from __future__ import annotations

import functools
import logging
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from bon.engines.base import Piece, Prompt, Turn, developer_as_system, fold_system
from bon.engines.text.vocabulary import PlainEncoder
from bon.errors import InputError, UnknownNameError
from bon.types import Tokens

log = logging.getLogger(__name__)

_PAD = "\t\t \t\t"  # white space around a placeholder: a template that trims a content takes it away
_SLOT = re.compile(rf"({_PAD})?BONxSLOTx(\d+)xEND({_PAD})?")
_MOST_WAITING = 8  # tokens whose text is held back
_MOST_TURNS = 64  # of a conversation whose rendering is worth keeping
_MOST_SKELETONS = 256
_ALWAYS_ACCEPTED = {"enable_thinking"}  # callers pass it without knowing the template


@dataclass(frozen=True, slots=True)
class _Slot:
    """Where the content of turn ``turn`` goes, and which of its ends the template trims."""

    turn: int
    trim_left: bool
    trim_right: bool


_Part = int | str | _Slot  # a control token, the template's plain text, a content


class Renderer:
    """Turns prompts into token ids for one tokenizer.

    Tokenizers without a chat template get a plain format: ``System: ...``, ``User: ...`` and ``Assistant:``, separated
    by empty lines, after the beginning-of-text token where the tokenizer adds one. A system message that a template
    refuses or leaves out goes before the first user message, in the same turn. A developer message is a system message
    wherever the template does not speak of developers. No padding token is needed.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template_kwargs: passed to the chat template, for instance ``{"enable_thinking": False}``.
        chat_template: what to use in place of the tokenizer's own template: Jinja text, or the file that holds it.
        eos_ids: further ids that end a completion (the generation config's).

    Raises:
        UnknownNameError: an argument that the chat template does not read.
        InputError: a chat template that is no Jinja template, or not there.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        chat_template: str | Path | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        if chat_template is not None:
            tokenizer.chat_template = _template(chat_template)
        self.tokenizer = tokenizer
        self.plain = PlainEncoder(tokenizer)
        self.fingerprint = self.plain.fingerprint
        self._kwargs = dict(chat_template_kwargs or {})
        self._pieces: dict[int, str] = {}
        self._skeletons: dict[tuple[Any, ...], list[_Part]] = {}
        if not tokenizer.chat_template:
            log.warning(
                "the tokenizer has no chat template; prompts are written as 'User: ...' and 'Assistant:'. To give one: "
                "chat_template=FILE"
            )
        self._check_arguments(self._kwargs)
        self.end_id: int | None = self._turn_end()
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.end_ids: frozenset[int] = frozenset((*eos_ids, *own, *(() if self.end_id is None else (self.end_id,))))

    def render(self, prompt: Prompt, *, generation: bool = True) -> tuple[int, ...]:
        """Token ids of a conversation, up to where the assistant's answer starts or goes on.

        Without ``generation`` it is the conversation to its end, what the template puts behind the last turn included.

        Every piece of a turn is encoded by itself; a ``Tokens`` piece of the same vocabulary is taken as it is, unless
        it holds control tokens or the template trims it.

        Raises:
            InputError: the chat template refuses this sequence of roles, a turn is about tools, or one of the user is
                to be continued and there is no chat template.
        """
        prompt.refuse_tools("an engine that runs the model here")
        if prompt.open and not self.tokenizer.chat_template:
            raise InputError(
                "the model has no chat template, so it was never shown what a user writes. Take an instruct model, or "
                "give chat_template=FILE."
            )
        turns, parts = self._skeleton(prompt, generation)
        ids: list[int] = []
        text, inner = "", False  # plain text not yet encoded, and whether it continues a run of plain text
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            if isinstance(part, int):
                ids += self.plain.encode(text, inner=inner)
                ids.append(part)
                text, inner = "", False
                continue
            for index, piece in enumerate(_trimmed(turns[part.turn].pieces, part)):
                known = self._known_ids(piece)
                if known is not None or index:
                    ids += self.plain.encode(text, inner=inner)
                    text, inner = "", True
                if known is not None:
                    ids += known
                else:
                    text += piece if isinstance(piece, str) else piece.text
        if prompt.open:
            text = text.rstrip(" ")  # which belongs to the first word that is to come
        return (*ids, *self.plain.encode(text, inner=inner))

    def encode(self, text: str) -> tuple[int, ...]:
        """Plain text as the start of an answer: no control tokens, whatever it says."""
        return tuple(self.plain.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.plain.decode(ids)

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """The text of each token by itself, "" for special ones.

        They join to the whole text, except where a character is spread over several tokens.
        """
        return tuple(self._pieces[i] if i in self._pieces else self._piece(i) for i in ids)

    def _piece(self, token: int) -> str:
        """A token's text inside a text: alone, some tokenizers drop the space that it begins with."""
        before = self.encode("a")
        self._pieces[token] = self.decode((*before, token))[len(self.decode(before)) :]
        return self._pieces[token]

    def as_tokens(self, ids: Sequence[int], text: str) -> Tokens | None:
        """The ids of a completion without special tokens, or None where they do not decode to ``text``."""
        kept = tuple(i for i in ids if i not in self.plain.special_ids)
        if self.decode(kept) != text:  # cut before a stop string, or the ids of something else
            fits = bisect_right(range(len(kept)), len(text), key=lambda count: len(self.decode(kept[:count])))
            kept = kept[: max(0, fits - 1)]
            if self.decode(kept) != text:
                return None
        return Tokens(text, kept, self.fingerprint)

    def _known_ids(self, piece: Piece) -> tuple[int, ...] | None:
        if isinstance(piece, str) or piece.vocabulary != self.fingerprint or self.plain.control_ids & set(piece.ids):
            return None
        return piece.ids

    def _skeleton(self, prompt: Prompt, generation: bool) -> tuple[tuple[Turn, ...], list[_Part]]:
        """The template's pieces for these roles, and the turns they ask for (system turns folded where refused)."""
        turns = self._known_roles(prompt.turns)
        try:
            return turns, self._parts(tuple(t.role for t in turns), prompt, generation)
        except _RefusedError as refusal:
            folded = fold_system(turns)
            if folded is None:
                raise InputError(f"the model's chat template refuses this conversation: {refusal}") from refusal
        try:
            return folded, self._parts(tuple(t.role for t in folded), prompt, generation)
        except _RefusedError as refusal:
            raise InputError(f"the model's chat template refuses this conversation: {refusal}") from refusal

    def _known_roles(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if "developer" in str(self.tokenizer.chat_template):
            return turns
        return developer_as_system(turns)

    def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        template = self.tokenizer.chat_template or ""
        sources = template.values() if isinstance(template, dict) else [template]
        known = frozenset[str]().union(*map(_arguments_of, sources))
        for name in arguments:
            if name not in known | _ALWAYS_ACCEPTED:
                raise UnknownNameError("chat template argument", name, known)

    def _parts(self, roles: tuple[str, ...], prompt: Prompt, generation: bool) -> list[_Part]:
        arguments, continued = prompt.template, generation and prompt.prefilled
        key = (roles, generation, continued, *((name, repr(value)) for name, value in sorted(arguments.items())))
        if key not in self._skeletons:
            self._check_arguments(arguments)
            parts = self._split(
                self._apply(roles, {**self._kwargs, **arguments}, generation=generation and not continued)
            )
            if continued:
                parts = _up_to(len(roles) - 1, parts)
            if missing := set(range(len(roles))) - {p.turn for p in parts if isinstance(p, _Slot)}:
                raise _RefusedError(f"it leaves out the {roles[min(missing)]} message")
            if not self.tokenizer.chat_template:
                parts = [*self.plain.start_ids, *parts]
            if len(roles) > _MOST_TURNS:
                return parts
            if len(self._skeletons) == _MOST_SKELETONS:
                del self._skeletons[next(iter(self._skeletons))]
            self._skeletons[key] = parts
        return self._skeletons[key]

    def _apply(self, roles: Sequence[str], arguments: Mapping[str, Any], *, generation: bool) -> str:
        slots = [f"{_PAD}BONxSLOTx{i}xEND{_PAD}" for i in range(len(roles))]
        if not self.tokenizer.chat_template:
            turns = [f"{role.capitalize()}: {slot}" for role, slot in zip(roles, slots, strict=True)]
            return "\n\n".join([*turns, "Assistant:"] if generation else turns)
        messages = [{"role": role, "content": slot} for role, slot in zip(roles, slots, strict=True)]
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **arguments
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise _RefusedError(str(error)) from error
        return str(rendered)

    def _split(self, rendered: str) -> list[_Part]:
        parts: list[_Part] = []
        at = 0
        for slot in _SLOT.finditer(rendered):
            parts += self.plain.split(rendered[at : slot.start()])
            parts.append(_Slot(int(slot[2]), trim_left=slot[1] is None, trim_right=slot[3] is None))
            at = slot.end()
        return parts + self.plain.split(rendered[at:])

    def _turn_end(self) -> int | None:
        """The control token that the template puts after an assistant message; without one, the tokenizer's eos."""
        eos = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template:
            try:
                parts = self._split(self._apply(("user", "assistant"), self._kwargs, generation=False))
            except _RefusedError:
                parts = []
            slots = [i for i, part in enumerate(parts) if isinstance(part, _Slot)]
            after = parts[slots[-1] + 1 :] if slots else []
            for part in after:
                if isinstance(part, int):
                    return part
        return None if eos is None else int(eos)


class TextStream:
    """Decodes one completion as it grows; bytes of an unfinished character are held back."""

    __slots__ = ("_decode", "_ids", "_read", "_skipped", "_start", "count", "text")

    def __init__(self, renderer: Renderer) -> None:
        self._decode, self._skipped = renderer.decode, renderer.plain.special_ids
        self._ids: list[int] = []
        self._start = 0  # decoding restarts here, a few tokens back, so that joined pieces come out right
        self._read = 0  # tokens whose text is in ``text``
        self.count = 0  # tokens pushed so far, special ones included
        self.text = ""

    def push(self, ids: Sequence[int]) -> str:
        """Add token ids; return all the text that is certain so far."""
        self.count += len(ids)
        self._ids += [i for i in ids if i not in self._skipped]
        before = self._decode(self._ids[self._start : self._read])
        # A character has four bytes at most, so of tokens that have waited for long at most three still wait for it.
        for held in range(4) if len(self._ids) - self._read > _MOST_WAITING else (0,):
            end = len(self._ids) - held
            now = self._decode(self._ids[self._start : end])
            if len(now) > len(before) and not now.endswith("\ufffd"):
                break
        else:
            if not held:
                return self.text
        self.text += now[len(before) :]
        self._start, self._read = self._read, end
        return self.text


class _RefusedError(Exception):
    """The chat template refused a sequence of roles."""


def _up_to(turn: int, parts: list[_Part]) -> list[_Part]:
    """The parts up to a turn's content, whose end is as it is given: a completion goes on from it."""
    at = max((i for i, part in enumerate(parts) if isinstance(part, _Slot) and part.turn == turn), default=-1)
    last = parts[at]
    return [*parts[:at], replace(last, trim_right=False)] if isinstance(last, _Slot) else parts


def _trimmed(pieces: Sequence[Piece], slot: _Slot) -> Sequence[Piece]:
    """The pieces of a content without the white space that the template takes off its ends."""
    kept = list(pieces)
    while slot.trim_left and kept:
        kept[0] = _without(kept[0], str.lstrip)
        if _text(kept[0]):
            break
        kept.pop(0)
    while slot.trim_right and kept:
        kept[-1] = _without(kept[-1], str.rstrip)
        if _text(kept[-1]):
            break
        kept.pop()
    return kept


def _text(piece: Piece) -> str:
    return piece if isinstance(piece, str) else piece.text


def _without(piece: Piece, strip: Any) -> Piece:
    text: str = strip(_text(piece))
    return piece if text == _text(piece) else text


def _template(given: str | Path) -> str:
    """A chat template's text: ``given`` itself where it holds Jinja, else what the file of that name holds."""
    if "{" in str(given):
        return str(given)
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"chat_template is {str(given)!r}, which is neither Jinja text (it has no {{) nor a file that can be read "
            f"({error})."
        ) from error


@functools.lru_cache(maxsize=16)
def _arguments_of(template: str) -> frozenset[str]:
    """Names that a chat template reads from its caller."""
    # transformers' own block tag; without it the rest is ordinary Jinja.
    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"the chat template has an error in line {error.lineno}: {error.message}. Give another: chat_template=FILE"
        ) from error
    return frozenset(jinja2.meta.find_undeclared_variables(parsed) - {"messages", "raise_exception", "strftime_now"})
