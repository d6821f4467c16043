"""The command line that all scripts have."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bon.errors import BonError, InputError


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    options = argparse.ArgumentParser(
        description=description.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="few sizes and rounds: does it run, roughly what comes")
    options.add_argument("--out", type=Path, help="write the JSON to this file as well")
    options.add_argument("--seed", type=int, default=0, help="of models, prompts and sampling")
    options.add_argument("--device", default=None, help="torch device; chosen when not given")
    options.add_argument("--dtype", default="float32", help="torch dtype of the models")
    return options


def script(main: Callable[[], object]) -> None:
    """Run a script's ``main``; an error of bon's ends it with a sentence in place of a traceback."""
    try:
        main()
    except BonError as error:
        sys.exit(f"error: {error}")


def warn(message: str) -> None:
    """Say something on stderr, where it is not in the way of the JSON."""
    print(message, file=sys.stderr)


def same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make a folder for what takes long, or find out that what is in it was made with the same settings.

    Raises:
        InputError: it was made with others.
    """
    path, own = folder / "settings.json", json.loads(json.dumps(settings, default=str))
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        for name in (name for name in own if own[name] != known.get(name)):
            raise InputError(
                f"{folder} was made with {name}={known.get(name)!r}, and now it is {own[name]!r}. Name another folder, "
                "or remove it."
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(own), encoding="utf-8")
