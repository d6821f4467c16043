"""The command ``bon`` for tests: in this process where that is enough, in one of its own where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def process(*arguments: object, cwd: Path, **options: Any) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **options.pop("env", {})}
    environment.pop("VLLM_LOGGING_LEVEL", None)  # set in this process where vLLM runs in it, by no user
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-m", "bon", *map(str, arguments)], cwd=cwd, env=environment, **pipes)


def in_process_of_its_own(*arguments: object, cwd: Path, stdin: bytes = b"", **options: Any) -> tuple[int, str, str]:
    """Run to the end; return (exit code, standard output, standard error)."""
    running = process(*arguments, cwd=cwd, stdin=subprocess.PIPE, **options)
    out, err = running.communicate(stdin, timeout=60)
    return running.returncode, out.decode(), err.decode()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
