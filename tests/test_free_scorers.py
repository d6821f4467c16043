"""Rewards without a model, and the final answers that some of them count."""

import itertools
import re

import pytest
from scoring import scores_of

from bon import BestOfN
from bon.answers import as_extract, classes, last_boxed, last_choice
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError
from bon.spec import SCORERS

TEXTS = ["short", "a longer one", "the longest of all", "short"]


@pytest.mark.parametrize(("spec", "picked"), [("longest", 2), ("shortest", 0), ("first", 0)])
def test_the_baselines_pick_what_their_names_say(spec, picked):
    assert BestOfN(scorer=spec).rerank("Say something.", TEXTS).best_candidate.index == picked


def test_chance_does_not_depend_on_the_order_and_does_on_the_seed():
    def rewards(spec, texts):
        return dict(
            zip(texts, (s.reward for s in scores_of(SCORERS.make(spec), "Say something.", *texts)), strict=True)
        )

    texts = TEXTS[:3]
    alone = rewards("random", texts)
    assert len(set(alone.values())) == 3
    for order in itertools.permutations(texts):
        assert rewards("random", order) == alone
    assert rewards("random:1", texts) != alone


def test_the_policys_log_probability_is_a_reward():
    policy = ScriptedEngine(["one two three", "one"])
    for spec in ("logprob", "logprob:sum"):
        result = BestOfN(policy, spec, n=2)("Count.")
        totals = [c.cumulative_logprob / (c.completion_tokens if spec == "logprob" else 1) for c in result.candidates]
        assert [score.reward for score in result.scores] == pytest.approx(totals)
        assert result.best_candidate.index == totals.index(max(totals))


def test_a_candidate_from_elsewhere_has_no_log_probability_and_no_reward():
    [score] = scores_of(SCORERS.make("logprob"), "Count.", "one")
    assert (score.reward, score.status) == (None, "failed")


def test_the_majority_counts_answers_and_not_texts():
    texts = ["It is 4.", "So 2 + 2 = 4.0", "I say 5", "Who knows"]
    found = scores_of(SCORERS.make("majority:number"), "What is 2 + 2?", *texts, whole=True)
    assert [score.reward for score in found] == [0.5, 0.5, 0.25, 0.0]
    assert found[0].explanation == "4"
    assert "no vote" in found[3].reason


def test_answers_that_are_equal_in_mathematics_are_one():
    pytest.importorskip("math_verify", reason="pip install 'bon[evals]'")
    assert classes(["0.5", "\\frac{1}{2}", "1/2", None, "3", "3.0", "1,000", "1000"]) == [0, 0, 0, None, 3, 3, 5, 5]
    assert classes(["2^3", "2^4", "23", "x", "y"]) == [0, 1, 2, 3, 4]


def test_a_vote_counts_equal_answers_together():
    from bon.selectors import WeightedVote

    result = BestOfN(scorer="longest", selector=WeightedVote("number")).rerank(
        "What?", ["It is 7 as I have said many times over.", "It is 4, I think.", "I think it is 4.0 as well."]
    )
    assert "4" in result.text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{4} and \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{never closed", None),
        ("\\boxed{}", None),
        ("none", None),
    ],
)
def test_the_last_box_is_the_answer(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is B.", "B"),
        ("Answer: **C**", "C"),
        ("I rule out (A), so (D) it is", "D"),
        ("\\boxed{\\text{b}}", "B"),
        ("Not A. In the end:\nE", "E"),
        ("A good answer is Elaborate.", None),
        ("nothing", None),
    ],
)
def test_the_choice_is_the_letter_named_last(text, answer):
    assert last_choice(text) == answer


@pytest.mark.parametrize("spec", ["majority:(", "random:-1", "logprob:most", "majority"])
def test_options_that_are_none_are_refused(spec):
    with pytest.raises(InputError):
        SCORERS.make(spec)


def test_what_is_looked_for_is_a_name_an_expression_or_a_function():
    with pytest.raises(InputError, match=re.escape("number, boxed, choice")):
        as_extract(3)


def test_free_scorers_run_no_model():
    for spec in ("longest", "shortest", "first", "random", "logprob", "majority:number"):
        made = SCORERS.make(spec)
        assert (made.models, made.engines) == ((), ())
