"""Files of prompts through the command line: what is kept, what is written, and what survives Ctrl-C."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from command import in_process_of_its_own, process, rows_of, write_rows

from bon import BestOfN
from bon.cli import main
from bon.data.formats import json_lines, read_file
from bon.data.rows import BadRow, Row, output_row, read_rows, row_of, run_rows
from bon.data.sink import Output, to_json
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError

SCRIPTED = {"run": ["--policy", "scripted", "--scorer", "flip"], "rerank": ["--scorer", "flip:scripted"]}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """bon run on the scripted engine, in this process and in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, command="run"):
        code = main([command, *map(str, arguments), *SCRIPTED[command]])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def prompts(count):
    return [{"id": f"p{i}", "prompt": f"Write a line about number {i}", "tag": i} for i in range(count)]


# --- What comes out --------------------------------------------------------------------------------------------------


def test_every_field_of_a_row_is_kept_beside_the_winner(run, tmp_path):
    source = write_rows(
        tmp_path / "in.jsonl", [{"id": 7, "prompt": "Say hi", "meta": {"a": [1, None]}, "huge": 10**30}]
    )
    code, out, _ = run(source, "-n", 2)
    row = json.loads(out)
    assert code == 0
    assert {k: row[k] for k in ("id", "prompt", "meta", "huge")} == rows_of(source)[0]
    assert {"text", "reward", "best", "reason", "status", "inferred"} <= row.keys()
    assert "candidates" not in row
    assert "line" not in row


def test_a_row_without_an_id_gets_its_line_number(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('\n{"prompt": "Say a"}\r\n\n{"prompt": "Say b"}')
    _, out, _ = run("in.jsonl", "-n", 1)
    assert {json.loads(line)["line"] for line in out.splitlines()} == {2, 4}


def test_all_writes_every_candidate_and_score(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(1))
    row = json.loads(run(source, "-n", 3, "--all")[1])
    assert len(row["candidates"]) == len(row["scores"]) == 3
    assert {"timing", "usage", "ranking"} <= row.keys()


def test_a_selector_that_picks_several_has_all_of_them_in_the_row(run, tmp_path):
    """It wrote the winner alone."""
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "Say it to them all loud and clear"}])
    row = json.loads(run(source, "-n", 8, "--selector", "top-k:3")[1])
    assert len(row["picked"]) == 3
    assert row["picked"][0] == {"text": row["text"], "reward": row["reward"]}
    rewards = [picked["reward"] for picked in row["picked"]]
    assert rewards == sorted(rewards, reverse=True)
    assert "picked" not in json.loads(run(source, "-n", 2)[1])
    write_rows(tmp_path / "ranked.jsonl", [{"prompt": "Say it", "candidates": ["Say", "Say it", "nothing", "no"]}])
    row = json.loads(run("ranked.jsonl", "--selector", "top-k:2", command="rerank")[1])
    assert [picked["text"] for picked in row["picked"]] == ["Say it", "Say"]


@pytest.mark.parametrize("command", ["run", "rerank"])
def test_a_reward_function_sees_the_reference_and_the_other_columns_of_a_row(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "columns.py").write_text(
        "def policy(prompt, n): return ['41', '42']\n"
        "def reward(prompt, responses, task):\n"
        "    assert task.metadata == {'id': 7, 'tag': ['a']}\n"
        "    return [float(response == task.reference) for response in responses]\n"
    )
    fields = {"id": 7, "prompt": "What is 6 times 7?", "reference": 42, "tag": ["a"], "candidates": ["41", "42"]}
    write_rows(tmp_path / "in.jsonl", [fields])
    policy = ["--policy", "columns:policy", "-n", "2"] if command == "run" else []
    assert main([command, "in.jsonl", *policy, "--scorer", "columns:reward"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["text"], row["reward"], row["reference"]) == ("42", 1.0, 42)


def test_candidates_are_ranked_without_a_policy_and_a_draw_has_a_seed(run, tmp_path):
    write_rows(
        tmp_path / "in.jsonl", [{"id": i, "prompt": "Say it", "candidates": [f"Say {i}", "it"]} for i in range(20)]
    )
    (tmp_path / "bon.toml").write_text('policy = "/no/such/model"\nselector = "softmax:2"\n')
    draws = [run("in.jsonl", "--seed", seed, command="rerank")[1] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_a_field_that_a_result_would_overwrite_is_kept_under_replaced(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "Say hi", "text": "mine", "replaced": "too"}])
    row = json.loads(run(source, "-n", 1)[1])
    assert row["text"] != "mine"
    assert row["replaced"] == {"text": "mine", "replaced": "too"}


