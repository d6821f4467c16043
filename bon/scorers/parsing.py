"""What a reconstruction says: from the raw text of a model to the instruction that it inferred.

Every outcome has a status. "robust" parsers read the text from left to right with bounded look-ahead, which gives them
a second ability: `settled` names the start of the instruction that no continuation can take back, and that is what
makes pruning exact. A general JSON repair library cannot promise that, and so none is used.
"reference" is the released code of the paper, warts included, and settles nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from bon.engines.base import Piece
from bon.errors import UnknownNameError
from bon.prompts import Output
from bon.types import Candidate, FinishReason, Score

ParseStatus = Literal["ok", "repaired", "fallback", "failed"]
PARSERS = ("robust", "reference")


@dataclass(frozen=True, slots=True)
class Parsed:
    """What became of one reconstruction.

    Args:
        status: "ok"; "repaired" when the answer's form had to be mended; "fallback" when the whole text was taken for
            the instruction; "failed" when there is none.
        instruction: the inferred instruction; None exactly when it failed.
        reason: what was mended or went wrong; None when all is well.
    """

    status: ParseStatus
    instruction: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Parser:
    """How the answers to one prompt style are read.

    Args:
        name: "robust" or "reference".
        output: the form that the prompt asks for.
        thinking: the model's answer starts inside a thinking block that the chat template opened.
    """

    name: str
    output: Output
    thinking: bool = False

    def __post_init__(self) -> None:
        if self.name not in PARSERS:
            raise UnknownNameError("parser", self.name, PARSERS)

    @property
    def settles(self) -> bool:
        """Whether ``settled`` ever says anything."""
        return self.name == "robust"

    def parse(
        self, raw: str, finish_reason: FinishReason = "stop", cut: str = "the answer was cut off at the token limit"
    ) -> Parsed:
        """Read a finished reconstruction.

        Args:
            raw: the model's text.
            finish_reason: "length" where it was cut off.
            cut: what to say of that.
        """
        if self.name == "reference":
            return _parse_reference(raw)
        text, problem = self._answer(raw)
        if problem or not text.strip():
            return Parsed("failed", None, problem or "the model answered with nothing")
        parsed = _parse_json(text) if self.output == "json" else _parse_text(text)
        if finish_reason == "length" and parsed.instruction is not None:
            status: ParseStatus = "fallback" if parsed.status == "fallback" else "repaired"
            return Parsed(status, parsed.instruction, f"{parsed.reason}; {cut}" if parsed.reason else cut)
        return parsed

    def settled(self, raw: str) -> str | None:
        """Return text that the instruction starts with, whatever the model writes next, but for its last word.

        The last white-space-separated part may still grow. Quotation marks around the whole are of no account as long
        as they are ASCII, because bounded metrics delete ASCII punctuation. None: nothing is settled yet.
        """
        if self.name == "reference":
            return None
        text, problem = self._answer(_without_partial_tag(raw))
        if problem:
            return None
        return _settled_json(text) if self.output == "json" else _settled_text(text)

    def _answer(self, raw: str) -> tuple[str, str | None]:
        """Return the text after thinking, and what is wrong with it."""
        if self.thinking and "<think>" not in raw:
            _, closed, raw = raw.partition("</think>")
            if not closed:
                return "", "the model did not finish thinking"
        text = _without_blocks(raw)
        if "</think>" in text:
            # Not taken for the end of a block: text that has been counted would be taken back.
            return "", "a </think> without <think>: the model thinks; pass thinking=True"
        return text, None


def _without_partial_tag(raw: str) -> str:
    """Hold back an end that may become ``<think>``: what it seems to be part of would be taken back with it."""
    tag = "<think>"
    return next((raw[:-length] for length in range(len(tag) - 1, 0, -1) if raw.endswith(tag[:length])), raw)


def strip_think(text: str) -> str:
    """Remove ``<think>…</think>``, unclosed ones too, and everything before a ``</think>`` that nothing opened."""
    return _without_blocks(text).rpartition("</think>")[2]


def _without_blocks(text: str) -> str:
    if "<think>" not in text:
        return text
    return re.sub(r"<think>.*?(?:</think>|\Z)", "", text, flags=re.DOTALL)


NO_RESPONSE = Score(None, "empty", "there is nothing but thinking")
"""The score of a candidate of which ``response_piece`` leaves nothing."""


def response_piece(candidate: Candidate) -> Piece | None:
    """What a scorer is shown of a candidate: the text without thinking, or None when nothing is left.

    Text that needed no change keeps the policy's token ids.
    """
    text = strip_think(candidate.text)
    if not text.strip():
        return None
    if text == candidate.text:
        return text if candidate.tokens is None else candidate.tokens
    return text.strip()


# --- bare text --------------------------------------------------------------------------------------------------------

_LABEL = re.compile(
    r"""[\s"'*#`]*+(?:(?:the|your)\s)?(?:(?:most\s)?(?:inferred|original|likely|user)\s){0,2}
        (?:instruction|prompt)(?:\sis|\swas)?[\s"'*`]{0,3}:[\s*]*""",
    re.IGNORECASE | re.VERBOSE,
)
_LABEL_WORD = re.compile("(?:the|your|most|inferred|original|likely|user|instruction|prompt|is|was)?", re.IGNORECASE)
_LABEL_START = re.compile(r"""[\s"'*#`a-z]*+\Z""", re.IGNORECASE)
_FINISHED_WORD = re.compile(r"(?<![^\s:])[^\s:]++(?=[\s:])")  # tried once for each word, not from each of its letters
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»", "「": "」"}
_CURLY = tuple(q for q in _QUOTES if not q.isascii())


def _parse_text(text: str) -> Parsed:
    instruction, mended = text.strip(), []
    if label := _LABEL.match(instruction):
        quote = _opening_quote(label.group())
        instruction = quote + instruction[label.end() :]
        mended.append("a label was removed")
    if len(instruction) > 1 and _QUOTES.get(instruction[0]) == instruction[-1]:
        inside = instruction[1:-1]
        if instruction[0] not in inside and instruction[-1] not in inside:
            instruction = inside.strip()
            mended.append("quotation marks were removed")
    if not instruction.strip("\"'`*#{}[] \n\t"):
        return Parsed("failed", None, "the model answered with nothing")
    return Parsed("repaired" if mended else "ok", instruction, "; ".join(mended) or None)


def _opening_quote(label: str) -> str:
    """The quotation mark before a label, when it is not closed before the colon: it belongs to the whole."""
    first = label.lstrip()[:1]
    return first if first in _QUOTES and label.count(first) == 1 else ""


def _settled_text(text: str) -> str | None:
    text = text.lstrip()
    if label := _LABEL.match(text):
        text = text[label.end() :]
    elif _LABEL_START.match(text) and all(
        _LABEL_WORD.fullmatch(re.sub(r"\W", "", word.group())) for word in _FINISHED_WORD.finditer(text)
    ):
        return None  # may yet become a label: all of its finished words occur in labels
    return None if text.startswith(_CURLY) else text


# --- JSON -------------------------------------------------------------------------------------------------------------

_OBJECT = re.compile(r"""\{\s*(?=["'“])""")
# A key in curly quotation marks has an end in sight: else each “ of many would have the rest of the text read.
_KEY = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*+)"|'((?:[^'\\\n]|\\.)*+)'|“([^”\n]{0,100}+)”)\s*:\s*""", re.DOTALL)
_KEY_START = re.compile(  # what is no key yet and may become one by going on
    r"""(?:"(?:[^"\\]|\\.)*+(?:"\s*+)?|'(?:[^'\\\n]|\\.)*+(?:'\s*+)?|“[^”\n]{0,100}+(?:”\s*+)?)\\*+\Z""", re.DOTALL
)
_COMMA = re.compile(r"\s*,?\s*")
_CLOSERS = {'"': '"', "'": "'", "“": "”"}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", '"': '"', "'": "'", "\\": "\\", "/": "/"}


