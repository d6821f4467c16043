"""What a judge says: from the text of a model to a rating or a choice, and where in the text it stands."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from bon.prompts.judging import Kind
from bon.scorers.parsing import strip_think
from bon.types import FinishReason, ScoreStatus

KEYS: dict[Kind, str] = {"pointwise": "score", "pairwise": "better", "listwise": "best"}
"""The field of the answer that bon's own templates ask for."""
RATINGS = tuple(str(rating) for rating in range(1, 11))

# The value behind a key that names it, in JSON or in something that was to be JSON; else, at the end of the text, what
# RewardBench takes for a rating or a choice.
_KEYS = {"pointwise": "score|rating", "pairwise": r"better\w*", "listwise": r"best\w*"}
_VALUES = {"pointwise": r"\d+(?:\.\d+)?", "pairwise": "[AB]", "listwise": r"\d+"}
_KEYED = {
    kind: re.compile(
        rf"""\b(?:{key})["'*]{{0,3}}\s?[:=]\s?["'*\[]{{0,3}}({_VALUES[kind]})(?![\w.]*\w)""", re.IGNORECASE
    )
    for kind, key in _KEYS.items()
}
_LAST = {kind: re.compile(rf"(?<![\w.-])({value})[\"'*\].}}\s`]{{0,8}}\Z") for kind, value in _VALUES.items()}
_REASON = re.compile(r'"(?:reasoning|reason|explanation)"\s?:\s?("(?:[^"\\]|\\.)*+")', re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one answer of a judge.

    Args:
        weights: for each response that was shown how much speaks for it: the rating of the only one, or shares that
            sum to 1; None when nothing could be read.
        status: "ok"; "repaired" when the answer was not JSON; "fallback" when the value was looked for at its end;
            "failed"; "pruned" when it was given up.
        reason: what was wrong.
        explanation: the judge's own reasoning.
        span: where the value stands in the raw text.
    """

    weights: tuple[float, ...] | None
    status: ScoreStatus = "ok"
    reason: str | None = None
    explanation: str | None = None
    span: tuple[int, int] = field(default=(0, 0), repr=False)


UNRATED = Verdict(None, "failed", "the judge's model gave no log-probabilities")
"""What holds until a judge that does not reason has been asked."""


def choices(kind: Kind, shown: int) -> tuple[str, ...]:
    """The answers that a judge may give about so many responses."""
    return RATINGS if kind == "pointwise" else ("A", "B") if kind == "pairwise" else tuple(map(str, range(shown)))


def read(kind: Kind, shown: int, raw: str, finish_reason: FinishReason = "stop") -> Verdict:
    """Read a judge's answer.

    Args:
        kind: what was asked.
        shown: how many responses were.
        raw: the answer; thinking before it counts for nothing.
        finish_reason: of its completion.
    """
    text = strip_think(raw)
    keyed = [*_KEYED[kind].finditer(text)]
    found = keyed[-1] if keyed else None  # the last one: a judge may speak of scores before it gives its own
    status: ScoreStatus = "repaired"
    if found is None:
        found, status = _LAST[kind].search(text, max(0, len(text) - 40)), "fallback"
    if found is None:
        cut = ": it was cut off at the token limit" if finish_reason == "length" else ""
        return Verdict(None, "failed", f"the judge's answer names no {_what(kind)}{cut}")
    value = found[1].upper()
    explanation, strict = _reasoning(text)
    if strict and status == "repaired":
        status = "ok"
    start = len(raw) - len(text) + found.start(1) if raw.endswith(text) else raw.rfind(found[1])
    at = (start, start + len(found[1]))
    if kind == "pointwise":
        if not 1 <= float(value) <= 10:
            return Verdict(None, "failed", f"the judge's rating is {value}, not a number from 1 to 10", explanation)
        weights: tuple[float, ...] = (float(value),)
    else:
        known = choices(kind, shown)
        if value not in known:
            return Verdict(None, "failed", f"the judge names response {value} of {shown}", explanation)
        weights = tuple(float(value == one) for one in known)
    reason = {"repaired": "the answer is not JSON", "fallback": f"the answer's end was taken for its {_what(kind)}"}
    return Verdict(weights, status, reason.get(status), explanation, at)


def schema(kind: Kind, shown: int) -> dict[str, Any]:
    """The JSON schema of the answers that bon's own templates ask for."""
    value: dict[str, Any] = {"type": "string", "enum": ["A", "B"]}
    if kind != "pairwise":
        least, most = (1, 10) if kind == "pointwise" else (0, shown - 1)
        value = {"type": "integer", "minimum": least, "maximum": most}
    properties = {"reasoning": {"type": "string"}, KEYS[kind]: value}
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def _what(kind: Kind) -> str:
    return (
        "rating from 1 to 10" if kind == "pointwise" else "better response" if kind == "pairwise" else "best response"
    )


def _reasoning(text: str) -> tuple[str | None, bool]:
    """The judge's reasoning, and whether the answer is JSON and nothing else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict):
        said = next(
            (value for key, value in data.items() if key.lower() in ("reasoning", "reason", "explanation")), None
        )
        return said if isinstance(said, str) else None, True
    if quoted := _REASON.search(text):
        try:
            return str(json.loads(quoted[1], strict=False)), False
        except ValueError:
            return quoted[1][1:-1], False
    return text.strip() or None, False