def test_the_output_of_a_run_can_be_reranked(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(3))
    run(source, "-n", 4, "--all", "-o", "first.jsonl")
    code, out, _ = run("first.jsonl", command="rerank")
    again = {row["id"]: row for row in map(json.loads, out.splitlines())}
    first = {row["id"]: row for row in rows_of(tmp_path / "first.jsonl")}
    assert code == 0
    assert {i: row["reward"] for i, row in again.items()} == {i: row["reward"] for i, row in first.items()}


def test_rows_are_ranked_in_one_batch_in_order_and_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counting.py").write_text(
        "from bon.engines.scripted import ScriptedEngine\n"
        "flip = ScriptedEngine(lambda text, draw: text.rpartition('Response:\\n')[2], concurrent=False)\n"
    )
    rows = [{"id": i, "prompt": f"Say {i}", "candidates": ["Say", f"Say {i}", "x"]} for i in range(200)]
    write_rows(tmp_path / "in.jsonl", [*rows[:150], {"id": "bad", "prompt": "Say", "candidates": [1]}, *rows[150:]])
    write_rows(tmp_path / "out.jsonl", [{"id": i, "mark": "kept"} for i in range(20)])
    arguments = ["rerank", "in.jsonl", "--scorer", "counting:flip", "-o", "out.jsonl", "--resume", "--skip-bad"]
    assert main(arguments) == 0
    written = rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in written] == list(range(200))
    assert all(row["mark"] == "kept" for row in written[:20])
    assert all(row["text"] == row["prompt"] for row in written[20:])
    assert sys.modules["counting"].flip.calls == 3, "540 candidates, about 256 at a time"
    assert "in.jsonl:151" in capsys.readouterr().err


def test_candidates_from_elsewhere_are_ranked(run, tmp_path):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "say one two three"}]
    source = write_rows(
        tmp_path / "in.jsonl", [{"messages": messages, "candidates": ["nothing", "say two three", "one"]}]
    )
    code, out, _ = run(source, "--all", command="rerank")
    row = json.loads(out)
    assert (code, row["text"], row["best"]) == (0, "say two three", 1)
    assert row["candidates"] == ["nothing", "say two three", "one"], "the row's own list stays as it was"
    assert len(row["scores"]) == 3


def test_a_system_message_goes_to_rows_that_have_none(tmp_path):
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]
    lines = [to_json({"prompt": "Hi"}), to_json({"messages": own})]
    systems = [
        row.task.messages[0].content for row in read_rows(json_lines(lines), partial(row_of, system="Be brief."))
    ]
    assert systems == ["Be brief.", "Mine."]


def test_the_instruction_of_a_row_is_what_is_inferred_back(tmp_path):
    [row] = read_rows([(1, {"prompt": "Sum up:\nlong text", "instruction": "Sum up:"})])
    assert (row.task.instruction, row.task.context) == ("Sum up:", "long text")


def test_rows_come_from_standard_input_and_go_to_standard_output(tmp_path):
    lines = b"".join(to_json(row) + b"\n" for row in prompts(3))
    code, out, err = in_process_of_its_own("run", "-", "-n", 2, "--policy", "scripted", cwd=tmp_path, stdin=lines)
    assert code == 0, err
    assert {json.loads(line)["id"] for line in out.splitlines()} == {"p0", "p1", "p2"}
    assert err == "", "a pipe gets rows and nothing else"


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + to_json({"prompt": "Hi"}))
    assert [*read_file(str(tmp_path / "in.jsonl"))] == [(1, {"prompt": "Hi"})]


def test_text_that_is_no_unicode_is_still_written_as_valid_json():
    assert json.loads(to_json({"text": "a\ud800b"})) == {"text": "a\ud800b"}


# --- Flat memory -----------------------------------------------------------------------------------------------------


