"""One JSON object per log line, and not the same complaint without end."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from time import monotonic
from typing import Any, TextIO

LONGEST = 20_000  # characters of a message, and of a traceback
REPEATS, EVERY_S = 20, 60.0


class Repeats(logging.Filter):
    """Lets the same warning or error through so many times a minute: failures without end would fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._since, self._seen = monotonic(), dict[tuple[str, str], int]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write it."""
        if record.levelno < logging.WARNING:
            return True
        key = record.name, str(record.msg)[:200]
        if monotonic() - self._since > EVERY_S or len(self._seen) > LONGEST:
            self._since, self._seen = monotonic(), {}
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] == REPEATS:
            record.msg = f"{record.msg} (said {REPEATS} times; no more of these for a minute)"
        return self._seen[key] <= REPEATS


class JsonFormatter(logging.Formatter):
    """Formats a record as JSON; what is passed as ``extra={"fields": {...}}`` becomes fields of the object."""

    def format(self, record: logging.LogRecord) -> str:
        """Make the line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage()[:LONGEST],
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-LONGEST:]
        return json.dumps(line, default=str, separators=(",", ":"))


def log_json(stream: TextIO = sys.stderr) -> None:
    """Send bon's log and those of uvicorn and asyncio to ``stream``."""
    handler = logging.StreamHandler(stream)
    handler.addFilter(Repeats())
    handler.setFormatter(JsonFormatter())
    for name in ("bon", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
