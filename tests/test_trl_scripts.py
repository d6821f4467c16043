"""``benchmarks/training.py`` and ``improve.py``, run small with TRL's real trainers (marker ``trl``)."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import rows_of, write_rows

from bon.errors import InputError
from bon.mini.tasks import sample_instructions

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(SCRIPTS))  # where the scripts' own folder is when they run

from lib.scripts import same_settings  # noqa: E402

trl = [pytest.mark.trl, pytest.mark.filterwarnings("ignore")]  # warnings of TRL's are TRL's


def marked(function: Any) -> Any:
    for mark in trl:
        function = mark(function)
    return function


def run(name: str, *arguments: object) -> None:
    pytest.importorskip("trl")
    importlib.import_module(name).main([str(each) for each in arguments])


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@marked
def test_five_methods_learn_from_the_mini_world_and_what_is_trained_is_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--quick",
        "--work",
        tmp_path / "work",
        "--plot",
        tmp_path / "plot.png",
        "--out",
        tmp_path / "out.json",
    )
    run("training", *arguments)
    found = last_line(capsys)
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    rows = {row["method"]: row for row in found["rows"]}
    assert [*rows] == ["before", "GRPO", "SFT", "DPO", "DPO-loop", "SELM", "GDRO", "GRPO unseen"]
    assert {row["samples"] for name, row in rows.items() if name != "before"} == {2 * 16 * 8}
    assert all(0 < row["learnt_from"] <= 16 for row in rows.values() if "learnt_from" in row)
    assert len(rows["GRPO"]["curve"]["truth"]) == 2
    for row in rows.values():
        for split in ("heldout", "unseen_wording"):
            assert 0 <= row[split]["greedy"]["low"] <= row[split]["greedy"]["mean"] <= row[split]["greedy"]["high"] <= 1
            assert all(example["answer"] != example["inferred"] for example in row[split]["examples"])
    sampled = [row["heldout"]["reward"] for row in rows.values()]
    assert len({*sampled}) > 1  # what is trained writes something else
    weights = (tmp_path / "work" / "DPO" / "model.safetensors").stat().st_mtime_ns
    run("training", *arguments)
    assert last_line(capsys)["rows"] == found["rows"]
    assert (tmp_path / "work" / "DPO" / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(InputError, match=r"made with seed=0, and now it is 1\. Name another folder"):
        run("training", *arguments, "--seed", 1)


@marked
@pytest.mark.parametrize("method", ["SFT", "SELM"])
def test_a_policy_improves_round_after_round_and_goes_on_where_it_was(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--quick", "--work", tmp_path, "--n", 4, "--method", method)
    run("improve", *arguments, "--rounds", 1)
    first = last_line(capsys)["rows"]
    weights = (tmp_path / "round-1" / "model.safetensors").stat().st_mtime_ns
    run("improve", *arguments, "--rounds", 2)
    rows = last_line(capsys)["rows"]
    assert rows[:2] == first
    assert [row["policy"] for row in rows] == ["mini", *(str(tmp_path / f"round-{number}") for number in (1, 2))]
    assert (tmp_path / "round-1" / "model.safetensors").stat().st_mtime_ns == weights
    written = [rows_of(tmp_path / f"round-{number}.jsonl") for number in (1, 2)]
    assert [row["prompt"] for row in written[0]] == sample_instructions(32, 1, "train")
    assert all(len(row["candidates"]) == 4 and row["scores"][0]["reward"] is not None for row in written[1])
    texts = [[candidate["text"] for row in some for candidate in row["candidates"]] for some in written]
    assert texts[0] != texts[1]


@marked
def test_any_local_model_can_be_improved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tiny.save(tmp_path / "policy", "Llama", "chatml", max_position_embeddings=1024)
    prompts = write_rows(tmp_path / "mine.jsonl", [{"prompt": f"Count to {number}."} for number in range(1, 5)])
    arguments = ("--work", tmp_path / "work", "--policy", policy, "--prompts", prompts)
    run("improve", "--quick", *arguments, "--n", 4, "--rounds", 1, "--method", "GDRO", "--max-tokens", 16)
    rows = last_line(capsys)["rows"]
    assert rows[1]["answered"] == 4
    assert (tmp_path / "work" / "round-1" / "model.safetensors").exists()


def test_bad_arguments_of_an_improvement_are_one_sentence(tmp_path: Path) -> None:
    improve = importlib.import_module("improve")
    with pytest.raises(InputError, match=r"--scorer flip would run on the policy, which changes\."):
        improve.main(["--work", str(tmp_path), "--scorer", "flip"])
    with pytest.raises(InputError, match="--policy http://host/v1#m cannot be trained here"):
        improve.main(["--work", str(tmp_path), "--policy", "http://host/v1#m"])
    with pytest.raises(InputError, match="--policy some/model needs --prompts FILE"):
        improve.main(["--work", str(tmp_path), "--policy", "some/model"])


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    same_settings(tmp_path / "new", {"n": 4, "prompts": tmp_path})
    same_settings(tmp_path / "new", {"n": 4, "prompts": tmp_path})
    with pytest.raises(InputError, match="was made with n=4, and now it is 8"):
        same_settings(tmp_path / "new", {"n": 8, "prompts": tmp_path})
