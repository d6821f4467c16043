"""Several adapters on one loaded base, and the base without any: one set of weights for policy and scorers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from scoring import scores_of
from tiny import save, save_adapter

from bon import BestOfN
from bon.engines.base import Generates, Prompt, Rates, Request
from bon.engines.torch.engine import TorchEngine
from bon.errors import BonError, EngineError, InputError, ModelNotFoundError
from bon.evals.harness import evaluate
from bon.evals.store import Store, stored
from bon.models import Model, ModelPool
from bon.scorers.likelihood import BackwardLikelihood
from bon.task import Message
from bon.types import Sampling

PROMPT = Prompt.of([Message("user", "Write a short reminder for Anna about the meeting on Friday")])
REQUEST = Request(PROMPT, Sampling(temperature=0.0, max_tokens=12))
RATED = ("Dear Anna, see you on Friday.", "No.")


@pytest.fixture
def base(tmp_path: Path) -> Any:
    return save(tmp_path / "base", "Llama", "ascii")


@pytest.fixture
def adapters(tmp_path: Path, base: Any) -> list[Path]:
    return [save_adapter(tmp_path / f"adapter{seed}", base, seed=seed) for seed in (1, 2)]


async def said(engine: Any) -> str:
    return "".join([completion.text async for completion in engine.generate([REQUEST])])


async def rated(engine: Any) -> list[float]:
    return [one.total for one in await engine.loglikelihood([PROMPT] * len(RATED), RATED)]


def everything(*engines: Any) -> list[tuple[str, list[float]]]:
    """What engines say and rate, all of them at the same time."""

    async def run() -> list[tuple[str, list[float]]]:
        async def one(engine: Any) -> tuple[str, list[float]]:
            return await said(engine), await rated(engine)

        return await asyncio.gather(*map(one, engines))

    return asyncio.run(run())


@pytest.mark.parametrize("share", [True, False])
def test_each_view_says_what_the_merged_model_says_and_the_base_what_it_said_before(
    base: Any, adapters: list[Path], share: bool
) -> None:
    engine = TorchEngine(base, share_prefix=share)
    [before] = everything(engine)
    views = [engine.adapted(folder) for folder in adapters]
    *found, after = everything(*views, engine)
    assert after == before, "to the last bit"
    merged = everything(*(TorchEngine(folder, share_prefix=share) for folder in adapters))
    for (text, totals), (own_text, own_totals) in zip(found, merged, strict=True):
        assert text == own_text
        assert totals == pytest.approx(own_totals, rel=1e-4)
    assert found[0] != found[1] != before


def test_layers_that_are_packed_take_an_adapter(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "Llama", "ascii", hidden_size=256, intermediate_size=2048)
    folder = save_adapter(tmp_path / "adapter", base)
    view = TorchEngine(base).adapted(folder)
    assert any(type(module).__name__ == "PackedLinear" for module in view._model.modules())
    [(_, totals)] = everything(view)
    [(_, merged)] = everything(TorchEngine(folder))
    assert totals == pytest.approx(merged, rel=1e-4)


def test_a_pool_loads_the_weights_once_for_policy_and_scorers(base: Any, adapters: list[Path]) -> None:
    with BestOfN(f"{base},engine=torch", f"flip:{base},engine=torch,adapter={adapters[0]}", n=2) as bon:
        result = bon("Hi there", sampling={"max_tokens": 5, "seed": 1})
    assert len(result.candidates) == 2
    pool = ModelPool()
    policy, flip = pool.both(f"{base},engine=torch", f"flip:{base},engine=torch,adapter={adapters[0]}")
    other = pool.scorer(f"likelihood:{base},engine=torch,adapter={adapters[1]}")
    assert isinstance(policy, TorchEngine)
    [mine], [second] = flip.engines, other.engines
    assert isinstance(mine, TorchEngine)
    assert isinstance(second, TorchEngine)
    assert mine._model is policy._model is second._model
    assert len({policy.name, mine.name, second.name}) == 3
    assert len({policy.fingerprint, mine.fingerprint, second.fingerprint}) == 3, "a head of one is none of another"
    asyncio.run(pool.aclose())


def test_a_view_that_is_closed_leaves_its_base(base: Any, adapters: list[Path]) -> None:
    engine = TorchEngine(base)
    view = engine.adapted(adapters[0])
    asyncio.run(view.aclose())
    with pytest.raises(EngineError, match="is closed"):
        asyncio.run(said(view))
    assert asyncio.run(said(engine))
    other = engine.adapted(adapters[1])
    asyncio.run(engine.aclose())
    with pytest.raises(EngineError, match="is closed"):
        asyncio.run(said(other))


def test_an_adapter_of_another_base_and_a_folder_that_is_none_are_refused(tmp_path: Path, adapters: list[Path]) -> None:
    other = save(tmp_path / "other", "Llama", "ascii", seed=5)
    (adapters[0] / "bon.json").write_text(json.dumps({"fingerprint": "of another model"}))
    wide = save(tmp_path / "wide", "Llama", "ascii", hidden_size=64)
    (tmp_path / "empty").mkdir()
    (adapters[1] / "adapter_model.safetensors").write_bytes(b"cut off")
    cases: list[tuple[Any, Path, type[BonError], str]] = [
        (other, adapters[0], InputError, "was trained for .*base.* is another model"),
        (other, tmp_path / "empty", ModelNotFoundError, "no LoRA adapter in .*empty"),
        (wide, save_adapter(tmp_path / "narrow", other), InputError, "does not fit"),
        (other, adapters[1], InputError, "is damaged"),
    ]
    for model, folder, kind, complaint in cases:
        with pytest.raises(kind, match=complaint) as raised:
            asyncio.run(_pooled(f"{model},engine=torch,adapter={folder}"))
        assert str(raised.value).count("\n") == 0


async def _pooled(spec: str) -> Any:
    async with ModelPool() as pool:
        return pool.engine(spec)


def test_a_store_scores_anew_what_another_adapter_of_the_same_name_rated(
    tmp_path: Path, base: Any, adapters: list[Path]
) -> None:
    engine, spec = TorchEngine(base), f"likelihood:{base},adapter=mine"
    rewards = []
    with Store(tmp_path / "scores") as store:
        for folder in (*adapters, adapters[0]):
            folder.rename(mine := tmp_path / "mine")
            scorer = stored(BackwardLikelihood(engine.adapted(mine)), store, spec)
            rewards += [scores_of(scorer, "Hi there", "Dear Anna, see you on Friday.")[0].reward]
            mine.rename(folder)
    assert rewards[0] == rewards[2] != rewards[1]


def test_a_folder_whose_name_is_a_number_is_an_adapter(
    tmp_path: Path, base: Any, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters[0].rename(tmp_path / "3")
    monkeypatch.chdir(tmp_path)
    assert asyncio.run(_pooled(f"{base},engine=torch,adapter=3")).name.endswith("+3")


def test_an_engine_that_takes_no_adapter_says_so(adapters: list[Path]) -> None:
    with pytest.raises(InputError, match="takes no adapter"):
        ModelPool().engine(Model("scripted", options={"adapter": str(adapters[0])}))


@pytest.mark.vllm
def test_views_on_vllm_say_what_torch_says_and_so_does_the_base(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "Qwen3", "ascii", head_dim=32)
    folders = [save_adapter(tmp_path / f"adapter{seed}", base, seed=seed, size=0.5) for seed in (1, 2)]

    async def run(engine: str) -> list[tuple[str, list[float]]]:
        async with ModelPool() as pool:
            models = [Model.of(base, engine=engine, adapter=str(folder)) for folder in folders]
            pool.load([*models, Model.of(base, engine=engine)])
            found = []
            for model in (*models, models[0].base):
                made = pool.engine(model)
                assert isinstance(made, Generates)
                assert isinstance(made, Rates)
                found.append((await said(made), await rated(made)))
            return found

    for (text, totals), (own_text, own_totals) in zip(asyncio.run(run("vllm")), asyncio.run(run("torch")), strict=True):
        assert text == own_text
        assert totals == pytest.approx(own_totals, rel=1e-3)


@pytest.mark.parametrize("engine", ["torch", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_an_evaluation_compares_a_base_with_its_adapters_on_one_engine(tmp_path: Path, engine: str) -> None:
    base = save(tmp_path / "base", "Qwen3", "ascii", head_dim=32)
    folders = [save_adapter(tmp_path / f"adapter{seed}", base, seed=seed) for seed in (1, 2)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Hi", "candidates": ["Hello", "No"], "best": 0}))
    specs = [f"likelihood:{base},engine={engine}", *(f"likelihood:{base},engine={engine},adapter={f}" for f in folders)]
    report = evaluate(str(rows), scorers=specs)
    assert all(report["scorers"][spec]["failed"] == 0 for spec in specs)


@pytest.mark.vllm
def test_vllm_refuses_an_adapter_of_another_base_before_it_reads_it(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "Qwen3", "ascii", head_dim=32)
    wide = save(tmp_path / "wide", "Qwen3", "ascii", head_dim=32, hidden_size=64)
    mine, foreign = save_adapter(tmp_path / "mine", base), save_adapter(tmp_path / "foreign", wide)
    engine = ModelPool().engine(f"{base},engine=vllm,adapter={mine}")
    own = TorchEngine(base).fingerprint
    (mine / "bon.json").write_text(json.dumps({"fingerprint": own}))
    assert asyncio.run(said(engine.adapted(mine))) == asyncio.run(said(TorchEngine(base).adapted(mine)))  # type: ignore[attr-defined]
    (mine / "bon.json").write_text(json.dumps({"fingerprint": "of another model"}))
    for folder, complaint in ((mine, "is another model"), (foreign, "does not fit")):
        with pytest.raises(InputError, match=complaint):
            engine.adapted(folder)  # type: ignore[attr-defined]
    asyncio.run(engine.aclose())
