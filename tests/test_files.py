"""Files of prompts through the command line: what is kept, what is written, and what survives Ctrl-C."""

import asyncio
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import date
from decimal import Decimal
from functools import partial

import pytest
from command import in_process_of_its_own, process, rows_of, write_rows
from fake_openai import FakeServer, Stream, error

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


# --- Formats ---------------------------------------------------------------------------------------------------------

ROWS = [{"question": "Say a", "tag": 1}, {"question": 'Say "b",\nthen c', "tag": None}]
LINES = "\n".join(map(json.dumps, ROWS))
SHEET = '\ufeffquestion,tag\nSay a,1\n\n"Say ""b"",\nthen c",\n'


def parquet(rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    sink = pyarrow.BufferOutputStream()
    write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    "rows.jsonl": lambda: LINES.encode(),
    "rows": lambda: LINES.encode(),
    "rows.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "lines.json": lambda: LINES.encode(),
    "rows.csv": SHEET.encode,
    "rows.tsv": lambda: SHEET.replace(",1", "\t1").replace("n,tag", "n\ttag").replace('c",', 'c"\t').encode(),
    "rows.parquet": lambda: parquet(ROWS),
    "ROWS.JSONL.GZ": lambda: gzip.compress(LINES.encode()),
    "rows.csv.gz": lambda: gzip.compress(SHEET.encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_a_prompt_field_is_read_from_any_format(run, tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name]())
    code, out, err = run(name, "-n", 1, "--prompt-field", "question")
    rows = sorted(map(json.loads, out.splitlines()), key=lambda row: row["line"])
    assert code == 0, err
    assert [(row["question"], str(row["tag"])) for row in rows] == [(r["question"], str(r["tag"])) for r in ROWS]
    assert [row["text"] for row in rows] == ["Say a", 'Say "b", then c']


def test_a_text_file_has_a_prompt_a_line_and_a_json_file_may_be_a_list_of_prompts(tmp_path):
    (tmp_path / "in.txt").write_bytes("\ufeffSay a\r\n\r\n  Say é".encode())
    (tmp_path / "in.json").write_text('["Say a", "Say b", 3]')
    assert [*read_file(str(tmp_path / "in.txt"))] == [(1, {"prompt": "Say a"}), (3, {"prompt": "  Say é"})]
    *read, (number, error) = read_file(str(tmp_path / "in.json"))
    assert read == [(1, {"prompt": "Say a"}), (2, {"prompt": "Say b"})]
    assert (number, isinstance(error, InputError)) == (3, True)


def test_a_prompt_field_may_hold_messages_and_csv_holds_candidates_as_json(run, tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"chat": [{"role": "user", "content": "Say it"}]}])
    assert json.loads(run("in.jsonl", "-n", 1, "--prompt-field", "chat")[1])["text"] == "Say it"
    (tmp_path / "in.csv").write_text('prompt,candidates\nSay it,"[""it"", ""Say it""]"\n')
    assert json.loads(run("in.csv", command="rerank")[1])["text"] == "Say it"


def test_limit_takes_the_first_rows_and_resume_goes_on_behind_them(run, tmp_path):
    write_rows(tmp_path / "in.jsonl", prompts(6))
    assert run("in.jsonl", "-n", 1, "-o", "out.jsonl", "--limit", 2)[0] == 0
    assert {row["id"] for row in rows_of(tmp_path / "out.jsonl")} == {"p0", "p1"}
    code, _, err = run("in.jsonl", "-n", 1, "-o", "out.jsonl", "--limit", 5, "--resume")
    assert (code, len(rows_of(tmp_path / "out.jsonl"))) == (0, 5)
    assert "3 rows done; 2 done before" in err


def test_values_that_json_lacks_are_written_as_text(run, tmp_path):
    """One column of bytes or of decimal numbers ended the whole run."""
    rows = [{"prompt": "Say a", "blob": b"\xff", "price": Decimal("1.50"), "day": date(2026, 1, 2), "x": float("nan")}]
    (tmp_path / "in.parquet").write_bytes(parquet(rows))
    row = json.loads(run("in.parquet", "-n", 1)[1])
    assert (row["price"], row["day"], row["x"]) == ("1.50", "2026-01-02", None)
    assert isinstance(row["blob"], str)


def test_a_bad_row_of_a_table_costs_that_row_only(run, tmp_path):
    (tmp_path / "in.csv").write_bytes(b'prompt,tag\nSay a,1\nSay b, but,2\ncaf\xe9,3\n"Say"x,4\nSay e,5\n')
    code, out, err = run("in.csv", "-n", 1, "--skip-bad")
    assert code == 0
    assert sorted(json.loads(line)["tag"] for line in out.splitlines()) == ["1", "5"]
    assert "in.csv:3: the row has 3 cells under a header of 2" in err
    assert "in.csv:4: the row is not UTF-8" in err
    assert "in.csv:5: not valid CSV" in err


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("in.jsonl.gz", gzip.compress(b'{"prompt": "Say a"}\n' * 9)[:-12], "Compressed file ended before"),
        ("in.csv", b'prompt\nSay a\n"Say b\nSay c\nSay d\n', "a quotation mark at line 3 is not closed"),
    ],
)
def test_a_file_that_ends_too_early_is_an_error_even_where_bad_rows_are_skipped(
    run, tmp_path, name, content, complaint
):
    """What stands behind the damage is lost, and it is more than a row."""
    (tmp_path / name).write_bytes(content)
    code, _, err = run(name, "-n", 1, "-o", "out.jsonl", "--skip-bad")
    assert code == 2
    assert f"cannot read {name}: {complaint}" in err
    assert re.search("^bon: [1-9] rows? done", err)
    assert rows_of(tmp_path / "out.jsonl"), "what came before is kept"


