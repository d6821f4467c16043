"""Templates for judges: how a request and responses to it are shown to a model that rates or compares them.

A template is two files, ``system.txt`` and ``user.txt``, in the format of ``bon.prompts``. Its fields say what kind it
is: ``{response}`` is rated, ``{response1}`` and ``{response2}`` are compared, of a ``{response_list}`` the best is
named, by its number from 0 on. ``{prompt}`` is required; ``{context}`` (the conversation before it), ``{reference}``
(a right answer) and ``{criterion}`` are optional. The FLIP paper's released judge templates are of this format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bon.engines.base import Piece, Prompt, Turn
from bon.errors import InputError, UnknownNameError
from bon.prompts import CONTEXT_HEADING, parse_template
from bon.task import Task

Kind = Literal["pointwise", "pairwise", "listwise"]
KINDS: dict[Kind, tuple[str, ...]] = {
    "pointwise": ("response",),
    "pairwise": ("response1", "response2"),
    "listwise": ("response_list",),
}
"""What a judge is asked, and the fields of a template that asks it."""

_OPTIONAL = ("prompt", "context", "reference", "criterion")
_HEADINGS = {
    "context": CONTEXT_HEADING + "{}\n\n",
    "reference": "A right answer:\n{}\n\n",
    "criterion": "- Judge one thing alone, whatever else there is to say: {}\n",
}

Part = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Judging:
    """A way to ask a judge.

    Args:
        name: what to call it in a table.
        kind: what is asked.
        system, user: the messages as (literal text, field) pairs in order.
        headings: whether context, reference and criterion come with a heading of bon's, and as nothing where there are
            none; without, they are inserted as they are.
    """

    name: str
    kind: Kind
    system: tuple[Part, ...]
    user: tuple[Part, ...]
    headings: bool = False

    def knows(self, field: str) -> bool:
        """Whether the template has a place for a field."""
        return any(name == field for _, name in (*self.system, *self.user))

    def prompt(
        self, task: Task, responses: Sequence[Piece], criterion: str = "", template: Mapping[str, Any] | None = None
    ) -> Prompt:
        """Ask about responses to a task; each is a piece of its own, so that what prompts share is the same tokens.

        Args:
            task: whose instruction is shown, behind its context where the template has no other place for that.
            responses: without thinking, in the order in which they are shown.
            criterion: what to judge by; "" for everything.
            template: variables for the chat template.
        """
        asked = task.instruction
        if task.context and not self.knows("context"):
            asked = f"{task.context}\n\n{asked}"
        values = {"prompt": asked, "context": task.context, "reference": task.reference or "", "criterion": criterion}
        turns = []
        for role, parts in (("system", self.system), ("user", self.user)):
            pieces = tuple(piece for part in parts for piece in self._pieces(part, values, responses) if piece != "")
            turns += [Turn(role, pieces)] if pieces else []
        return Prompt(tuple(turns), template or {})

    def _pieces(self, part: Part, values: Mapping[str, str], responses: Sequence[Piece]) -> Iterator[Piece]:
        literal, name = part
        yield literal
        if name == "response_list":
            for number, response in enumerate(responses):
                yield f"{chr(10) * 2 if number else ''}[{number}]\n"
                yield response
        elif name in ("response", "response1", "response2"):
            yield responses[name == "response2"]
        elif name is not None:
            value = values[name]
            yield _HEADINGS[name].format(value) if self.headings and value and name in _HEADINGS else value


def load_judging(style: str | Path | Judging) -> Judging:
    """Look a template up by its kind, or read it from a folder with ``user.txt`` and, perhaps, ``system.txt``.

    Raises:
        UnknownNameError: neither a kind nor such a folder.
        InputError: templates that are none; the message names the file.
    """
    if isinstance(style, Judging):
        return style
    own = Path(style)
    if str(style) not in KINDS and (own / "user.txt").is_file():
        system = own / "system.txt"
        return judging_from_files(system if system.is_file() else None, own / "user.txt")
    if str(style) not in KINDS:
        raise UnknownNameError("judge's style", str(style), KINDS)
    own = Path(__file__).parent / str(style)
    return _read(str(style), own / "system.txt", own / "user.txt", headings=True)


def judging_from_files(system: str | Path | None, user: str | Path) -> Judging:
    """Read a judge's template from files.

    Raises:
        InputError: a file that is missing or not UTF-8, or a template whose fields are not those of one kind.
    """
    return _read(Path(user).stem, None if system is None else Path(system), Path(user), headings=False)


def _read(name: str, system: Path | None, user: Path, *, headings: bool) -> Judging:
    shown = [field for fields in KINDS.values() for field in fields]
    parts = tuple(parse_template(user, (*_OPTIONAL, *shown)))
    used = {field for _, field in parts}
    kinds = [kind for kind, fields in KINDS.items() if used & {*shown} == {*fields}]
    if not kinds or "prompt" not in used:
        wanted = "; ".join(f"{' and '.join(f'{{{f}}}' for f in fields)} ({kind})" for kind, fields in KINDS.items())
        raise InputError(f"the judge's template {user} needs {{prompt}}, and one of: {wanted}.")
    first = () if system is None else tuple(parse_template(system, _OPTIONAL))
    return Judging(name, kinds[0], first, parts, headings)


SLOT = _read("slot", *(Path(__file__).parent / "slot" / name for name in ("system.txt", "user.txt")), headings=True)
SLOT_QUESTION = (Path(__file__).parent / "slot" / "question.txt").read_text(encoding="utf-8").strip()
"""What a response is shown for, and what is asked about it: see ``bon.scorers.slot``."""
