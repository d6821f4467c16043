"""Files of heads and of hidden states: arrays and a header in JSON in one npz; nothing in it is code or pickled."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bon.engines.base import Reading
from bon.errors import InputError, UnknownNameError
from bon.heads.data import Arrays, Rewards, States

KINDS = {"probe": "bon.heads.probe", "bnrm": "bon.heads.bnrm"}
"""Modules with ``choose``, ``fit`` and ``rewards``."""
_HEADER = "header"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile)


def kind_of(name: str) -> Any:
    """The module of a kind of head.

    Raises:
        UnknownNameError: no such kind.
    """
    if name not in KINDS:
        raise UnknownNameError("kind of head", name, KINDS)
    return import_module(KINDS[name])


@dataclass(frozen=True)
class Header:
    """What a file says of its head.

    Args:
        kind: "probe" or "bnrm".
        model: the spec of the model whose hidden states it knows.
        fingerprint: that model's.
        width: numbers of a hidden state.
        settings: what was chosen, ``layers`` among it.
        report: cross-validation and learning curve.
    """

    kind: str
    model: str
    fingerprint: str
    width: int
    settings: Mapping[str, Any]
    report: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A header and the arrays that go with it."""

    header: Header
    arrays: Arrays

    def rewards(self, states: States) -> Rewards:
        """What it says of candidates whose hidden states these are."""
        found: Rewards = kind_of(self.header.kind).rewards(self.arrays, self.header.settings, states)
        return found

    @property
    def digest(self) -> str:
        """Changes with what it holds."""
        digest = hashlib.blake2b(digest_size=6)
        for name in sorted(self.arrays):
            digest.update(np.ascontiguousarray(self.arrays[name]).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the file, in place of what is there.

        Raises:
            InputError: it cannot be written.
        """
        header = np.array(json.dumps(asdict(self.header), ensure_ascii=False))
        small: dict[str, Any] = {name: np.asarray(value, np.float32) for name, value in self.arrays.items()}
        _write(path, {_HEADER: header, **small})

    @classmethod
    def load(cls, path: Path) -> TrainedHead:
        """Read a file.

        Raises:
            InputError: it is not there or holds no head.
        """
        no_head = f"{str(path)!r} holds no head. bon train head ROWS.jsonl --model MODEL -o FILE makes one"
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = Header(**json.loads(str(arrays.pop(_HEADER))))
        except FileNotFoundError as error:
            raise InputError(f"there is no file {str(path)!r}. bon train head makes one.") from error
        except _UNREADABLE as error:
            raise InputError(f"{no_head} ({str(error) or type(error).__name__}).") from error
        for name, values in arrays.items():
            if values.dtype.kind != "f" or not np.isfinite(values).all():
                raise InputError(f"{no_head} (its array {name} holds something else than finite numbers).")
        head = cls(header, arrays)
        try:
            layers = header.settings["layers"]
            head.rewards(States(layers, np.zeros((1, len(layers), header.width)), np.zeros((1, header.width))))
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
            raise InputError(f"{no_head} (its arrays do not fit together: {' '.join(str(error).split())}).") from error
        return head


def save_states(path: Path, readings: Mapping[str, Reading], fingerprint: str, layers: Sequence[int]) -> None:
    """Keep what could be read, by key.

    Raises:
        InputError: the file cannot be written.
    """
    fine = {key: one for key, one in readings.items() if one.error is None}
    columns = {name: np.array([getattr(one, name) for one in fine.values()]) for name in ("pools", "last", "tokens")}
    _write(path, {_HEADER: np.array(_of_states(fingerprint, layers)), "keys": np.array([*fine]), **columns})


def load_states(path: Path, fingerprint: str, layers: Sequence[int]) -> dict[str, Reading]:
    """What ``save_states`` wrote; nothing where there is no file yet.

    Raises:
        InputError: the file holds something else, or another model's states.
    """
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            header, keys, *columns = (file[name] for name in (_HEADER, "keys", "pools", "last", "tokens"))
    except _UNREADABLE as error:
        raise InputError(f"{str(path)!r} holds no hidden states ({error}). Name another file.") from error
    if str(header) != _of_states(fingerprint, layers):
        raise InputError(f"{str(path)!r} holds hidden states of another model. Name another file, or remove it.")
    return {str(key): Reading(*values) for key, *values in zip(keys, *columns, strict=True)}


def _of_states(fingerprint: str, layers: Sequence[int]) -> str:
    return json.dumps({"fingerprint": fingerprint, "layers": [*layers]})


def _write(path: Path, arrays: Mapping[str, Any]) -> None:
    try:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}.") from error
