"""Bad input: one clear line on standard error (value, place, what to do), exit code 2, no traceback, no output."""

import asyncio
import json
import os

import pytest
from command import in_process_of_its_own, write_rows

from bon import BestOfN, InputError, Task, score
from bon.cli import main
from bon.cli.run import is_file
from bon.engines.scripted import ScriptedEngine
from bon.evals.harness import evaluate

SCRIPTED = ("--policy", "scripted")
RANKED = ("--scorer", "flip:scripted")


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Run bon in an empty folder; check that it refuses; return what it says."""
    monkeypatch.chdir(tmp_path)

    def refused(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert captured.out == ""
        assert "Traceback" not in captured.err
        lines = captured.err.splitlines()
        assert all(line.startswith("bon: ") for line in lines)
        [message] = [line for line in lines if line.startswith("bon: error: ")]
        return message

    return refused


# --- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"prompt": "a"', "not valid JSON"),
        (b"hello", "not valid JSON"),
        (b'["a"]', "must be a JSON object"),
        (b"3", "must be a JSON object with 'prompt' or 'messages', not 3"),
        (b'{"text": "a"}', "neither 'prompt' nor 'messages'. Its fields: 'text'"),
        (b"{}", "Its fields: none"),
        (b'{"prompt": null}', "neither 'prompt' nor 'messages'"),
        (b'{"prompt": ""}', "the prompt is empty"),
        (b'{"prompt": " \\n "}', "the prompt is empty"),
        (b'{"prompt": 5}', "'prompt' must be text, not 5"),
        (b'{"prompt": ["a"]}', "'prompt' must be text, not ['a']. A conversation belongs in 'messages'"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "both 'prompt' and 'messages'"),
        (b'{"messages": "hi"}', "'messages' must be a list"),
        (b'{"messages": []}', "non-empty list of messages"),
        (b'{"messages": ["hi"]}', "messages[0] must be an object with 'role' and 'content', not 'hi'"),
        (b'{"messages": [{"role": "user"}]}', "messages[0].content must be text or a list of text parts, not None"),
        (b'{"messages": [{"role": "uesr", "content": "a"}]}', "'uesr'. Did you mean 'user'"),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}', "unknown message role"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            "messages[0].content[0].text must be text",
        ),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "no user message"),
        (
            b'{"messages": [{"role": "user", "content": "a", "function_call": {}}]}',
            "messages[0].function_call: there is no such field",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}',
            "messages[0].tool_calls[0].function must",
        ),
        (b'{"prompt": "a", "instruction": 3}', "'instruction' must be text, not 3"),
        (b'{"prompt": "a", "instruction": "b"}', "'b' is not"),
        (b'{"prompt": "a", "reference": ["b"]}', "'reference' must be text or a number, not ['b']"),
        (b'{"prompt": "a", "id": 1.5}', "'id' must be text or a whole number, not 1.5"),
        (b'{"prompt": "a", "id": true}', "'id' must be text or a whole number, not True"),
        (b'{"prompt": "a", "x": NaN}', "NaN is no JSON number"),
        (b'{"prompt": "a \\ud800"}', "half a surrogate pair"),
        (b'{"prompt": "caf\xe9"}', "byte 16 of the line (0xe9) is not UTF-8. Save the file as UTF-8"),
        (b"\xff\xfe{\x00", "is not UTF-8"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_row_is_refused_with_its_file_and_line(refused, tmp_path, line, complaint):
    (tmp_path / "in.jsonl").write_bytes(b"\n" + line + b"\n")
    message = refused("run", "in.jsonl", *SCRIPTED)
    assert message.startswith("bon: error: in.jsonl:2: ")
    assert complaint in message


@pytest.mark.parametrize(
    ("candidates", "complaint"),
    [
        (None, "'candidates' must be a list of at least one text, not nothing"),
        ([], "'candidates' must be a list of at least one text, not []"),
        ("a", "'candidates' must be a list"),
        (["a", 3], "candidate 1 must be text, not 3"),
    ],
)
def test_bad_candidates_are_refused_with_their_file_and_line(refused, tmp_path, candidates, complaint):
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Say hi", "candidates": candidates}])
    message = refused("rerank", "in.jsonl", *RANKED)
    assert "in.jsonl:1: " in message
    assert complaint in message


def test_a_bad_row_that_is_long_makes_no_long_message(refused, tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"prompt": ["x" * 10_000]}])
    assert len(refused("run", "in.jsonl", *SCRIPTED)) < 250


def test_a_row_cannot_put_escape_sequences_on_the_terminal(refused, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"\\u001b[2J": 1}\n')
    assert "\x1b" not in refused("run", "in.jsonl", *SCRIPTED)


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["prompts.jsonl", "none.txt", "a.json", "a.csv", "notes.md", "a.parquet", "a.jsonl.gz", "folder/none"]
)
@pytest.mark.parametrize("command", ["run", "rerank"])
def test_the_name_of_a_file_that_does_not_exist_is_no_prompt(refused, command, name):
    """``bon run none.txt`` sampled answers to the text "none.txt"."""
    assert f"there is no file {name!r}" in refused(command, name)


@pytest.mark.parametrize(
    "prompt",
    [
        "Read and/or write",
        " and/or",
        "Explain a.txt",
        "解释TCP/IP协议",
        "解释main.py",
        "hello",
        "hello.",
        "3.14",
        "e.g.",
    ],
)
def test_a_prompt_with_a_slash_or_the_name_of_a_file_in_it_is_a_prompt(prompt):
    assert not is_file(prompt)


def test_json_lines_that_are_called_text_are_not_sent_to_a_model(refused, tmp_path):
    write_rows(tmp_path / "in.txt", [{"id": 1, "prompt": "Say hi"}])
    assert "in.txt:1: the line is a row of JSON Lines" in refused("run", "in.txt", *SCRIPTED)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(refused, tmp_path, content):
    (tmp_path / "in.jsonl").write_text(content)
    assert "in.jsonl is empty. A row of JSON Lines is" in refused("run", "in.jsonl", *SCRIPTED)


@pytest.mark.parametrize("command", ["run", "rerank"])
def test_a_folder_is_no_input(refused, tmp_path, command):
    (tmp_path / "rows").mkdir()
    assert "'rows' is a folder" in refused(command, "rows")


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("missing/out.jsonl", "cannot write to missing/out.jsonl: No such file or directory"),
        ("folder", "cannot write to folder: Is a directory"),
        ("in.jsonl", "in.jsonl is both the input and the output"),
        ("./in.jsonl", "is both the input and the output"),
        ("link.jsonl", "is both the input and the output"),
        ("in.jsonl/x", "Not a directory"),
        ("out.csv", "rows are written as JSON Lines, and out.csv would be read as something else. Name it .jsonl"),
        ("out.jsonl.gz", "would be read as something else"),
    ],
)
def test_an_unwritable_output_is_refused_before_any_work(refused, tmp_path, path, complaint):
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Say hi"}])
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    before = (tmp_path / "in.jsonl").read_bytes()
    message = refused("run", "in.jsonl", "-o", path, "--overwrite", "--policy", "/would/be/noticed/later")
    assert complaint in message
    assert (tmp_path / "in.jsonl").read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission_is_refused(refused, tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Say hi"}])
    (tmp_path / "out.jsonl").touch(0o400)
    assert "cannot write to out.jsonl: Permission denied" in refused("run", "in.jsonl", "-o", "out.jsonl", *SCRIPTED)


def test_standard_input_that_is_empty_or_broken_is_refused(tmp_path):
    for stdin, complaint in [(b"", "standard input is empty"), (b"x\n", "standard input:1: not valid JSON")]:
        code, out, err = in_process_of_its_own("run", "-", *SCRIPTED, cwd=tmp_path, stdin=stdin)
        assert (code, out) == (2, "")
        assert complaint in err


# --- Options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["runn"], "No such command 'runn'. Did you mean 'run'?"),
        (["eval", "mni"], "unknown dataset 'mni'. Did you mean 'mini'?"),
        (["run"], "PROMPT|FILE is missing. Type: bon run --help"),
        (["rerank"], "FILE is missing. Type: bon rerank --help"),
        (["run", "say", "hi"], "unexpected extra argument"),
        (["run", "hi", "--polcy", "x"], "No such option: --polcy. Did you mean '--policy'?"),
        (["run", "hi", "--flip", "x"], "No such option: --flip"),
        (["run", "hi", "--stop-at", "0.9"], "No such option: --stop-at. Did you mean '--stop'?"),
        (["run", "hi", "-n", "many"], "unknown budget 'many'. Known: a whole number, adaptive, fixed, stop-at"),
        (
            ["run", "hi", "-n", "2.5"],
            "n must be a whole number of at least 1, or a budget such as stop-at:0.9, got 2.5",
        ),
        (["eval", "mini", "-n", "2.5"], "n must be a whole number of at least 1, or a budget"),
        (["eval", "mini", "-n", "stop-at:0.5"], "-n is a plain number for this command, got 'stop-at:0.5'"),
        (["bench", "-n", "0"], "n must be a whole number of at least 1, got 0"),
        (["bench", "-n", "mni"], "unknown budget 'mni'"),
        (["serve", "mini", "--policy", "other"], "the policy is given twice, as 'mini' and as --policy 'other'"),
        (["run", "hi", "-n", "stop-at"], "It is written stop-at:REWARD"),
        (["run", "hi", "-n", "stop-at:x"], "the reward to stop at must be a number, got 'x'"),
        (["run", "hi", "-n", "stop-at:0.5,mst=3"], "'mst'. Did you mean 'most'?"),
        (["run", "hi", "-n", "0", *SCRIPTED], "n must be a whole number of at least 1, got 0"),
        (["run", "hi", "-n", "-3", *SCRIPTED], "got -3"),
        (["run", "", *SCRIPTED], "the prompt is empty"),
        (["run", " \n", *SCRIPTED], "the prompt is empty"),
        (["run", "caf\udce9", *SCRIPTED], "the prompt is not UTF-8"),
        (["run", "hi", "--policy", "m,engine=trch"], "unknown engine 'trch'. Did you mean 'torch'?"),
        (["run", "hi", "--policy", "mini,devce=cpu"], "option of the engine 'torch' 'devce'. Did you mean 'device'?"),
        (["run", "hi", "--policy", "mini,seed=1,seed=2"], "seed is given twice in 'mini,seed=1,seed=2'"),
        (["run", "hi", "--threads", "0", *SCRIPTED], "threads must be a whole number of at least 1, got 0"),
        (["run", "hi", "--schedule", "eech", *SCRIPTED], "unknown schedule 'eech'. Did you mean 'each'?"),
        (["run", "hi", "--config", "no.toml"], "cannot read the configuration 'no.toml'"),
        (["run", "hi", "--scorer", "likelyhood", *SCRIPTED], "unknown scorer 'likelyhood'. Did you mean 'likelihood'?"),
        (["run", "hi", "--scorer", "flip:style=jsn", *SCRIPTED], "unknown prompt style 'jsn'. Did you mean 'json'?"),
        (["run", "hi", "--scorer", "flip:samples=0", *SCRIPTED], "samples must be a whole number of at least 1, got 0"),
        (["run", "hi", "--scorer", "likelihood:style=json", *SCRIPTED], "'json' asks for JSON"),
        (["run", "hi", "--selector", "soft-max", *SCRIPTED], "unknown selector 'soft-max'. Did you mean 'softmax'?"),
        (["run", "hi", "--selector", "top-k", *SCRIPTED], "It is written top-k:K"),
        (["run", "hi", "--selector", "top-k:0", *SCRIPTED], "k must be a whole number of at least 1, got 0"),
        (["run", "hi", "--selector", "softmax:hot", *SCRIPTED], "temperature must be a number >= 0, got 'hot'"),
        (["run", "hi", "--selector", "vote", *SCRIPTED], "It is written vote:EXTRACT"),
        (["run", "hi", "--selector", "vote:(", *SCRIPTED], "not a regular expression"),
        (["run", "hi", "--selector", "best:1", *SCRIPTED], "too many positional arguments. It is written best"),
        (["run", "hi", "--min-reward", "nan", *SCRIPTED], "min_reward must be a number"),
        (["run", "hi", "--temperature", "-1", *SCRIPTED], "temperature must be a number >= 0, got -1.0"),
        (["run", "hi", "--top-p", "1.5", *SCRIPTED], "top_p must be a number in (0, 1], got 1.5"),
        (["run", "hi", "--max-tokens", "0", *SCRIPTED], "max_tokens must be a whole number >= 1, got 0"),
        (["run", "hi", "--stop", "", *SCRIPTED], "stop must be one or several texts that are not empty"),
        (["run", "hi", "--seed", "-2", *SCRIPTED], "seed must be a whole number >= 0, got -2"),
        (["run", "hi", "--instruction", "ho", *SCRIPTED], "'ho' is not"),
        (["run", "hi", "-o", "out.jsonl", *SCRIPTED], "--output is for files of prompts"),
        (["run", "hi", "--resume", *SCRIPTED], "--resume is for files of prompts"),
        (["run", "hi", "--all", *SCRIPTED], "--all is for files of prompts"),
        (["run", "hi", "--limit", "3", *SCRIPTED], "--limit is for files of prompts"),
        (["run", "hi", "--prompt-field", "q", *SCRIPTED], "--prompt-field is for files of prompts"),
        (["run", "in.jsonl", "--limit", "0", *SCRIPTED], "got '0'"),
        (["run", "in.jsonl", "--prompt-field", "q", *SCRIPTED], "the row has no field 'q'. Its fields: 'prompt'"),
        (["run", "in.jsonl", "--trace", "in.jsonl", *SCRIPTED], "in.jsonl is no trace and would be overwritten"),
        (["eval", "in.jsonl", "--report", "in.jsonl"], "in.jsonl is no report and would be overwritten"),
        (["run", "hi", "--trace", "in.jsonl", *SCRIPTED], "in.jsonl is no trace and would be overwritten"),
        (["run", "hi", "--policy", "scripted,nme=x"], "option of the engine 'scripted' 'nme'. Did you mean 'name'?"),
        (["run", "hi", "--policy", "http://127.0.0.1:9/v1,dtype=float32"], "unknown option of the HTTP engine 'dtype'"),
        (["run", "hi", "--policy", "x,engine=scripted"], "'scripted' runs no model, so it cannot be 'x'"),
        (["run", "hi", "--policy", "no_module:f"], "no object of yours: there is no module 'no_module'"),
        (["run", "hi", "--scorer", "no_module:f", *SCRIPTED], "no object of yours: there is no module 'no_module'"),
        (["run", "hi", "--selector", "no_module:f", *SCRIPTED], "there is no module 'no_module'"),
        (
            ["run", "hi", "--policy", "json:dumps,foo=1"],
            "'json:dumps' is an object of your own, which takes no options: foo",
        ),
        (
            ["run", "hi", "--scorer", "json:dumps,foo=1", *SCRIPTED],
            "'json:dumps' is an object of your own, which takes",
        ),
        (
            ["run", "hi", "--selector", "json:dumps,foo=1", *SCRIPTED],
            "'json:dumps' is an object of your own, which takes",
        ),
        (["run", "hi", "--scorer", "likelihood:stile=x", *SCRIPTED], "Did you mean 'style'?"),
        (
            ["run", "hi", "--scorer", "likelihood:mini,devize=x", *SCRIPTED],
            "unknown option of likelihood(mini), or of the",
        ),
        (["run", "hi", "--scorer", "likelihood:mini,devize=x", *SCRIPTED], "'devize'. Did you mean 'device'?"),
        (["run", "hi", "--scorer", 'flip:"mini', *SCRIPTED], "a quotation mark is not closed in 'flip:\"mini'"),
        (["run", "hi", "--scorer", 'flip:mini,style="json', *SCRIPTED], "a quotation mark is not closed in"),
        (["run", "hi", "--selector", 'vote:"a', *SCRIPTED], "a quotation mark is not closed in"),
        (["run", "hi", "--policy", 'mini,dtype="float32'], "a quotation mark is not closed in"),
        (["run", "hi", "--scorer", "flip:", *SCRIPTED], "nothing stands behind the colon of 'flip:'. Write flip alone"),
        (
            ["run", "hi", "--scorer", "guard:", *SCRIPTED],
            "nothing stands behind the colon of 'guard:'. Write guard:SOME",
        ),
        (["run", "hi", "--selector", "best:", *SCRIPTED], "nothing stands behind the colon of 'best:'"),
        (
            ["run", "hi", "--scorer", "", *SCRIPTED],
            "the scorer is empty. Known: consensus, consensus:embedding, deepconf, default",
        ),
        (["run", "hi", "--policy", "rows"], "the folder 'rows' holds no model: it has neither config.json"),
        (["run", "hi", "--policy", "qwen:latest"], "'qwen:latest' is neither a folder nor a model on this machine"),
        (["run", "hi", "--policy", "llama3:8b"], "'llama3:8b' is neither a folder nor a Hugging Face name"),
        (["run", "hi", "--policy", "./no/such/model"], "no/such/model"),
        (["run", "hi", "--policy", ""], "a model's name is empty"),
        (["run", "in.jsonl", "--json", *SCRIPTED], "--json is for a single prompt"),
        (["run", "in.jsonl", "--instruction", "x", *SCRIPTED], "rows of a file have a field 'instruction'"),
        (["run", "in.jsonl", "--resume", *SCRIPTED], "--resume needs an output file"),
        (["run", "in.jsonl", "--resume", "--overwrite", "-o", "o", *SCRIPTED], "exclude each other"),
        (["rerank", "nothing", *RANKED], "there is no file 'nothing'"),
        (["tasks", "--count", "0"], "'0'"),
        (["eval", "mini", "--limit", "0"], "'0'"),
        (["eval", "mini", "--max-words", "none"], "'none'"),
        (["eval", "mini", "--store", "no/such/scores.db", *SCRIPTED], "no/such"),
        (["eval", "mini", "--scorer", "flip", "--scorer", "flip"], "the scorer 'flip' is given twice"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(refused, tmp_path, arguments, complaint):
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Say hi"}])
    (tmp_path / "rows").mkdir()
    assert complaint in refused(*arguments)


# --- From Python -----------------------------------------------------------------------------------------------------

BON = BestOfN(ScriptedEngine(), "flip", n=1)


@pytest.mark.parametrize("one", ["Hello", b"Hello", {"role": "user", "content": "Hello"}, Task.of("Hello"), None, 5])
@pytest.mark.parametrize(
    "call",
    [
        lambda one: list(BON.map(one)),
        lambda one: BON.stream(one),
        lambda one: BON.rerank("Hello", one),
        lambda one: asyncio.run(score(BON.scorer, one)),
        lambda one: asyncio.run(score(BON.scorer, [("Hello", one)])),
        lambda one: evaluate("mini", scorers=one, limit=1),
    ],
)
def test_one_text_where_a_list_belongs_is_never_taken_apart(call, one):
    """``bon.map("Hello")`` asked for answers to H, e, l, l and o."""
    with pytest.raises(InputError, match=r"are a list .*Put it into a list"):
        call(one)


# --- Code of the user's ----------------------------------------------------------------------------------------------

USER_CODE = """
from bon.engines.scripted import ScriptedEngine

