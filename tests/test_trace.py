"""A trace has one span for what each candidate's sampling and scoring took, and nothing that did not happen."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from command import rows_of, write_rows

from bon import BestOfN
from bon.cli import main
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError
from bon.trace import Trace
from bon.types import Result

WORDS = ("a cat sat on the mat", "a dog ran", "a dog ran", "the mat sat on a cat today for an hour or two")


def run() -> Result:
    engine = ScriptedEngine(
        lambda text, draw: WORDS[draw % 4] if "Response:" not in text else "a cat", step_seconds=0.002
    )
    return BestOfN(engine, "flip", n=4, prune=False, schedule="each")("Where did the cat sit?")


def spans(events: list[dict[str, Any]], category: str, process: int = 0) -> dict[int, dict[str, Any]]:
    return {e["tid"]: e for e in events if e["ph"] == "X" and e["cat"] == category and e["pid"] == process}


def end(span: dict[str, Any]) -> int:
    return int(span["ts"] + span["dur"])


@pytest.fixture
def traced(tmp_path: Path) -> Any:
    def traced(*makers: Any) -> tuple[list[Result], list[dict[str, Any]]]:
        results = []
        with Trace(tmp_path / "out.json") as trace:
            for make in makers:
                results.append(make())
                trace.add(results[-1])
        return results, json.loads((tmp_path / "out.json").read_text())

    return traced


def test_every_candidate_has_its_spans(traced: Any) -> None:
    [result], events = traced(run)
    sampled, scored = spans(events, "sample"), spans(events, "score")
    assert sorted(sampled) == [1, 2, 3, 4]
    assert sorted(scored) == [1, 2, 4]  # candidate 2 is a copy of candidate 1 and was not scored again
    whole = spans(events, "run")[0]
    for candidate in result.candidates:
        span = sampled[candidate.index + 1]
        assert whole["ts"] <= span["ts"] < end(span)
        assert end(span) - whole["ts"] == pytest.approx(candidate.finished * 1e6, abs=3)
        assert span["args"]["text"] == candidate.text
    for thread, span in scored.items():
        assert end(sampled[thread]) - 3 <= span["ts"] < end(span) <= end(whole)
        assert span["args"]["reward"] == result.scores[thread - 1].reward


def test_scoring_that_overlaps_sampling_shows_it(traced: Any) -> None:
    [result], events = traced(run)
    assert result.timing.overlap > 0
    last_sample = max(end(span) for span in spans(events, "sample").values())
    assert min(span["ts"] for span in spans(events, "score").values()) < last_sample


def test_prompts_are_processes_on_one_clock_and_the_winner_is_named(traced: Any) -> None:
    def later() -> Result:
        time.sleep(0.05)
        return run()

    results, events = traced(run, later)
    names = [e for e in events if e["ph"] == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in names if e["name"] == "process_name"}
    assert processes == {i: f"prompt {i}: Where did the cat sit?" for i in (0, 1)}
    best = [e["args"]["name"] for e in names if e["name"] == "thread_name" and "(best)" in e["args"]["name"]]
    assert best == [f"candidate {result.best} (best)" for result in results]
    first, second = (spans(events, "run", process)[0] for process in (0, 1))
    apart = results[1].timing.started - results[0].timing.started
    assert first["ts"] >= 0
    assert second["ts"] - first["ts"] == pytest.approx(apart * 1e6, abs=3)
    assert second["ts"] - end(first) >= 50_000


def test_a_reranked_candidate_has_no_sampling_span(traced: Any) -> None:
    """Its times are those of the run that made it."""
    [_, again], events = traced(
        run,
        lambda: BestOfN(ScriptedEngine(step_seconds=0.002), "flip").rerank("Where did the cat sit?", run().candidates),
    )
    assert len(spans(events, "score", 1)) == 3
    assert not spans(events, "sample", 1)
    assert again.timing.sample == 0


def test_a_trace_that_was_cut_off_holds_what_came_before(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "out.json")
    trace.add(run())
    assert len(spans(json.loads((tmp_path / "out.json").read_text() + "]"), "sample")) == 4
    trace.close()
    trace.close()


def test_a_trace_replaces_a_trace_and_nothing_else(tmp_path: Path) -> None:
    """``--trace notes.json`` overwrote the notes."""
    path = tmp_path / "out.json"
    for results in ([], [run()], [run(), run()]):
        with Trace(path) as trace:
            for result in results:
                trace.add(result)
    path.write_text('[{"prompt": "mine"}]')
    with pytest.raises(InputError, match=r"out\.json is no trace and would be overwritten"):
        Trace(path)
    assert path.read_text() == '[{"prompt": "mine"}]'


def test_a_trace_of_nothing_is_still_json_and_an_unwritable_one_is_named(tmp_path: Path) -> None:
    Trace(tmp_path / "out.json").close()
    assert json.loads((tmp_path / "out.json").read_text()) == []
    with pytest.raises(InputError, match="cannot write the trace"):
        Trace(tmp_path / "missing" / "out.json")


# --- From the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_rows(tmp_path / "in.jsonl", [{"prompt": f"Say number {i}"} for i in range(5)]).parent


def test_a_single_prompt_can_be_traced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "Say it", "-n", "3", "--policy", "scripted", "--json", "--trace", "t.json"]) == 0
    assert len(spans(json.loads((folder / "t.json").read_text()), "sample")) == 3
    assert len(json.loads(capsys.readouterr().out)["candidates"]) == 3


@pytest.mark.parametrize("command", ["run", "rerank"])
def test_a_file_of_prompts_becomes_one_trace(folder: Path, command: str) -> None:
    write_rows(folder / "in.jsonl", [{**row, "candidates": ["Say", "number"]} for row in rows_of(folder / "in.jsonl")])
    scripted = ["--policy", "scripted"] if command == "run" else ["--scorer", "flip:scripted"]
    assert main([command, "in.jsonl", "-o", "out.jsonl", *scripted, "--trace", "t.json"]) == 0
    events = json.loads((folder / "t.json").read_text())
    assert {e["pid"] for e in events} == {1, 2, 3, 4, 5}, "lines of the file"
    for line in range(1, 6):
        assert len(spans(events, "sample", line)) == (8 if command == "run" else 0)


@pytest.mark.parametrize("name", ["in.jsonl", "out.jsonl"])
def test_a_trace_never_overwrites_the_input_or_the_output(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "in.jsonl").read_text()
    assert main(["run", "in.jsonl", "-o", "out.jsonl", "--policy", "scripted", "--trace", name]) == 2
    assert "would be overwritten by the trace" in capsys.readouterr().err
    assert (folder / "in.jsonl").read_text() == before
