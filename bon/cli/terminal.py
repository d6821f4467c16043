"""What reaches the terminal: results on standard output, everything else on standard error, nothing unescaped.

Every command imports this module, so it imports next to nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bon.catalog import SMALLEST, kept_in
from bon.errors import BonError, PromptTooLongError

if TYPE_CHECKING:
    from bon.types import Saved

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

# Control characters but tab and newline, the marks that reorder text, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class StoppedError(Exception):
    """Ctrl-C was pressed; the message says what is done."""


def clean(text: str) -> str:
    """Make a text safe to print: what could move the cursor, colour or reorder the line is shown as its code."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """The text, safe and with all white space collapsed."""
    return clean(" ".join(text.split()))


def sentence(error: BonError) -> str:
    """An error as one line; it speaks of "the prompt", since the place is said in front of it."""
    if isinstance(error, PromptTooLongError):
        error = PromptTooLongError(error.tokens, error.limit)
    return one_line(str(error))


def say(text: str) -> None:
    """Print a line on standard error, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"bon: {one_line(text)}", file=sys.stderr)


def print_json(value: object) -> None:
    """Print one line of JSON, in UTF-8 whatever the terminal's encoding."""
    from bon.data.sink import to_json

    sys.stdout.flush()
    sys.stdout.buffer.write(to_json(value) + b"\n")
    sys.stdout.buffer.flush()


class _Said(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


@contextlib.contextmanager
def shown_log() -> Iterator[None]:
    """Meanwhile print bon's log: which engine was chosen, that a model is being fetched."""
    logger, handler = logging.getLogger("bon"), _Said()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def quiet_libraries() -> None:
    """Keep transformers and the hub from printing; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def say_off_world(*, ranked: bool = False, count: tuple[int, int] | None = None) -> None:
    """Say that prompts are outside the embedded model's world, and how to get a real model.

    Args:
        ranked: whether it scores only.
        count: for a file, how many prompts of how many; the notice is then one line.
    """
    what = "scores" if ranked else "writes and scores"
    plainly = f"the embedded model knows a small world of writing tasks only; what it {what} beyond that means nothing."
    option = f"--scorer default:{SMALLEST}" if ranked else f"--policy {SMALLEST}"
    get = f"add {option}" if kept_in(SMALLEST).is_dir() else f"type: bon fetch {SMALLEST}, and add {option}"
    remedy = f"For a real model {get} (`bon models` lists others, `bon tasks` what the embedded one knows)."
    if count is not None:
        say(f"{count[0]} of {count[1]} prompts are outside its world: {plainly} {remedy}")
        return
    from bon.mini.tasks import sample_instructions

    say(plainly)
    for example in sample_instructions(2):
        say(f"  it knows, for example: {example}")
    say(remedy)


def said_of(saved: Saved) -> str:
    """What was left undone, and what that saved the scorer; "" when nothing was."""
    counts = {"not sampled": saved.unsampled, "pruned": saved.pruned, "scored as copies": saved.copies}
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    if saved.drafted:
        parts.append(f"{saved.drafted} tokens drafted")
    if parts and saved.share >= 0.005:
        parts.append(f"which saved about {saved.share:.0%} of the scorer's decoding (an estimate)")
    return ", ".join(parts)
