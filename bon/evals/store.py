"""Scores on disk: what has been scored once is not scored again.

A score is found by what made it: the scorer's spec, the model that it runs on, the task, and the candidate (for scorers
that look at whole groups: all candidates of the group). Each is written as it comes, so an evaluation that was cut off
goes on where it was, and rules for how many samples to draw can be tried on scores that are there. Two processes may
use one store.

Kept is what says something about the candidate. A score that failed because the model could not be reached, that was
pruned because another candidate was better, or that came late is not, and is made anew the next time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import sqlite3
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, Self

from bon.data.sink import to_json
from bon.engines.base import Engine
from bon.errors import InputError
from bon.mini import WEIGHTS
from bon.models import MINI, Model
from bon.scorers.base import Needs, Pending, Scorer
from bon.types import Score, Usage

VERSION = 1
"""Of what is written; a store of another version is refused."""
_BON = 0x626F6E31  # marks an SQLite file as a score store
_PATIENCE_S = 60.0  # for another process that writes
_TABLE = """
CREATE TABLE IF NOT EXISTS scores (
  scorer TEXT, model TEXT, task TEXT, candidate TEXT,
  reward REAL, status TEXT, tokens INTEGER, tie_break REAL, seconds REAL, rest TEXT,
  PRIMARY KEY (scorer, model, task, candidate)
) WITHOUT ROWID
"""
_REST = ("reason", "explanation", "parts", "usage", "details", "spread")
_MODEL_FILES = ("*.safetensors", "*.bin", "*.gguf", "*config.json", "tokenizer*", "*.jinja")


class Key(NamedTuple):
    """What a score is found by: a scorer's spec, its model, and digests of the task and of the candidate."""

    scorer: str
    model: str
    task: str
    candidate: str


class Store:
    """A file of scores.

    Args:
        path: an SQLite file, which is made if it is not there; its folder must be.

    Raises:
        InputError: the file was written by another version of bon's or by something else, or cannot be written; it
            stays as it is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        if not self.path.parent.is_dir():
            raise InputError(f"there is no folder {str(self.path.parent)!r} for the score store. Make it first.")
        with self._explained("opened"):
            self._connection = sqlite3.connect(
                self.path, timeout=_PATIENCE_S, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self.close()
                raise

    def find(self, keys: Sequence[Key]) -> dict[Key, tuple[Score, float]]:
        """What is there of these: scores, and the seconds that each took when it was made.

        Raises:
            InputError: the file cannot be read.
        """
        query = (
            "SELECT reward, status, tie_break, seconds, rest FROM scores "
            "WHERE scorer = ? AND model = ? AND task = ? AND candidate = ?"
        )
        found = {}
        with self._explained("read"), self._lock:
            for key in keys:
                if (row := self._connection.execute(query, key).fetchone()) is not None:
                    found[key] = _score(*row[:3], **json.loads(row[4])), row[3]
        return found

    def put(self, key: Key, score: Score, seconds: float) -> None:
        """Write a score, at once.

        Raises:
            InputError: the file cannot be written.
        """
        rest = to_json({name: _plain(getattr(score, name)) for name in _REST}).decode()
        row = (*key, score.reward, score.status, score.tokens, score.tie_break, seconds, rest)
        with self._explained("written"), self._lock:
            self._connection.execute("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    async def aclose(self) -> None:
        """Close the file."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prepare(self) -> None:
        run = self._connection.execute
        run("BEGIN")  # one look at what is there: another process may be making it
        [kind] = run("PRAGMA application_id").fetchone()
        [version] = run("PRAGMA user_version").fetchone()
        [tables] = run("SELECT count(*) FROM sqlite_master").fetchone()
        run("COMMIT")
        if kind == _BON and version != VERSION:
            raise InputError(
                f"the score store {str(self.path)!r} has version {version}, and this bon writes version {VERSION}. "
                "Name another file; this one stays as it is."
            )
        if kind != _BON and tables:
            raise InputError(f"{str(self.path)!r} is a database of something else, no score store. Name another file.")
        run("BEGIN IMMEDIATE")  # or says that it is read-only
        run(_TABLE)
        run(f"PRAGMA application_id = {_BON}")
        run(f"PRAGMA user_version = {VERSION}")
        run("COMMIT")
        with suppress(sqlite3.OperationalError):  # another process is at it just now, or will be
            run("PRAGMA journal_mode = WAL")  # readers beside a writer, and no wait for the disk with each score
        run("PRAGMA synchronous = NORMAL")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            hint = "It is no score store; name another file." if "not a database" in str(error) else ""
            message = f"the score store {str(self.path)!r} cannot be {what}: {error}. {hint}"
            raise InputError(message.rstrip()) from error


def stored(scorer: Scorer, store: Store, spec: str) -> Stored:
    """A scorer that takes from a store what is there, and leaves there what it had to score.

    Args:
        scorer: what scores the rest.
        store: stays the caller's.
        spec: the scorer's, as ``SCORERS.spec_of`` writes it.
    """
    return Stored(scorer, store, spec)


