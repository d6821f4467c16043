"""Selectors: the ranking rule, ties, draws, votes, abstaining; never a candidate without a reward."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bon.answers import as_extract
from bon.errors import InputError, UnknownNameError, UserCodeError
from bon.selectors import Softmax, TopK, WeightedVote, as_selector, rank, select
from bon.types import Candidate, Score, Selection, Usage

NAN = math.nan


def choose(selector, scores, texts=None, min_reward=None):
    candidates = [Candidate(s.candidate, t) for s, t in zip(scores, texts or [""] * len(scores), strict=True)]
    return select(as_selector(selector, min_reward), scores, candidates)


def scored(*rewards):
    return [Score(r, "failed" if r is None else "ok", candidate=i) for i, r in enumerate(rewards)]


def test_higher_rewards_rank_first():
    assert choose("best", scored(0.2, 0.9, 0.5)) == Selection(1, (1, 2, 0), (1,))


def test_ties_go_to_the_higher_tie_break_then_fewer_tokens_then_the_lower_index():
    nothing = np.full(4, NAN)
    same = np.full(4, 0.5)
    assert rank(same, np.array([-2.0, -1.0, NAN, -1.0]), np.zeros(4)).tolist() == [1, 3, 0, 2]
    assert rank(same, np.full(4, -1.0), np.array([9, 3, 9, 2])).tolist() == [3, 1, 0, 2]
    assert rank(same, nothing, np.zeros(4)).tolist() == [0, 1, 2, 3]


def test_pruned_candidates_rank_by_bound_behind_every_reward_and_failed_ones_last():
    scores = [
        Score(None, "failed", candidate=0),
        Score(None, "pruned", upper_bound=0.3, candidate=1),
        Score(0.1, candidate=2),
        Score(None, "pruned", upper_bound=0.6, candidate=3),
        Score(None, "empty", candidate=4),
    ]
    assert choose("best", scores).ranking == (2, 3, 1, 0, 4)


@given(
    st.lists(
        st.tuples(
            st.none() | st.sampled_from([0.0, 0.5, 1.0]),
            st.none() | st.sampled_from([-1.0, -2.0]),
            st.integers(0, 2),
            st.sampled_from(["failed", "pruned"]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_ranking_is_the_stated_rule(rows):
    scores = [
        Score(
            r,
            "ok" if r is not None else s,
            tie_break=t,
            usage=Usage(scorer_completion_tokens=k),
            upper_bound=0.4 if s == "pruned" else None,
            candidate=i,
        )
        for i, (r, t, k, s) in enumerate(rows)
    ]

    def stated(score):
        if score.reward is not None:
            tie = -math.inf if score.tie_break is None else score.tie_break
            return (0, -score.reward, -tie, score.tokens, score.candidate)
        return (1 if score.status == "pruned" else 2, 0, 0, 0, score.candidate)

    selection = choose("best", scores)
    assert selection.ranking == tuple(s.candidate for s in sorted(scores, key=stated))
    if selection.best is not None:
        assert scores[selection.best].reward is not None


def test_without_any_reward_it_abstains_and_counts_the_statuses():
    scores = [
        Score(None, "failed", reason="not parsed", candidate=0),
        Score(None, "empty", candidate=1),
        Score(None, "failed", candidate=2),
    ]
    selection = choose("best", scores)
    assert (selection.best, selection.picked, selection.ranking) == (None, (), (0, 1, 2))
    assert selection.reason == "no candidate has a reward (1 empty, 2 failed): not parsed"
    assert choose("best", []).reason == "there are no candidates"


def test_below_the_minimum_reward_it_abstains_with_the_numbers():
    selection = choose("best", scored(0.25, 0.5), min_reward=0.6)
    assert (selection.best, selection.ranking) == (None, (1, 0))
    assert selection.reason == "the best reward, 0.5, is below the minimum of 0.6"
    assert choose("best", scored(0.25, 0.6), min_reward=0.6).best == 1


def test_a_minimum_reward_holds_for_every_picked_candidate():
    assert choose(TopK(3), scored(0.25, 0.5, 0.7), min_reward=0.4).picked == (2, 1)


def test_top_k_takes_what_has_a_reward():
    assert choose(TopK(2), scored(0.2, 0.9, 0.5)).picked == (1, 2)
    assert choose(TopK(5), scored(0.2, None, 0.5)).picked == (2, 0)


def test_softmax_draws_in_proportion_and_the_same_seed_draws_the_same():
    scores = scored(0.0, None, 1.0)
    weights = choose(Softmax(0.5, seed=1), scores).weights
    assert weights == pytest.approx((1 / (1 + math.e**2), 0, math.e**2 / (1 + math.e**2)))
    assert choose(Softmax(0.5, seed=1), scores) == choose(Softmax(0.5, seed=1), scores)
    drawn = [choose(Softmax(0.5, seed=s), scores).best for s in range(400)]
    assert set(drawn) == {0, 2}
    assert drawn.count(2) / 400 == pytest.approx(weights[2], abs=0.06)


def test_the_prompts_of_a_file_draw_independently_under_one_seed():
    """Seeded with the seed alone, the draw was the same for every prompt: always the third of the ranking, say."""
    scores = scored(0.0, 0.0, 0.0, 0.0)
    drawn = [choose(Softmax(1.0, seed=1), scores, [f"{prompt} {i}" for i in range(4)]).best for prompt in range(200)]
    assert all(drawn.count(i) > 20 for i in range(4))


@given(st.permutations(range(5)), st.integers(0, 9))
def test_shuffled_candidates_draw_the_same_text(order, seed):
    rewards, texts = [0.1, 0.9, 0.5, None, 0.7], ["a", "b", "c", "d", "e"]
    plain = choose(Softmax(0.5, seed=seed), scored(*rewards), texts).best
    shuffled = choose(Softmax(0.5, seed=seed), scored(*(rewards[i] for i in order)), [texts[i] for i in order]).best
    assert order[shuffled] == plain


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-3])
def test_a_cold_softmax_is_the_best(temperature):
    assert choose(Softmax(temperature, seed=3), scored(0.2, 0.9, 0.5)).best == 1


def test_a_vote_adds_up_rewards_of_equal_answers_and_picks_the_best_of_the_winning_one():
    texts = ["so 7", "I say 5", "it is 5.", "none"]
    selection = choose(WeightedVote(r"(\d+)"), scored(0.9, 0.5, 0.6, 0.95), texts)
    assert selection.best == 2
    assert selection.weights == (0.9, 0.5, 0.6, 0.0)


def test_the_last_match_is_the_answer_and_functions_work_too():
    assert as_extract(r"\d+")("3 and 4") == "4"
    assert as_extract(r"= (\d+)")("1 = 3") == "3"
    assert as_extract(lambda text: None if text == "?" else text.upper())(" x ") == "X"
    assert as_extract(lambda text: None)("x") is None


def test_negative_rewards_are_shifted_so_that_the_worst_weighs_nothing():
    texts = ["1", "2", "2"]
    selection = choose(WeightedVote(r"\d"), scored(-1.0, -2.0, -3.0), texts)
    assert selection.weights == (2.0, 1.0, 0.0)
    assert selection.best == 0
    assert choose(WeightedVote(r"\d"), scored(0.0, 0.0, 0.0), texts).best == 1


def test_votes_without_an_answer_fall_back_to_the_best_and_failed_ones_do_not_vote():
    assert choose(WeightedVote(r"\d"), scored(0.1, 0.2), ["x", "y"]).best == 1
    assert choose(WeightedVote(r"\d"), scored(0.1, None, None), ["1", "2", "2"]).best == 0


def test_indices_are_the_candidates_own():
    scores = [Score(0.1, candidate=7), Score(0.2, candidate=3)]
    assert choose(TopK(2), scores) == Selection(3, (3, 7), (3, 7))


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: as_selector("bets"), "Did you mean 'best'"),
        (lambda: as_selector(3), "a selector is a name or a function"),
        (lambda: as_selector("best", NAN), "min_reward must be a number, got nan"),
        (lambda: TopK(0), "k must be a whole number of at least 1, got 0"),
        (lambda: Softmax(-1), "temperature must be a number >= 0"),
        (lambda: Softmax(1, seed=-1), "seed must be"),
        (lambda: WeightedVote("("), "not a regular expression"),
        (lambda: WeightedVote(3), "a regular expression or a function"),
    ],
)
def test_bad_options_are_refused(make, problem):
    with pytest.raises((InputError, UnknownNameError), match=problem):
        make()


def test_scores_that_do_not_belong_to_the_candidates_are_refused():
    with pytest.raises(UserCodeError, match="2 scores do not belong to 1 candidates"):
        select(as_selector("best"), scored(0.1, 0.2), [Candidate(0, "x")])


def test_a_selector_of_ones_own_is_checked():
    last = choose(lambda rewards, order, texts: Selection(int(order[-1]), tuple(map(int, order))), scored(0.1, 0.2))
    assert last.best == 0
    with pytest.raises(UserCodeError, match="the selector raised ValueError: no"):
        choose(WeightedVote(lambda text: (_ for _ in ()).throw(ValueError("no"))), scored(0.1))
    with pytest.raises(UserCodeError, match="must return a Selection, got 1"):
        choose(lambda rewards, order, texts: 1, scored(0.1))


def test_what_a_selector_says_on_purpose_keeps_its_words_and_its_cause():
    """It was raised from itself: its cause was lost, and a traceback printed it twice."""

    def refuse(rewards, order, texts):
        raise InputError("not these") from KeyError("x")

    with pytest.raises(InputError, match=r"^not these$") as caught:
        choose(refuse, scored(0.1))
    assert isinstance(caught.value.__cause__, KeyError)
