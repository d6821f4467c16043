"""The error log of vLLM's processes: what killed them can be read from it, and writing to it never raises."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bon.engines.vllm.process import ErrorLog, last_error, write_config


def test_the_last_error_is_the_cause_and_not_what_follows_from_it(tmp_path: Path) -> None:
    log = tmp_path / "errors.log"
    assert last_error(log) is None
    log.write_text(
        "EngineCore failed\nTraceback (most recent call last):\n  File x\n    boom()\nRuntimeError: no head_dim=16\n"
        "more\nTraceback (most recent call last):\n  File y\nvllm.v1.engine.exceptions.EngineDeadError: see above\n"
    )
    assert last_error(log) == "RuntimeError: no head_dim=16"
    end = "Worker proc VllmWorker-0 died unexpectedly (exit code: -9)"
    after = f"{end}, shutting down executor.\nTraceback (most recent call last):\n  File x\nRuntimeError: cancelled\n"
    log.write_text(after)
    assert last_error(log) == end
    log.write_text(f"Traceback (most recent call last):\n  File x\nValueError: out of memory\n{after}")
    assert last_error(log) == "ValueError: out of memory"


def test_vllm_is_told_to_spawn_its_processes_unless_the_user_says_otherwise() -> None:
    """A CPU build spawns anyway; on a GPU its default is to fork, beside bon's threads and other engines' sockets."""
    name = "VLLM_WORKER_MULTIPROC_METHOD"
    code = (
        "import os, sys; sys.modules['vllm'] = None\n"
        "try: import bon.engines.vllm.start\n"
        f"except ModuleNotFoundError: print(os.environ['{name}'])"
    )
    env = {key: value for key, value in os.environ.items() if key != name}
    for given, expected in (({}, "spawn"), ({name: "fork"}, "fork")):
        done = subprocess.run([sys.executable, "-c", code], env={**env, **given}, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_a_logger_whose_file_is_gone_says_nothing(tmp_path: Path) -> None:
    """An engine's files go when it is closed. vLLM's logger in bon's process still wrote there when another engine
    died, the error came up inside vLLM's output loop, and the calls of that engine waited for ever."""
    (tmp_path / "engine").mkdir()
    log = ErrorLog(str(tmp_path / "engine" / "errors.log"), os.getpid(), quiet=True)
    (tmp_path / "engine").rmdir()
    log.emit(logging.LogRecord("vllm", logging.ERROR, "x", 1, "died", None, None))
    log.close()


@pytest.mark.parametrize("level", [None, "INFO"])
def test_the_configuration_is_one_that_logging_takes(tmp_path: Path, level: str | None) -> None:
    path, log = write_config(tmp_path, level)
    config = json.loads(path.read_text())
    config["loggers"] = {"bon-test-vllm": config["loggers"]["vllm"]}
    logging.config.dictConfig(config)
    logger = logging.getLogger("bon-test-vllm")
    try:
        raise ValueError("on purpose")
    except ValueError:
        logger.exception("failed")
    assert last_error(log) == "ValueError: on purpose"
    assert len(logger.handlers) == (1 if level is None else 2)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
