"""What people see: the ranked table, JSON, help, and what stays off the terminal."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from command import ROOT, in_process_of_its_own, write_rows

import bon
from bon.cli import main
from bon.cli.doctor import EXTRAS, explain
from bon.config import Config
from bon.mini import WEIGHTS
from bon.mini.tasks import FAMILIES, knows, sample_instructions
from bon.spec import BUDGETS, DATASETS, ENGINES, SCORERS, SELECTORS
from bon.types import Sampling

PROMPT = "Write a short line about the quiet old harbour at night"
SCRIPTED = ("--policy", "scripted")
needs_weights = pytest.mark.skipif(not (WEIGHTS / "config.json").exists(), reason="the embedded weights are not there")


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def answering(tmp_path, *texts):
    """A module whose ``model`` answers with these texts and infers from each what it says."""
    (tmp_path / "answers.py").write_text(
        "from bon import Flip\nfrom bon.engines.scripted import ScriptedEngine\n"
        f"model = ScriptedEngine({list(texts)!r})\n"
        "reader = Flip(ScriptedEngine(lambda text, draw: text.rpartition('Response:\\n')[2]))\n"
    )
    return ("--policy", "answers:model", "--scorer", "answers:reader", "-n", len(texts))


@pytest.fixture(autouse=True)
def _fresh_modules(monkeypatch):
    monkeypatch.delitem(sys.modules, "answers", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the folder of each test is added to it


# --- The table -------------------------------------------------------------------------------------------------------


def test_the_winner_comes_first_and_then_all_candidates_by_reward(run):
    code, out, err = run("run", PROMPT, "-n", 8, *SCRIPTED, "--scorer", "flip", "--no-prune")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert re.fullmatch(r"Best of 8: candidate \d, reward 1\.000", lines[0])
    assert lines[2] == PROMPT
    rewards = [float(m[1]) for line in lines if (m := re.match(r"\s*\*?\d+\s+(\d\.\d{3})\s", line))]
    assert len(rewards) == 6, "copies share a row"
    assert rewards == sorted(rewards, reverse=True)
    assert "-> Write" in out
    assert re.search(r"\n +3 the same, echo, 12 tokens, 12 of the scorer, \d\.\d\d s\s", out)
    assert "sampling" in lines[-4]
    assert "tokens: policy 11 in" in lines[-3]
    assert lines[-1].startswith("warning: of 8 candidates the scorer repeated 8")


@pytest.mark.parametrize("columns", ["80", "60", "200"])
def test_no_line_of_the_table_is_wider_than_the_terminal(run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = run("run", PROMPT, "-n", 8, *SCRIPTED)
    assert max(map(len, out.splitlines()[3:-4])) <= int(columns)


def test_a_pipe_gets_neither_colours_nor_boxes(tmp_path):
    code, out, err = in_process_of_its_own("run", PROMPT, "-n", 8, *SCRIPTED, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out.isascii()
    assert "\x1b" not in out


def test_the_winner_is_printed_in_full_however_long_it_is(run, tmp_path):
    text = " ".join(f"word{i}" for i in range(400)) + "\n\n  - indented [bold]not markup[/bold] :smile:"
    _, out, _ = run("run", "Say", *answering(tmp_path, text))
    assert text in out


def test_candidates_cannot_reach_the_terminal_with_control_characters(run, tmp_path):
    texts = [
        "\x1b[2J\x1b]0;owned\x07red\x9b31m",
        "a\u202eb\u2066c",
        "bell\x07\x08\x7f",
        "[red]markup[/red]",
    ]
    for text in texts:
        sys.modules.pop("answers", None)
        code, out, err = run("run", "Say it", *answering(tmp_path, text))
        assert code == 0, err
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", out)
    assert "[red]markup[/red]" in out


def test_half_a_character_from_a_function_is_shown_as_its_code(run, tmp_path):
    (tmp_path / "halves.py").write_text(
        "def policy(prompt): return 'half \\ud83d done'\ndef scorer(prompt, responses): return [1.0] * len(responses)\n"
    )
    arguments = ("run", "Say it", "-n", 1, "--policy", "halves:policy", "--scorer", "halves:scorer")
    assert r"half \ud83d done" in run(*arguments)[1]
    assert json.loads(run(*arguments, "--json")[1])["text"] == "half \ud83d done"


def test_candidates_without_a_reward_say_why(run, tmp_path):
    _, out, _ = run("run", "Say it", *answering(tmp_path, "", "Say it", "Say it"))
    assert "(no text)" in out
    assert re.search(r"\s0\s+-\s+\(no text\)\s+empty, ", out)
    assert "2 the same" in out


def test_what_was_saved_is_said_for_a_prompt_and_for_a_file(run, tmp_path):
    said = "1 scored as copies, which saved about 50% of the scorer's decoding (an estimate)"
    options = answering(tmp_path, "Say it", "Say it")
    assert f"candidates: {said}" in run("run", "Say it", *options)[1].splitlines()[-2]
    assert json.loads(run("run", "Say it", *options, "--json")[1])["saved"]["share"] == 0.5
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Say it"}])
    assert said in run("run", "in.jsonl", "-o", "out.jsonl", *options)[2]


def test_a_result_below_the_minimum_says_that_there_is_no_winner(run):
    code, out, _ = run("run", PROMPT, "-n", 2, *SCRIPTED, "--min-reward", 1.5)
    assert code == 0
    assert out.startswith("No winner among 2: ")


def in_a_terminal(*arguments, cwd, env=None):
    """Run bon on a pseudo-terminal of 80 columns; return what it printed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "80", **(env or {})}
    running = subprocess.Popen(
        [sys.executable, "-m", "bon", *map(str, arguments)], stdout=slave, stderr=slave, cwd=cwd, env=environment
    )
    os.close(slave)
    output = b""
    while True:
        try:
            block = os.read(master, 1 << 16)
        except OSError:  # Linux: the other side is closed
            break
        if not block:
            break
        output += block
    os.close(master)
    assert running.wait() == 0
    return output.decode()


