"""Where finished rows go: whole lines, each on disk before the next one is written, so that a run can be resumed."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from bon.data.formats import parse_object
from bon.data.rows import Key, Read, before, row_of
from bon.errors import InputError

# UTF-8 of control characters beyond ASCII's first 32, and of the marks that reorder a line.
_CONTROLS = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xd8\x9c|\xe2\x80[\x8e\x8f\xa8-\xae]|\xe2\x81[\xa6-\xa9]")


def to_json(value: Any) -> bytes:
    """JSON in UTF-8, on one line, with nothing in it that could move a terminal's cursor or reorder its text.

    What orjson cannot write (lone surrogates, very long integers) json escapes. A value that JSON has no form for
    (bytes or a decimal number of Parquet) is written as text.
    """
    try:
        line = orjson.dumps(value, default=str, option=orjson.OPT_SERIALIZE_NUMPY)
        return _CONTROLS.sub(lambda match: b"\\u%04x" % ord(match[0].decode()), line)
    except TypeError:
        return json.dumps(value, default=str).encode()


def check_replaceable(path: Path, what: str, *starts: bytes) -> None:
    """Refuse to replace a file that is something else than what is to be written.

    Args:
        path: the file, which need not be there.
        what: is to be written, and the option that names the file.
        starts: how such files begin.

    Raises:
        InputError: it begins in another way.
    """
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(100)
        if start and not start.startswith(starts):
            raise InputError(f"{path} is no {what} and would be overwritten by the {what}. Choose another --{what}.")


@dataclass(slots=True)
class Output:
    """Where rows go: a file that is appended to one whole line at a time, or standard output.

    Args:
        name: for messages.
        done: how often each row was there before.
        asked: digests of those with an id, where the output has what was asked.
        spent: samples of the rows that were there before, where their budget decided how many.
        repaired: bytes of a torn last line that were cut off.
        written: rows written so far.
    """

    name: str
    file: BinaryIO
    done: Counter[Key] = field(default_factory=Counter)
    asked: dict[Key, bytes] = field(default_factory=dict)
    spent: int = 0
    repaired: int = 0
    written: int = 0
    _path: Path | None = None
    _fresh: bool = False
    _truncate: bool = False

    @classmethod
    def open(
        cls,
        path: Path | None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        run: str = "",
        read: Read = row_of,
    ) -> Output:
        """Open the output and find out whether it can be written, before any work is done.

        Args:
            path: a file, or None for standard output. A file is locked until it is closed.
            resume: go on from what an interrupted run left; a torn last line is cut off.
            overwrite: replace what is there, which stays until ``start``.
            run: the run that resumes; rows that say that they are of another one are refused.
            read: how it reads rows.

        Raises:
            InputError: the file exists already, cannot be written, is written to by another run, or holds what no run
                wrote, or another one.
        """
        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other.")
        if path is None:
            if resume or overwrite:
                raise InputError(f"--{'resume' if resume else 'overwrite'} needs an output file: give -o FILE.")
            return cls("standard output", sys.stdout.buffer)
        if path.suffix.lower() in (".csv", ".tsv", ".parquet", ".gz"):
            raise InputError(
                f"rows are written as JSON Lines, and {path} would be read as something else. Name it .jsonl."
            )
        fresh = not path.exists()
        try:
            file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise InputError(f"cannot write to {path}: {error.strerror}. Choose another -o.") from error
        output = cls(str(path), file, _path=path, _fresh=fresh)
        if path.is_file():
            try:
                output._claim(resume=resume, overwrite=overwrite)
                if resume:
                    output._find_done(path, run, read)
            except BaseException:
                file.close()
                raise
        return output

    def _claim(self, *, resume: bool, overwrite: bool) -> None:
        """Lock the file, and see to it that nothing in it is lost unless that is wanted."""
        from fcntl import LOCK_EX, LOCK_NB, flock

        try:
            flock(self.file, LOCK_EX | LOCK_NB)
            free = os.fstat(self.file.fileno()).st_nlink > 0  # whoever had it may have removed it
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        if not free:
            raise InputError(f"another run is writing to {self.name}. Wait until it ends, or choose another -o.")
        if os.fstat(self.file.fileno()).st_size and not (resume or overwrite):
            raise InputError(
                f"{self.name} exists already. Add --resume to append the rows that are missing, "
                "--overwrite to replace it, or choose another -o."
            )
        self._truncate = overwrite

    def _find_done(self, path: Path, run: str, read: Read) -> None:
        """Find the rows that are done; end or cut off a last line that was torn."""
        whole, line = 0, b"\n"
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    fields = parse_object(line) if line.strip() else None
                except InputError as error:
                    if not line.endswith(b"\n"):
                        os.truncate(path, whole)
                        self.repaired = len(line)
                        return
                    raise InputError(f"{path}:{number}: cannot resume: {error}") from error
                if fields is not None:
                    self._note(fields, number, run, read)
                whole += len(line)
        if not line.endswith(b"\n"):
            self.file.write(b"\n")

    def _note(self, fields: dict[str, Any], number: int, run: str, read: Read) -> None:
        """Note a row that is done."""
        if fields.get("run", run) != run:
            raise InputError(
                f"{self.name}:{number} was made with other settings (policy, scorer, selector, n, sampling, --system, "
                "--all): cannot resume. Give those again, choose another -o, or to mix them take 'run' out of its rows."
            )
        try:
            row = read(number, before(fields))
            key = row.key
            self.asked[key] = row.digest
        except InputError as error:  # what was asked may have been thrown away since
            if not isinstance(identity := fields.get("id"), str | int):
                raise InputError(f"{self.name}:{number}: cannot resume: {error}") from error
            key = ("id", identity)
        self.done[key] += 1
        self.spent += n if isinstance(n := fields.get("n"), int) else 0

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
        if self._fresh and not self.written and self._path.is_file() and not self._path.stat().st_size:
            self._path.unlink()  # while it is locked
        self.file.close()
