"""The mini evaluation computes exact expectations and reports them in the promised shape."""

import json
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon.errors import InputError
from bon.evals.mini import RULES, evaluate_mini, expected_pass, format_table, interval


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


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return evaluate_mini(n_instructions=14, max_n=4, seed=1, progress=False)


def test_the_report_has_the_promised_shape(report: dict[str, Any]) -> None:
    json.dumps(report)
    for part in (report, report["unseen_wordings"]):
        assert part["n_instructions"] == 14
        assert 0 <= part["greedy"] <= 1
        assert list(part["best_of"]) == ["1", "2", "4"]
        for n, row in part["best_of"].items():
            assert set(row) == set(RULES)
            for rule, rate in row.items():
                low, high = part["intervals"]["best_of"][n][rule]
                assert 0 <= low <= rate <= high <= 1


def test_with_one_candidate_every_rule_is_the_same_and_the_oracle_is_never_beaten(report: dict[str, Any]) -> None:
    assert len({round(rate, 9) for rate in report["best_of"]["1"].values()}) == 1
    for row in report["best_of"].values():
        assert max(row.values()) == pytest.approx(row["oracle"])


def test_the_same_seed_gives_the_same_report(report: dict[str, Any]) -> None:
    assert evaluate_mini(n_instructions=14, max_n=4, seed=1, progress=False) == report


def test_the_table_fits_eighty_columns(report: dict[str, Any]) -> None:
    table = format_table(report)
    assert max(map(len, table.splitlines())) <= 80
    assert "greedy decoding" in table
    assert all(rule in table for rule in RULES)


@pytest.mark.parametrize("option", ["n_instructions", "max_n"])
def test_a_size_below_one_is_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"{option} must be at least 1, got 0"):
        evaluate_mini(**{option: 0})
