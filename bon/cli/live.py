"""What goes on while a prompt is worked on: a line below everything else, and the candidates while they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.live import Live
from rich.text import Text

from bon.cli.terminal import one_line
from bon.engines.base import Partial
from bon.types import Candidate, Score

_TAIL = 1000  # characters: more than any line has


class View:
    """How far the candidates of one prompt are.

    Args:
        n: how many there will be at most; None where nobody knows.
        texts: whether to show the end of each that is being written.
    """

    def __init__(self, n: int | None, texts: bool) -> None:
        self._n, self._texts, self._started = n, texts, monotonic()
        self._written: dict[int, tuple[int, str]] = {}  # of those that grow: tokens, and the end of the text
        self._tokens = self._sampled = self._scored = 0

    def heard(self, event: Candidate | Score) -> None:
        """A candidate is finished, or has its score."""
        if isinstance(event, Score):
            self._scored += 1
            return
        self._written.pop(event.index, None)
        self._sampled += 1
        self._tokens += event.completion_tokens or 0

    def follow(self, partial: Partial) -> None:
        """A candidate has grown."""
        self._written[partial.sample_index] = partial.completion_tokens, partial.text[-_TAIL:]

    def render(self) -> Text:
        """The lines to show now."""
        minutes, seconds = divmod(int(monotonic() - self._started), 60)
        growing = dict(self._written)  # a copy: engines may tell from their threads
        tokens = self._tokens + sum(written for written, _ in growing.values())
        of = "" if self._n is None else f" of {self._n}"
        line = f"{minutes}:{seconds:02d}  {self._sampled}{of} sampled, {self._scored} scored, {tokens} tokens"
        shown = [f"{index}: {one_line(text)}" for index, (_, text) in sorted(growing.items())] if self._texts else []
        width, height = Console(stderr=True).size
        width, height = width - 1, height - 2
        cut = [text if len(text) <= width else f"{text[: text.index(':')]}: ...{text[-width + 8 :]}" for text in shown]
        return Text("\n".join([*cut[:height], line]), style="dim", no_wrap=True, overflow="ellipsis")


@contextmanager
def view(n: int | None, texts: bool) -> Iterator[View]:
    """Meanwhile show how far the candidates are, on standard error; nothing of it stays.

    Args:
        n, texts: see ``View``.
    """
    seen = View(n, texts)
    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    with Live(get_renderable=seen.render, console=console, refresh_per_second=4, transient=True):
        yield seen
