"""A folder of shards: files of rows, each written as a whole, so that a run over many machines can be resumed.

A shard has the rows of consecutive lines of one input, in their order, and its name says which lines: the names of all
shards in order are the order of the input. Rows that failed stand in it with the status "error" until a later run has
made them again; then the shard is replaced in one step.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from bon.data.formats import parse_object
from bon.data.rows import FAILED, BadRow, Read, Row, as_asked, error_row
from bon.data.sink import check_run, to_json
from bon.errors import InputError

_NAME = re.compile(r"(.+)\.(\d{9,})-(\d{9,})\.jsonl")
_UNFINISHED = ".unfinished"


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that are done together and are, or go into, one shard.

    Args:
        file: of the input.
        shard: its file's name.
        rows: that are to be done.
        places: where each of them stands among the rows of the shard.
        bad: rows that cannot be done, by their places.
        again: whether the shard is there already, with other rows of its own.
    """

    file: Path
    shard: str
    rows: tuple[Row, ...]
    places: tuple[int, ...]
    bad: Mapping[int, BadRow] = field(default_factory=dict)
    again: bool = False


@dataclass(frozen=True, slots=True)
class _Shard:
    path: Path
    first: int
    last: int


@dataclass(slots=True)
class Shards:
    """The output of a run over many machines; one process at a time writes to it.

    Args:
        folder: where shards are.
        run: which settings make the rows; others are refused.
        read: how the run reads rows.
        written: rows that have been done by this run.
        already: rows that were done before.
    """

    folder: Path
    run: str
    read: Read
    written: int = 0
    already: int = 0
    _lock: int = -1
    _new: bool = False
    _there: dict[str, list[_Shard]] = field(default_factory=dict)
    _replaced: list[Path] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, run: str, read: Read, *, resume: bool = False, overwrite: bool = False) -> Self:
        """Open a folder, which is made where it is not there, and find its shards.

        Raises:
            InputError: it is a file, cannot be written, is written to by another run, or has shards already.
        """
        from fcntl import LOCK_EX, LOCK_NB, flock

        if resume and overwrite:
            raise InputError("--resume and --overwrite exclude each other.")
        new = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
        except OSError as error:
            problem = "it is a file, and shards need a folder" if folder.is_file() else error.strerror
            raise InputError(f"cannot write to {folder}: {problem}. Choose another -o.") from error
        shards = cls(folder, run, read, _lock=lock, _new=new)
        try:
            try:
                flock(lock, LOCK_EX | LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another run is writing to {folder}. Wait until it ends, or choose another -o."
                ) from error
            except OSError:  # a file system without locks
                pass
            for path in sorted(folder.iterdir()):
                if path.name.startswith(".") and path.name.endswith(_UNFINISHED):  # of a run that was killed
                    path.unlink()
                elif match := _NAME.fullmatch(path.name):
                    shards._there.setdefault(match[1], []).append(_Shard(path, int(match[2]), int(match[3])))
            if shards._there and not (resume or overwrite):
                raise InputError(
                    f"{folder} has shards already. Add --resume to make the rows that are missing, "
                    "--overwrite to replace them, or choose another -o."
                )
            if overwrite:
                shards._replaced = [shard.path for there in shards._there.values() for shard in there]
                shards._there = {}
        except BaseException:
            shards.close()
            raise
        return shards

    @property
    def name(self) -> str:
        """The folder, for messages."""
        return str(self.folder)

    def start(self) -> None:
        """Remove the shards that are to be replaced, now that the run is certain to begin."""
        for path in self._replaced:
            path.unlink()
        self._replaced = []

    def check_inputs(self, names: Sequence[str]) -> None:
        """Refuse a folder that has shards of something else than what is to be read.

        Args:
            names: of the input's files.
        """
        for name, (shard, *_) in self._there.items():
            if name not in names:
                raise InputError(
                    f"{shard.path} is a shard of {name}, which this run does not read: the folder is another run's. "
                    "Choose another -o."
                )

    def missing(self, file: Path, rows: Iterable[Row | BadRow], size: int) -> Iterator[Block]:
        """What the shards of a file do not have yet, in blocks; rows that failed are to be done again.

        Args:
            file: of the input.
            rows: all of its rows, in order.
            size: rows of a new shard.

        Raises:
            InputError: a shard cannot be read, is of a run with other settings, or is of other rows.
        """
        shards = iter(sorted(self._there.get(file.name, []), key=lambda shard: shard.first))
        shard, fresh, known = next(shards, None), list[Row | BadRow](), list[bytes]()
        again: dict[int, Row | BadRow] = {}
        place = 0
        for row in rows:
            while shard is not None and row.line > shard.last:
                yield from _again(file, shard, again)
                shard, place, again = next(shards, None), 0, {}
            if shard is None or row.line < shard.first:
                fresh.append(row)
                if len(fresh) == size:
                    yield _fresh(file, fresh)
                    fresh = []
                continue
            if fresh:
                yield _fresh(file, fresh)
                fresh = []
            if place == 0:
                known = _lines(shard.path)
            if self._failed(shard.path, known, place, row, file):
                again[place] = row
            else:
                self.already += 1
            place += 1
        if shard is not None:
            yield from _again(file, shard, again)
        if fresh:
            yield _fresh(file, fresh)

    def _failed(self, path: Path, lines: list[bytes], place: int, row: Row | BadRow, file: Path) -> bool:
        """Whether a row of a shard has to be done again."""
        where = f"{path}:{place + 1}"
        try:
            if place >= len(lines):
                raise InputError(f"it has {len(lines)} rows, and the input has more for it")
            fields = parse_object(lines[place])
        except InputError as error:
            said = str(error).rstrip(".")
            raise InputError(
                f"{where}: cannot resume: {said}. Remove the shard, and its rows are made again."
            ) from error
        check_run(fields, where, self.run)
        if fields.get("status") == FAILED and fields.get("text") is None:
            return True
        try:
            same = isinstance(row, Row) and as_asked(row.line, fields, self.read).digest == row.digest
        except InputError:
            same = False
        if not same:
            raise InputError(f"{file}:{row.line} is another prompt than the one in {where}. Choose another -o.")
        return False

    def write(self, block: Block, rows: Sequence[bytes], done: int) -> None:
        """Write the rows of a block, all or none of them.

        Args:
            block: which; the rows that it could not do are written as they are.
            rows: as JSON, in its order.
            done: how many of them did not fail.

        Raises:
            OSError: the disk is full.
        """
        path = self.folder / block.shard
        lines = dict(enumerate(_lines(path))) if block.again else {}
        lines |= dict(zip(block.places, rows, strict=True))
        lines |= {place: to_json(error_row(bad, bad.error, run=self.run)) for place, bad in block.bad.items()}
        unfinished = path.with_name(f".{path.name}{_UNFINISHED}")
        with unfinished.open("wb") as file:
            file.writelines(lines[place] + b"\n" for place in sorted(lines))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        self.written += done

    def close(self) -> None:
        """Let others write to the folder; one that was made for this run and got no shard is removed."""
        if self._new and not any(self.folder.iterdir()):
            self.folder.rmdir()
        os.close(self._lock)


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Remove it, and its rows are made again.") from error


def _fresh(file: Path, rows: Sequence[Row | BadRow]) -> Block:
    shard = f"{file.name}.{rows[0].line:09}-{rows[-1].line:09}.jsonl"
    return _block(file, shard, dict(enumerate(rows)))


def _again(file: Path, shard: _Shard, rows: Mapping[int, Row | BadRow]) -> Iterator[Block]:
    if rows:
        yield _block(file, shard.path.name, rows, again=True)


def _block(file: Path, shard: str, rows: Mapping[int, Row | BadRow], again: bool = False) -> Block:
    todo = {place: row for place, row in rows.items() if isinstance(row, Row)}
    bad = {place: row for place, row in rows.items() if isinstance(row, BadRow)}
    return Block(file, shard, tuple(todo.values()), tuple(todo), bad, again)