def test_matched_words_are_highlighted_on_a_terminal(tmp_path):
    env = {"NO_COLOR": ""}
    out = in_a_terminal("run", "Say it loud", *answering(tmp_path, "Say it softly"), cwd=tmp_path, env=env)
    assert "\x1b[1;32mSay\x1b[0m" in out
    assert "softly" in out
    assert "32msoftly" not in out


def test_without_colour_matched_words_are_bold(tmp_path):
    out = in_a_terminal(
        "run", "Say it loud", *answering(tmp_path, "Say it softly"), cwd=tmp_path, env={"NO_COLOR": "1"}
    )
    assert "\x1b[1mSay\x1b[0m" in out
    assert "\x1b[1;32m" not in out


def test_a_file_run_shows_progress_on_a_terminal_only(tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"prompt": f"Say {i}"} for i in range(5)])
    out = in_a_terminal("run", "in.jsonl", "-o", "out.jsonl", *SCRIPTED, cwd=tmp_path)
    assert "5/5" in out
    code, _, err = in_process_of_its_own("run", "in.jsonl", "-o", "out2.jsonl", *SCRIPTED, cwd=tmp_path)
    assert code == 0
    assert len(err.splitlines()) == 1
    assert err.startswith("bon: 5 rows done")


def test_rerank_shows_each_rows_ranking_on_a_terminal_and_writes_it_elsewhere(tmp_path):
    """It printed the winner, and nowhere how the others ranked."""
    candidates = ["A cat.", "A long text about it.", "A dog, say."]
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Say it", "candidates": candidates}])
    (tmp_path / "own.py").write_text("def longest(prompt, responses): return [(len(r), 'length') for r in responses]\n")
    arguments = ("rerank", "in.jsonl", "--scorer", "own:longest")
    out = in_a_terminal(*arguments, cwd=tmp_path, env={"NO_COLOR": "1"})
    assert "in.jsonl:1: Say it" in out
    assert out.index("*1") < out.index("\n 2") < out.index("\n 0")
    assert "{" not in out
    _, out, _ = in_process_of_its_own(*arguments, cwd=tmp_path)
    row = json.loads(out)
    assert (row["ranking"], row["rewards"], row["best"]) == ([1, 2, 0], [6.0, 21.0, 11.0], 1)


SLOW = ("--policy", "scripted,step_seconds=0.05", "-n", 2)


def test_one_prompt_on_a_terminal_says_what_goes_on_and_leaves_nothing_behind(tmp_path):
    """There was nothing to see for 4 min 42 s."""
    out = in_a_terminal("run", PROMPT, *SLOW, cwd=tmp_path)
    assert "bon: loading scripted,step_seconds=0.05" in out
    assert re.search(r"0:0\d  \d of 2 sampled, \d scored, \d+ tokens", out)
    assert out.rindex("sampled") < out.index("Best of 2")
    assert not re.search(r"\d: Write a", out)


