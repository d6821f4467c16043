"""The arithmetic of evaluations against brute force, and the baselines and checks that need no model."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon.evals.baselines import baselines, repeated
from bon.evals.inversion import inversion
from bon.evals.metrics import bootstrap, equal_pool, expected_best, interval, spearman
from bon.similarity import WordF1

# --- Best of N -------------------------------------------------------------------------------------------------------


@given(data=st.data(), count=st.integers(1, 7))
def test_the_expectation_equals_going_through_all_subsets_with_ties_split(data: st.DataObject, count: int) -> None:
    numbers = st.floats(-5, 5, allow_nan=False)
    labels = data.draw(st.lists(numbers, min_size=count, max_size=count))
    rewards = data.draw(st.lists(st.sampled_from([-np.inf, 0.0, 0.5, 1.0]), min_size=count, max_size=count))
    size = data.draw(st.integers(1, count))
    picks = []
    for subset in combinations(range(count), size):
        best = max(rewards[i] for i in subset)
        picks.append(np.mean([labels[i] for i in subset if rewards[i] == best]))
    assert expected_best(np.array(labels), np.array(rewards), size) == pytest.approx(np.mean(picks))


def test_a_row_with_fewer_candidates_takes_all_it_has() -> None:
    assert expected_best(np.array([0.0, 1.0]), np.array([1.0, 2.0]), 64) == 1


def test_a_candidate_without_a_reward_is_picked_only_where_none_has_one() -> None:
    labels = np.array([0.0, 1.0, 1.0])
    assert expected_best(labels, np.array([-9.0, -np.inf, -np.inf]), 3) == 0
    assert expected_best(labels, np.full(3, -np.inf), 3) == pytest.approx(2 / 3)


def test_thousands_of_candidates_overflow_nothing() -> None:
    assert expected_best(np.arange(4000.0), np.arange(4000.0), 2000) == pytest.approx(3998, abs=1)


# --- Intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_about_the_normal_one() -> None:
    found = interval(bootstrap(400, 0), np.array([0.0, 1.0] * 200))
    assert found is not None
    assert found["mean"] == 0.5
    assert (found["low"], found["high"]) == pytest.approx((0.451, 0.549), abs=0.006)


def test_the_interval_of_a_ratio_is_that_of_resampled_rows() -> None:
    rng = np.random.default_rng(3)
    above, below = rng.normal(size=30), rng.uniform(size=30)
    weights = bootstrap(30, 1)
    assert (weights.sum(axis=1) == 30).all()
    found = interval(weights, above, below)
    ratios = []
    for drawn in weights.astype(int):
        rows = np.repeat(np.arange(30), drawn)
        ratios.append(above[rows].sum() / below[rows].sum())
    assert found == pytest.approx(
        {"mean": above.sum() / below.sum(), "low": np.percentile(ratios, 2.5), "high": np.percentile(ratios, 97.5)}
    )


def test_the_same_seed_draws_the_same_rows_and_one_row_draws_itself() -> None:
    assert (bootstrap(9, 4) == bootstrap(9, 4)).all()
    assert (bootstrap(9, 4) != bootstrap(9, 5)).any()
    assert interval(bootstrap(1, 0), np.array([0.3])) == pytest.approx({"mean": 0.3, "low": 0.3, "high": 0.3})


def test_there_is_no_share_where_nothing_differs_and_resamples_of_such_rows_are_left_out() -> None:
    assert interval(bootstrap(2, 0), np.zeros(2), np.zeros(2)) is None
    found = interval(bootstrap(2, 0), np.array([0.0, 1.0]), np.array([0.0, 1.0]))  # a quarter draws the first row twice
    assert found == {"mean": 1, "low": 1, "high": 1}


# --- Ranks and pools -------------------------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans_with_shared_ranks() -> None:
    a, b = np.array([1.0, 2, 2, 3, 9]), np.array([10.0, 5, 7, 3, 1])
    ranks = np.array([1, 2.5, 2.5, 4, 5]), np.array([5, 3, 4, 2, 1])
    assert spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert spearman(a, a) == pytest.approx(1)


def test_rank_correlation_leaves_out_what_has_no_reward_and_is_none_where_nothing_varies() -> None:
    assert spearman(np.array([-np.inf, 1, 2]), np.array([9.0, 1, 2])) == pytest.approx(1)
    assert spearman(np.zeros(3), np.arange(3.0)) is None
    assert spearman(np.array([-np.inf, 1]), np.array([1.0, 2])) is None
    assert spearman(np.full(2, -np.inf), np.arange(2.0)) is None


def test_the_pool_holds_the_generators_within_five_points_of_each_other_that_wrote_most() -> None:
    labels = [np.array([0.50, 0.54, 0.90, 0.0]), np.array([0.50, 0.54, 1.0, 0.94])]
    generators = [["a", "b", "c", "d"], ["a", "b", "c", "c"]]
    assert equal_pool(labels, generators) == [[0, 1], [0, 1]]


def test_a_row_with_one_candidate_of_the_pool_is_no_row_of_it() -> None:
    labels = [np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0])]
    assert equal_pool(labels, [["a", "b", "c"], ["a", "c"]]) == [[0, 1], []]


def test_without_generators_there_is_no_pool() -> None:
    assert equal_pool([np.array([0.0, 1.0])], [()]) == [[]]


# --- Baselines and the inversion check -------------------------------------------------------------------------------


def test_consensus_orders_as_the_mean_word_f1_with_the_others() -> None:
    texts = ["the cat sat on a mat", "a cat sat there, on two mats", "no", "cat cat cat"]
    f1 = WordF1()
    others = [[f1(text, other).f1 for j, other in enumerate(texts) if j != i] for i, text in enumerate(texts)]
    own = baselines(texts, np.zeros(4), None)["consensus"]
    assert own == pytest.approx((np.sum(others, axis=1) + 1) / 4), "itself included, which moves all alike"


def test_every_baseline_prefers_what_its_name_says() -> None:
    texts = ["so it is 4", "4", "it is 5, I think", "no idea"]
    rules = baselines(texts, np.array([0.0, 1.0, 0.0, 0.0]), lambda text: next((d for d in "45" if d in text), None))
    assert list(rules) == ["random", "first", "longest", "shortest", "consensus", "majority", "oracle"]
    picked = {name: set(np.flatnonzero(rewards == rewards.max())) for name, rewards in rules.items()}
    assert picked == {
        "random": {0, 1, 2, 3}, "first": {0}, "longest": {2}, "shortest": {1}, "consensus": {0},
        "majority": {0, 1}, "oracle": {1},
    }  # fmt: skip
    assert rules["majority"][3] == 0, "no answer, no vote"
    assert "majority" not in baselines(texts, np.zeros(4), None)


def test_the_echo_is_the_share_of_words_that_come_again() -> None:
    assert repeated("Write a haiku about rain", "Write about rain: drip, drip") == pytest.approx(3 / 4)
    assert repeated("", "rain") == 0


PROMPTS = [f"write about topic{i} and thing{i}" for i in range(70)]


def test_a_reader_finds_its_own_prompt_among_all() -> None:
    found = inversion(PROMPTS, [(i, f"topic{i}", f"it is topic{i}, surely") for i in range(70)], 0)
    assert found["retrieval_at_1"] == {"8": 1, "64": 1}
    assert found["margin"] == pytest.approx(2 / 6)
    assert found["echo_rate"] == 1


def test_who_infers_the_same_for_every_answer_is_at_chance() -> None:
    found = inversion(PROMPTS, [(i, "write about", "something") for i in range(70)], 0)
    assert found["retrieval_at_1"] == pytest.approx({"8": 1 / 8, "64": 1 / 64})
    assert (found["margin"], found["echo_rate"]) == (0, 0)


def test_prompts_that_are_equal_are_no_rivals_and_too_few_give_no_figure() -> None:
    found = inversion(["a b", "a b", "c d"], [(0, "a b", "x")], 0)
    assert found["retrieval_at_1"] == {"8": None, "64": None}
    assert found["margin"] is None
    assert inversion(PROMPTS, [], 0)["echo_rate"] is None