def test_rows_are_read_as_they_are_needed_and_not_before():
    taken = 0

    def lines():
        nonlocal taken
        for i in range(100_000):
            taken += 1
            yield to_json({"prompt": f"Say {i}"})

    async def first_ten():
        outcomes = run_rows(
            BestOfN(ScriptedEngine(), n=2), (row for row in read_rows(json_lines(lines())) if isinstance(row, Row))
        )
        async for i, _ in aenumerate(outcomes):
            if i == 10:
                break
        await outcomes.aclose()

    asyncio.run(first_ten())
    assert taken < 500


async def aenumerate(items):
    i = 0
    async for item in items:
        yield i, item
        i += 1


# --- Resuming --------------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_not_touched_without_being_told(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(2))
    (tmp_path / "out.jsonl").write_text("precious\n")
    code, _, err = run(source, "-o", "out.jsonl")
    assert code == 2
    assert "out.jsonl exists already" in err
    assert "--resume" in err
    assert "--overwrite" in err
    assert (tmp_path / "out.jsonl").read_text() == "precious\n"


def test_overwrite_replaces_what_was_there(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(2))
    (tmp_path / "out.jsonl").write_text("old\n" * 50)
    assert run(source, "-n", 1, "-o", "out.jsonl", "--overwrite")[0] == 0
    assert len(rows_of(tmp_path / "out.jsonl")) == 2


def test_overwrite_keeps_the_old_file_when_the_run_cannot_begin(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(2))
    (tmp_path / "out.jsonl").write_text("old\n")
    assert run(source, "-n", 0, "-o", "out.jsonl", "--overwrite")[0] == 2
    assert (tmp_path / "out.jsonl").read_text() == "old\n"


