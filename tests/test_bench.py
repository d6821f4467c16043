"""The benchmarks: what the harness computes, and that every script runs to its last line. No figure is judged here."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer, DynamicCache

from bon import portal
from bon.bench.forward import DifferentTokensError, cache_bytes, measure_forward, plain_forward
from bon.bench.harness import Pairs, Report, Spread, conditions, forget, interleave, table
from bon.bench.latency import measure_latency
from bon.bench.pruning import EVERYTHING, PRUNED, Pruning, WinnerChangedError, measure_pruning
from bon.best_of_n import BestOfN
from bon.budget import StopAt
from bon.cli import main as bon_main
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError, UnknownNameError
from bon.mini.tasks import sample_instructions
from bon.models import Model, ModelPool
from bon.scorers.flip import Flip
from bon.task import Task
from bon.types import Sampling

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(SCRIPTS))  # where the scripts' own folder is when they run

from lib.card import Clock  # noqa: E402
from lib.headroom import possible_in_step  # noqa: E402
from lib.lengths import LONGEST_INSTRUCTION, Lengths, real_lengths  # noqa: E402
from lib.models import Filler, describe, dummy_model, random_model  # noqa: E402
from lib.opening import Models, forced, open_models  # noqa: E402


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = tmp_path_factory.mktemp("words")
    tiny.tokenizer("chatml").save_pretrained(words)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 0}
    return random_model(tmp_path_factory.mktemp("small"), tokenizer=words, **sizes, **heads)


def script(name: str) -> Any:
    return importlib.import_module(name)


def load(model: Path) -> Any:
    return ModelPool().engine(model, engine="torch")


def last_line(out: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert set(result) == {"benchmark", "conditions", "ratios", "quartiles", "rows"}
    assert {"date", "cpu", "cores", "threads", "torch", "transformers", "bon", "seed"} <= set(result["conditions"])
    assert set(result["ratios"]) == set(result["quartiles"])
    assert result["rows"]
    return result


# --- The harness -----------------------------------------------------------------------------------------------------


def test_each_round_has_every_side_once_in_an_order_of_its_own_and_warm_up_rounds_do_not_count() -> None:
    """Whoever always followed the same side found a server's and the machine's caches as that one left them."""
    calls: list[tuple[int, str]] = []
    sides = {name: lambda r, name=name: calls.append((r, name)) or r for name in "ABC"}
    timed = interleave(sides, 12, warmup=1)
    rounds = [[name for _, name in calls[at : at + 3]] for at in range(0, len(calls), 3)]
    assert [r for r, _ in calls[::3]] == [*range(-1, 12)]
    assert all(sorted(names) == ["A", "B", "C"] for names in rounds)
    assert {names[0] for names in rounds} == {"A", "B", "C"}
    assert {names[names.index("A") - 1] for names in rounds if names[0] != "A"} == {"B", "C"}
    assert [t.value for t in timed["A"]] == [*range(12)]
    assert all(t.seconds >= 0 for t in timed["B"])


def test_something_can_be_done_before_each_call_outside_its_time() -> None:
    calls: list[str] = []
    sides = {name: lambda r, name=name: calls.append(name) for name in "AB"}
    interleave(sides, 1, warmup=0, before=lambda: calls.append("before"))
    assert calls[::2] == ["before"] * 2
    assert sorted(calls[1::2]) == ["A", "B"]


def test_the_ratio_is_the_median_of_the_ratios_within_rounds_not_the_ratio_of_medians() -> None:
    pairs = Pairs("case", {"n": 3}, ("a", "b"), [10.0, 2.0, 9.0], [1.0, 2.0, 3.0])
    assert pairs.ratio == Spread(median=3.0, low=2.0, high=6.5)
    row = pairs.to_dict()
    assert row["medians"] == [9.0, 2.0]
    assert (row["ratio"], row["ratio_quartiles"], row["rounds"], row["n"]) == (3.0, [2.0, 6.5], 3, 3)


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 2.0])])
def test_measurements_that_make_no_pairs_are_refused(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match="make no pairs"):
        Pairs("case", {}, ("a", "b"), first, second)


def test_a_report_ends_in_one_line_of_json_and_writes_the_same_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report("example", conditions(seed=0), {"key": Spread(2.0, 1.0, 3.0)}, [{"case": "x"}], ["a table"])
    report.emit(tmp_path / "new" / "example.json")
    printed = capsys.readouterr().out
    result = last_line(printed)
    assert "a table" in printed
    assert result["ratios"] == {"key": 2.0}
    assert result["quartiles"] == {"key": [1.0, 3.0]}
    assert json.loads((tmp_path / "new" / "example.json").read_text()) == result


def test_only_json_prints_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    Report("example", {"seed": 0}, text=["a table"]).emit(only_json=True)
    assert json.loads(capsys.readouterr().out)["benchmark"] == "example"


def test_tables_align() -> None:
    assert table(["name", "ms"], [["a", 1], ["long name", 12.5]]).splitlines() == [
        "name         ms",
        "---------------",
        "a             1",
        "long name  12.5",
    ]


# --- What is timed ---------------------------------------------------------------------------------------------------


def test_the_default_random_model_has_4_7_million_parameters(tmp_path: Path, small: Path) -> None:
    assert describe(random_model(tmp_path, tokenizer=small))["parameters"] == pytest.approx(4.7e6, rel=0.01)


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"llama-4\.7m"):
        random_model(tmp_path, "lama-4.7m")


def test_a_random_model_never_ends_early_and_its_text_round_trips(small: Path) -> None:
    engine = load(small)
    [latency] = measure_latency(
        engine, {"flip": Flip(engine, sampling=Sampling(temperature=0, max_tokens=9))},
        [Task.of("a haiku"), Task.of("the evening")], [4], Sampling(max_tokens=12, seed=0),
    )  # fmt: skip
    for result in latency.results["flip"]:
        assert [c.completion_tokens for c in result.candidates] == [12] * 4
        assert {c.finish_reason for c in result.candidates} == {"length"}
        assert all(c.tokens is not None for c in result.candidates)


def test_filler_has_exactly_the_tokens_asked_for(small: Path) -> None:
    words = AutoTokenizer.from_pretrained(small)
    filler = Filler(words)
    for count in (1, 7, 100):
        assert len(words.encode("." + filler(count), add_special_tokens=False)) == count + 1


def test_lengths_are_those_of_the_files_texts(tmp_path: Path) -> None:
    rows = [("a b c", ["a " * 30, "a " * 60]), ("too long " * 100, ["a"]), ("x", [])]
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": asked}], "candidates": given}) + "\n"
            for asked, given in rows
        )
    )
    drawn = real_lengths(path, 5, 4, context=None)
    assert all(lengths.instruction == 4 for lengths in drawn)
    assert all(sorted(lengths.responses[:2]) == [40, 80] and set(lengths.responses) <= {40, 80} for lengths in drawn)
    assert drawn == real_lengths(path, 5, 4, context=None)
    short = real_lengths(path, 5, 4, context=2 * LONGEST_INSTRUCTION + 128 + 50)
    assert {length for lengths in short for length in lengths.responses} == {40, 50}


def test_without_the_file_lengths_are_those_of_the_mini_world(tmp_path: Path) -> None:
    [lengths] = real_lengths(tmp_path / "nowhere.jsonl", 1, 20, context=1024)
    assert isinstance(lengths, Lengths)
    assert 5 < lengths.instruction < 60
    assert len(lengths.responses) == 20
    assert all(5 < length < 100 for length in lengths.responses)


def test_a_dummy_is_a_configuration_and_a_tokenizer_without_weights(tmp_path: Path, small: Path) -> None:
    shape = dummy_model(tmp_path / "shape", "qwen3-0.6b")
    assert describe(shape)["parameters"] == pytest.approx(0.6e9, rel=0.01)
    assert not list(shape.glob("*.safetensors"))
    for config in (small, small / "config.json"):
        copied = dummy_model(tmp_path / config.name, config)
        assert describe(copied)["layers"] == 2
        assert describe(copied)["vocabulary"] >= len(AutoTokenizer.from_pretrained(copied))


def test_what_is_no_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"qwen3-0\.6b"):
        dummy_model(tmp_path / "model", "qwen3-0.6")
    (tmp_path / "config.json").write_text('{"not": "a model"}')
    with pytest.raises(InputError, match="no configuration of a model"):
        dummy_model(tmp_path / "model", tmp_path / "config.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"engine": "torch"}, "needs --engine vllm"),
        ({"policy": Path("x")}, "in place of --policy"),
        ({"dummy": ["llama-4.7m"] * 3}, "one or two shapes"),
    ],
)
def test_dummies_that_make_no_sense_are_refused(changed: dict[str, Any], message: str) -> None:
    named = {
        "engine": "vllm",
        "dummy": ["llama-4.7m"],
        "policy": None,
        "scorer": None,
        "device": None,
        "dtype": "float32",
    }
    with pytest.raises(InputError, match=message):
        open_models(argparse.Namespace(**{**named, **changed}))


# --- Measurements ----------------------------------------------------------------------------------------------------


def test_sampling_alone_and_best_of_n_sample_the_same_candidates(small: Path) -> None:
    engine = load(small)
    scorer = Flip(engine, sampling=Sampling(temperature=0, max_tokens=4))
    tasks = [Task.of("a haiku"), Task.of("the evening")]
    runs = [measure_latency(engine, {"flip": scorer}, tasks, [2], Sampling(max_tokens=6, seed=3)) for _ in range(2)]
    texts = [[[c.text for c in r.candidates] for r in run[0].results["flip"]] for run in runs]
    assert texts[0] == texts[1]
    row = runs[0][0].rows()[0]
    assert row["policy_tokens"] == 12
    assert row["policy_steps"] == 6
    assert row["rounds"] == 2
    assert row["total_p95"] >= row["total_p50"] > 0


def test_pruning_that_changes_a_winner_fails_loudly() -> None:
    answers = iter(["a b c d", "x y z", "a b c"] * 100)  # a scorer that says something else every time it is asked
    policy = ScriptedEngine(lambda prompt, index: f"candidate {index}")
    judge = ScriptedEngine(lambda prompt, index: next(answers))
    with pytest.raises(WinnerChangedError, match="won prompt"):
        measure_pruning(policy, Flip(judge), [Task.of("a b c d")], 2, Sampling())


def test_pruning_counts_what_was_not_decoded() -> None:
    policy = ScriptedEngine(lambda prompt, index: f"candidate {index}")
    judge = ScriptedEngine(lambda prompt, index: "a b" if "candidate 0" in prompt else "x " * 40)
    measured = measure_pruning(policy, Flip(judge), [Task.of("a b")] * 2, 3, Sampling())
    assert 0.3 < measured.saved(PRUNED).median < 1
    assert measured.saved(PRUNED).median <= possible_in_step(measured)
    assert measured.equal(PRUNED) == 2
    assert isinstance(measured, Pruning)
    assert sum(measured.tokens(EVERYTHING)) > sum(measured.tokens(PRUNED))


def test_a_stop_gives_up_given_candidates_as_soon_as_one_has_the_reward() -> None:
    """Reranking once forgot the budget's reward: what tied with the bound was decoded to its end."""
    policy = ScriptedEngine(lambda prompt, index: f"candidate {index}")
    judge = ScriptedEngine(lambda prompt, index: "a b" if "candidate 0" in prompt else "a b " * 20, concurrent=False)
    stopped = BestOfN(policy, Flip(judge), n=StopAt(0.01)).rerank("a b " * 20, ["candidate 0", "candidate 1"])
    assert [score.status for score in stopped.scores] == ["ok", "pruned"]