class Stored(Scorer):
    """What ``stored`` returns.

    Attributes:
        seconds: what all scores took that came so far, those from the store when they were made.
    """

    def __init__(self, scorer: Scorer, store: Store, spec: str) -> None:
        self._scorer, self._store, self._spec = scorer, store, spec
        self._model: str | None = None
        self.seconds = 0.0

    @property
    def needs(self) -> Needs:  # type: ignore[override]
        """What the scorer needs."""
        return self._scorer.needs

    @property
    def range(self) -> tuple[float, float] | None:  # type: ignore[override]
        """The scorer's."""
        return self._scorer.range

    @property
    def concurrent(self) -> bool:  # type: ignore[override]
        """Whether the scorer's calls may run at the same time."""
        return self._scorer.concurrent

    @property
    def models(self) -> Sequence[Model | None]:  # type: ignore[override]
        """What the scorer has still to load."""
        return self._scorer.models

    @property
    def name(self) -> str:
        """The scorer's."""
        return self._scorer.name

    @property
    def engines(self) -> Sequence[Engine]:
        """What the scorer runs on."""
        return self._scorer.engines

    def bound(self, find: Callable[[Model | None], Engine]) -> Stored:
        """The same with the scorer's models in place."""
        return Stored(self._scorer.bound(find), self._store, self._spec)

    async def aclose(self) -> None:
        """Free what the scorer holds; the store stays open."""
        await self._scorer.aclose()

    def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate: those first that are in the store."""
        return self._scored(pending, self._scorer.score, self._spec, whole=self.needs.group)

    def settle(self, tied: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Rate what is tied: again what is in the store comes from there."""
        return self._scored(tied, self._scorer.settle, f"{self._spec} between equal rewards", whole=False)

    async def _scored(
        self,
        pending: Sequence[Pending],
        score_them: Callable[[Sequence[Pending]], AsyncGenerator[tuple[int, Score], None]],
        spec: str,
        *,
        whole: bool,
    ) -> AsyncGenerator[tuple[int, Score], None]:
        if self._model is None:
            models = [fingerprint(engine.name) + getattr(engine, "adapter", "") for engine in self.engines]
            self._model = " + ".join(models) + self._scorer.version
        keys = [self._key(spec, each, self._model) for each in pending]
        found = await asyncio.to_thread(self._store.find, keys)
        missing = {position: each for position, each in enumerate(pending) if keys[position] not in found}
        if whole:  # a group is scored as a whole
            torn = {id(each.group) for each in missing.values()}
            missing = {position: each for position, each in enumerate(pending) if id(each.group) in torn}
        for position, key in enumerate(keys):
            if position not in missing:
                score, seconds = found[key]
                self.seconds += seconds
                yield position, score
        if not missing:
            return
        places = dict(enumerate(missing))
        async with aclosing(score_them(list(missing.values()))) as scores:
            since = perf_counter()
            async for place, score in scores:
                seconds = perf_counter() - since
                self.seconds += seconds
                position = places[place]
                if score.error is None and score.status not in ("pruned", "late"):
                    await asyncio.to_thread(self._store.put, keys[position], score, seconds)
                yield position, score
                since = perf_counter()

    def _key(self, spec: str, pending: Pending, model: str) -> Key:
        task, candidate, needs = pending.task, pending.candidate, self.needs
        messages = [message.to_dict() for message in task.messages]
        asked = _digest(messages, task.instruction, task.context, task.reference, dict(task.metadata))
        group = (candidate.index, [each.text for each in pending.group.candidates]) if needs.group else ()
        logprobs = (candidate.top_logprobs or candidate.logprobs) if needs.logprobs else ()
        return Key(spec, model, asked, _digest(candidate.text, candidate.finish_reason, *group, logprobs))


def fingerprint(model: str) -> str:
    """A model's name, and what changes when its files do.

    Args:
        model: a folder or a file, for which sizes and times count; a name of the hub, whose revision on this machine
            counts; or another name, which is all there is.
    """
    path = WEIGHTS if model == MINI else Path(model).expanduser()
    files = [path] if path.is_file() else sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern)})
    if files:
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return f"{model} {_digest(stats)[:16]}"
    return f"{model} {_revision(model)}".rstrip()


def _revision(name: str) -> str:
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no such name is possible
        return ""
    return Path(config).parent.name if isinstance(config, str) else ""


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _score(
    reward: float | None, status: Any, tie_break: float | None, usage: dict[str, int], details: Any, **rest: Any
) -> Score:
    known = None if details is None else _details(tuple(details))(**details)
    return Score(reward, status, tie_break=tie_break, usage=Usage(**usage), details=known, **rest)


@cache
def _details(names: tuple[str, ...]) -> type:
    """A dataclass with the fields of a scorer's own, which a file is not trusted to name."""
    return dataclasses.make_dataclass("StoredDetails", names, frozen=True)