def test_stream_shows_candidates_while_they_are_written(tmp_path):
    out = in_a_terminal("run", PROMPT, *SLOW, "--stream", cwd=tmp_path)
    shown = re.findall(r"0: ([^\x1b]*)\x1b", out[: out.index("Best of 2")])
    assert len({*shown}) > 1
    assert all(PROMPT.startswith(text) for text in shown)


def test_stream_is_refused_where_it_would_show_nothing(run, tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Say it"}])
    for prompt, said in (("Say it", "standard error is none"), ("in.jsonl", "--stream is for a single prompt")):
        code, _, err = run("run", prompt, "--stream", *SCRIPTED)
        assert (code, said in err) == (2, True)


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(tmp_path):
    code, out, err = in_process_of_its_own(
        "run", PROMPT, "-n", 8, "--json", *SCRIPTED, "--scorer", "flip", cwd=tmp_path
    )
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    result = json.loads(out)
    assert {"id", "text", "reward", "best", "candidates", "scores", "timing", "usage"} <= result.keys()
    assert len(result["candidates"]) == len(result["scores"]) == 8
    assert {"reward", "status", "inferred"} <= result["scores"][0].keys()
    assert result["text"] == result["candidates"][result["best"]]["text"]


def test_json_holds_no_character_that_a_terminal_obeys(run, tmp_path):
    text = "a\x9b31m b\u202ec\u2066\x7f\u200f"
    _, out, _ = run("run", "Say", *answering(tmp_path, text), "--json")
    assert json.loads(out)["text"] == text
    assert out.strip().isprintable()


def test_json_is_utf8_whatever_the_terminal_speaks(tmp_path):
    arguments = answering(tmp_path, "Grüße 🦊")
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    code, out, _ = in_process_of_its_own("run", "Say", *arguments, "--json", cwd=tmp_path, env=env)
    assert code == 0
    assert json.loads(out)["text"] == "Grüße 🦊"
    code, out, _ = in_process_of_its_own("run", "Say", *arguments, cwd=tmp_path, env=env)
    assert code == 0
    assert r"Gr\xfc\xdfe \U0001f98a" in out


def test_the_same_seed_gives_the_same_result(run):
    first, second = (json.loads(run("run", PROMPT, "--json", "--seed", 5, *SCRIPTED)[1]) for _ in range(2))
    assert [c["text"] for c in first["candidates"]] == [c["text"] for c in second["candidates"]]
    assert first["id"] == second["id"]


# --- Options reach the library ---------------------------------------------------------------------------------------


def test_options_mean_what_the_library_means(run):
    def result(*options):
        return json.loads(run("run", PROMPT, "--json", "--no-prune", *SCRIPTED, *options)[1])

    assert len(result("-n", 3)["candidates"]) == 3
    assert len(result()["candidates"]) == 8
    assert len({c["text"] for c in result("--temperature", 0)["candidates"]}) == 1
    assert {c["finish_reason"] for c in result("--max-tokens", 2)["candidates"]} == {"length"}
    assert "short" not in result("--stop", " short")["candidates"][0]["text"]
    assert len(result("--selector", "top-k:3")["picked"]) == 3
    assert result("--scorer", "likelihood")["reward"] < 0
    assert len(result("--scorer", "flip:scripted,samples=2")["scores"][0]["samples"]) == 2
    assert result("--instruction", "a short line")["instruction"] == "a short line"
    assert (
        result("--selector", "softmax:0.5", "--seed", 1)["best"]
        == result("--selector", "softmax:0.5", "--seed", 1)["best"]
    )
    assert result("--selector", "vote:(old harbour)")["best"] is not None


def test_scorers_of_the_users_own_are_taken_from_a_module(run, tmp_path):
    (tmp_path / "own_scorer.py").write_text(
        "from bon import RewardFunction\n"
        "def length(prompt, responses): return [len(r) for r in responses]\n"
        "ready = RewardFunction(length)\n"
        "class Made(RewardFunction):\n    def __init__(self): super().__init__(length)\n"
    )
    for name in ("length", "ready", "Made"):
        code, out, err = run("run", PROMPT, "--json", *SCRIPTED, "--scorer", f"own_scorer:{name}")
        assert code == 0, err
        assert json.loads(out)["reward"] == len(json.loads(out)["text"])


# --- The other commands ----------------------------------------------------------------------------------------------


def test_tasks_prints_one_instruction_of_each_kind(run):
    code, out, _ = run("tasks")
    assert code == 0
    assert len(out.splitlines()) == len(set(out.splitlines())) == len(FAMILIES)
    assert all(knows(line) for line in out.splitlines())


def test_tasks_makes_an_input_file_for_run(run, tmp_path):
    code, out, _ = run("tasks", "--count", 40, "--seed", 3, "--jsonl")
    assert code == 0
    (tmp_path / "in.jsonl").write_text(out)
    assert run("run", "in.jsonl", "-n", 1, "-o", "out.jsonl", *SCRIPTED)[0] == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 40
    assert run("tasks", "--count", 40, "--seed", 3, "--jsonl")[1] == out


def test_doctor_says_what_is_here_and_what_to_type_for_the_rest(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert f"bon           {bon.__version__}" in out
    assert re.search(r"torch +A language model in this process", out)
    for package, extra in EXTRAS.items():
        [line] = re.findall(rf"^  {package} +(.*)$", out, re.MULTILINE)
        assert line == f"not installed: pip install 'bon[{extra}]'" or re.fullmatch(r"[\d.]+\w*", line)
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == 0
    for registry in (ENGINES, SCORERS, SELECTORS, BUDGETS, DATASETS):
        listed = report[f"{registry.kind}s"]
        assert [each["name"] for each in listed] == list(registry)
        assert all(each["detail"] for each in listed)
    assert {each["name"]: each["detail"] for each in report["selectors"]}["best"] == "Pick the first of the ranking."
    assert report["versions"]["torch"]
    assert [choice["for"] for choice in report["chosen"]][-1] == "a URL"


@pytest.mark.parametrize(
    ("models", "vllm", "gpus", "said"),
    [
        ("torch", False, 0, r"no CUDA GPUs, and vLLM cannot run .* on the CPU: MODEL,engine=vllm"),
        ("torch", True, 0, r"no CUDA GPUs\. vLLM runs them on the CPU: MODEL,engine=vllm"),
        ("torch", False, 1, r"1 CUDA GPU, and vLLM is not installed.* type: pip install 'bon\[vllm\]'"),
        ("vllm", True, 2, r"vLLM is installed, and torch sees 2 CUDA GPUs\. Without it: MODEL,engine=torch"),
        ("vllm", False, 1, r"cannot run \(see above\)\. Until it can: MODEL,engine=torch"),
    ],
)
def test_doctor_explains_which_engine_runs_models_and_how_to_change_that(models, vllm, gpus, said):
    assert re.search(said, explain(models, vllm, gpus))


def test_version_and_help_exit_with_0(run):
    assert run("--version") == (0, f"bon {bon.__version__}\n", "")
    for arguments in (
        [],
        ["--help"],
        ["run", "--help"],
        ["rerank", "--help"],
        ["eval", "--help"],
        ["serve", "--help"],
        ["bench", "--help"],
    ):
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        assert "Usage: bon" in out


def test_help_shows_the_defaults_that_cost_time(run):
    """Nobody saw that a candidate may have 1,024 tokens, which took a model of 135M parameters five minutes."""
    out = " ".join(run("run", "--help")[1].replace("│", " ").split())
    assert f"{Sampling().max_tokens} by default" in out
    assert f"{Config().n} by default" in out


def test_a_long_spelling_of_a_short_option_is_understood_as_that(run):
    """`--n 3` was answered with: did you mean '--json'?"""
    code, _, err = run("run", "Say", "--n", 3)
    assert (code, "Did you mean '-n'?" in err) == (2, True)


def test_help_states_the_exit_code_of_ctrl_c(run):
    assert "130" in run("run", "--help")[1]


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["tasks"]])
def test_commands_that_need_no_model_load_no_model_library(arguments):
    code = (
        "import sys; from bon.cli import main\n"
        f"main({arguments!r})\n"
        "sys.stderr.write(' '.join(m for m in ('torch', 'transformers', 'vllm', 'aiohttp') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_eval_measures_any_scorer_on_a_dataset_by_its_name(run):
    options = (
        "--policy",
        "scripted",
        "--scorer",
        "flip:samples=2",
        "--scorer",
        "flip",
        "-n",
        2,
        "--limit",
        3,
        "--seed",
        1,
    )
    code, out, err = run("eval", "mini", *options, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["rows"], report["parts"]["unseen_wordings"]["rows"]) == (3, 3)
    assert {"flip:samples=2", "flip", "random", "oracle"} <= report["scorers"].keys()
    code, out, _ = run("eval", "mini", *options)
    assert code == 0
    assert "greedy" in out
    assert max(map(len, out.splitlines())) <= 80


GIVEN = """
from bon.evals.dataset import Dataset, Example
from bon.task import Task

class Colours(Dataset):
    name = "colours"

    def rows(self, limit=None, seed=0):
        for i in range(limit or 4):
            texts = ["red", "blue, a colour of the sky", "it is number " + str(i)]
            yield Example(Task.of("Name colour " + str(i)), candidates=texts, labels=[1, 1, 0])

def short(prompt, responses):
    return [-len(response) for response in responses]
"""


def test_eval_measures_given_candidates_and_keeps_their_scores(run, tmp_path):
    (tmp_path / "coloured.py").write_text(GIVEN)
    options = ("coloured:Colours", "--scorer", "coloured:short", "--scorer", "flip:scripted", "--limit", 3)
    code, out, err = run("eval", *options, "--max-words", 5, "--store", "scores.db", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["dataset"], report["rows"], report["policy"], report["n"]) == ("colours", 3, None, 2)
    assert report["scorers"]["coloured:short"]["score"] == 1
    assert (tmp_path / "scores.db").exists()
    code, out, err = run("eval", *options, "--report", "page.html", "--plots", "plots")
    assert (code, err) == (0, "")
    assert "coloured:short" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert list((tmp_path / "plots").glob("*.png"))


# --- The embedded model ----------------------------------------------------------------------------------------------


@needs_weights
def test_the_embedded_model_answers_what_it_knows(tmp_path):
    prompt = "Write a reminder for Anna to water the plants on Monday."
    code, out, err = in_process_of_its_own("run", prompt, "-n", 8, "--seed", 1, "--json", cwd=tmp_path)
    result = json.loads(out)
    assert code == 0
    assert err == "", "the libraries keep quiet, and the prompt is known"
    assert len(result["candidates"]) == 8
    assert result["reward"] > 0.8


@needs_weights
def test_a_prompt_that_the_embedded_model_does_not_know_gets_a_plain_warning(run):
    code, out, err = run("run", "Explain physics", "-n", 2, "--max-tokens", 9, "--scorer", "likelihood")
    lines = err.splitlines()
    assert code == 0
    assert out.startswith("Best of 2")
    assert "the embedded model knows a small world of writing tasks only" in lines[0]
    assert all(knows(line.partition("for example: ")[2]) for line in lines[1:3])
    assert "--policy" in lines[3]


@needs_weights
def test_a_file_of_unknown_prompts_gets_one_line_of_warning(run, tmp_path):
    rows = [{"prompt": "Explain physics"}, {"prompt": sample_instructions(1)[0]}]
    write_rows(tmp_path / "in.jsonl", rows)
    code, out, err = run("run", "in.jsonl", "-n", 2, "--max-tokens", 9, "--scorer", "likelihood")
    assert code == 0
    assert len(out.splitlines()) == 2
    [warning] = [line for line in err.splitlines() if "embedded" in line]
    assert "1 of 2 prompts" in warning
    assert "--policy" in warning
    write_rows(tmp_path / "in.jsonl", [{**row, "candidates": ["It is physics."]} for row in rows])
    code, out, err = run("rerank", "in.jsonl")
    assert code == 0
    assert len(out.splitlines()) == 2
    assert "1 of 2 prompts are outside its world" in err
    assert "--scorer default:smollm2-135m" in err


@needs_weights
def test_a_prompt_longer_than_the_context_says_by_how_much(run, tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"prompt": "ferns " * 5000}])
    for arguments in (["ferns " * 5000], ["in.jsonl"]):
        code, out, err = run("run", *arguments, "-n", 2)
        assert (code, out) == (2, "")
        match = re.search(r"the prompt has (\d+) tokens, (\d+) more than the (\d+) that fit", err)
        assert int(match[1]) == int(match[2]) + int(match[3])
    assert "in.jsonl:1: the prompt has" in err


@needs_weights
def test_a_file_of_the_embedded_models_tasks_runs_and_can_be_reranked(run, tmp_path):
    (tmp_path / "in.jsonl").write_text(run("tasks", "--jsonl", "--count", 12)[1])
    code, _, err = run("run", "in.jsonl", "-n", 4, "--seed", 0, "-o", "out.jsonl", "--all")
    assert code == 0, err
    assert "12 rows done" in err
    code, out, _ = run("rerank", "out.jsonl", "--scorer", "likelihood")
    assert code == 0
    assert all(json.loads(line)["reward"] < 0 for line in out.splitlines())
