"""A folder of shards: the order of the input, no row twice, no half of a shard, and another run's rows refused."""

import json
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from command import rows_of, write_rows

from bon.cli import main
from bon.data.formats import read_file
from bon.data.rows import error_row, read_rows, row_of
from bon.data.shards import Shards
from bon.data.sink import to_json
from bon.errors import EngineError, InputError

RUN = "r"


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "in.jsonl", [{"prompt": f"Say {number}"} for number in range(10)])


def missing(shards, source, size=4, limit=None):
    rows = list(read_rows(read_file(str(source)), shards.read))[:limit]
    return list(shards.missing(source, rows, size))


def made(row):
    return to_json({**row.fields, "text": row.fields["prompt"].upper(), "line": row.line, "run": RUN})


def failed(row):
    return to_json(error_row(row, EngineError("it cannot be reached."), run=RUN))


def do(folder, source, lines=made, *, only=(0, 1, 2), resume=False, size=4):
    with closing(Shards.open(folder, RUN, row_of, resume=resume)) as shards:
        blocks = missing(shards, source, size)
        for block in (blocks[index] for index in only if index < len(blocks)):
            shards.write(block, [lines(row) for row in block.rows], len(block.rows))
    return shards


def texts(folder):
    return [row["text"] for path in sorted(folder.iterdir()) for row in rows_of(path)]


def test_shards_in_the_order_of_their_names_are_the_input_in_its_order_whichever_was_done_first(tmp_path, source):
    do(tmp_path / "out", source, only=(2, 0, 1))
    assert texts(tmp_path / "out") == [f"SAY {number}" for number in range(10)]


def test_what_a_killed_run_left_out_is_done_and_nothing_else_even_in_other_sizes(tmp_path, source):
    do(tmp_path / "out", source, only=(1,))
    shards = do(tmp_path / "out", source, resume=True, size=3, only=range(9))
    assert (shards.already, shards.written) == (4, 6)
    assert texts(tmp_path / "out") == [f"SAY {number}" for number in range(10)]
    assert do(tmp_path / "out", source, resume=True).written == 0


def test_rows_that_failed_are_done_again_in_their_place(tmp_path, source):
    do(tmp_path / "out", source, lambda row: failed(row) if row.line in (2, 3, 9) else made(row))
    assert texts(tmp_path / "out").count(None) == 3
    before = sorted((tmp_path / "out").iterdir())
    assert do(tmp_path / "out", source, resume=True).written == 3
    assert sorted((tmp_path / "out").iterdir()) == before
    assert texts(tmp_path / "out") == [f"SAY {number}" for number in range(10)]


def test_a_row_that_cannot_be_read_has_its_place_too_and_is_done_when_it_has_been_mended(tmp_path, source):
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join([*lines[:5], "{\n", *lines[6:]]))
    do(tmp_path / "out", source)
    [bad] = [row for path in (tmp_path / "out").iterdir() for row in rows_of(path) if row["text"] is None]
    assert (bad["line"], bad["status"]) == (6, "error")
    assert "not valid JSON" in bad["reason"]
    source.write_text("".join(lines))
    assert do(tmp_path / "out", source, resume=True).written == 1
    assert texts(tmp_path / "out") == [f"SAY {number}" for number in range(10)]


def test_rows_that_were_added_to_the_input_get_shards_of_their_own(tmp_path, source):
    do(tmp_path / "out", source)
    with source.open("a") as file:
        file.write('{"prompt": "Say more"}\n')
    assert do(tmp_path / "out", source, resume=True).written == 1
    assert texts(tmp_path / "out")[-1] == "SAY MORE"


def test_a_shard_that_was_not_finished_is_none(tmp_path, source):
    do(tmp_path / "out", source, only=(0,))
    (tmp_path / "out" / ".in.jsonl.000000005-000000008.jsonl.unfinished").write_text('{"prompt": "Sa')
    do(tmp_path / "out", source, resume=True)
    assert texts(tmp_path / "out") == [f"SAY {number}" for number in range(10)]


def test_a_folder_has_one_run_at_a_time(tmp_path, source):
    shards = Shards.open(tmp_path / "out", RUN, row_of)
    with pytest.raises(InputError, match="another run is writing"):
        Shards.open(tmp_path / "out", RUN, row_of)
    shards.close()
    Shards.open(tmp_path / "out", RUN, row_of).close()