class _Value(NamedTuple):
    """A value of an object: text when it is a string, whether it has ended, and where reading goes on."""

    text: str | None
    closed: bool
    end: int
    data: Any = None


def _parse_json(text: str) -> Parsed:
    found = _field(text)
    if found is None:
        if _OBJECT.search(text):
            return Parsed("failed", None, "the answer has no field for the instruction")
        plain = _parse_text(_FENCE.sub("", text))
        return Parsed("fallback", plain.instruction, "the answer is not JSON") if plain.instruction else plain
    instruction = found.text
    if instruction is None and isinstance(found.data, list) and all(isinstance(v, str) for v in found.data):
        instruction = "\n".join(found.data)
    if instruction is None or not instruction.strip():
        kind = "empty" if instruction is not None else "not a string"
        return Parsed("failed", None, f"the field for the instruction is {kind}")
    try:
        strict = isinstance(json.loads(text), dict) and found.text is not None
    except (ValueError, RecursionError):
        strict = False
    if strict:
        return Parsed("ok", instruction.strip())
    reason = "the object was mended or had text around it" if found.closed else "the object was cut short"
    return Parsed("repaired", instruction.strip(), reason)


def _settled_json(text: str) -> str | None:
    found = _field(text)
    return None if found is None else found.text


_FENCE = re.compile(r"^\s*```\w*\n|\n```\s*$")


def _field(text: str) -> _Value | None:
    """Find the first value whose key speaks of an instruction, in the first object that has one."""
    start = 0
    while opened := _OBJECT.search(text, start):
        position = opened.end()
        while key := _KEY.match(text, position):
            name = next(group for group in key.groups() if group is not None).lower()
            value = _value(text, key.end())
            if "instruct" in name and "reason" not in name:
                return value
            if not value.closed:
                return None
            position = _skip(_COMMA, text, value.end)
        if position == len(text) or _KEY_START.match(text, position):
            return None
        start = position
    return None


