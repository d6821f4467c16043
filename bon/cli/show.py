"""A result for people: the winner in full, then every candidate with what was inferred from it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bon.cli.terminal import clean, one_line, said_of
from bon.remarks import OFF_WORLD
from bon.similarity import matched_words
from bon.types import Candidate, Result, Score

CANDIDATE_WIDTH, INFERRED_WIDTH = 140, 280
"""Characters of a candidate and of an inferred instruction that the table shows; the winner is above it in full."""


def show(result: Result) -> None:
    """Print a result: plain columns without boxes, so that it reads the same in a file.

    Nothing is interpreted as markup, emoji codes or links.
    """
    console = Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
    n = len(result.candidates)
    if result.text is None:
        console.print(Text(f"No winner among {n}: {one_line(result.selection.reason or 'no reward')}", style="bold"))
    else:
        reward = "no reward" if result.reward is None else f"reward {result.reward:.3f}"
        console.print(Text(f"Best of {n}: candidate {result.best}, {reward}", style="bold"))
        console.print()
        console.print(Text(clean(result.text).strip("\n")), soft_wrap=True)
    console.print()
    console.print(_table(result))
    console.print()
    for line in _footer(result):
        console.print(Text(line, style="dim"), soft_wrap=True)
    for warning in result.warnings:
        if warning != OFF_WORLD:  # which was said before anything was sampled
            console.print(Text(f"warning: {warning}", style="bold yellow"), soft_wrap=True)


def _table(result: Result) -> Table:
    """All candidates by rank, those that are the same in one row."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("reward", justify="right", no_wrap=True)
    inferred = any(getattr(score.details, "inferred", None) is not None for score in result.scores)
    arrow = " -> instruction inferred from it" if inferred else ""
    table.add_column(f"candidate{arrow}", overflow="fold", ratio=1)
    alike: dict[tuple[str | float | None, ...], list[int]] = {}
    for index in result.selection.ranking:
        candidate, score = result.candidates[index], result.scores[index]
        alike.setdefault((candidate.text, candidate.error, score.status, score.reward), []).append(index)
    for copies in alike.values():
        candidate, score = result.candidates[copies[0]], result.scores[copies[0]]
        style = "bold" if result.best in copies else ""
        table.add_row(
            Text(f"{'*' if {*copies} & {*result.selection.picked} else ''}{copies[0]}", style=style),
            Text("-" if score.reward is None else f"{score.reward:.3f}", style=style),
            _texts(result, candidate, score, len(copies)),
        )
    return table


def _texts(result: Result, candidate: Candidate, score: Score, copies: int) -> Text:
    cell = Text(_short(one_line(candidate.text), CANDIDATE_WIDTH) or "(no text)")
    if score.explanation is not None:
        cell.append("\n-> ", style="dim")
        shown = _short(one_line(score.explanation), INFERRED_WIDTH)
        inferred = getattr(score.details, "inferred", None) is not None
        cell.append_text(_highlighted(shown, result.task.instruction) if inferred else Text(shown))
    elif score.reason and score.status != "empty":
        cell.append(f"\n-> ({_short(one_line(score.reason), INFERRED_WIDTH)})", style="dim")
    about = [
        *([f"{copies} the same"] if copies > 1 else []),
        score.status,
        *(["cut off"] if candidate.finish_reason == "length" else []),
        *([] if candidate.completion_tokens is None else [f"{candidate.completion_tokens} tokens"]),
        *([f"{score.tokens} of the scorer"] if score.tokens else []),
        f"{max(candidate.finished, score.finished):.2f} s",
    ]
    return cell.append(f"\n{', '.join(about)}", style="dim")


def _highlighted(inferred: str, instruction: str) -> Text:
    text = Text(inferred)
    for start, end in matched_words(inferred, instruction):
        text.stylize("bold green", start, end)
    return text


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def _footer(result: Result) -> list[str]:
    timing, usage = result.timing, result.usage
    saved = said_of(result.saved)
    return [
        f"{timing.total:.2f} s: sampling {timing.sample:.2f}, scoring {timing.score:.2f}, overlap {timing.overlap:.2f}",
        f"tokens: policy {usage.policy_prompt_tokens} in, {usage.policy_completion_tokens} out; "
        f"scorer {usage.scorer_prompt_tokens} in, {usage.scorer_completion_tokens} out; {usage.cached_tokens} cached",
        *([f"candidates: {saved}"] if saved else []),
    ]