number = 3
tiny = ScriptedEngine(max_model_len=5)

def raises(prompt):
    raise ValueError("no luck")

def too_few(prompt, n):
    return ["one"] * (n - 1)

def no_texts(prompt, n):
    return [1] * n

def no_list(prompt, n):
    return 7

def fine(prompt):
    return "fine"

def scores_raise(prompt, responses):
    raise RuntimeError("bad day")

def scores_few(prompt, responses):
    return [1.0]

def scores_words(prompt, responses):
    return ["good"] * len(responses)

def selects_badly(rewards, order, texts):
    raise KeyError("x")

class NeedsArguments:
    def __init__(self, x): ...
"""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--policy", "mine:raises", "--scorer", "flip:scripted"], "'mine:raises' raised ValueError: no luck"),
        (
            ["--policy", "mine:too_few", "--scorer", "flip:scripted"],
            "'mine:too_few' must return a list of 4 texts, but returned 3",
        ),
        (
            ["--policy", "mine:no_texts", "--scorer", "flip:scripted"],
            "must return a list of 4 texts, but returned 1 as sample 0",
        ),
        (["--policy", "mine:no_list", "--scorer", "flip:scripted"], "must return a list of 4 texts, but returned 7"),
        (
            ["--policy", "mine:fine", "--scorer", "mine:raises"],
            "called with (prompt, responses), and mine:raises takes (prompt)",
        ),
        (["--policy", "mine:fine", "--scorer", "flip"], "cannot score by itself. Name a model to score with"),
        (["--policy", "mine:number"], "'mine:number' is no function and no engine, but int"),
        (["--policy", "mine:missing"], "the module 'mine' has no 'missing'"),
        (["--policy", "nowhere.at.all:f"], "'nowhere.at.all:f' is neither a folder nor a model"),
        (["--policy", "broken:f"], "cannot import 'broken:f': SyntaxError"),
        (["--policy", "mine:tiny"], "the prompt has 6 tokens, 2 more than the 4 that fit"),
        (["--scorer", "mine:number", *SCRIPTED], "'mine:number' is no scorer and no function, but int"),
        (["--scorer", "mine:scores_raise", *SCRIPTED], "'mine:scores_raise' raised RuntimeError: bad day"),
        (["--scorer", "mine:scores_words", *SCRIPTED], "must return numbers"),
        (["--scorer", "mine:scores_few", *SCRIPTED], "must return"),
        (["--scorer", "mine:NeedsArguments", *SCRIPTED], "'mine:NeedsArguments' raised TypeError"),
        (["--selector", "mine:selects_badly", *SCRIPTED], "the selector raised KeyError: 'x'"),
    ],
)
@pytest.mark.parametrize("from_file", [False, True])
def test_a_function_that_misbehaves_is_named(tmp_path, arguments, complaint, from_file, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(USER_CODE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("mine", "broken"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    prompt = "Write one line about foxes"
    prompt += " now" if "tiny" in str(arguments) else ""
    write_rows(tmp_path / "in.jsonl", [{"prompt": prompt}])
    code = main(["run", "in.jsonl" if from_file else prompt, "-n", "4", *arguments])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured.err
    assert complaint in captured.err
    assert "Traceback" not in captured.err


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "hi", "-n", "0", *SCRIPTED, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("BON_DEBUG", "1")
    assert main(["run", "hi", "-n", "0", *SCRIPTED]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_that_nobody_expected_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(
        "from bon.engines.scripted import ScriptedEngine\n"
        "class Odd(ScriptedEngine):\n    concurrent = property(lambda self: {}['x'], lambda self, value: None)\n"
        "policy = Odd()\n"
    )
    code = main(["run", "hi", "--policy", "odd:policy", "--scorer", "flip:scripted"])
    captured = capsys.readouterr()
    assert (code, captured.out) == (1, "")
    assert captured.err == "bon: error: KeyError: 'x' (--debug shows where)\n"


def test_refusals_leave_nothing_on_standard_output_of_a_real_process(tmp_path):
    code, out, err = in_process_of_its_own("run", "hi", "--json", "--policy", "m,engine=nope", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert json.dumps(err)
