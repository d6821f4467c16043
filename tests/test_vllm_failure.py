"""When vLLM's engine dies in the middle of a run, or the run itself is ended: results are left, and no processes."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import process, rows_of, write_rows

from bon import BestOfN
from bon.errors import BonError, EngineError
from bon.mini.tasks import sample_instructions
from bon.types import Result

pytestmark = pytest.mark.vllm

ROWS = [{"id": i, "prompt": prompt} for i, prompt in enumerate(sample_instructions(400))]
PATIENCE = 300  # seconds: starting an engine takes long where others compute as well
ARGUMENTS = ("run", "in.jsonl", "-o", "out.jsonl", "-n", 8, "--policy", "mini,engine=vllm", "--no-prune")


def cores(parent: psutil.Process) -> list[psutil.Process]:
    """The processes of vLLM's engines; not Python's own resource tracker."""
    children = parent.children(recursive=True)
    alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]  # an earlier test's, ended
    return [child for child in alive if not any("resource_tracker" in word for word in child.cmdline())]


def begun(folder: Path) -> tuple[Any, list[psutil.Process]]:
    """A run of the command line that has written some rows, and all processes that it has started."""
    running = process(*ARGUMENTS, cwd=folder)
    out = folder / "out.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline, "no row was written"
        time.sleep(0.05)
    return running, psutil.Process(running.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    left = psutil.wait_procs(processes, timeout=30)[1]
    assert not left, f"still there: {left}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "in.jsonl", ROWS).parent


def test_a_file_run_whose_engine_is_killed_keeps_its_rows_says_why_once_and_can_be_resumed(folder: Path) -> None:
    running, started = begun(folder)
    for core in cores(psutil.Process(running.pid)):
        core.kill()
    err = running.communicate(timeout=PATIENCE)[1].decode()
    done = rows_of(folder / "out.jsonl")
    assert running.returncode == 1
    assert err.count("died: its process was ended by signal 9 (out of memory?). Load it again to go on.") == 1
    assert f"{len(done)} rows done; " in err
    assert "failed" in err
    assert "Traceback" not in err
    assert 5 <= len(done) < len(ROWS)
    assert all(row["text"] for row in done)
    assert_gone(started)

    write_rows(folder / "in.jsonl", ROWS[: max(row["id"] for row in done) + 9])
    resumed = process(*ARGUMENTS, "--resume", cwd=folder)
    err = resumed.communicate(timeout=PATIENCE)[1].decode()
    assert resumed.returncode == 0, err
    assert f"{len(done)} done before" in err
    assert sorted(row["id"] for row in rows_of(folder / "out.jsonl")) == list(range(len(rows_of(folder / "in.jsonl"))))


@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGTERM", -15), ("SIGKILL", -9)])
def test_a_file_run_that_is_ended_leaves_whole_rows_and_no_process(folder: Path, sent: str, code: int) -> None:
    running, started = begun(folder)
    assert started
    running.send_signal(getattr(signal, sent))
    err = running.communicate(timeout=PATIENCE)[1].decode()
    assert running.returncode == code, err
    assert "Traceback" not in err
    assert len(rows_of(folder / "out.jsonl")) >= 5
    assert_gone(started)


def test_results_from_before_the_engine_died_are_returned_and_it_can_be_loaded_again() -> None:
    prompts = [row["prompt"] for row in ROWS[:60]]

    async def collect(bon: BestOfN) -> list[Result | BonError]:
        outcomes = []
        async for _, outcome in bon.stream(prompts):
            outcomes.append(outcome)
            if len(outcomes) == 10:
                for core in cores(psutil.Process()):
                    core.kill()
        return outcomes

    with BestOfN("mini,engine=vllm", n=8) as bon:
        outcomes = asyncio.run(collect(bon))
        results = [outcome for outcome in outcomes if isinstance(outcome, Result)]
        errors = {id(outcome): outcome for outcome in outcomes if not isinstance(outcome, Result)}
        assert len(outcomes) == 60
        assert 10 <= len(results) < 60
        assert all(result.text for result in results)
        [error] = errors.values()
        assert isinstance(error, EngineError)
        assert "ended by signal 9" in str(error)
        with pytest.raises(EngineError, match="ended by signal 9"):
            bon(prompts[0])
    assert not cores(psutil.Process())
    with BestOfN("mini,engine=vllm", n=8) as again:
        assert len(list(again.map(prompts[:5]))) == 5
    assert not cores(psutil.Process())
