"""Which engine runs a model, and how two models share a machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny import save

from bon import BackwardLikelihood, BestOfN, Flip
from bon.cli.build import Options, build
from bon.engines import base
from bon.engines.base import choose_engine
from bon.engines.placement import LEAST_TOKENS, SHARE, WORKSPACE, Need, load_together, need_of, place, weight_bytes
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError, ModelNotFoundError
from bon.mini import WEIGHTS

GIB = 1 << 30
POLICY = Need("a policy of 4B", 8 * GIB, 147_456)
SCORER = Need("a scorer of 0.6B", int(1.2 * GIB), 114_688)


def test_as_many_gpus_as_models_are_one_each() -> None:
    assert place([POLICY, SCORER], [24 * GIB, 24 * GIB]) == [{"device_ids": [0]}, {"device_ids": [1]}]


@pytest.mark.parametrize("memory", [24, 40, 80, 141])
def test_on_one_gpu_both_hold_the_same_number_of_tokens_within_the_share(memory: int) -> None:
    policy, scorer = place([POLICY, SCORER], [memory * GIB])
    assert policy["gpu_memory_utilization"] + scorer["gpu_memory_utilization"] <= SHARE
    tokens = [o["kv_cache_memory_bytes"] // n.per_token for o, n in ((policy, POLICY), (scorer, SCORER))]
    assert tokens[0] == tokens[1] >= LEAST_TOKENS
    for options, need in ((policy, POLICY), (scorer, SCORER)):
        taken = need.weights + WORKSPACE + options["kv_cache_memory_bytes"]
        assert options["gpu_memory_utilization"] * memory * GIB == pytest.approx(taken, rel=0.01)


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match=r"14\.4 GiB of its 16\.0 GiB .* a policy of 4B 8\.0 GiB, .* 0\.6B 1\.2 GiB"):
        place([POLICY, SCORER], [16 * GIB])


def test_the_size_of_a_model_is_that_of_its_weight_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    assert weight_bytes(str(folder)) == (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(("dtype", "size"), [(None, 2), ("bfloat16", 2), ("float32", 4)])
def test_what_a_model_takes_depends_on_what_its_numbers_are_held_in(
    tmp_path: Path, dtype: str | None, size: int
) -> None:
    folder = save(tmp_path / "model")  # stored in float32
    need = need_of(str(folder), dtype)
    assert need.per_token == 2 * 3 * 2 * 16 * size
    assert need.weights == (folder / "model.safetensors").stat().st_size * size // 4


@pytest.mark.parametrize("missing", ["no/such-model", "/no/such/folder"])
def test_a_model_whose_size_cannot_be_looked_up_is_not_found(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On one GPU sizes are looked up before anything is loaded, where a wrong name used to end in a traceback."""
    monkeypatch.setattr("bon.engines.placement.visible_gpus", lambda: [80 * GIB])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match=f"{missing}.*({missing}|Check the path)"):
        load_together([(save(tmp_path / "model"), {}), (missing, {})])


def test_models_that_load_together_come_in_order_with_their_own_options(tmp_path: Path) -> None:
    first, second = save(tmp_path / "first"), save(tmp_path / "second", "Qwen3")
    engines = load_together([(first, {"max_model_len": 64}), (second, {"max_model_len": 128})], engine="torch")
    assert [e.max_model_len for e in engines] == [64, 128]
    with pytest.raises(ModelNotFoundError, match="no model folder"):
        load_together([(first, {}), (tmp_path / "missing", {})], engine="torch")


@pytest.mark.parametrize(
    "build",
    [
        lambda policy, flip: BestOfN(policy, flip),
        lambda policy, flip: BestOfN(policy, Flip(flip, prompt="json")),
        lambda policy, flip: BestOfN(policy, BackwardLikelihood(flip)),
        lambda policy, flip: build(Options(policy=policy, flip=flip)).bon,
    ],
    ids=["names", "flip", "likelihood", "command line"],
)
def test_two_models_that_vllm_runs_are_placed_together_however_they_are_named(
    build: Callable[[str, str], BestOfN], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded one after the other, the first took the GPU and the second did not fit."""
    asked = []

    def load(models: Sequence[tuple[Any, Any]]) -> list[ScriptedEngine]:
        asked.append([model for model, _ in models])
        return [ScriptedEngine(name=str(model)) for model, _ in models]

    monkeypatch.setattr("bon.resolve.choose_engine", lambda model: "vllm")
    monkeypatch.setattr("bon.resolve.load_together", load)
    bon = build("big/policy", "small/scorer")
    assert asked == [["big/policy", "small/scorer"]]
    assert (bon.policy.name, bon.scorer.engine.name) == ("big/policy", "small/scorer")  # type: ignore[attr-defined]


def test_a_scorer_that_names_the_policys_model_runs_on_the_policys_engine(tmp_path: Path) -> None:
    folder = str(save(tmp_path / "model"))
    with BestOfN(folder, Flip(folder)) as bon:
        assert bon.scorer.engine is bon.policy  # type: ignore[attr-defined]


def test_urls_go_over_http_and_the_mini_model_to_torch() -> None:
    assert choose_engine("http://127.0.0.1:8000/v1") == "openai"
    assert choose_engine(None) == "torch"


@pytest.mark.parametrize(
    ("installed", "gpu", "name", "reason"),
    [
        (True, True, "vllm", "there is a CUDA GPU; engine='torch' avoids it"),
        (True, False, "torch", "there is no CUDA GPU; engine='vllm' takes its CPU build"),
        (False, True, "torch", "vLLM is not installed"),
    ],
)
def test_vllm_where_it_can_use_a_gpu_and_said_once(
    installed: bool,
    gpu: bool,
    name: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(base, "find_spec", lambda module: object() if installed else None)
    monkeypatch.setattr(base, "_has_cuda", lambda: gpu)
    base._local_engine.cache_clear()
    with caplog.at_level(logging.INFO, "bon"):
        assert {choose_engine(WEIGHTS), choose_engine("Qwen/Qwen3-0.6B")} == {name}
    base._local_engine.cache_clear()
    [message] = [record.getMessage() for record in caplog.records if record.name == "bon"]
    assert message.startswith(f"models run on {name}: ")
    assert reason in message
