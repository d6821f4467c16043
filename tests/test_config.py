<<<<<<< HEAD
"""Settings: a file, the options over it, and the file that --print-config makes of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import rows_of, write_rows

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


@pytest.mark.parametrize("command", ["run", "rerank", "serve", "bench"])
def test_print_config_loads_no_model_and_needs_no_input(run: Any, command: str) -> None:
    model = "/no/such/model"
    policy = [] if command == "rerank" else [model] if command == "serve" else ["--policy", model]
    code, out, err = run(*command.split(), *policy, "--scorer", f"likelihood:{model}", "--print-config")
    assert (code, err) == (0, "")
    assert f'scorer = "likelihood:{model}"' in out
    assert command == "rerank" or f'policy = "{model}"' in out


def test_bon_toml_in_the_current_folder_is_read_and_said_and_options_win(run: Any, tmp_path: Path) -> None:
    (tmp_path / "bon.toml").write_text('policy = "scripted"\nn = 3\nselector = "top-k:2"\n[sampling]\nseed = 1\n')
    code, out, err = run("run", "Say it", "--json")
    assert (code, err) == (0, "bon: settings come from bon.toml in this folder.\n")
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
=======
"""Configuration as data: from a file, from a BestOfN, and back; what cannot be is refused before a model is loaded."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bon import BestOfN, Fixed, Flip, Softmax, StopAt, TopK
from bon.config import Config
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError, UnknownNameError
from bon.models import Model

plain = st.fixed_dictionaries(
    {},
    optional={
        "policy": st.sampled_from(
            [None, "mini", "qwen:latest", "Qwen/Qwen3-4B,max_model_len=8192", "http://h/v1,model=x"]
        ),
        "scorer": st.sampled_from([None, "flip", "flip:style=json,samples=2", 'flip:"http://h/v1,model=x",samples=2']),
        "n": st.integers(1, 99) | st.sampled_from(["stop-at:0.9,most=16", "fixed:3"]),
        "selector": st.sampled_from(["best", "top-k:3", 'vote:"answer=(\\\\d+), b=1"', "softmax:0.5,seed=2"]),
        "min_reward": st.none() | st.floats(-10, 10),
        "prune": st.booleans(),
        "schedule": st.sampled_from([None, "each", "ready", "all"]),
        "threads": st.none() | st.integers(1, 9),
        "sampling": st.fixed_dictionaries(
            {},
            optional={
                "temperature": st.floats(0, 2),
                "seed": st.integers(0, 2**62),
                "stop": st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=2),
                "extra": st.just({"repetition_penalty": 1.1, "bad words": ["a", "ü\n"]}),
            },
        ),
    },
)


@given(plain)
@settings(deadline=None)
def test_settings_are_read_back_from_a_mapping_and_from_a_file(tmp_path_factory, values):
    config = Config.of(values)
    assert Config.of(config.to_dict()) == config
    path = tmp_path_factory.mktemp("config") / "bon.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert Config.read(path).to_toml() == config.to_toml()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scorer": "flip:scripted,samples=2", "n": 5},
        {"scorer": Flip("scripted", style="json"), "n": "stop-at:0.5,most=3"},
        {"scorer": Flip("scripted", sampling={"max_tokens": 9}), "n": StopAt(1.0, 3), "selector": TopK(2)},
        {"selector": Softmax(0.5, 3), "min_reward": 0.25, "prune": False, "schedule": "all", "n": Fixed(2)},
        {"selector": "softmax:0.5", "sampling": {"seed": 7, "stop": ["a", "b"], "temperature": 0.5}},
        {"policy": Model.of("scripted", max_model_len=64), "threads": 2},
    ],
)
def test_a_best_of_n_is_made_again_from_its_configuration(options):
    made = BestOfN(**{"policy": "scripted", "n": 2, **options})
    config = Config.from_bon(made)
    again = Config.of(config.to_dict()).build()
    assert Config.from_bon(again) == config
    for part in ("budget", "selector", "sampling", "prune", "schedule", "min_reward", "threads"):
        assert getattr(again, part) == getattr(made, part)
    assert (again.policy.name, again.policy.max_model_len) == (made.policy.name, made.policy.max_model_len)
    assert again.scorer.name == made.scorer.name
    assert again("Say something").text == made("Say something").text


