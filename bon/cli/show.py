"""A result for people: the winner in full, then every candidate with what was inferred from it."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bon.cli.terminal import clean, one_line, said_of
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


def _table(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("candidate -> instruction inferred from it", overflow="fold", ratio=1)
    for index in result.selection.ranking:
        candidate, score = result.candidates[index], result.scores[index]
        style = "bold" if index == result.best else ""
        table.add_row(
            Text(f"{'*' if index in result.selection.picked else ''}{index}", style=style),
            Text("-" if score.reward is None else f"{score.reward:.3f}", style=style),
            Text(_status(candidate, score)),
            Text(_tokens(candidate, score), style="dim"),
            Text(f"{max(candidate.finished, score.finished):.2f}", style="dim"),
            _texts(result, candidate, score),
        )
    return table


def _status(candidate: Candidate, score: Score) -> str:
    return f"{score.status}, cut" if candidate.finish_reason == "length" else score.status


def _tokens(candidate: Candidate, score: Score) -> str:
    written = "?" if candidate.completion_tokens is None else str(candidate.completion_tokens)
    return f"{written}+{score.tokens}"


def _texts(result: Result, candidate: Candidate, score: Score) -> Text:
    if score.same_as is not None:
        return Text(f"(the same text as candidate {score.same_as})", style="dim")
    cell = Text(_short(one_line(candidate.text), CANDIDATE_WIDTH) or "(no text)")
    if score.explanation is not None:
        cell.append("\n-> ", style="dim")
        shown = _short(one_line(score.explanation), INFERRED_WIDTH)
        inferred = getattr(score.details, "inferred", None) is not None
        cell.append_text(_highlighted(shown, result.task.instruction) if inferred else Text(shown))
    elif score.reason and score.status != "empty":
        cell.append(f"\n-> ({_short(one_line(score.reason), INFERRED_WIDTH)})", style="dim")
    return cell


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
