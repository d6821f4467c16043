"""What a run over rows counts and says: rows that failed, what came of the others, the exit code."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from bon.cli.options import Files
from bon.cli.terminal import said_of, say, say_off_world, sentence
from bon.data.rows import Counts, Row
from bon.errors import BonError, InputError

T = TypeVar("T")

LISTED = 20
"""Bad rows that are reported one by one; the rest is only counted."""


class Sink(Protocol):
    """Where rows go."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def written(self) -> int:
        """Rows so far."""


@dataclass(kw_only=True)
class Tally:
    """The counts of one run over rows.

    Args:
        source: the input's name.
        files: what to do with it.
        output: where rows go.
        counts: what came of the rows that are done.
    """

    source: str
    files: Files
    output: Sink
    counts: Counts = field(default_factory=Counts)
    seen: int = 0
    off_world: int = 0
    already: int = 0
    failed: int = 0
    listed: int = 0
    engine_failed: bool = False
    stopped: bool = False
    said: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def name(self) -> str:
        """The input, for messages."""
        return "standard input" if self.source == "-" else self.source

    def fail(self, line: int, error: BonError, file: str | None = None) -> None:
        """Report a row that cannot be done; without ``skip_bad`` nothing more is read.

        Args:
            line: where it is.
            error: why.
            file: the file, where that is one of several.
        """
        self.stopped = not self.files.skip_bad
        text = sentence(error)
        with self.lock:  # rows are read on another thread than they are finished on
            self.failed += 1
            if not isinstance(error, InputError):
                self.engine_failed = True
                if text in self.said:  # a model that died takes all rows that were under way with it
                    return
                self.said.add(text)
            self.listed += 1
        if self.listed <= LISTED:
            say(f"{'skipped' if self.files.skip_bad else 'error:'} {file or self.name}:{line}: {text}")

    def counting_off_world(self, rows: Iterable[T]) -> Iterator[T]:
        """The same rows, and how many of them are outside the embedded model's world is counted."""
        from bon.mini.tasks import knows

        for row in rows:
            self.off_world += isinstance(row, Row) and not knows(row.task.instruction)
            yield row

    def say_off_world(self, ranked: bool = False) -> None:
        """Say how many are, where some are."""
        if self.off_world:
            say_off_world(ranked=ranked, count=(self.off_world, self.seen))

    @property
    def exit_code(self) -> int:
        """0 when every row is done or was bad and to be skipped; 1 when a model failed, which is no row's fault."""
        if self.engine_failed:
            return 1
        return 2 if self.stopped else 0

    @property
    def _done(self) -> str:
        return f"{self.output.written} row{'' if self.output.written == 1 else 's'} done"

    @property
    def interrupted(self) -> str:
        """What to say after Ctrl-C."""
        if self.files.output is None:
            return f"interrupted: {self._done} and written."
        return (
            f"interrupted: {self._done} and in {self.output.name}. The same command with --resume goes on from there."
        )

    def say_unlisted(self) -> None:
        """Say how many bad rows were not."""
        if self.listed > LISTED:
            say(f"bad rows that are not listed: {self.listed - LISTED}.")

    def say_summary(self, seconds: float) -> None:
        """Say one line about the whole run."""
        self.say_unlisted()
        counts, parts = self.counts, [self._done]
        if self.already:
            parts.append(f"{self.already} done before")
        if self.failed:
            parts.append(f"{self.failed} {'failed' if self.engine_failed else 'bad'}")
        if counts.without:
            parts.append(f"{counts.without} without a text")
        if counts.lost:
            parts.append(f"{counts.lost} of {counts.candidates} candidates failed")
        if counts.scored:
            parts.append(f"mean reward {counts.reward_sum / counts.scored:.3f}")
        if self.output.written:
            parts.append(f"{seconds:.1f} s, {counts.candidates / seconds:.1f} candidates/s")
            parts.append(f"{counts.usage.total_tokens} tokens")
        if saved := said_of(counts.saved):
            parts.append(saved)
        say("; ".join(parts) + ".")
