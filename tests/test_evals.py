"""Evaluations: exact expectations, any dataset with any scorers, and the mini world's report as promised."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon.engines.scripted import ScriptedEngine
from bon.errors import BonError, InputError, UnknownNameError, UserCodeError
from bon.evals.dataset import Dataset, Example, as_dataset
from bon.evals.harness import BASELINES, SCORERS, evaluate, format_table
from bon.evals.metrics import expected_pass, interval
from bon.evals.mini import MiniWorld
from bon.scorers.flip import Flip
from bon.task import Task

# --- Figures ---------------------------------------------------------------------------------------------------------


@given(data=st.data(), passed=st.lists(st.booleans(), min_size=1, max_size=7))
def test_the_expectation_equals_going_through_all_subsets(data: st.DataObject, passed: list[bool]) -> None:
    order = data.draw(st.permutations(range(len(passed))))
    size = data.draw(st.integers(1, len(passed)))
    picks = [passed[min(subset, key=order.index)] for subset in combinations(range(len(passed)), size)]
    assert expected_pass(passed, order, size) == pytest.approx(sum(picks) / len(picks))


def test_the_interval_is_the_usual_one_and_stays_within_bounds() -> None:
    assert interval(np.array([0.0, 1.0] * 50)) == pytest.approx([0.5 - 0.0985, 0.5 + 0.0985], abs=1e-3)
    assert interval(np.ones(10)) == [1.0, 1.0]
    assert interval(np.array([1.0])) == [0.0, 1.0]


# --- Any dataset -----------------------------------------------------------------------------------------------------


class Sums(Dataset):
    """Right answers say "right"; the scripted policies below answer differently at each draw."""

    name = "sums"

    def rows(self, limit: int | None = None, seed: int = 0) -> Iterator[Example]:
        for number in range(limit or 3):
            yield Example(Task.of(f"sum {number}"), lambda text: text.endswith("right"))


class Empty(Sums):
    def rows(self, limit: int | None = None, seed: int = 0) -> Iterator[Example]:
        yield from ()


def prefers_right(prompt: str, responses: list[str]) -> list[float]:
    return [float("right" in response) for response in responses]


def prefers_wrong(prompt: str, responses: list[str]) -> list[float]:
    return [float("wrong" in response) for response in responses]


def answers(*texts: str) -> ScriptedEngine:
    return ScriptedEngine(list(texts))


def test_every_scorer_rates_the_same_candidates_and_has_its_own_row() -> None:
    asked: list[int] = []

    def policy(prompt: str, n: int) -> list[str]:
        asked.append(n)
        return ["so wrong", "right", "wrong", "it is right"][:n]

    report = evaluate(Sums(), policy=policy, scorers=[prefers_right, prefers_wrong], n=4)
    assert sorted(asked) == [1, 1, 1, 4, 4, 4]  # greedy and sampled, once each: no scorer samples for itself
    assert list(report["best_of"]) == ["1", "2", "4"]
    assert list(report["best_of"]["4"]) == ["prefers_right", "prefers_wrong", *BASELINES]
    assert report["best_of"]["4"] == {
        "prefers_right": 1, "prefers_wrong": 0, "random": 0.5, "oracle": 1, "longest": 1, "shortest": 1,
    }  # fmt: skip
    assert set(report["best_of"]["1"].values()) == {0.5}
    assert report["greedy"] == 0
    assert (report["n_instructions"], report["failed"]) == (3, 0)
    assert report["scorers"] == {"prefers_right": "prefers_right", "prefers_wrong": "prefers_wrong"}


def test_scorers_without_a_model_of_their_own_run_on_the_policys() -> None:
    report = evaluate(Sums(), policy=ScriptedEngine(), scorers=["flip", "flip:style=json", Flip()], n=2, limit=1)
    own = "flip-direct(scripted)"
    assert report["scorers"] == {"flip": own, "flip:style=json": "flip-json(scripted)", own: own}


def test_without_scorers_there_are_the_baselines() -> None:
    assert list(evaluate(Sums(), policy=answers("right"), scorers=[], n=1)["best_of"]["1"]) == list(BASELINES)


def test_an_example_that_goes_wrong_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    def sampled(prompt: str) -> str:
        if prompt == "sum 1":
            raise RuntimeError("no such sum")
        return "right"

    with caplog.at_level(logging.WARNING, "bon"):
        report = evaluate(Sums(), policy=sampled, scorers=[prefers_right], n=2)
    assert (report["n_instructions"], report["failed"], report["greedy"]) == (2, 1, 1)
    assert "1 of 3 examples are left out" in caplog.text
    assert "no such sum" in caplog.text
    assert "2 sums (1 left out)" in format_table(report)


def test_a_verifier_that_raises_fails_its_example_with_a_name() -> None:
    class Broken(Sums):
        def rows(self, limit: int | None = None, seed: int = 0) -> Iterator[Example]:
            yield Example(Task.of("a"), lambda text: bool(1 / 0))

    with pytest.raises(UserCodeError, match=r"the dataset.*ZeroDivisionError"):
        evaluate(Broken(), policy=answers("right"), scorers=[], n=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, InputError, "n must be a whole number of at least 1, got 0"),
        ({"limit": 0}, InputError, "limit must be a whole number of at least 1, got 0"),
        ({"dataset": Empty()}, InputError, "'sums' has no examples"),
        ({"dataset": "minni"}, UnknownNameError, "mini"),
        ({"dataset": "mini:unseen"}, UnknownNameError, "unseen_wording"),
        ({"dataset": 3}, InputError, "is a bon.evals.dataset.Dataset or its spec, not 3"),
        ({"scorers": [prefers_right, prefers_right]}, InputError, "'prefers_right' is given twice"),
        ({"scorers": ["flipp"]}, UnknownNameError, "flip"),
        ({"sampling": {"temprature": 1}}, UnknownNameError, "temperature"),
    ],
)
def test_what_makes_no_evaluation_is_refused(options: dict[str, Any], error: type[BonError], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(**{"dataset": Sums(), "policy": answers("right"), "scorers": [], **options})


def test_a_dataset_is_known_by_its_spec_or_as_a_class_of_the_users_own() -> None:
    dataset = as_dataset("mini:unseen_wording")
    assert isinstance(dataset, MiniWorld)
    assert dataset.split == "unseen_wording"
    assert isinstance(as_dataset(f"{__name__}:Sums"), Dataset)


# --- The mini world --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return evaluate("mini", n=4, limit=14, seed=1)


def test_the_report_has_the_promised_shape(report: dict[str, Any]) -> None:
    json.dumps(report)
    for part in (report, report["unseen_wordings"]):
        assert part["n_instructions"] == 14
        assert 0 <= part["greedy"] <= 1
        assert list(part["best_of"]) == ["1", "2", "4"]
        for n, row in part["best_of"].items():
            assert set(row) == {*SCORERS, *BASELINES}
            for rule, rate in row.items():
                low, high = part["intervals"]["best_of"][n][rule]
                assert 0 <= low <= rate <= high <= 1


def test_with_one_candidate_every_rule_is_the_same_and_the_oracle_is_never_beaten(report: dict[str, Any]) -> None:
    assert len({round(rate, 9) for rate in report["best_of"]["1"].values()}) == 1
    for row in report["best_of"].values():
        assert max(row.values()) == pytest.approx(row["oracle"])


def test_the_same_seed_gives_the_same_report(report: dict[str, Any]) -> None:
    assert evaluate("mini", n=4, limit=14, seed=1) == report


def test_the_table_fits_eighty_columns(report: dict[str, Any]) -> None:
    table = format_table(report)
    assert max(map(len, table.splitlines())) <= 80
    assert table.count("greedy decoding") == 2
    assert all(rule in table for rule in (*SCORERS, *BASELINES))
    assert "14 instructions in unseen wordings" in table
