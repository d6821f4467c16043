"""Files of a training that are whole or not there: whatever ends it, the last one that was written stays."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from bon.errors import InputError

log = logging.getLogger("bon")

NAME = "checkpoint.pt"


@contextmanager
def claimed(folder: Path, own: Collection[str]) -> Iterator[None]:
    """Keep other trainings out of a folder, which is made where it is not there, and find out that it can be written.

    Args:
        folder: of an adapter.
        own: names of the files that a training writes.

    Raises:
        InputError: it cannot be written, holds something else, or another training writes to it.
    """
    from fcntl import LOCK_EX, LOCK_NB, flock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - set(own)
        with TemporaryFile(dir=folder):
            held = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"cannot write to the folder {str(folder)!r}: {error.strerror}. Name another.") from error
    try:
        if others and not (folder / NAME).exists():
            raise InputError(f"the folder {str(folder)!r} holds something else, {min(others)!r} for one. Name another.")
        try:
            flock(held, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another training is writing to {str(folder)!r}. Wait until it ends, or name another folder."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(held)


def write(path: Path, content: bytes) -> None:
    """Write a file in place of what is there, at once or not at all.

    Raises:
        InputError: it cannot be written; what was there still is.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise InputError(
            f"cannot write {str(path)!r}: {error.strerror}. Once it can be, the same command goes on from the last "
            "checkpoint."
        ) from error


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; where that cannot be done, say so and let the training go on."""
    content = io.BytesIO()
    torch.save(state, content)
    try:
        write(folder / NAME, content.getvalue())
    except InputError as error:
        log.warning("no checkpoint at step %d, and the one before stays: %s", state["step"], error)


def load(folder: Path, key: str) -> dict[str, Any] | None:
    """The state that a training that was broken off has left; None where there is none.

    Args:
        folder: of the adapter.
        key: tells trainings apart.

    Raises:
        InputError: it is another training's, or damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        known = state["key"]
    except Exception as error:  # whatever unpickling and unzipping raise
        raise InputError(f"{str(path)!r} is damaged. Remove it to begin anew.") from error
    if known != key:
        raise InputError(
            f"{str(path)!r} belongs to a training with other pairs, another model or other settings. Go on with those, "
            "name another folder, or remove it."
        )
    return state
