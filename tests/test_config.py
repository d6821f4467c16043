"""Configuration as data: from a file, from a BestOfN, and back; what cannot be is refused before a model is loaded."""

import pytest
from hypothesis import given
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
