"""Bon's log on the command line. It is there for every command, so it imports next to nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


class _Said(logging.Handler):
    """Shows what bon has to tell of its work: which engine was chosen, that a model is being fetched."""

    def emit(self, record: logging.LogRecord) -> None:
        from bon.cli.console import say

        say(record.getMessage())


@contextlib.contextmanager
def shown_log() -> Iterator[None]:
    """Show bon's log as lines on standard error meanwhile."""
    logger, handler = logging.getLogger("bon"), _Said()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
