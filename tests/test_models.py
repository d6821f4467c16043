"""Who loads a model closes it, and nobody else: pools, BestOfN, score."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from typing import ClassVar

import pytest
from scoring import Own

import bon.models
from bon import BestOfN, Flip, score
from bon.engines.function import FunctionEngine
from bon.engines.scripted import ScriptedEngine
from bon.errors import EngineError, InputError, UnknownNameError
from bon.models import Model, ModelPool, as_scorer
from bon.spec import ENGINES, Entry


class Counting(ScriptedEngine):
    """An engine by name that remembers who was made and closed."""

    made: ClassVar[list[Counting]] = []
    fails: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: str, *, size: int = 1, threads: int | None = None, concurrent: bool = True):
        if model in self.fails:
            raise InputError(f"there is no model {model}")
        super().__init__(name=model, concurrent=concurrent)
        self.size, self.threads, self.closed = size, threads, 0
        Counting.made.append(self)

    async def aclose(self):
        self.closed += 1
        if self.name == "stubborn":
            raise EngineError("does not stop")


@pytest.fixture(autouse=True)
def counting(monkeypatch):
    """A registered engine named "counting", which runs whatever is named."""
    monkeypatch.setattr(Counting, "made", [])
    monkeypatch.setitem(ENGINES._builtin, "counting", Entry(f"{__name__}:Counting"))
    monkeypatch.setattr(bon.models, "choose_engine", lambda name: "counting")
    return Counting


def closed():
    return {engine.name: engine.closed for engine in Counting.made}


# --- ownership (fault 2) ----------------------------------------------------------------------------------------------


def test_what_was_named_is_closed_the_scorers_model_too():
    """``BestOfN("A", "B").close()`` freed A and never B."""
    for scorer in ("B", "flip:B", "likelihood:B", Flip("B")):
        Counting.made.clear()
        BestOfN("A", scorer).close()
        assert closed() == {"A": 1, "B": 1}


def test_an_engine_that_was_passed_in_stays_open():
    """It was closed together with the rest."""
    policy, own = Counting("policy"), Counting("own")
    for scorer in (own, Flip(own), None, "B"):
        with BestOfN(policy, scorer, n=1) as made:
            made("x")
    assert (policy.closed, own.closed) == (0, 0)
    assert closed()["B"] == 1


def test_a_model_that_is_named_twice_is_loaded_once_and_closed_once():
    BestOfN("A", "flip:A").close()
    BestOfN("A").close()
    assert [(engine.name, engine.closed) for engine in Counting.made] == [("A", 1), ("A", 1)]
    made = BestOfN("A,size=1", "flip:A,size=2")
    assert made.policy is not made.scorer.engine, "other options, another engine"


def test_async_with_frees_what_was_loaded():
    async def run():
        async with BestOfN("A", "B", n=1) as made:
            await made.run("x")
            assert closed() == {"A": 0, "B": 0}

    asyncio.run(run())
    assert closed() == {"A": 1, "B": 1}


def test_closing_twice_is_harmless_and_a_copy_owns_nothing():
    made = BestOfN("A", "B")
    made.replace(n=2).close()
    assert closed() == {"A": 0, "B": 0}
    made.close()
    made.close()
    assert closed() == {"A": 1, "B": 1}


def test_what_cannot_be_closed_does_not_keep_the_others_open():
    made = BestOfN("stubborn", "B")
    with pytest.raises(EngineError, match="does not stop"):
        made.close()
    assert closed() == {"stubborn": 1, "B": 1}


def test_a_scorer_that_cannot_be_loaded_does_not_leave_the_policy_behind(monkeypatch):
    """Nobody had the policy's engine in hand by then: its process ran on until the end of the program."""
    monkeypatch.setattr(Counting, "fails", ("B",))
    with pytest.raises(InputError, match="no model B"):
        BestOfN("A", "B")
    assert closed() == {"A": 1}


def test_score_frees_what_it_loaded_and_keeps_what_is_in_a_pool():
    asyncio.run(score("flip:B", [("x", ["a"])]))
    assert closed() == {"B": 1}

    async def run():
        async with ModelPool() as pool:
            for _ in range(2):
                await score("flip:C", [("x", ["a"])], pool=pool)
            assert closed() == {"B": 1, "C": 0}

    asyncio.run(run())
    assert closed() == {"B": 1, "C": 1}


def test_score_frees_what_it_loaded_when_it_fails():
    with pytest.raises(InputError):
        asyncio.run(score("flip:B", [("x", [])]))
    assert closed() == {"B": 1}


def test_the_thread_of_a_function_that_was_passed_in_ends():
    def threads():
        return {t.name for t in threading.enumerate() if "writes" in t.name or "rates" in t.name}

    def writes(prompt):
        return "x"

    def rates(prompt, responses):
        return [0.5 for _ in responses]

    with BestOfN(writes, rates, n=2) as made:
        made("x")
        assert len(threads()) == 2
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()
    assert made("x").reward == 0.5, "and begins again when it is called again"
    made.close()


