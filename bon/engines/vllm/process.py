"""What bon adds to the processes that vLLM starts: they end with the process that started them, and say why they died.

vLLM builds its log handlers in each of its processes from a configuration; ``ErrorLog`` comes in that way. It imports
neither vLLM nor torch.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

_LOOK_EVERY_S = 0.5
_GRACE_S = 5.0  # for vLLM to free its memory and stop its workers
_TAIL = 100_000  # bytes of a log in which its last error is looked for
# Errors that only say that another one happened.
_CONSEQUENCES = ("vllm.v1.engine.exceptions.EngineDeadError", "SystemExit", "KeyboardInterrupt")


def write_config(folder: Path, level: str | None) -> tuple[Path, Path]:
    """Write a ``logging.config.dictConfig`` that vLLM applies in every process of one engine.

    Args:
        folder: where to.
        level: shown on stderr from this level on; None shows nothing.

    Returns:
        Its path, and that of the file for errors and for what the processes print.
    """
    errors, config = folder / "errors.log", folder / "logging.json"
    handlers = {"errors": {"()": f"{__name__}.ErrorLog", "file": str(errors), "owner": os.getpid(), "quiet": not level}}
    if level is not None:
        handlers["stderr"] = {"class": "logging.StreamHandler", "level": level, "formatter": "plain"}
    whole = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "vllm[%(process)d] %(levelname)s %(message)s"}},
        "handlers": handlers,
        "loggers": {"vllm": {"handlers": list(handlers), "level": level or "ERROR", "propagate": False}},
    }
    config.write_text(json.dumps(whole))
    return config, errors


class ErrorLog(logging.FileHandler):
    """Writes errors to a file. Built in a process of vLLM's own, it also ties that process to the one that started it.

    Such a process gets a process group of its own, so that Ctrl-C stops a call and not the engine; it ends when its
    parent is gone, however that one ended; and where ``quiet``, what it prints goes to the file as well.

    Args:
        file: where to write.
        owner: id of the process that bon runs in.
        quiet: send standard output and standard error of vLLM's processes to the file.
    """

    def __init__(self, file: str, owner: int, quiet: bool) -> None:
        super().__init__(file, delay=True, encoding="utf-8")
        self.setLevel(logging.ERROR)
        self.setFormatter(logging.Formatter("%(message)s"))
        if os.getpid() == owner:
            return
        os.setpgid(0, 0)
        parent = os.getppid()
        if parent == owner:
            # An interpreter with torch in it takes seconds to shut down, for nothing. Workers of this process are
            # another matter: they hold shared memory that outlives them.
            atexit.register(os._exit, 0)
        if quiet:
            with open(file, "ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
        orphan = parent == 1 != owner  # the parent was gone before this began
        threading.Thread(target=_end_with, args=(0 if orphan else parent,), name="bon-watch", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record if that is still possible: the file goes with its engine, while vLLM's logger stays."""
        with contextlib.suppress(OSError):
            super().emit(record)


def _end_with(parent: int) -> None:
    """Stop this process once it has another parent than ``parent``: by SIGTERM, and then by SIGKILL."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def last_error(log: Path) -> str | None:
    """The last exception in a log as "Type: message", or the end of a worker; None where there is neither.

    A worker that ended had its exception before that, or none.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    found = None
    inside = False
    for line in lines:
        if line.startswith("Worker proc ") and " died" in line:  # what follows only says so in other words
            return found or line.removesuffix(", shutting down executor.")
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and line and not line[0].isspace():
            inside = False
            if not line.startswith(_CONSEQUENCES):
                found = line
    return found


def quiet_loggers() -> None:
    """Keep vLLM's loggers quiet until they are configured, which is after it has been imported."""
    logging.getLogger("vllm").setLevel(os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"))


if __name__ == "__mp_main__":  # a process that was spawned starts here: bon.engines.vllm.start sees to it
    quiet_loggers()
