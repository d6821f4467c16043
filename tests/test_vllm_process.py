"""The diary of vLLM's processes: what killed them can be read from it, and writing to it never raises."""

from __future__ import annotations

import json
import logging
import logging.config
import os
from pathlib import Path

import pytest

from bon.engines.vllm_process import Diary, last_words, write_config


def test_the_last_words_are_the_last_exception_and_not_its_echo(tmp_path: Path) -> None:
    diary = tmp_path / "errors.log"
    assert last_words(diary) is None
    diary.write_text(
        "EngineCore failed\nTraceback (most recent call last):\n  File x\n    boom()\nRuntimeError: no head_dim=16\n"
        "more\nTraceback (most recent call last):\n  File y\nvllm.v1.engine.exceptions.EngineDeadError: see above\n"
    )
    assert last_words(diary) == "RuntimeError: no head_dim=16"


def test_a_logger_whose_file_is_gone_says_nothing(tmp_path: Path) -> None:
    """An engine's files go when it is closed. vLLM's logger in bon's process still wrote there when another engine
    died, the error came up inside vLLM's output loop, and the calls of that engine waited for ever."""
    (tmp_path / "engine").mkdir()
    diary = Diary(str(tmp_path / "engine" / "errors.log"), os.getpid(), quiet=True)
    (tmp_path / "engine").rmdir()
    diary.emit(logging.LogRecord("vllm", logging.ERROR, "x", 1, "died", None, None))
    diary.close()


@pytest.mark.parametrize("level", [None, "INFO"])
def test_the_configuration_is_one_that_logging_takes(tmp_path: Path, level: str | None) -> None:
    path, diary = write_config(tmp_path, level)
    config = json.loads(path.read_text())
    config["loggers"] = {"bon-test-vllm": config["loggers"]["vllm"]}
    logging.config.dictConfig(config)
    logger = logging.getLogger("bon-test-vllm")
    try:
        raise ValueError("on purpose")
    except ValueError:
        logger.exception("failed")
    assert last_words(diary) == "ValueError: on purpose"
    assert len(logger.handlers) == (1 if level is None else 2)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
