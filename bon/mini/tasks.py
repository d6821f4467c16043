"""The mini world: writing tasks sampled from a grammar, their right answers, and a verifier.

`lexicon.py` and `families.py` are the data; this module only interprets them. A `Task` is an instruction before it is
put into words: a family, one of its wordings, and a value for each constraint.

    task = sample_task(random.Random(0), "heldout")
    instruction(task)                  # "Write a reminder for Anna to water the plants on Monday."
    response(task, random.Random(0))   # "Hello Anna, this is a reminder to water the plants on Monday."
    verify(task, text)                 # does any text, from any model, meet every constraint?

The verifier checks constraints and layout, not fluency. Standard library only.
"""

import random
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from bon.mini.families import FAMILIES, Family
from bon.mini.lexicon import LEXICON, MARKERS

__all__ = [
    "FAMILIES",
    "Split",
    "Task",
    "corrupt",
    "instruction",
    "is_held_out",
    "knows",
    "response",
    "sample_instructions",
    "sample_task",
    "sample_tasks",
    "verify",
]

Split = Literal["train", "heldout", "unseen_wording"]
"""`train`: trained wordings and value pairs. `heldout`: value pairs never trained on. `unseen_wording`: wordings never
trained on (with value pairs that were)."""

OPTIONAL_RATE = 0.55
"""How often a task sets each of its optional slots."""

HELD_OUT_ONE_IN = 12
"""One in this many pairs of (first, second) slot values is kept out of training."""


@dataclass(frozen=True)
class Task:
    """One instruction of the world: `wording` indexes the family's trained wordings, then its unseen ones."""

    family: str
    wording: int
    slots: Mapping[str, str] = field(hash=False)


# --- Templates -------------------------------------------------------------------------------------------------------

_OPTIONAL = re.compile(r"\[([^\]]*)\]")
_CHOICE = re.compile(r"<([^>]*)>")
_SLOT = re.compile(r"\{(\w+)\}")
_A_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")
_AN = re.compile(r"\b([Aa])n(?= )")


@cache
def _blocks(template: str) -> tuple[tuple[str, frozenset[str]], ...]:
    """A template cut into (text, slots that must all be set for the text to appear)."""
    pieces = _OPTIONAL.split(template)  # odd ones were in brackets
    return tuple(
        (text, frozenset(_SLOT.findall(text)) if index % 2 else frozenset())
        for index, text in enumerate(pieces)
        if text
    )


def _fill(template: str, values: Mapping[str, str], rng: random.Random | None) -> str:
    """The template with its optional parts decided, choices taken (the first without `rng`), and slots filled in."""

    def choose(match: re.Match[str]) -> str:
        options = match[1].split("|")
        return rng.choice(options) if rng else options[0]

    text = "".join(text for text, needed in _blocks(template) if needed <= values.keys())
    text = _CHOICE.sub(choose, text)
    text = _SLOT.sub(lambda match: values[match[1]], text)
    return _A_BEFORE_VOWEL.sub(r"\1n ", text)


def _shown(family: Family, slots: Mapping[str, str], rng: random.Random | None) -> dict[str, str]:
    """Slot values as a response shows them: a marker becomes one of its phrases."""
    shown = {}
    for slot, value in slots.items():
        phrases = MARKERS.get(family.slots[slot], {}).get(value, (value,))
        shown[slot] = rng.choice(phrases) if rng else phrases[0]
    return shown


# --- Sampling --------------------------------------------------------------------------------------------------------


def is_held_out(family: str, slots: Mapping[str, str]) -> bool:
    """Whether training never sees these values of the family's first two slots together."""
    first, second = list(FAMILIES[family].required)[:2]
    return zlib.crc32(f"{family}|{slots[first]}|{slots[second]}".encode()) % HELD_OUT_ONE_IN == 0


def _sample_slots(family: Family, rng: random.Random) -> dict[str, str]:
    slots: dict[str, str] = {}
    for slot, kind in family.slots.items():
        if slot in family.optional and rng.random() >= OPTIONAL_RATE:
            continue
        slots[slot] = rng.choice([value for value in LEXICON[kind] if value not in slots.values()])
    return slots


def sample_task(rng: random.Random, split: Split = "train", family: str | None = None) -> Task:
    """Draw a task of the split, of the given family or of any.

    Raises:
        ValueError: the split is unknown.
    """
    if split not in ("train", "heldout", "unseen_wording"):
        raise ValueError(f"unknown split {split!r}: use 'train', 'heldout' or 'unseen_wording'")
    grammar = FAMILIES[family or rng.choice(list(FAMILIES))]
    trained = len(grammar.wordings)
    wording = rng.randrange(trained)
    if split == "unseen_wording":
        wording = trained + rng.randrange(len(grammar.unseen))
    while True:
        slots = _sample_slots(grammar, rng)
        if is_held_out(grammar.name, slots) == (split == "heldout"):
            return Task(grammar.name, wording, slots)