def test_parquet_without_pyarrow_says_what_to_type(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    code, _, err = run("in.parquet")
    assert code == 1
    assert "Type: pip install 'bon[parquet]'" in err


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


def test_resume_with_nothing_left_loads_no_model(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "gone.py").write_text("def policy(prompt):\n    return prompt\n")
    write_rows(tmp_path / "in.jsonl", prompts(2))
    command = ["run", "in.jsonl", "-n", "1", "-o", "out.jsonl", "--policy", "gone:policy", "--scorer", "flip:scripted"]
    assert main(command) == 0
    (tmp_path / "gone.py").unlink()
    monkeypatch.delitem(sys.modules, "gone")
    assert main([*command, "--resume"]) == 0


def test_resume_refuses_a_file_that_no_run_wrote(run, tmp_path):
    source = write_rows(tmp_path / "in.jsonl", prompts(2))
    (tmp_path / "out.jsonl").write_text('{"text": "whose?"}\n{"id": 1}\n')
    code, _, err = run(source, "-o", "out.jsonl", "--resume")
    assert code == 2
    assert "out.jsonl:1: cannot resume" in err


def test_a_line_that_was_inserted_is_done_and_no_other_is_done_again(run, tmp_path):
    """Rows without ids were known by their line: one prompt was done twice, and the new one never."""
    rows = [{"prompt": f"Say number {i}"} for i in (1, 2, 2, 3)]
    write_rows(tmp_path / "in.jsonl", rows)
    run("in.jsonl", "-n", 1, "-o", "out.jsonl")
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Say it first"}, {"id": None, "prompt": "Say null"}, *rows])
    for more in (2, 0):
        code, _, err = run("in.jsonl", "-n", 1, "-o", "out.jsonl", "--resume")
        assert (code, f"{more} rows done; {6 - more} done before" in err) == (0, True), err
    done = sorted(row["prompt"] for row in rows_of(tmp_path / "out.jsonl"))
    assert done == ["Say it first", "Say null", *(row["prompt"] for row in rows)]


@pytest.mark.parametrize("command", ["run", "rerank"])
def test_every_row_is_known_again_when_the_output_has_fields_of_the_same_names(run, tmp_path, command):
    rows = [{"text": f"Say {i}", "run": i, "instruction": "Say", "candidates": ["Say", str(i)]} for i in range(3)]
    write_rows(tmp_path / "in.jsonl", rows)
    arguments = ("in.jsonl", "-o", "out.jsonl", "--prompt-field", "text", "--all")
    assert run(*arguments, command=command)[0] == 0
    assert "0 rows done; 3 done before" in run(*arguments, "--resume", command=command)[2]


@pytest.mark.parametrize(
    "changed", [["-n", 5], ["-n", 2, "--seed", 7], ["-n", 2, "--all"], ["-n", 2, "--system", "Hi"]]
)
def test_resume_refuses_rows_that_were_made_with_other_settings(run, tmp_path, changed):
    """It went on, and rewards of two scorers stood in one file without a word."""
    write_rows(tmp_path / "in.jsonl", prompts(3))
    run("in.jsonl", "-n", 2, "-o", "out.jsonl", "--limit", 1)
    before = (tmp_path / "out.jsonl").read_bytes()
    code, _, err = run("in.jsonl", "-o", "out.jsonl", "--resume", *changed)
    assert code == 2
    assert "out.jsonl:1 was made with other settings" in err
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert run("in.jsonl", "-n", 2, "-o", "out.jsonl", "--resume", "--threads", 2)[0] == 0, "which changes no row"


def test_resume_refuses_an_id_that_has_another_prompt_now(run, tmp_path):
    write_rows(tmp_path / "in.jsonl", prompts(2))
    run("in.jsonl", "-n", 1, "-o", "out.jsonl")
    write_rows(tmp_path / "in.jsonl", [prompts(1)[0], {"id": "p1", "prompt": "Say something else"}])
    code, _, err = run("in.jsonl", "-n", 1, "-o", "out.jsonl", "--resume")
    assert code == 2
    assert "in.jsonl:2: out.jsonl has the id 'p1' for another prompt" in err


def test_a_blank_line_in_the_output_is_no_row(run, tmp_path):
    write_rows(tmp_path / "in.jsonl", prompts(2))
    run("in.jsonl", "-n", 1, "-o", "out.jsonl", "--limit", 1)
    with (tmp_path / "out.jsonl").open("a") as output:
        output.write("\n")
    assert "1 row done; 1 done before" in run("in.jsonl", "-n", 1, "-o", "out.jsonl", "--resume")[2]


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_two_runs_cannot_write_to_one_output(tmp_path, how):
    """Both did, every row was there twice, and both said that all was well."""
    output = Output.open(tmp_path / "out.jsonl")
    with pytest.raises(InputError, match=r"another run is writing to .*out\.jsonl"):
        Output.open(tmp_path / "out.jsonl", **how)
    output.write({"id": 1})
    output.close()
    Output.open(tmp_path / "out.jsonl", resume=True).close()
    assert rows_of(tmp_path / "out.jsonl") == [{"id": 1}]


def test_an_output_that_was_removed_by_the_run_that_held_it_is_not_written_to(tmp_path, monkeypatch):
    holder = Output.open(tmp_path / "out.jsonl")
    import fcntl

    real = fcntl.flock

    def late(*arguments):
        holder.close()  # between opening and locking
        real(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(InputError, match="another run is writing"):
        Output.open(tmp_path / "out.jsonl")


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


def test_rows_whose_scorer_could_not_be_reached_are_not_done_and_resume_does_them(tmp_path, monkeypatch, capsys):
    """They were written without a text, counted as done, the exit code was 0, and --resume left them out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "echo.py").write_text("def policy(prompt, n): return [f'{prompt} {i}' for i in range(n)]\n")
    write_rows(tmp_path / "in.jsonl", prompts(4))
    with FakeServer() as scorer:
        scorer.refuse = lambda seen: error(500, "down") if re.search("number [12]", str(seen.body)) else None
        command = ["run", "in.jsonl", "-n", "2", "-o", "out.jsonl", "--policy", "echo:policy", "--skip-bad"]
        command += ["--scorer", f"flip:{scorer.url}"]
        assert main(command) == 1
        assert "2 rows done; 2 failed" in capsys.readouterr().err
        assert {row["id"] for row in rows_of(tmp_path / "out.jsonl")} == {"p0", "p3"}
        scorer.refuse = lambda seen: None
        assert main([*command, "--resume"]) == 0
    rows = rows_of(tmp_path / "out.jsonl")
    assert sorted(row["id"] for row in rows) == ["p0", "p1", "p2", "p3"]
    assert None not in [row["text"] for row in rows]


CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "fine"}}
ODD = {
    "no UTF-8": json.dumps({"choices": [CHOICE]}).encode().replace(b"fine", b"\xff"),
    "half a surrogate pair": json.dumps({"choices": [CHOICE]}).encode().replace(b"fine", b"\\ud83d"),
    "token ids": {"choices": [{**CHOICE, "token_ids": 5}]},
    "tool calls": {"choices": [{**CHOICE, "message": {"role": "assistant", "content": "fine", "tool_calls": 5}}]},
    "content": {"choices": [{**CHOICE, "message": {"role": "assistant", "content": 5}}]},
    "no message": {"choices": [{"index": 0, "message": 5}]},
    "no choices": {"choices": 5},
    "a stream nobody asked for": Stream([b'{"choices": [{"index": 0, "delta": {"content": "\xff"}}]}', b"[DONE]"]),
    "HTML": b"<html>",
}


@pytest.mark.parametrize("odd", ODD)
def test_one_odd_answer_of_a_policy_costs_its_row_and_no_other(tmp_path, monkeypatch, capsys, odd):
    """An invalid byte in an answer to row 3 ended a run of 200 rows, and --resume --skip-bad ended at it again."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", prompts(4))
    with FakeServer() as policy:
        policy.refuse = lambda seen: ODD[odd] if "number 2" in str(seen.body) else None
        command = ["run", "in.jsonl", "-n", "2", "-o", "out.jsonl", "--policy", f"{policy.url},retries=0"]
        command += ["--scorer", "consensus", "--skip-bad"]
        for how in ([], ["--resume"]):
            assert main([*command, *how]) == 1
            assert "skipped in.jsonl:3: " in capsys.readouterr().err
            assert {row["id"] for row in rows_of(tmp_path / "out.jsonl")} == {"p0", "p1", "p3"}
        policy.refuse = lambda seen: None
        assert main([*command, "--resume"]) == 0
    assert sorted(row["id"] for row in rows_of(tmp_path / "out.jsonl")) == ["p0", "p1", "p2", "p3"]


def test_candidates_that_failed_and_rows_without_a_text_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "unsure.py").write_text(
        "def policy(prompt, n): return [f'{prompt} {i}' for i in range(n)]\n"
        "def reward(prompt, responses): return [None if '1' in r else 1.0 for r in responses]\n"
    )
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Say 1"}, {"prompt": "Say 2"}])
    command = ["run", "in.jsonl", "-n", "2", "-o", "out.jsonl", "--policy", "unsure:policy"]
    assert main([*command, "--scorer", "unsure:reward"]) == 0
    assert "2 rows done; 1 without a text; 3 of 4 candidates failed" in capsys.readouterr().err


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
    assert f"interrupted: {len(done)} row{'s' * (len(done) > 1)} done and in out.jsonl" in err.decode()
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
