"""Budgets on candidates that are there: what a replay says is what a run does, and rules are judged on rows apart."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring import Own

from bon import Adaptive, BestOfN, Fixed
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError
from bon.evals.budgets import compare, front
from bon.evals.budgets import settings as to_try
from bon.evals.harness import evaluate
from bon.evals.replay import Samples, allocated, oracle, replay
from bon.evals.table import format_table
from bon.types import Candidate, Score

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))


def samples(rewards, tokens=None):
    """Candidates whose label is 1 where the reward is."""
    tokens = tokens or [10] * len(rewards)
    candidates = [Candidate(i, f"answer {i}", completion_tokens=n) for i, n in enumerate(tokens)]
    labels = np.array([float(reward == 1.0) for reward in rewards])
    return Samples(candidates, [Score(reward, candidate=i) for i, reward in enumerate(rewards)], labels, (0.0, 1.0))


tables = st.lists(
    st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]), min_size=16, max_size=16), min_size=2, max_size=5
)


@given(tables)
@settings(max_examples=30)
def test_stopping_at_the_top_finds_what_all_find_and_nobody_is_cheaper_than_the_oracle(table):
    rows = [samples(rewards) for rewards in table]
    exact = replay(Adaptive(least=1, most=16, rule="exact", batch=1), rows)
    full, known = replay(Fixed(16), rows), oracle(16, rows)
    assert exact[:, 0].tolist() == full[:, 0].tolist() == known[:, 0].tolist()
    assert (known[:, 1] <= exact[:, 1]).all()
    assert (exact[:, 1] <= full[:, 1]).all()
    assert (full[:, 1] == 16).all()
    assert (full[:, 2] == 160).all()
    shared = allocated(8 * len(rows), rows)
    assert shared[:, 1].sum() <= 8 * len(rows)


def test_a_replay_says_what_a_run_does(monkeypatch):
    """In the order of sampling: the same number of samples, tokens and rounds, and the same pick."""
    monkeypatch.setattr("bon.evals.replay._orders", lambda row, seed: np.tile(np.arange(len(row.labels)), (4, 1)))
    draw = np.random.default_rng(5)
    for rule in ("improvement", "pandora", "excess", "exact", "bound"):
        rewards = draw.uniform(0, 1, 40).tolist()
        budget = Adaptive(least=3, most=40, rule=rule, batch=3)
        scorer = Own(lambda e, rewards=rewards: rewards[e.candidate.index])
        scorer.range = (0.0, 1.0)
        result = BestOfN(ScriptedEngine([f"answer {i}" for i in range(40)]), scorer, n=budget, prune=False)("x")
        [[_, n, tokens, _]] = replay(
            budget, [samples(rewards, [c.completion_tokens for c in result.candidates] + [2] * 40)]
        )
        assert (n, tokens) == (len(result.candidates), result.usage.policy_completion_tokens)


def test_rules_are_chosen_on_one_half_and_judged_on_the_other():
    draw = np.random.default_rng(0)
    rows = [samples(draw.choice([0.1, 0.4, 1.0], 16, p=[0.5, 0.3, 0.2]).tolist()) for _ in range(12)]
    found = compare(rows, to_try(16, bounded=True), [8, 16])
    exact = next(each for each in found["halves"] if (each["rule"], each["n"]) == ("exact", 8))
    assert len(exact["specs"]) == 2
    assert exact["saved"]["low"] > 0.3
    assert found["recommended"].keys() == {"8", "16"}
    assert [each["n"] for each in found["fixed"]] == [1, 2, 3, 4, 6, 8, 12, 16]
    line = front(found["fixed"])
    assert line == sorted(line, key=lambda point: point[1])
    votes = to_try(16, bounded=True, extract="number")
    assert [*votes] == ["vote:number"], "where answers vote, rewards do not stop"


def test_an_evaluation_recommends_a_line_to_type_and_runs_it():
    report = evaluate("mini:unseen_wording", policy="mini", scorers=["flip"], n=8, limit=4, budgets=True)
    found = report["budgets"]["flip"]
    spec = found["recommended"]["8"]
    assert found["ran"].keys() == {"8", spec}
    assert found["ran"]["8"]["samples"] == 8
    assert f"To type: --scorer flip -n {spec}" in format_table(report).splitlines()
    json.dumps(found)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"n": 4}, "budgets are compared on a policy's candidates, at least 8 for each row"),
        ({"scorers": ["consensus:chrf"]}, "budgets cannot be compared for the scorer 'consensus:chrf'"),
    ],
)
def test_what_cannot_be_replayed_is_refused(options, complaint):
    with pytest.raises(InputError, match=complaint):
        evaluate("mini", policy="mini", limit=2, budgets=True, **{"scorers": ["flip"], "n": 8, **options})


def test_the_benchmark_makes_its_table_once_and_ends_in_its_ratios(tmp_path, capsys):
    main = importlib.import_module("adaptive").main
    arguments = ["--quick", "--prompts", "4", "--n", "9", "--table", str(tmp_path / "table.jsonl")]
    main(arguments)
    made = (tmp_path / "table.jsonl").read_bytes()
    assert len(made.splitlines()) == 4
    main([*arguments, "--plot", str(tmp_path / "curve.png")])
    assert (tmp_path / "table.jsonl").read_bytes() == made
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])["ratios"]
    assert {"tokens_saved_8", "points_lost_8", "oracle_saved_8", "samples_to_best_9"} <= ratios.keys()


def test_the_benchmark_says_how_rewards_of_unfinished_candidates_tell_the_final_ones(capsys):
    importlib.import_module("adaptive").main(["--partial", "--prompts", "4", "--n", "6"])
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])["ratios"]
    assert ratios["rank_correlation_25"] < ratios["rank_correlation_75"] <= 1
    assert ratios.keys() >= {"best_kept_50", "best_kept_by_chance"}
