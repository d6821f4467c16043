"""Ctrl-C: what is running is cancelled, cleans up, and the exit code is 130."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from bon import portal

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


class StoppedError(Exception):
    """Ctrl-C was pressed; the message says what is done."""


def run_until_interrupted(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine; Ctrl-C cancels it between two of its steps, so that no line is torn. A second one does not wait.

    Raises:
        KeyboardInterrupt: it was cancelled.
    """
    portal.run(work)
