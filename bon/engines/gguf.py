"""GGUF files as models: which file a name means, and what transformers needs to read one.

transformers reads the weights dequantised, and the tokenizer and the chat template from the file itself. Importing this
loads no model library.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from bon.errors import InputError, MissingExtraError, ModelNotFoundError

PACKAGES = ("gguf", "accelerate")
"""What transformers needs beside itself."""


def gguf_file(model: str | Path) -> Path | None:
    """The GGUF file that ``model`` names: a file, or the only one of a folder without other weights.

    Raises:
        ModelNotFoundError: there is no such file.
        InputError: a folder with several.
    """
    path = Path(os.path.expanduser(model))
    folder = os.path.isdir(path)  # which is True or False whatever the text is
    if path.suffix.lower() == ".gguf" and not folder:
        if os.path.isfile(path):
            return path
        raise ModelNotFoundError(f"there is no GGUF file at {str(model)!r}. Check the path.")
    if not folder or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(f"{str(model)!r} holds several GGUF files ({names}). Name one, for example {files[0]}")
    return files[0] if files else None


def check_packages(what: str) -> None:
    """Refuse to go on where a package is missing that transformers needs to read GGUF.

    Args:
        what: the model, for the message.

    Raises:
        MissingExtraError: one is.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            needs = f"{what!r} is in GGUF format, and reading that needs the package {package!r}, which"
            raise MissingExtraError(needs, "pip install 'bon[gguf]'")
