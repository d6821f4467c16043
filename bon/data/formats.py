"""Files that people have, as records: JSON Lines, JSON, text, CSV, TSV and Parquet, all but the last gzipped as well.

The ending of a file's name says which format it has. What the fields of a record mean is for ``bon.data.rows`` to say.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from bon.errors import InputError, MissingExtraError

File = BufferedReader | gzip.GzipFile
Record = tuple[int, dict[str, Any] | InputError]
"""The number of a line, or of a row where a format has no lines, from 1; and its fields, or why it has none."""


def read_file(source: str) -> Iterator[Record]:
    """Read the records of a file one by one, as they are asked for.

    Args:
        source: a path; "-" is standard input, which is JSON Lines.

    Raises:
        InputError: it cannot be opened, or not be read to its end.
        MissingExtraError: it is Parquet, and pyarrow is not installed.
    """
    name, what = source.lower(), "standard input" if source == "-" else source
    try:
        with _opened(source) as file:
            if file.peek(3).startswith(_MARK):
                file.read(len(_MARK))
            yield from FORMATS.get(Path(name.removesuffix(".gz")).suffix, json_lines)(file)
    except InputError as error:
        raise InputError(f"cannot read {what}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {what}: {getattr(error, 'strerror', None) or error}.") from error


_MARK = b"\xef\xbb\xbf"  # of the byte order, which says nothing in UTF-8


def _opened(source: str) -> File:
    if source == "-":
        return open(sys.stdin.fileno(), "rb", closefd=False)
    return gzip.open(source) if source.lower().endswith(".gz") else open(source, "rb")


def json_lines(lines: Iterable[bytes]) -> Iterator[Record]:
    """The records of JSON Lines; blank lines are skipped."""
    return _by_line(lines, parse_object)


def _by_line(lines: Iterable[bytes], parse: Callable[[bytes], dict[str, Any]]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, parse(line)
            except InputError as error:
                yield number, error


def _text(lines: Iterable[bytes]) -> Iterator[Record]:
    return _by_line(lines, _prompt)


def _prompt(line: bytes) -> dict[str, Any]:
    text = _decoded(line).rstrip("\r\n")
    if re.match(r'{.*"(prompt|messages)"\s*:', text):
        raise InputError("the line is a row of JSON Lines, and a text file has a prompt a line. Name the file .jsonl.")
    return {"prompt": text}


def _json(file: File) -> Iterator[Record]:
    """An array of objects or of prompts, or one object; JSON Lines have this ending as well."""
    data = file.read()
    try:
        value = _parsed(data)
    except InputError:
        if data.lstrip().startswith(b"["):
            raise
        yield from json_lines(data.splitlines())
        return
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        try:
            yield number, {"prompt": item} if isinstance(item, str) else _object(item)
        except InputError as error:
            yield number, error


def _csv(lines: Iterable[bytes], delimiter: str = ",") -> Iterator[Record]:
    """Rows under a header; an empty cell is None, and ``messages`` and ``candidates`` are JSON in a cell."""
    csv.field_size_limit(2**31 - 1)  # texts are longer than its 128 KiB
    # What is not UTF-8 is refused row by row: a reader whose source raised would lose the rows behind it.
    texts = (line.decode("utf-8", "surrogateescape") for line in lines)
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if header is None:
                header = cells
            elif cells:
                yield number, _of_cells(header, cells)
        except InputError as error:
            yield number, error
        except csv.Error as error:
            if reader.line_num > number:  # rows may have been swallowed
                raise InputError(
                    f"a quotation mark at line {number} is not closed as it should be: {error}."
                ) from error
            yield number, InputError(f"not valid CSV: {error}.")


def _of_cells(header: list[str], cells: list[str]) -> dict[str, Any]:
    if len(cells) > len(header):
        raise InputError(
            f"the row has {len(cells)} cells under a header of {len(header)}. Quote a cell that has a separator in it."
        )
    try:
        "".join(cells).encode()
    except UnicodeEncodeError as error:
        raise InputError("the row is not UTF-8. Save the file as UTF-8.") from error
    fields: dict[str, Any] = dict(zip(header, (cell or None for cell in cells), strict=False))
    for name in ("messages", "candidates"):
        if fields.get(name) is not None:
            fields[name] = _parsed(fields[name].encode())
    return fields


def _parquet(file: File) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError("pyarrow, which reads Parquet,", "pip install 'bon[parquet]'") from error
    try:
        batches = ParquetFile(file).iter_batches(batch_size=1000)
        yield from enumerate((fields for batch in batches for fields in batch.to_pylist()), 1)
    except ArrowException as error:
        raise InputError(str(error)) from error


FORMATS: dict[str, Callable[[File], Iterator[Record]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": _json,
    ".txt": _text,
    ".csv": _csv,
    ".tsv": partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
}
"""By the ending of a file's name; what has another one is JSON Lines."""

NAMED = tuple(f"{ending}{gz}" for ending in FORMATS for gz in ("", ".gz"))
"""The endings of files of rows."""


def parse_object(line: bytes) -> dict[str, Any]:
    """Read one line of JSON Lines.

    Raises:
        InputError: not UTF-8, not JSON, or not an object.
    """
    return _object(_parsed(line))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"a row must be a JSON object with 'prompt' or 'messages', not {shown(value)}.")
    return value


def _parsed(data: bytes) -> Any:
    text = _decoded(data)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"column {error.colno}. Each line must be one object."
        if error.lineno > 1:
            place = f"line {error.lineno}, column {error.colno}."
        raise InputError(f"not valid JSON: {error.msg} at {place}") from error
    except RecursionError as error:
        raise InputError("not usable JSON: it is nested too deeply.") from error
    except UnicodeEncodeError as error:
        raise InputError(f"not usable JSON: it holds half a surrogate pair ({error.object[error.start]!a}).") from error
    except ValueError as error:
        raise InputError(f"not usable JSON: {error}.") from error
    return value


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {error.start + 1} of the line (0x{data[error.start]:02x}) is not UTF-8. Save the file as UTF-8."
        ) from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number} is too large")
    return value


def shown(value: Any) -> str:
    """A value, for a message."""
    return "nothing" if value is None else f"{value!r:.60}"
