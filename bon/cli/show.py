"""A result for people: the winner in full, then every candidate with what was inferred from it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bon.cli.terminal import clean, one_line, said_of
from bon.remarks import OFF_WORLD
from bon.similarity import matched_words
from bon.types import Candidate, Credit, Result, Score

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
        console.print(_winner(result.text, result.credit or ()), soft_wrap=True)
    console.print()
    if result.credit:
        console.print(_credits(result.credit))
        console.print()
    console.print(_table(result))
    console.print()
    for line in _footer(result):
        console.print(Text(line, style="dim"), soft_wrap=True)
    for warning in result.warnings:
        if warning != OFF_WORLD:  # which was said before anything was sampled
            console.print(Text(f"warning: {warning}", style="bold yellow"), soft_wrap=True)


def _winner(text: str, credits: Sequence[Credit]) -> Text:
    """The winner in full, the sentences that earn most and least in colours."""
    shown, at = Text(), 0
    for each, (_, style) in zip(credits, _marks(credits), strict=True):
        shown.append(clean(text[at : each.start])).append(clean(each.text), style)
        at = each.end
    shown.append(clean(text[at:]))
    shown.rstrip()
    return shown[len(shown.plain) - len(shown.plain.lstrip("\n")) :]


def _credits(credits: Sequence[Credit]) -> Table:
    """The sentences of the winner, each with its credit."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("credit", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what the reward loses without this sentence", overflow="fold", ratio=1)
    for each, (mark, style) in zip(credits, _marks(credits), strict=True):
        sentence = Text(_short(one_line(each.text), CANDIDATE_WIDTH))
        if each.credit is None:
            sentence.append(f"\n-> ({_short(one_line(each.reason or ''), INFERRED_WIDTH)})", style="dim")
        table.add_row(Text("-" if each.credit is None else f"{each.credit:+.3f}", style), Text(mark, style), sentence)
    return table


def _marks(credits: Sequence[Credit]) -> list[tuple[str, str]]:
    """A word and a style for each sentence: for those that earn most and least, where these differ."""
    known = {each.credit for each in credits if each.credit is not None}
    if len(known) < 2:
        return [("", "")] * len(credits)
    marks: dict[float | None, tuple[str, str]] = {min(known): ("least", "yellow"), max(known): ("most", "bold green")}
    return [marks.get(each.credit, ("", "")) for each in credits]


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
    saved, stop = said_of(result.saved), result.stop
    gain = "" if stop is None or stop.gain is None else f" (expected gain {stop.gain:.2g})"
    return [
        f"{timing.total:.2f} s: sampling {timing.sample:.2f}, scoring {timing.score:.2f}, overlap {timing.overlap:.2f}",
        f"tokens: policy {usage.policy_prompt_tokens} in, {usage.policy_completion_tokens} out; "
        f"scorer {usage.scorer_prompt_tokens} in, {usage.scorer_completion_tokens} out; {usage.cached_tokens} cached",
        *([f"candidates: {saved}"] if saved else []),
        *([] if stop is None else [f"stopped after {len(result.candidates)} samples: {stop.reason}{gain}"]),
    ]
