"""Where finished rows go: whole lines, each on disk before the next one is written, so that a run can be resumed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from bon.data.rows import Key, parse_object
from bon.errors import InputError

# UTF-8 of control characters beyond ASCII's first 32, and of the marks that reorder a line.
_CONTROLS = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xd8\x9c|\xe2\x80[\x8e\x8f\xa8-\xae]|\xe2\x81[\xa6-\xa9]")


def to_json(value: Any) -> bytes:
    """JSON in UTF-8, on one line, with nothing in it that could move a terminal's cursor or reorder its text.

    What orjson cannot write (lone surrogates, very long integers) json escapes.
    """
    try:
        line = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
        return _CONTROLS.sub(lambda match: b"\\u%04x" % ord(match[0].decode()), line)
    except TypeError:
        return json.dumps(value).encode()


@dataclass(slots=True)
class Output:
    """Where rows go: a file that is appended to one whole line at a time, or standard output.

    Args:
        name: for messages.
        done: keys of the rows that were there before.
        repaired: bytes of a torn last line that were cut off.
        written: rows written so far.
    """

    name: str
    file: BinaryIO
    done: set[Key] = field(default_factory=set)
    repaired: int = 0
    written: int = 0
    _path: Path | None = None
    _fresh: bool = False
    _truncate: bool = False

    @classmethod
    def open(cls, path: Path | None, *, resume: bool = False, overwrite: bool = False) -> Output:
        """Open the output and find out whether it can be written, before any work is done.

        Args:
            path: a file, or None for standard output.
            resume: go on from what an interrupted run left; a torn last line is cut off.
            overwrite: replace what is there, which stays until ``start``.

        Raises:
            InputError: the file exists already, cannot be written, or holds what no run wrote.
        """
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other.")
        if path is None:
            if resume or overwrite:
                raise InputError(f"--{'resume' if resume else 'overwrite'} needs an output file: give -o FILE.")
            return cls("standard output", sys.stdout.buffer)
        fresh = not path.exists()
        regular = fresh or path.is_file()
        if not fresh and regular and path.stat().st_size and not (resume or overwrite):
            raise InputError(
                f"{path} exists already. Add --resume to append the rows that are missing, "
                "--overwrite to replace it, or choose another -o."
            )
        try:
            file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise InputError(f"cannot write to {path}: {error.strerror}. Choose another -o.") from error
        output = cls(str(path), file, _path=path, _fresh=fresh, _truncate=overwrite and regular)
        if resume and regular:
            try:
                output._find_done(path)
            except BaseException:
                output.close()
                raise
        return output

    def _find_done(self, path: Path) -> None:
        """Find the rows that are done; end or cut off a last line that was torn."""
        whole, line = 0, b"\n"
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    fields = parse_object(line)
                    identity = fields.get("id", fields.get("line"))
                    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
                        raise InputError("the row has neither 'id' nor 'line'")
                except InputError as error:
                    if not line.endswith(b"\n"):
                        os.truncate(path, whole)
                        self.repaired = len(line)
                        return
                    raise InputError(f"{path}:{number}: cannot resume: {error}") from error
                self.done.add(("id", identity) if "id" in fields and fields["id"] is not None else ("line", identity))
                whole += len(line)
        if not line.endswith(b"\n"):
            self.file.write(b"\n")

    def start(self) -> None:
        """Drop what an overwritten file held, now that the run is certain to begin."""
        if self._truncate:
            self.file.truncate(0)

    def write(self, value: Mapping[str, Any]) -> None:
        """Append one row and see it out of this process.

        Raises:
            OSError: the disk is full, the pipe is closed.
        """
        line = memoryview(to_json(value) + b"\n")
        while line:
            line = line[self.file.write(line) :]
        self.file.flush()
        self.written += 1

    def close(self) -> None:
        """Close the file; one that was made for this run and got no row is removed."""
        if self._path is None:
            return
        self.file.close()
        if self._fresh and not self.written and self._path.is_file() and not self._path.stat().st_size:
            self._path.unlink()