def test_shards_that_are_there_stay_unless_that_is_wanted(tmp_path, source):
    do(tmp_path / "out", source)
    with pytest.raises(InputError, match=r"has shards already\. Add --resume"):
        do(tmp_path / "out", source)
    shards = Shards.open(tmp_path / "out", RUN, row_of, overwrite=True)
    assert len(missing(shards, source)) == 3
    assert len(texts(tmp_path / "out")) == 10  # until the run begins
    shards.start()
    assert list((tmp_path / "out").iterdir()) == []
    shards.close()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: {**row, "run": "another"}, "was made with other settings"),
        (lambda row: {**row, "prompt": "Say no"}, "in.jsonl:5 is another prompt than the one in"),
        (lambda row: {**row, "prompt": 3}, "in.jsonl:5 is another prompt than the one in"),
        (lambda row: [row], "cannot resume: a row must be a JSON object"),
    ],
)
def test_rows_of_another_run_or_another_input_are_refused(tmp_path, source, change, said):
    do(tmp_path / "out", source)
    path = tmp_path / "out" / "in.jsonl.000000005-000000008.jsonl"
    first, *others = rows_of(path)
    write_rows(path, [change(first), *others])
    with pytest.raises(InputError, match=said):
        do(tmp_path / "out", source, resume=True)


def test_a_shard_with_too_few_rows_is_named_and_how_to_get_on(tmp_path, source):
    do(tmp_path / "out", source)
    path = tmp_path / "out" / "in.jsonl.000000005-000000008.jsonl"
    write_rows(path, rows_of(path)[:3])
    with pytest.raises(InputError, match=r"000000008.jsonl:4: cannot resume: .*Remove the shard, and its rows"):
        do(tmp_path / "out", source, resume=True)
    path.unlink()
    assert do(tmp_path / "out", source, resume=True).written == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "in.jsonl", "--ray", "local"], "give -o FOLDER"),
        (["run", "in.jsonl", "--workers", "2"], "--workers says what a worker of a Ray cluster gets: give --ray"),
        (["run", "Say hi", "--ray", "local"], "--ray is for files of prompts"),
        (["run", "in.jsonl", "--ray", "local", "-o", "in.jsonl"], "it is a file, and shards need a folder"),
        (["run", "in.jsonl", "--ray", "local", "-o", "out", "--trace", "t.json"], "--trace is for a run on one"),
        (["run", "in.jsonl", "--ray", "local", "-o", "out", "--total-samples", "20"], "on one machine: leave out"),
        (["run", "-", "--ray", "local", "-o", "out"], "standard input cannot be read again"),
        (["run", "empty", "--ray", "local", "-o", "out"], "the folder 'empty' has no file of rows"),
        (["run", "inputs", "--ray", "local", "-o", "inputs"], "both the input and the output"),
        (["run", "inputs", "--ray", "local", "-o", "out"], "cannot read inputs/b.jsonl.gz: Not a gzipped file"),
        (["run", "in.jsonl", "--ray", "local", "-o", "others", "--resume"], "a shard of theirs.jsonl, which this run"),
    ],
)
def test_what_a_run_over_many_machines_cannot_do_is_said_before_any_machine_is_asked(
    tmp_path, monkeypatch, capsys, source, arguments, said
):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "inputs", "others"):
        Path(folder).mkdir()
    write_rows(Path("inputs/a.jsonl"), [{"prompt": "Say a"}])
    Path("inputs/b.jsonl.gz").write_text("no gzip")
    Path("others/theirs.jsonl.000000001-000000002.jsonl").write_text("{}\n")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("out").exists()


def test_without_ray_the_command_to_install_it_is_said(tmp_path, monkeypatch, capsys, source):
    monkeypatch.setitem(__import__("sys").modules, "ray.data", None)
    assert main(["run", str(source), "--ray", "local", "-o", str(tmp_path / "out"), "--policy", "scripted"]) == 1
    assert "pip install 'bon[ray]'" in capsys.readouterr().err


def test_an_error_row_has_what_came_in_and_comes_back_from_it():
    row = row_of(3, {"prompt": "Say hi", "text": "mine", "status": "new"})
    written = json.loads(to_json(error_row(row, EngineError("no."), run=RUN)))
    assert written["replaced"] == {"text": "mine", "status": "new"}
    assert (written["text"], written["reason"], written["line"]) == (None, "no.", 3)
    read = partial(row_of, system=None)
    assert read(3, {**written, **written["replaced"]}).digest == row.digest
