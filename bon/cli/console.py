"""What reaches the terminal: results on standard output, everything else on standard error, nothing unescaped."""

from __future__ import annotations

import os
import re
import sys

from rich.console import Console
from tqdm import tqdm

from bon.errors import BonError, PromptTooLongError

# Control characters but tab and newline, the marks that reorder text, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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
    tqdm.write(f"bon: {one_line(text)}", file=sys.stderr)


def stdout_console() -> Console:
    """A console that never interprets text as markup, emoji codes or links."""
    return Console(file=sys.stdout, markup=False, emoji=False, highlight=False)


def print_bytes(line: bytes) -> None:
    """Print one line of JSON, in UTF-8 whatever the terminal's encoding."""
    sys.stdout.flush()
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def quiet_libraries(keep_downloads: bool) -> None:
    """Keep transformers and the hub from printing; call it before they are imported.

    Args:
        keep_downloads: show progress bars, for a model that may have to be fetched.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not (keep_downloads and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def one_thread() -> None:
    """Run the embedded model on one thread unless the user says otherwise; call it before torch is imported.

    Its matrices are too small to share out: with two threads the same run took twice as long on a busy two-core
    machine (``OMP_NUM_THREADS=2 bon run FILE`` against ``OMP_NUM_THREADS=1 bon run FILE``).
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
