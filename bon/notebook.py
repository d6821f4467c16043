"""A result as a table of HTML, for notebooks: no script, no style sheet, and every text escaped."""

from __future__ import annotations

from html import escape

from bon.types import Candidate, Result, Score

_SHORT = 400  # characters of a text; a notebook is saved with what it shows
_HEADINGS = ("", "candidate", "reward", "explanation", "status")


def table(result: Result) -> str:
    """Candidates in ranking order, those that the selector picked marked, with rewards and explanations."""
    rows = [_row(result, index) for index in result.selection.ranking]
    reason = f"<p><em>nothing picked: {escape(result.selection.reason)}</em></p>" if result.selection.reason else ""
    headings = "".join(f'<th style="text-align:left">{name}</th>' for name in _HEADINGS)
    return (
        f"<p><strong>{_text(result.task.instruction)}</strong></p>{reason}"
        f"<table><thead><tr>{headings}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _row(result: Result, index: int) -> str:
    candidate, score = result.candidates[index], result.scores[index]
    picked = index in result.selection.picked
    cells = (
        f"{'★' if picked else ''} {index}",
        _text(candidate.text or candidate.error or ""),
        "" if score.reward is None else f"{score.reward:.4g}",
        _text(score.explanation or score.reason or ""),
        escape(_status(candidate, score)),
    )
    style = "text-align:left;vertical-align:top;white-space:pre-wrap" + (";font-weight:bold" if picked else "")
    return "<tr>" + "".join(f'<td style="{style}">{cell}</td>' for cell in cells) + "</tr>"


def _status(candidate: Candidate, score: Score) -> str:
    copy = [] if score.same_as is None else [f"same as {score.same_as}"]
    cut = ["cut off"] if candidate.finish_reason == "length" else []
    return ", ".join([score.status, *copy, *cut])


def _text(text: str) -> str:
    return escape(text if len(text) <= _SHORT else text[:_SHORT] + "…")