def sample_tasks(count: int, seed: int = 0, split: Split = "heldout") -> list[Task]:
    """Draw `count` tasks with different instructions, taking the families in turn; the same seed, the same tasks."""
    rng = random.Random(f"{split}/{seed}")
    names = list(FAMILIES)
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        family = names[len(tasks) % len(names)]
        task = sample_task(rng, split, family)
        tasks.setdefault(instruction(task), task)
    return list(tasks.values())


def sample_instructions(count: int, seed: int = 0, split: Split = "heldout") -> list[str]:
    """The instructions of `sample_tasks`: as many, in the same order."""
    return [instruction(task) for task in sample_tasks(count, seed, split)]


# --- Both sides of a task --------------------------------------------------------------------------------------------


def instruction(task: Task) -> str:
    """The task as a user would ask for it."""
    family = FAMILIES[task.family]
    templates = [*(wording.instruction for wording in family.wordings), *family.unseen]
    return _fill(templates[task.wording], task.slots, None)


def response(task: Task, rng: random.Random) -> str:
    """A right answer. An unseen wording is answered like one of the family's trained ones."""
    family = FAMILIES[task.family]
    wording = family.wordings[task.wording] if task.wording < len(family.wordings) else rng.choice(family.wordings)
    return _fill(wording.response, _shown(family, task.slots, rng), rng)


def corrupt(task: Task, rng: random.Random, drop: float, alter: float) -> Task:
    """The task as a careless writer remembers it, to make flawed demonstrations from.

    Arguments:
        task: what was asked.
        rng: source of the mistakes.
        drop: probability that each optional constraint is forgotten.
        alter: probability that each remembered value turns into another of its kind.

    A held-out pair of values never comes out of a task that was not held out.
    """
    family = FAMILIES[task.family]
    while True:
        slots = {}
        for slot, value in task.slots.items():
            if slot in family.optional and rng.random() < drop:
                continue
            slots[slot] = rng.choice(LEXICON[family.slots[slot]]) if rng.random() < alter else value
        if is_held_out(task.family, slots) <= is_held_out(task.family, task.slots):
            return replace(task, slots=slots)


# --- Verification ----------------------------------------------------------------------------------------------------


@cache
def _phrasebook() -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern for every value that a response can show, longest first, and what each stands for (lower case)."""
    plain = {kind: values for kind, values in LEXICON.items() if kind not in MARKERS}
    meaning = {value.lower(): f"{kind}:{value}" for kind, values in plain.items() for value in values}
    for kind, values in MARKERS.items():
        for value, phrases in values.items():
            meaning.update((phrase.lower().rstrip(".!"), f"{kind}:{value}") for phrase in phrases)
    longest_first = sorted(meaning, key=len, reverse=True)
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)"), meaning


def _mentions(text: str) -> Counter[str]:
    """Every slot value and marker in the text, as often as it occurs: {"person:Hana": 1, "tone:formal": 1}."""
    pattern, meaning = _phrasebook()
    return Counter(meaning[found] for found in pattern.findall(text.lower()))


def _layout(text: str) -> list[str]:
    """The kind of each line: a list item ("-"), a labelled line ("Name:") or plain text ("")."""
    return [match[0] if (match := re.match(r"-(?= )|\w+:", line)) else "" for line in text.strip().split("\n")]


def verify(task: Task, text: str) -> bool:
    """Whether the text meets every constraint of the task, adds none, and is laid out like one of the right answers."""
    family = FAMILIES[task.family]
    shown = _shown(family, task.slots, None)
    references = [_fill(wording.response, shown, None) for wording in family.wordings]
    layout, mentions = _layout(text), _mentions(text)
    return any(layout == _layout(reference) and mentions == _mentions(reference) for reference in references)


@cache
def _instruction_pattern() -> re.Pattern[str]:
    """One pattern that matches exactly the instructions the grammar can produce, with "a" for every "an"."""

    def pattern(family: Family, text: str) -> str:
        pieces = _SLOT.split(text)  # odd ones are slot names
        values = ["|".join(map(re.escape, LEXICON[family.slots[slot]])) for slot in pieces[1::2]]
        return "".join(re.escape(a) + f"(?:{b})" * bool(b) for a, b in zip(pieces[::2], [*values, ""], strict=True))

    wordings = []
    for family in FAMILIES.values():
        for template in [*(wording.instruction for wording in family.wordings), *family.unseen]:
            blocks = [(pattern(family, text), needed) for text, needed in _blocks(_AN.sub(r"\1", template))]
            wordings.append("".join(f"(?:{block})?" if needed else block for block, needed in blocks))
    return re.compile("|".join(wordings), re.IGNORECASE)


def knows(text: str) -> bool:
    """Whether the text is an instruction of this world, in any wording; case and spacing do not matter."""
    tidy = _AN.sub(r"\1", " ".join(text.split())).rstrip(".!? ")
    return any(_instruction_pattern().fullmatch(tidy + end) for end in (".", ""))
