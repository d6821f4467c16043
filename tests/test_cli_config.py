"""Settings: a file, the options over it, and the file that --print-config makes of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import in_process_of_its_own, rows_of, write_rows

from bon import BestOfN, Flip, StopAt
from bon.cli import main
from bon.cli.options import threads_for
from bon.config import Config
from bon.errors import InputError
from bon.models import ModelPool


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


OPTIONS = (
    "--policy",
    "Qwen/Qwen3-4B,dtype=bfloat16,max_model_len=8192",
    "--scorer",
    'flip:Qwen/Qwen3-0.6B,style=json,samples=4,sampling={"temperature": 0.5}',
    "-n",
    "stop-at:0.9,most=16",
    "--selector",
    'vote:answer is "(.+)"',
    "--min-reward",
    "0.25",
    "--no-prune",
    "--schedule",
    "ready",
    "--threads",
    "3",
    "--temperature",
    "0.7",
    "--max-tokens",
    "64",
    "--stop",
    "\n\n",
    "--stop",
    'é"\\',
    "--seed",
    "7",
)


def test_what_print_config_prints_is_what_config_reads(run: Any, tmp_path: Path) -> None:
    code, printed, err = run("run", "--print-config", *OPTIONS)
    assert (code, err) == (0, "")
    (tmp_path / "mine.toml").write_text(printed, encoding="utf-8")
    assert run("run", "--print-config", "--config", "mine.toml") == (0, printed, "")
    config = Config.read("mine.toml")
    assert config.policy == OPTIONS[1]
    assert (config.n, config.min_reward, config.prune, config.threads) == ("stop-at:0.9,most=16", 0.25, False, 3)
    assert config.sampling == {"temperature": 0.7, "max_tokens": 64, "stop": ["\n\n", 'é"\\'], "seed": 7}


def test_the_configuration_of_an_object_goes_through_a_file(tmp_path: Path) -> None:
    sampling = {"extra": {"repetition_penalty": 1.1, "stop_token_ids": [1, 2]}, "top_p": 0.9}
    bon = BestOfN("scripted", Flip("scripted", samples=2), n=StopAt(0.9, most=16), sampling=sampling, threads=2)
    config = Config.from_bon(bon)
    (tmp_path / "bon.toml").write_text(config.to_toml())
    assert Config.read(tmp_path / "bon.toml") == config
    assert Config.read(tmp_path / "bon.toml").build().sampling == bon.sampling


@pytest.mark.parametrize("command", ["run", "rerank", "serve", "serve --policy", "bench"])
def test_print_config_loads_no_model_and_needs_no_input(run: Any, tmp_path: Path, command: str) -> None:
    model = "/no/such/model"
    policy = [] if command == "rerank" else [model] if command.startswith("serve") else ["--policy", model]
    arguments = (*command.split(), *policy, "--scorer", f"likelihood:{model}", "--print-config")
    # The server takes over the log of its process.
    code, out, err = in_process_of_its_own(*arguments, cwd=tmp_path) if command.startswith("serve") else run(*arguments)
    assert (code, err) == (0, "")
    assert f'scorer = "likelihood:{model}"' in out
    assert command == "rerank" or f'policy = "{model}"' in out


def test_bon_toml_in_the_current_folder_is_read_and_said_and_options_win(run: Any, tmp_path: Path) -> None:
    (tmp_path / "bon.toml").write_text('policy = "scripted"\nn = 3\nselector = "top-k:2"\n[sampling]\nseed = 1\n')
    code, out, err = run("run", "Say it", "--json")
    assert (code, err) == (0, "bon: settings come from bon.toml in this folder\n")
    assert out.count('"finish_reason"') == 3
    assert run("run", "Say it", "--json", "-n", 5)[1].count('"finish_reason"') == 5
    (tmp_path / "other.toml").write_text('policy = "scripted"\nn = 1\n')
    code, out, err = run("run", "Say it", "--json", "--config", "other.toml")
    assert (err, out.count('"finish_reason"')) == ("", 1)
    printed = run("run", "--print-config", "--temperature", 0.5, "--selector", "best")[1]
    assert 'selector = "best"' in printed
    assert "[sampling]\nseed = 1\ntemperature = 0.5" in printed


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ('polcy = "x"', "unknown setting 'polcy'. Did you mean 'policy'?"),
        ("policy = 3", "policy must be text, got 3"),
        ('policy = "x,engine=trch"', "unknown engine 'trch'. Did you mean 'torch'?"),
        ('scorer = "likelyhood"', "unknown scorer 'likelyhood'. Did you mean 'likelihood'?"),
        ('scorer = "flip:style=jsn"', "unknown prompt style 'jsn'"),
        ('selector = "top-k"', "It is written top-k:K"),
        ("n = 0", "n must be a whole number of at least 1, got 0"),
        ('schedule = "eech"', "unknown schedule 'eech'"),
        ("threads = true", "threads must be a whole number"),
        ("[sampling]\nstop = 5", "stop must be one or several texts that are not empty, got (5,)"),
        ("[sampling]\ntemprature = 1", "'temprature'. Did you mean 'temperature'?"),
        ("n = ", "is not TOML"),
    ],
)
def test_a_bad_setting_is_refused_with_its_file(run: Any, tmp_path: Path, settings: str, complaint: str) -> None:
    (tmp_path / "bad.toml").write_text(settings)
    code, out, err = run("run", "--print-config", "--config", "bad.toml")
    assert (code, out) == (2, "")
    assert err.startswith("bon: error: bad.toml")
    assert complaint in err


def test_a_bad_spec_is_refused_by_print_config_too(run: Any) -> None:
    assert run("run", "--print-config", "--policy", "x,engine=trch")[0] == 2
    assert run("run", "--print-config", "--scorer", "flip:samples=0")[0] == 2


def test_a_setting_without_a_form_in_toml_is_named() -> None:
    with pytest.raises(InputError, match="has no form in TOML"):
        Config(sampling={"extra": {"stop_token_ids": None}}).to_toml()


def test_a_files_objects_are_imported_from_the_current_folder(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "own_parts.py").write_text(
        "import numpy as np\nfrom bon.types import Selection\n"
        "def policy(prompt, n): return [f'{prompt} {i}' for i in range(n)]\n"
        "def reward(prompt, responses): return [float(r[-1]) for r in responses]\n"
        "def worst(rewards, order, texts): return Selection(int(order[-1]), tuple(map(int, order)))\n"
    )
    parts = {"policy": "own_parts:policy", "scorer": "own_parts:reward", "selector": "own_parts:worst"}
    (tmp_path / "own.toml").write_text("".join(f'{name} = "{spec}"\n' for name, spec in parts.items()))
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Say"}])
    assert run("run", "in.jsonl", "--config", "own.toml", "-o", "out.jsonl")[0] == 0
    assert rows_of(tmp_path / "out.jsonl")[0]["text"] == "Say 0"


def test_the_embedded_model_has_one_thread_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads_for(Config()) is None, "the environment says it"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_for(Config()) == 1
    assert threads_for(Config(scorer="flip:samples=2")) == 1
    assert threads_for(Config(scorer="flip:Qwen/Qwen3-0.6B")) is None
    assert threads_for(Config(policy="Qwen/Qwen3-0.6B")) is None
    assert threads_for(Config(policy="Qwen/Qwen3-0.6B"), ranked=True) == 1, "no policy runs"
    assert threads_for(Config(threads=4)) == 4


def test_threads_are_those_of_every_engine_that_has_them_and_whose_spec_does_not_say() -> None:
    from bon.spec import ENGINES

    class Counted:
        name, concurrent = "counted", True

        def __init__(self, model: str, threads: int | None = None) -> None:
            self.threads = threads

    ENGINES._builtin["counted"] = type(ENGINES["torch"])(f"{__name__}:Counted")
    globals()["Counted"] = Counted
    try:
        pool = ModelPool(threads=3)
        assert pool.engine("a,engine=counted").threads == 3
        assert pool.engine("a,engine=counted,threads=1").threads == 1
        assert pool.engine("scripted").name == "scripted"
        assert ModelPool().engine("a,engine=counted").threads is None
    finally:
        del ENGINES._builtin["counted"]
