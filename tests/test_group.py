"""The group: admission, copies, statuses, usage, callbacks, deadlines, and what becomes of a task without a reward."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scoring import Own, group_of, scored

from bon.errors import EngineError, InputError, UnavailableError, UserCodeError
from bon.group import Group
from bon.selectors import Best
from bon.task import Task
from bon.types import Candidate, Score, Usage

TASK = Task.of("Say something")


def test_copies_share_one_score_and_the_first_is_the_original():
    group = group_of(TASK, ["same", "other", "same", "same"])
    assert [p.candidate.index for p in group.pending()] == [0, 1]
    group.post(group.candidates[0], Score(0.7, usage=Usage(scorer_completion_tokens=5)))
    group.post(group.candidates[1], Score(0.2))
    assert [s.reward for s in group.scores] == [0.7, 0.2, 0.7, 0.7]
    assert [s.same_as for s in group.scores] == [None, None, 0, 0]
    assert group.usage.scorer_completion_tokens == 5, "paid for once"
    result = group.result(Best())
    assert result.best == 0
    assert result.saved.copies == 2


def test_a_copy_that_comes_after_the_score_has_it_at_once():
    group = Group(TASK)
    group.ask(1)
    group.admit(Candidate(0, "same"))
    group.post(group.candidates[0], Score(0.7))
    group.ask(1)
    assert not group.admit(Candidate(1, "same"))
    assert group.rewards == (0.7, 0.7)


def test_a_scorer_that_looks_at_the_whole_group_gets_copies_too():
    """``42, 42, 42, 41`` arrived as ``42, 41``: rank, majority and normalised rewards were wrong without a sign."""
    group = group_of(TASK, ["42", "42", "42", "41", " "], whole=True)
    assert [p.candidate.text for p in group.pending()] == ["42", "42", "42", "41"]


@pytest.mark.parametrize(
    ("candidate", "status"),
    [
        (Candidate(0, ""), "empty"),
        (Candidate(0, " \n"), "empty"),
        (Candidate(0, "wri", "abort"), "pruned"),
        (Candidate(0, "", "error", error="the server said no"), "failed"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_what_needs_no_score_has_a_status_with_a_reason_instead(candidate, status, whole):
    group = group_of(TASK, [candidate, "text"], whole=whole)
    assert [p.candidate.index for p in group.pending()] == [1]
    assert (group.scores[0].status, group.scores[0].reward) == (status, None)
    assert group.scores[0].reason
    scored(Own(lambda each: 0.1), group)
    assert group.result(Best()).text == "text"


def test_a_text_that_was_cut_off_is_scored_like_any_other():
    group = group_of(TASK, [Candidate(0, "a b", "length")])
    assert len(group.pending()) == 1


def test_samples_that_were_not_asked_for_are_refused():
    group = group_of(TASK, ["a"])
    for index in (0, 1, -1):
        with pytest.raises(EngineError, match=f"sample {index} twice or unasked"):
            group.admit(Candidate(index, "b"))


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_a_failure_and_never_the_best(reward):
    """A NaN ended the whole run of a file; an infinite one would have won."""
    group = group_of(TASK, ["a", "b"])
    group.post(group.candidates[0], Score(reward))
    group.post(group.candidates[1], Score(-3.0))
    assert (group.scores[0].status, group.scores[0].reward) == ("failed", None)
    assert "not a finite number" in group.scores[0].reason
    assert group.best_reward == -3.0
    assert group.result(Best()).best == 1


def test_no_reward_is_a_failure_whatever_its_status_says():
    group = group_of(TASK, ["a"])
    group.post(group.candidates[0], Score(None))
    assert (group.scores[0].status, group.scores[0].reason) == ("failed", "the scorer gave no reward")


def test_one_sample_that_could_not_be_made_leaves_the_others():
    group = Group(TASK)
    group.ask(2)
    group.admit(Candidate(0, "", "error", error="no"), error=EngineError("no"))
    group.admit(Candidate(1, "yes"), Usage(policy_prompt_tokens=4, policy_completion_tokens=2))
    group.post(group.candidates[1], Score(0.5))
    result = group.result(Best())
    assert (result.text, result.errors) == ("yes", ("no",))
    assert result.usage.policy_prompt_tokens == 4


def test_without_any_sample_or_any_score_the_reason_is_the_outcome():
    unsampled = Group(TASK)
    unsampled.ask(2)
    for index in range(2):
        unsampled.admit(Candidate(index, "", "error", error="no"), error=EngineError("no"))
    with pytest.raises(EngineError, match="no"):
        unsampled.result(Best())
    unscored = group_of(TASK, ["a", "b"])
    for candidate in unscored.candidates:
        unscored.post(candidate, Score(None, "failed", "timed out", error=UnavailableError("timed out")))
    with pytest.raises(UnavailableError, match="timed out"):
        unscored.result(Best())


def test_a_candidate_without_a_score_by_an_engines_fault_leaves_the_others():
    group = group_of(TASK, ["a", "b"])
    group.post(group.candidates[0], Score(None, "failed", "timed out", error=UnavailableError("timed out")))
    group.post(group.candidates[1], Score(0.5))
    assert group.result(Best()).text == "b"
    assert group.scores[0].reason == "timed out"


def test_the_first_reason_stays():
    group = group_of(TASK, ["a"])
    group.fail(InputError("first"))
    group.fail(InputError("second"))
    with pytest.raises(InputError, match="first"):
        group.result(Best())


def test_a_selector_that_raises_is_the_error_of_its_task():
    group = group_of(TASK, ["a"])
    group.post(group.candidates[0], Score(0.5))

    def broken(rewards, order, texts):
        raise KeyError("x")

    with pytest.raises(UserCodeError, match="the selector raised KeyError"):
        group.result(broken)
    assert isinstance(group.error, UserCodeError)


def test_a_callback_that_raises_ends_its_task_and_is_not_called_again():
    calls = []

    def broken(event):
        calls.append(event)
        raise RuntimeError("the screen is gone")

    group = group_of(TASK, ["a", "b"], callback=broken)
    assert len(calls) == 1
    assert group.over
    with pytest.raises(UserCodeError, match="the callback raised RuntimeError: the screen is gone"):
        group.result(Best())


def test_what_a_deadline_cut_off_is_late():
    group = group_of(TASK, ["a", "b", "b"])
    group.ask(1)
    group.post(group.candidates[0], Score(0.5))
    group.expire("the deadline of 2 s passed")
    assert [s.status for s in group.scores] == ["ok", "late", "late", "late"]
    assert group.scores[3].reason == "the deadline of 2 s passed before it was finished"
    assert group.scores[1].reason == "the deadline of 2 s passed before it was scored"
    result = group.result(Best())
    assert (result.text, len(result.candidates)) == ("a", 4)


def test_a_policy_that_returned_too_few_is_found_out():
    group = Group(TASK)
    group.ask(3)
    group.admit(Candidate(0, "a"))
    with pytest.raises(EngineError, match="1 of 3 completions"):
        group.result(Best())


@given(st.lists(st.sampled_from(["a", "b", "", "c"]), min_size=1, max_size=8), st.booleans())
def test_whatever_comes_every_candidate_has_one_score_and_is_told_once(texts, whole):
    told = []
    group = group_of(TASK, texts, whole=whole, callback=told.append)
    scored(Own(lambda each: len(each.candidate.text)), group)
    assert [s.candidate for s in group.scores] == list(range(len(texts)))
    assert [c.text for c in group.candidates] == texts
    assert sorted(e.candidate for e in told if isinstance(e, Score)) == list(range(len(texts)))
    assert sorted(e.index for e in told if isinstance(e, Candidate)) == list(range(len(texts)))
    assert group.pending() == [] or whole
