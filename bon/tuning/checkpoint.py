"""Files of a training that are whole or not there: whatever ends it, the last one that was written stays."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any

import torch

from bon.errors import InputError

log = logging.getLogger("bon")

NAME = "checkpoint.pt"


def write(path: Path, content: bytes) -> None:
    """Write a file in place of what is there, at once or not at all.

    Raises:
        InputError: it cannot be written; what was there still is.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}.") from error


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