def test_plain_forward_decodes_what_transformers_generates(small: Path) -> None:
    engine = load(small)
    model = engine._model
    prompts = [[5, 6, 7, 8 + row] for row in range(3)]
    expected = model.generate(torch.tensor(prompts), max_new_tokens=6, do_sample=False)[:, 4:]
    assert torch.equal(plain_forward(model, prompts, steps=5).tokens, expected)


def test_both_sides_of_a_forward_benchmark_decode_the_same_and_the_model_stays_as_it_was(small: Path) -> None:
    model = load(small)._model
    measured = measure_forward(model, prefix=24, rows=4, own=2, steps=4, rounds=2)
    assert model.config._attn_implementation == "sdpa"
    assert measured["memory"].ratio == Spread(4.0, 4.0, 4.0)
    assert set(measured) == {"prefill", "decode", "memory"}
    assert measured["decode"].sizes == {"prefix": 24, "rows": 4, "own": 2}


def test_a_forward_benchmark_fails_when_the_sides_decode_different_tokens(small: Path) -> None:
    model = load(small)._model

    def wrong_when_shared(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits if model.config._attn_implementation == "sdpa" else logits.flip(-1)

    handle = model.lm_head.register_forward_hook(wrong_when_shared)
    try:
        with pytest.raises(DifferentTokensError, match="prefix 24, 4 rows"):
            measure_forward(model, prefix=24, rows=4, steps=4, rounds=1)
    finally:
        handle.remove()


def test_a_caches_bytes_are_those_of_its_keys_and_values() -> None:
    cache = DynamicCache()
    keys = torch.zeros(2, 3, 5, 4)
    cache.update(keys, keys.clone(), 0)
    assert cache_bytes(cache) == 2 * (2 * 3 * 5 * 4) * 4


# --- On vLLM ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_vllm() -> Iterator[Models]:
    models = Models.load([Model(engine="vllm")], {})
    yield models
    models.close()


@pytest.mark.vllm
def test_all_sides_sample_the_same_candidates_and_find_the_same_winners_reward(on_vllm: Models) -> None:
    from lib import schedules as s
    from lib.plain import Job

    scorer = Flip(on_vllm.scorer, sampling=Sampling(temperature=0, max_tokens=48))
    jobs = [Job(Task.of(text), Sampling(max_tokens=48, seed=3), scorer) for text in sample_instructions(3, 0)]
    sides = (s.ALONE, s.TOGETHER, s.ONE_BY_ONE, s.GATHER, s.BON, s.EVERYTHING, s.STOPPING)
    measured = s.measure_schedules(on_vllm, "mini world", jobs, 4, sides)
    for side in (s.ONE_BY_ONE, s.BON, s.EVERYTHING, s.STOPPING):
        assert measured.same_rewards(side, s.GATHER) == 3
    rows = {row["side"]: row for row in measured.rows()}
    for side in (s.ALONE, s.ONE_BY_ONE, s.BON, s.EVERYTHING):
        assert rows[side]["policy_tokens"] == rows[s.GATHER]["policy_tokens"]
    assert rows[s.EVERYTHING]["scorer_tokens"] <= rows[s.GATHER]["scorer_tokens"]
    assert all(
        bound > max(alone.value.ready) for bound, alone in zip(measured.bound, measured.timed[s.ALONE], strict=True)
    )
    assert "barrier, gather" in s.schedules_table([measured])


@pytest.mark.vllm
def test_all_sides_decode_as_many_tokens_as_were_drawn(on_vllm: Models) -> None:
    from lib import schedules as s
    from lib.plain import Job

    extra = forced(on_vllm.policy)
    scorer = Flip(on_vllm.scorer, sampling=Sampling(temperature=0, max_tokens=7, extra=extra))
    jobs = [Job(Task.of("a b c"), Sampling(max_tokens=30, seed=0, extra=extra), scorer, (30, 5, 12))]
    sides = (s.ALONE, s.ONE_BY_ONE, s.GATHER, s.EVERYTHING)
    for row in s.measure_schedules(on_vllm, "real lengths", jobs, 3, sides).rows():
        assert row["policy_tokens"] == 47
        assert row["scorer_tokens"] == (0 if row["side"] == s.ALONE else 21)


@pytest.mark.vllm
def test_a_cache_that_was_emptied_serves_nothing(on_vllm: Models) -> None:
    from lib.plain import Job, Plain

    scorer = Flip(on_vllm.scorer)
    job = Job(Task.of("Write a reminder. " * 20), Sampling(max_tokens=2, seed=0), scorer)
    plain = Plain(on_vllm.policy)
    forget(on_vllm.policy)
    first, again = (portal.run(plain.sample(job, 1)) for _ in range(2))
    on_vllm.forget()
    fresh = portal.run(plain.sample(job, 1))
    assert (first.cached_tokens, fresh.cached_tokens) == (0, 0)
    assert again.cached_tokens >= 32


@pytest.mark.vllm
def test_latency_on_vllm_runs_to_its_last_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--engine", "vllm", "--quick", "--prompts", "1", "--n", "1", "16", "32", "--max-tokens", "8"]
    script("latency").main([*arguments, "--lengths", "nowhere.jsonl", "--out", str(tmp_path / "latency.json")])
    result = last_line(capsys.readouterr().out)
    timed = {"overhead_bon16", "vs_gather", "vs_gather_stopping", "vs_one_by_one"}
    assert set(result["ratios"]) == timed | {"cached_share", "two_engine_start"}
    assert result["ratios"]["cached_share"] > 0.5
    assert "there is no nowhere.jsonl" in result["conditions"]["lengths"]
    draw(tmp_path / "latency.json")


@pytest.mark.vllm
def test_pruning_on_vllm_runs_to_its_last_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--engine", "vllm", "--quick", "--prompts", "2", "--n", "3", "--max-tokens", "24"]
    script("pruning").main([*arguments, "--out", str(tmp_path / "pruning.json")])
    result = last_line(capsys.readouterr().out)
    assert set(result["ratios"]) == {"scorer_tokens_saved"}
    assert all(row["winner_rewards_equal"] == 2 for row in result["rows"])
    draw(tmp_path / "pruning.json")


@pytest.mark.vllm
def test_throughput_of_a_dummy_runs_to_its_last_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--engine", "vllm", "--quick", "--prompts", "2", "--n", "2", "--max-tokens", "8"]
    script("throughput").main([*arguments, "--dummy", "llama-4.7m", "--out", str(tmp_path / "throughput.json")])
    result = last_line(capsys.readouterr().out)
    assert set(result["ratios"]) == {"offline_throughput", "offline_throughput_no_tie_break"}
    tokens = [row["tokens"] for row in result["rows"] if row["case"] == "side"]
    assert tokens == [2 * 2 * (8 + 8)] * 3
    assert result["conditions"]["model"]["model"] == "dummy llama-4.7m"
    draw(tmp_path / "throughput.json")


@pytest.mark.vllm
def test_bon_bench_measures_models_on_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--policy", "mini,engine=vllm", "-n", "3", "--max-tokens", "8", "--quick", "--json"]
    assert bon_main(arguments) == 0
    result = last_line(capsys.readouterr().out)
    assert set(result["ratios"]) == {"overhead", "overhead_likelihood", "pruning_saved", "stopping_saved"}


# --- The scripts and the command -------------------------------------------------------------------------------------


def test_latency_runs_to_its_last_line(small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--quick", "--policy", small, "--prompts", 2, "--max-tokens", 4, "--out", tmp_path / "latency.json"]
    script("latency").main([*map(str, arguments)])
    result = last_line(capsys.readouterr().out)
    assert result["benchmark"] == "latency"
    assert set(result["ratios"]) == {"overhead_bon16", "overhead_bon16_likelihood"}
    draw(tmp_path / "latency.json")


def test_pruning_runs_to_its_last_line(small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--quick", "--policy", small, "--prompts", 2, "--n", 3, "--max-tokens", 8]
    script("pruning").main([*map(str, arguments), "--out", str(tmp_path / "pruning.json")])
    result = last_line(capsys.readouterr().out)
    assert result["benchmark"] == "pruning"
    assert {"pruning_saved", "pruning_saved_stopping"} <= set(result["ratios"])
    draw(tmp_path / "pruning.json")


def test_throughput_runs_to_its_last_line(small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--quick", "--policy", small, "--prompts", 2, "--n", 2, "--max-tokens", 4]
    script("throughput").main([*map(str, arguments), "--out", str(tmp_path / "throughput.json")])
    result = last_line(capsys.readouterr().out)
    assert result["benchmark"] == "throughput"
    assert set(result["ratios"]) == {"end_to_end", "end_to_end_batched"}
    draw(tmp_path / "throughput.json")


def test_prefix_sharing_runs_to_its_last_line(small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--quick", "--model", str(small), "--sizes", "64x4", "512x32", "--candidates", "4"]
    script("prefix_sharing").main([*arguments, "--out", str(tmp_path / "prefix_sharing.json")])
    result = last_line(capsys.readouterr().out)
    assert result["benchmark"] == "prefix_sharing"
    expected = {"prefill_shared", "decode_shared", "prefix_memory", "score_fused", "score_shared"}
    assert expected <= set(result["ratios"])
    assert result["ratios"]["prefix_memory"] >= 32
    draw(tmp_path / "prefix_sharing.json")


def test_gpu_shows_without_a_gpu_that_it_runs_to_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    script("gpu").main(["--quick", "--dtype", "float32"])
    result = last_line(capsys.readouterr().out)
    assert {row["part"]: row["outcome"] for row in result["rows"] if row["case"] == "part"} == dict.fromkeys(
        ("contract", "greedy", "sharing", "sampling", "best_of", "budget"), "ok"
    )
    assert {"contract", "greedy_float32", "greedy_bfloat16", "overhead_bon16"} <= set(result["ratios"])
    assert result["ratios"]["contract"] == result["ratios"]["greedy_float32"] == 1


def test_a_part_of_gpu_that_fails_does_not_keep_the_others_from_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(bench: Any) -> None:
        raise RuntimeError("CUDA error: an illegal instruction\nand more")

    monkeypatch.setattr(script("gpu"), "PARTS", {"first": (0.5, fails), "second": (0.5, lambda bench: None)})
    with pytest.raises(SystemExit, match=r"first: RuntimeError: CUDA error: an illegal instruction$"):
        script("gpu").main(["--quick"])
    assert [row["part"] for row in last_line(capsys.readouterr().out)["rows"]] == ["first", "second"]


def test_gpu_ends_at_its_limit_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left, over = [], threading.Event()
    monkeypatch.setattr(os, "_exit", lambda status: (left.append(status), over.set()))
    monkeypatch.setattr(script("gpu"), "PARTS", {"stuck": (1.0, lambda bench: over.wait(60))})
    script("gpu").main(["--quick", "--minutes", "0.005"])
    assert left == [3]
    assert "Ended after 0.005 minutes" in capsys.readouterr().out


def test_a_part_of_gpu_starts_no_step_for_which_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lib.card.perf_counter", lambda: now[0])
    clock = Clock(10, {"first": 1, "second": 1, "third": 1})
    assert clock.begin("first")
    steps = []
    for step in clock.within(range(9)):
        steps.append(step)
        now[0] += 1.5
    assert steps == [0, 1]
    assert clock.begin("second")
    assert clock.budget == 3.5
    now[0] = 10
    assert not clock.begin("third")


def draw(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:  # in an environment of vLLM's own
        return
    script("plot").main([str(path)])
    assert path.with_suffix(".png").stat().st_size > 5_000


def test_bon_bench_measures_the_users_own_models(
    small: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Write a haiku."}\n{"prompt": "Thank you."}\n')
    arguments = ["bench", "--policy", small, "--prompts", prompts, "-n", 4, "--max-tokens", 4, "--quick", "--json"]
    assert bon_main([*map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    result = last_line(out)
    expected = {"overhead", "overhead_likelihood", "pruning_saved", "stopping_saved", "prefill_shared", "decode_shared"}
    assert set(result["ratios"]) == expected


def test_bon_bench_refuses_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert bon_main(["bench", "--prompts", "nowhere.jsonl"]) == 2
    assert "cannot read nowhere.jsonl" in capsys.readouterr().err


def test_real_text_measures_rules_on_all_rows_and_keeps_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, one = ["An apple tree", "apple", "an apple"], {"prompt": "Say yes", "candidates": ["yes", "yes"]}
    rows: list[dict[str, Any]] = [
        {"prompt": f"Name a fruit, {i}", "candidates": texts, "correct": [0, 1, 1]} for i in range(5)
    ]
    rows += [{**one, "correct": [1, 1]}, {"prompt": "Word " * 300, "candidates": texts, "correct": [0, 1, 1]}]
    (tmp_path / "crux.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("BON_DATA", str(tmp_path))
    common = ["--sets", "crux", "--record", str(tmp_path / "kept"), "--store", str(tmp_path / "scores.db")]
    script("real_text").main(common)
    found = {(row["scorer"], row["part"]): row for row in last_line(capsys.readouterr().out)["rows"]}
    assert [found["shortest", part]["rows"] for part in ("choose", "report", "all")] == [3, 2, 5]
    assert found["shortest", "all"]["share"]["mean"] == 1.0
    kept = tmp_path / "kept" / "eval_crux.json"
    assert "apple" not in kept.read_text()
    assert (tmp_path / "kept" / "eval_crux.png").stat().st_size > 5_000
    before = len(json.loads(kept.read_text())["rows"])
    script("real_text").main([*common, "--model", "mini", "--rows", "2", "--scorer", "likelihood:{model}"])
    after = json.loads(kept.read_text())["rows"]
    names = {row["scorer"] for row in after}
    assert {"likelihood:mini", "default:mini", "consensus:chrf", "longest"} <= names
    assert len(after) > before
    assert len({(row["part"], row["scorer"], row["candidates"]) for row in after}) == len(after), "none twice"


def test_real_heads_learns_from_every_other_row_and_keeps_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["No.", "It is a long and very good answer", "It is a good answer"]
    rows = [{"prompt": f"Name fruit {i}", "candidates": texts, "correct": [0, 1, 0]} for i in range(20)]
    (tmp_path / "crux.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("BON_DATA", str(tmp_path))
    files = ["--states", str(tmp_path / "states.npz"), "--store", str(tmp_path / "scores.db")]
    common = ["--sets", "crux", "--model", "mini", "--layers", "1", "3", *files]
    script("real_heads").main([*common, "--out", str(tmp_path / "real_heads.json")])
    found = {(row["case"], row["pick"]): row for row in last_line(capsys.readouterr().out)["rows"]}
    assert found["crux", "longest"]["share"]["mean"] == 1.0
    assert found["crux", "head"]["share"]["mean"] == found["mean", "both"]["share"]["mean"] == 1.0
    assert (found["crux", "head"]["trained"], found["crux", "head"]["rows"]) == (10, 10)
    assert "fruit" not in (tmp_path / "real_heads.json").read_text()