def test_the_weights_of_a_model_are_freed_when_it_is_closed(monkeypatch):
    """``TorchEngine.aclose`` kept them: another object held the model."""
    monkeypatch.setattr(bon.models, "choose_engine", lambda name: "torch")
    made = BestOfN("mini", n=2, sampling={"max_tokens": 4})
    made("Write a slogan for a bakery called Sunrise.")
    weights = weakref.ref(next(made.policy._model.parameters()))
    made.close()
    gc.collect()
    assert weights() is None
    with pytest.raises(EngineError, match="closed"):
        made("Write a slogan for a bakery called Sunrise.")


# --- pools ------------------------------------------------------------------------------------------------------------


def test_a_pool_loads_each_model_once_however_many_ask_at_the_same_time():
    pool, got = ModelPool(), []
    threads = [threading.Thread(target=lambda: got.append(pool.engine("A"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Counting.made) == 1
    assert len({id(engine) for engine in got}) == 1


def test_a_pool_hands_its_threads_to_engines_whose_spec_does_not_say():
    pool = ModelPool(threads=3)
    assert [pool.engine(spec).threads for spec in ("A", "B,threads=1")] == [3, 1]
    with pytest.raises(InputError, match="threads must be a whole number"):
        ModelPool(threads=0)


def test_a_scorer_without_a_model_runs_on_the_policy_or_on_the_embedded_one():
    pool = ModelPool()
    policy = pool.engine("A")
    assert pool.scorer(None, policy).engines == (policy,)
    assert pool.scorer("flip:samples=2", policy).engine is policy
    assert pool.scorer("flip").engine.name.endswith("weights")
    assert pool.scorer(Own(lambda e: 0.5)).models == ()


def test_an_engine_that_cannot_do_what_is_asked_is_refused():
    bare = type("Bare", (), {"name": "bare", "max_model_len": 1, "concurrent": True, "aclose": lambda self: None})()
    with pytest.raises(InputError, match="'bare' cannot be sampled"):
        ModelPool().policy(bare)
    with pytest.raises(InputError, match="log-probabilities of a text, and 'say' cannot"):
        as_scorer("likelihood").on(FunctionEngine(say))


def say(prompt):
    return "x"


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "engine", "options"),
    [
        (None, "mini", None, {}),
        ("mini", "mini", None, {}),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B", None, {}),
        ("qwen:latest", "qwen:latest", None, {}),
        ("Qwen/Qwen3-4B,engine=vllm,max_model_len=8192", "Qwen/Qwen3-4B", "vllm", {"max_model_len": 8192}),
        ("http://h/v1,http://i/v1,model=x", "http://h/v1,http://i/v1", None, {"model": "x"}),
        ("scripted,concurrent=false", "scripted", "scripted", {"concurrent": False}),
    ],
)
def test_the_spec_of_a_model_is_read_and_written(spec, name, engine, options):
    model = Model.of(spec)
    assert (model.name, model.engine, model.options) == (name, engine, options)
    assert Model.of(model.text) == model


@pytest.mark.parametrize(
    ("spec", "options", "complaint"),
    [
        ("", {}, "name is empty"),
        (" ,device=cpu", {}, "name is empty"),
        ("A,device=cpu", {"device": "cuda"}, "device is given twice"),
        ("A,engine=tortch", {}, "Did you mean 'torch'"),
        ("A", {"engine": "tortch"}, "Did you mean 'torch'"),
    ],
)
def test_what_is_no_model_is_refused(spec, options, complaint):
    with pytest.raises((InputError, UnknownNameError), match=complaint):
        Model.of(spec, **options)


def test_the_same_model_with_its_options_in_another_order_is_the_same():
    assert Model.of("A,x=1,y=2").key == Model.of("A,y=2,x=1").key
    assert Model.of("A,x=1").key != Model.of("A,x=1.0").key


@pytest.mark.parametrize(
    "name", ["gpt2", "openai/gpt-oss-20b", "openai-community/gpt2", "mini", "o1", "Qwen/Qwen3-0.6B"]
)
def test_names_of_models_are_taken_for_what_they_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o1").mkdir()
    assert Model.of(name).name == name


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("localhost:8000/v1", "Did you mean http://localhost:8000/v1"),
        ("127.0.0.1:8000", "Did you mean http://127.0.0.1:8000"),
        ("localhost:11434/v1", r"Did you mean http://localhost:11434/v1\?"),
        ("api.openai.com/v1", "Did you mean http://api.openai.com/v1"),
        ("llama3:8b", r"Ollama's models are reached over HTTP: http://localhost:11434/v1#llama3:8b$"),
        ("qwen2.5:0.5b-instruct", "http://localhost:11434/v1#qwen2.5:0.5b-instruct"),
        ("ollama/llama3", "http://localhost:11434/v1#llama3$"),
        ("gpt-4o", "write https://api.openai.com/v1#gpt-4o, with the key in OPENAI_API_KEY"),
        ("openai/o3-mini", "write https://api.openai.com/v1#o3-mini"),
        ("claude-sonnet-4", "an OpenAI-compatible API that has it, and #claude-sonnet-4 behind it"),
        ("bon-mini", "the embedded model is called 'mini' here"),
        ("Mini", "the embedded model is called 'mini' here"),
        ("flip:mini", "is a scorer's spec, not a model. Write --scorer flip:mini"),
    ],
)
def test_what_is_no_models_name_is_not_looked_for_on_the_hub(name, remedy):
    with pytest.raises(InputError, match=remedy):
        Model.of(name)
