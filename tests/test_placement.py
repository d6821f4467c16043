"""Which engine runs a model, and how several models share a machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import save

import bon
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
        load_together([(str(save(tmp_path / "model")), {}), (missing, {})], lambda *_: pytest.fail("nothing is loaded"))


def test_a_size_is_looked_up_where_the_model_will_be_loaded_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On one GPU a model of another revision, or with code of its own, was sized by the main branch or not at all."""
    from bon.engines import loading

    folder, asked = save(tmp_path / "model"), []
    config = loading.load_config(folder)

    def load_config(model: str, **options: Any) -> Any:
        asked.append((model, options))
        return config

    def cached(model: str, revision: str | None) -> Path:
        asked.append((model, revision))
        return Path(folder)

    monkeypatch.setattr("bon.engines.placement.visible_gpus", lambda: [80 * GIB])
    monkeypatch.setattr(loading, "load_config", load_config)
    monkeypatch.setattr(loading, "cached", cached)
    options = {"revision": "v2", "trust_remote_code": True, "max_model_len": 64}
    load_together([("some/model", options), ("other/model", {})], lambda name, _: ScriptedEngine(name=name))
    assert asked == [
        ("some/model", {"revision": "v2", "trust_remote_code": True}),
        ("some/model", "v2"),
        ("other/model", {"revision": None, "trust_remote_code": False}),
        ("other/model", None),
    ]


class Fake(ScriptedEngine):
    """Remembers how it was loaded and that it was closed."""

    made: list[Fake]

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        if name == "missing":
            raise ModelNotFoundError("there is no model folder at 'missing'.")
        super().__init__(name=name)
        self.options, self.closed = options, False
        Fake.made.append(self)

    async def aclose(self) -> None:
        await asyncio.sleep(0)
        self.closed = True


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    Fake.made = []
    return lambda memory: monkeypatch.setattr("bon.engines.placement.visible_gpus", lambda: memory)


def test_models_come_in_order_and_their_own_options_come_first(gpus: Callable[[list[int]], None]) -> None:
    gpus([])
    first, second = load_together([("a", {}), ("b", {"threads": 7})], Fake)
    assert (first.name, second.name) == ("a", "b")
    assert first.options["threads"] >= 1  # type: ignore[attr-defined]
    assert second.options == {"threads": 7}  # type: ignore[attr-defined]
    gpus([80 * GIB] * 2)
    load_together([("a", {"dtype": "float16"}), ("b", {})], Fake)
    assert sorted(e.options["device_ids"] for e in Fake.made[2:]) == [[0], [1]]
    load_together([("a", {"gpu_memory_utilization": 0.5}), ("b", {})], Fake)
    assert {e.name: e.options for e in Fake.made[4:]} == {"a": {"gpu_memory_utilization": 0.5}, "b": {}}


def test_where_one_cannot_be_loaded_those_that_could_are_closed(gpus: Callable[[list[int]], None]) -> None:
    gpus([])
    with pytest.raises(ModelNotFoundError, match="no model folder"):
        load_together([("a", {}), ("missing", {}), ("b", {})], Fake)
    assert sorted(e.name for e in Fake.made if e.closed) == ["a", "b"]


@pytest.mark.parametrize(
    "build",
    [
        lambda policy, scorer: bon.BestOfN(policy, scorer),
        lambda policy, scorer: bon.BestOfN(policy, bon.Flip(scorer, style="json")),
        lambda policy, scorer: bon.BestOfN(policy, bon.BackwardLikelihood(scorer)),
        lambda policy, scorer: bon.BestOfN(policy, f"likelihood:{scorer}"),
    ],
    ids=["names", "flip", "likelihood", "spec"],
)
def test_two_models_that_vllm_runs_are_placed_together_however_they_are_named(
    build: Callable[[str, str], bon.BestOfN], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded one after the other, the first took the GPU and the second did not fit."""
    asked = []

    def load(models: Any, make: Any) -> list[ScriptedEngine]:
        asked.append([model for model, _ in models])
        return [ScriptedEngine(name=model) for model, _ in models]

    monkeypatch.setattr("bon.models.choose_engine", lambda model: "vllm")
    monkeypatch.setattr("bon.engines.placement.load_together", load)
    made = build("big/policy", "small/scorer")
    assert asked == [["big/policy", "small/scorer"]]
    assert (made.policy.name, made.scorer.engine.name) == ("big/policy", "small/scorer")  # type: ignore[attr-defined]


def test_a_scorer_that_names_the_policys_model_runs_on_the_policys_engine(tmp_path: Path) -> None:
    folder = str(save(tmp_path / "model"))
    with bon.BestOfN(folder, bon.Flip(folder)) as made:
        assert made.scorer.engine is made.policy  # type: ignore[attr-defined]


def test_urls_go_over_http_and_the_mini_model_to_torch() -> None:
    from bon.models import MINI, choose_engine

    assert choose_engine("http://127.0.0.1:8000/v1") == "http"
    assert choose_engine(MINI) == "torch"


@pytest.mark.parametrize(
    ("installed", "gpu", "name", "reason"),
    [
        (True, True, "vllm", "there is a CUDA GPU; engine=torch avoids it"),
        (True, False, "torch", "there is no CUDA GPU; engine=vllm takes its CPU build"),
        (False, True, "torch", "vLLM is not installed"),
        (False, False, "torch", None),
    ],
)
def test_vllm_where_it_can_use_a_gpu_and_said_once(
    installed: bool,
    gpu: bool,
    name: str,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from bon import models

    monkeypatch.setattr(models, "find_spec", lambda module: object() if installed else None)
    monkeypatch.setattr(models, "_has_cuda", lambda: gpu)
    models._local_engine.cache_clear()
    with caplog.at_level(logging.INFO, "bon"):
        assert {models.choose_engine(str(WEIGHTS)), models.choose_engine("Qwen/Qwen3-0.6B")} == {name}
    models._local_engine.cache_clear()
    said = [record.getMessage() for record in caplog.records if record.name == "bon"]
    assert len(said) == (reason is not None), "without vLLM and without a GPU there was nothing to choose"
    assert all(message.startswith(f"models run on {name}: ") and str(reason) in message for message in said)