@pytest.mark.parametrize("with_ids", [True, False])
def test_resume_does_only_what_is_missing(run, tmp_path, with_ids):
    rows = prompts(6) if with_ids else [{"prompt": f"Say number {i}"} for i in range(6)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    run(source, "-n", 2, "-o", "out.jsonl")
    whole = rows_of(tmp_path / "out.jsonl")
    kept = [dict(row, mark="kept") for row in whole[:4]]
    write_rows(tmp_path / "out.jsonl", kept)
    code, _, err = run(source, "-n", 2, "-o", "out.jsonl", "--resume")
    after = rows_of(tmp_path / "out.jsonl")
    assert code == 0
    assert after[:4] == kept
    assert {row.get("id", row.get("line")) for row in after} == {row.get("id", row.get("line")) for row in whole}
    assert len(after) == 6
    assert "2 rows done; 4 done before" in err


def test_resume_cuts_off_a_torn_last_line_and_does_that_row_again(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(3))
    run(source, "-n", 2, "-o", "out.jsonl")
    torn = (tmp_path / "out.jsonl").read_bytes()[:-9]
    (tmp_path / "out.jsonl").write_bytes(torn)
    code, _, err = run(source, "-n", 2, "-o", "out.jsonl", "--resume")
    assert code == 0
    assert "torn" in err
    assert sorted(row["id"] for row in rows_of(tmp_path / "out.jsonl")) == ["p0", "p1", "p2"]


def test_resume_ends_a_last_line_that_only_lacks_its_newline(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(3))
    run(source, "-n", 2, "-o", "out.jsonl")
    kept = rows_of(tmp_path / "out.jsonl")[:2]
    (tmp_path / "out.jsonl").write_text("\n".join(map(json.dumps, kept)))
    run(source, "-n", 2, "-o", "out.jsonl", "--resume")
    assert rows_of(tmp_path / "out.jsonl")[:2] == kept
    assert len(rows_of(tmp_path / "out.jsonl")) == 3


def test_resume_with_nothing_left_loads_no_model(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(2))
    run(source, "-n", 1, "-o", "out.jsonl")
    code = main(["run", str(source), "-o", "out.jsonl", "--resume", "--policy", "/no/such/model"])
    assert code == 0


def test_resume_refuses_a_file_that_no_run_wrote(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(2))
    (tmp_path / "out.jsonl").write_text('{"text": "whose?"}\n{"id": 1}\n')
    code, _, err = run(source, "-o", "out.jsonl", "--resume")
    assert code == 2
    assert "out.jsonl:1: cannot resume" in err


def test_resume_refuses_ids_that_are_not_unique(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [*prompts(2), prompts(1)[0]])
    code, _, err = run(source, "-n", 1, "-o", "out.jsonl", "--resume")
    assert code == 2
    assert "in.jsonl:3: the id 'p0' is that of line 1" in err


# --- Bad rows --------------------------------------------------------------------------------------------------------


def test_a_bad_row_ends_the_run_after_what_came_before_it_is_written(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Say a"}\n{"prompt": "Say b"}\n{oops\n{"prompt": "Say c"}\n')
    code, _, err = run("in.jsonl", "-n", 2, "-o", "out.jsonl")
    assert code == 2
    assert "in.jsonl:3: not valid JSON" in err
    assert {row["line"] for row in rows_of(tmp_path / "out.jsonl")} == {1, 2}


def test_one_row_is_not_called_rows(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Say a"}\n')
    assert "bon: 1 row done; mean" in run("in.jsonl", "-n", 2, "-o", "out.jsonl")[2]


def test_skip_bad_reports_bad_rows_and_does_the_others(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{oops\n{"prompt": "Say a"}\n[]\n{"prompt": ""}\n{"prompt": "Say c"}\n')
    code, out, err = run("in.jsonl", "-n", 2, "--skip-bad")
    assert code == 0
    assert {json.loads(line)["line"] for line in out.splitlines()} == {2, 5}
    assert [f"in.jsonl:{i}:" in err for i in (1, 3, 4)] == [True] * 3
    assert "2 rows done; 3 bad" in err


def test_thousands_of_bad_rows_are_counted_and_not_all_listed(run, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Say a"}\n' + "oops\n" * 3000)
    code, _, err = run("in.jsonl", "-n", 1, "--skip-bad")
    assert code == 0
    assert "3000 bad" in err
    assert len(err.splitlines()) < 30


def test_an_engine_that_fails_is_no_fault_of_the_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing.py").write_text(
        "from bon.engines.scripted import ScriptedEngine\nmodel = ScriptedEngine(fail_after=5)\n"
    )
    write_rows(tmp_path / "in.jsonl", prompts(3))
    code = main(["run", "in.jsonl", "--policy", "failing:model", "--skip-bad", "-o", "out.jsonl"])
    err = capsys.readouterr().err
    assert code == 1
    assert "in.jsonl:1: the scripted engine was told to fail" in err


def test_a_model_that_died_is_reported_once_and_not_for_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dying.py").write_text(
        "from bon.engines.scripted import ScriptedEngine\nmodel = ScriptedEngine(fail_after=200)\n"
    )
    write_rows(tmp_path / "in.jsonl", prompts(60))
    code = main(["run", "in.jsonl", "-n", "2", "--policy", "dying:model", "-o", "out.jsonl"])
    err = capsys.readouterr().err
    done = rows_of(tmp_path / "out.jsonl")
    assert code == 1
    assert err.count("was told to fail") == 1
    assert 0 < len(done) < 60
    assert re.search(rf"{len(done)} rows done; \d+ failed", err)


def test_each_prompt_that_is_too_long_is_named_with_its_own_count(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(
        "from bon.engines.scripted import ScriptedEngine\n"
        "policy = ScriptedEngine(max_model_len=8, concurrent=False)\nflip = ScriptedEngine(concurrent=False)\n"
    )
    lengths = [3, 10, 4, 30]
    write_rows(tmp_path / "in.jsonl", [{"prompt": " ".join(["word"] * length)} for length in lengths])
    code = main(["run", "in.jsonl", "--policy", "small:policy", "--scorer", "small:flip", "--skip-bad"])
    captured = capsys.readouterr()
    assert code == 0
    assert {json.loads(line)["line"] for line in captured.out.splitlines()} == {1, 3}
    assert "in.jsonl:2: the prompt has 10 tokens, 3 more than the 7" in captured.err
    assert "in.jsonl:4: the prompt has 30 tokens, 23 more than the 7" in captured.err


def test_a_function_that_raises_for_one_row_costs_that_row_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picky.py").write_text(
        "from bon.engines.scripted import ScriptedEngine\nflip = ScriptedEngine(concurrent=False)\n"
        "def policy(prompt):\n    if '3' in prompt: raise ValueError('not three')\n    return prompt\n"
    )
    write_rows(tmp_path / "in.jsonl", prompts(8))
    code = main(["run", "in.jsonl", "--policy", "picky:policy", "--scorer", "picky:flip", "--skip-bad"])
    captured = capsys.readouterr()
    assert code == 0
    assert len(captured.out.splitlines()) == 7
    assert "in.jsonl:4: the function 'picky:policy' raised ValueError: not three" in captured.err
    assert "1 bad" in captured.err


def test_reading_says_what_is_wrong_and_goes_on():
    rows = list(
        read_rows(
            json_lines([b"{", b'{"prompt": "a"}', b'{"prompt": "\\ud800"}', b'{"prompt": "a", "x": NaN}', b"[" * 10**5])
        )
    )
    assert [type(row) for row in rows] == [BadRow, Row, BadRow, BadRow, BadRow]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]


# --- Writing ---------------------------------------------------------------------------------------------------------


def test_a_row_is_on_disk_as_soon_as_it_is_written(tmp_path):
    output = Output.open(tmp_path / "out.jsonl")
    output.write({"id": 1})
    assert rows_of(tmp_path / "out.jsonl") == [{"id": 1}]
    output.close()


def test_an_output_without_rows_leaves_no_file_behind(tmp_path):
    Output.open(tmp_path / "out.jsonl").close()
    assert not (tmp_path / "out.jsonl").exists()


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(InputError, match="exclude"):
        Output.open(tmp_path / "out.jsonl", resume=True, overwrite=True)


def test_a_full_disk_is_an_error_and_not_a_success(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(1))
    code, _, err = run(source, "-n", 1, "-o", "/dev/full")
    assert code == 1
    assert "No space left" in err


def test_an_abstaining_result_is_a_row_without_text():
    bon = BestOfN(ScriptedEngine(), n=2, min_reward=1.1)
    row = row_of(1, {"prompt": "Say hi"})
    written = output_row(row, asyncio.run(bon.run(row.task)), run="")
    assert written["text"] is None
    assert written["reason"]


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(tmp_path):
    """A policy that takes its time, 300 prompts, and a run over them that has begun to write."""
    (tmp_path / "slow.py").write_text(
        "from bon.engines.scripted import ScriptedEngine\nmodel = ScriptedEngine(step_seconds=0.02)\n"
    )
    write_rows(tmp_path / "in.jsonl", prompts(300))
    return tmp_path


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def test_ctrl_c_leaves_every_finished_row_and_resume_completes_the_file(slow):
    out = slow / "out.jsonl"
    arguments = ("run", "in.jsonl", "-o", "out.jsonl", "-n", 4, "--policy", "slow:model")
    running = process(*arguments, cwd=slow)
    wait_for(lambda: out.exists() and out.stat().st_size > 0)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    done = rows_of(out)
    assert running.returncode == 130
    assert 0 < len(done) < 300
    assert out.read_bytes().endswith(b"\n")
    assert f"interrupted: {len(done)} rows done and in out.jsonl" in err.decode()
    assert "Traceback" not in err.decode()

    code, _, err = in_process_of_its_own(*arguments[:-1], "slow:model", "--resume", cwd=slow)
    assert code == 0, err
    assert f"{len(done)} done before" in err
    ids = [row["id"] for row in rows_of(out)]
    assert sorted(ids) == sorted(row["id"] for row in prompts(300)), "each row once"


def test_a_killed_run_leaves_whole_lines(slow):
    out = slow / "out.jsonl"
    running = process("run", "in.jsonl", "-o", "out.jsonl", "-n", 4, "--policy", "slow:model", cwd=slow)
    wait_for(lambda: out.exists() and out.stat().st_size > 0)
    running.kill()
    running.communicate()
    assert rows_of(out)


def test_a_row_is_written_while_the_next_is_awaited_and_ctrl_c_does_not_wait_for_it(tmp_path):
    running = process("run", "-", "--policy", "scripted", cwd=tmp_path, stdin=subprocess.PIPE)
    running.stdin.write(to_json({"prompt": "Say hi"}) + b"\n")
    running.stdin.flush()
    assert json.loads(running.stdout.readline())["prompt"] == "Say hi"
    running.send_signal(signal.SIGINT)
    wait_for(lambda: running.poll() is not None, 20)
    _, err = running.communicate()
    assert running.returncode == 130
    assert b"interrupted" in err
    assert b"Traceback" not in err


def test_a_closed_pipe_ends_the_run_without_a_word(slow):
    running = process("run", "in.jsonl", "-n", 1, "--policy", "scripted", cwd=slow)
    running.stdout.readline()
    running.stdout.close()
    running.wait(timeout=60)
    assert running.stderr.read() == b""
    running.stderr.close()
    assert os.WIFEXITED(running.returncode) or running.returncode == 1
