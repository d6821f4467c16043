"""A trace has one span for what each candidate's sampling and scoring took, and nothing that did not happen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bon import BestOfN
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError
from bon.trace import trace, write_trace
from bon.types import Result

WORDS = ("a cat sat on the mat", "a dog ran", "a dog ran", "the mat sat on a cat today for an hour or two")


def run() -> Result:
    engine = ScriptedEngine(
        lambda text, draw: WORDS[draw % 4] if "Response:" not in text else "a cat", step_seconds=0.002
    )
    return BestOfN(engine, n=4, prune=False)("Where did the cat sit?")


def spans(events: list[dict[str, Any]], category: str) -> dict[int, dict[str, Any]]:
    return {e["tid"]: e for e in events if e["ph"] == "X" and e["cat"] == category}


def test_every_candidate_has_its_spans() -> None:
    result = run()
    events = trace([result])["traceEvents"]
    sampled, scored = spans(events, "sample"), spans(events, "score")
    assert sorted(sampled) == [1, 2, 3, 4]
    assert sorted(scored) == [1, 2, 4]  # candidate 2 is a copy of candidate 1 and was not scored again
    for candidate in result.candidates:
        span = sampled[candidate.index + 1]
        assert span["ts"] + span["dur"] == pytest.approx(candidate.finished * 1e6, abs=2)
        assert span["args"]["text"] == candidate.text
    for thread, span in scored.items():
        assert span["ts"] >= sampled[thread]["ts"] + sampled[thread]["dur"] - 2
        assert span["args"]["reward"] == result.scores[thread - 1].reward


def test_prompts_are_processes_and_the_winner_is_named() -> None:
    results = [run(), run()]
    names = [e for e in trace(results)["traceEvents"] if e["ph"] == "M"]
    processes = {e["pid"]: e["args"]["name"] for e in names if e["name"] == "process_name"}
    assert processes == {i: f"prompt {i}: Where did the cat sit?" for i in (0, 1)}
    best = [e["args"]["name"] for e in names if e["name"] == "thread_name" and "(best)" in e["args"]["name"]]
    assert best == [f"candidate {result.best} (best)" for result in results]


def test_a_reranked_candidate_has_no_sampling_span() -> None:
    result = BestOfN(ScriptedEngine(step_seconds=0.002)).rerank("Where did the cat sit?", ["on the mat", "it sat"])
    events = trace([result])["traceEvents"]
    assert len(spans(events, "score")) == 2
    for span in spans(events, "sample").values():
        assert span["dur"] < 2000


def test_the_file_is_json_and_an_unwritable_one_is_named(tmp_path: Path) -> None:
    write_trace(tmp_path / "out.json", [run()])
    assert json.loads((tmp_path / "out.json").read_text())["displayTimeUnit"] == "ms"
    with pytest.raises(InputError, match="cannot write the trace"):
        write_trace(tmp_path / "missing" / "out.json", [])