def test_a_copy_with_other_settings_has_a_configuration_too():
    """Its policy and scorer had become objects by then, and had no text."""
    made = BestOfN("scripted", "flip:samples=2", n=2, threads=1).replace(n=5, sampling={"seed": 1})
    assert Config.from_bon(made) == Config("scripted", "flip:samples=2", 5, threads=1, sampling={"seed": 1})


def test_folders_are_paths(tmp_path):
    made = BestOfN("scripted", n=1)
    made.given = (tmp_path / "policy", tmp_path / "scorer")
    config = Config.from_bon(made)
    assert (config.policy, config.scorer) == (str(tmp_path / "policy"), str(tmp_path / "scorer"))


@pytest.mark.parametrize(
    "options",
    [
        {"policy": ScriptedEngine()},
        {"policy": lambda prompt: "x"},
        {"scorer": lambda prompt, responses: [0.5]},
        {"scorer": Flip(ScriptedEngine())},
        {"selector": lambda rewards, order, texts: None},
    ],
)
def test_an_object_of_ones_own_is_refused_by_name(options):
    made = BestOfN(**{"policy": "scripted", "scorer": "flip:scripted", "n": 1, **options})
    with pytest.raises(InputError, match=r"has no spec|cannot be written as text"):
        Config.from_bon(made)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"polcy": "mini"}, "Did you mean 'policy'"),
        ({"policy": 3}, "policy must be text, got 3"),
        ({"policy": "mini,engine=tortch"}, "Did you mean 'torch'"),
        ({"scorer": "flipp"}, "Did you mean 'flip'"),
        ({"scorer": "flip:mini,stile=json"}, "Did you mean 'style'"),
        ({"n": 0}, "n must be"),
        ({"n": "stop-at"}, "stop-at:REWARD"),
        ({"selector": "bets"}, "Did you mean 'best'"),
        ({"min_reward": "high"}, "min_reward must be a number"),
        ({"prune": "yes"}, "prune must be true or false"),
        ({"schedule": "eech"}, "Did you mean 'each'"),
        ({"threads": 0}, "threads must be"),
        ({"sampling": "hot"}, "sampling must be a table"),
        ({"sampling": {"temprature": 1}}, "Did you mean 'temperature'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_a_model_is_loaded(tmp_path, values, complaint):
    with pytest.raises(InputError, match=complaint):
        Config.of(values)
    lines = [f"{name} = {value!r}".replace("True", "true") for name, value in values.items() if name != "sampling"]
    if lines:
        (tmp_path / "bon.toml").write_text("\n".join(lines))
        with pytest.raises(InputError, match=rf"bon\.toml: .*{complaint}"):
            Config.read(tmp_path / "bon.toml")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the configuration .*nowhere\.toml"):
        Config.read(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_text("policy = ")
    with pytest.raises(InputError, match=r"bad\.toml is not TOML"):
        Config.read(tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"policy = '\xff'")
    with pytest.raises(InputError, match=r"bytes\.toml is not TOML"):
        Config.read(tmp_path / "bytes.toml")


def test_changes_are_checked_and_sampling_options_are_added():
    config = Config(sampling={"temperature": 0.5}, n=4)
    changed = config.changed(n=8, sampling={"seed": 3})
    assert (changed.n, changed.sampling) == (8, {"temperature": 0.5, "seed": 3})
    assert config.sampling == {"temperature": 0.5}
    with pytest.raises(UnknownNameError, match="Did you mean 'temperature'"):
        config.changed(sampling={"temprature": 1})
>>>>>>> w-core