def _skip(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _value(text: str, position: int) -> _Value:
    if closer := _CLOSERS.get(text[position : position + 1]):
        return _string(text, position + 1, closer)
    try:
        data, end = _DECODER.raw_decode(text, position)
    except (ValueError, RecursionError):
        return _Value(None, False, len(text))
    # A number may go on: 1 may become 12. What is not a string never counts before the object goes on after it.
    return _Value(None, end < len(text), end, data)


_DECODER = json.JSONDecoder()


def _string(text: str, position: int, closer: str) -> _Value:
    """Read a string that need not be valid JSON: raw line breaks and unescaped quotation marks are content.

    A quotation mark ends the string when the object goes on after it: with a closing brace, the next key or a fence.
    In valid JSON it always does, so there the value is the one that a JSON parser finds.
    """
    marks = re.compile(rf"\\.|\\\Z|{closer}", re.DOTALL)
    at = position
    while mark := marks.search(text, at):
        if mark.group() == closer:
            goes_on = _goes_on(text, mark.end())
            if goes_on is not False:
                return _Value(_decode(text[position : mark.start()]), goes_on is True, mark.end())
        at = mark.end()
    return _Value(_decode(_without_partial_escape(text[position:])), False, len(text))


def _goes_on(text: str, position: int) -> bool | None:
    """Whether an object goes on at ``position``; None when the text ends too early to tell."""
    at = _skip(_COMMA, text, position)
    if text.startswith(("}", "```"), at) or _KEY.match(text, at):
        return True
    return None if text[at : at + 3] in ("", "`", "``") or _KEY_START.match(text, at) else False


def _without_partial_escape(content: str) -> str:
    r"""Cut an escape that is still being written: ``\``, ``\u12``, or the first half of a surrogate pair."""
    if "\\" not in content[-6:]:
        return content
    return re.sub(r"(?<!\\)((?:\\\\)*)\\(?:u[0-9a-fA-F]{0,3})?\Z", r"\1", content)


def _decode(content: str) -> str:
    """Resolve escapes; an unknown one, such as LaTeX's, stands for itself."""

    if "\\" not in content:
        return content

    def plain(match: re.Match[str]) -> str:
        code = match.group(1)
        if len(code) == 5:
            return chr(int(code[1:], 16))
        return _ESCAPED.get(code, match.group())

    text = _ESCAPE.sub(plain, content)
    # Surrogate pairs become the character that they stand for; a lone half cannot be encoded and is replaced.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# --- the paper's released code ----------------------------------------------------------------------------------------

_REFERENCE_KEYS = (
    "INFERRED INSTRUCTION",
    "inferred_instruction",
    "Inferred Instructcion",
    "inferred instruction",
    "Inferred_Instruction",
)
_REFERENCE_NOISE = ("assistant", "<think>", "</think>", "<|system|>", "<|assistant|>", "<|text|>")


def _parse_reference(raw: str) -> Parsed:
    r"""Do what the released code does to a reconstruction before it computes F1.

    Source: github.com/yikee/FLIP at c9739ee, open_instruct: ``LLMJudgeVerifier.parse_completion``, then
    ``extract_score_with_f1``. Line breaks become a literal ``\n`` before parsing, outside strings too, so JSON on more
    than one line never parses and the whole blob is scored. Where that code raises, and ends up with a score of 0,
    the reconstruction is "failed" here.
    """
    # r"<think>\s*.*?\s*</think>\s*" over there, which takes cubic time; without an end the block stays.
    text = re.sub(r"(<think>.*?)(?:</think>\s*|(\Z))", lambda m: "" if m[2] is None else m[1], raw, flags=re.DOTALL)
    text = text.replace("<answer>", "").replace("</answer>", "").strip()
    if text.startswith("```json"):
        text = text[7:]
    elif text.startswith("```"):
        text = text[3:]
    text = text.removesuffix("```").replace("\r\n", "\n").replace("\n", "\\n")
    text = re.sub(r'\\(?!["\\/bfnrtu])', r"\\\\", text).strip()
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return _reference_blob(text, "the answer is not JSON once its line breaks are escaped")
    except (ValueError, RecursionError) as error:
        return Parsed("failed", None, f"the answer cannot be read: {error}")
    if not isinstance(data, dict):
        return Parsed("failed", None, f"the answer is JSON but not an object: {text[:40]}")
    value = next((data[key] for key in _REFERENCE_KEYS if data.get(key)), data.get(_REFERENCE_KEYS[-1]))
    if value is None:
        return _reference_blob(text, "the object has none of the fields that the released code looks for")
    if not isinstance(value, str):
        return Parsed("failed", None, "the field for the instruction is not a string")
    return Parsed("ok", value)


def _reference_blob(text: str, reason: str) -> Parsed:
    for noise in _REFERENCE_NOISE:
        text = text.replace(noise, "")
    return Parsed("fallback", text, reason)
