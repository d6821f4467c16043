"""The rows of a file that a command reads one by one, and what is wrong with some of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from bon.errors import BonError, InputError

if TYPE_CHECKING:
    from bon.cli.options import Rows
    from bon.data.rows import Read, Row


@dataclass
class Input:
    """The rows of a file.

    Args:
        source: its name, or "-" for standard input.
        files: what to do with it.
        read: how a row is read.
        name: what it is called in messages.
        stopped: whether a bad row ended it.
        engine_failed: whether a model failed, which is no row's fault.
        broken: why it could not be read to its end.
    """

    source: str
    files: Rows
    read: Read
    name: str
    stopped: bool = False
    engine_failed: bool = False
    broken: BonError | None = None

    def __iter__(self) -> Iterator[Row]:
        from bon.data.formats import read_file
        from bon.data.rows import BadRow, read_rows

        try:
            for row in islice(read_rows(read_file(self.source), self.read), self.files.limit):
                if isinstance(row, BadRow):
                    self.fail(row.line, row.error)
                else:
                    yield row
                if self.stopped:
                    return
        except BonError as error:
            self.broken = error

    def fail(self, line: int, error: BonError) -> None:
        """Report a row that cannot be done; without ``--skip-bad`` nothing more is read."""
        from bon.cli.terminal import say, sentence

        self.stopped = not self.files.skip_bad
        self.engine_failed |= not isinstance(error, InputError)
        say(f"{'skipped' if self.files.skip_bad else 'error:'} {self.name}:{line}: {sentence(error)}")

    @property
    def exit_code(self) -> int:
        """As that of ``bon run`` over a file."""
        return 1 if self.engine_failed else 2 if self.stopped else 0
