"""Budgets: rounds of any size give the same candidates, never more than was asked for; nonsense ends its own group."""

import asyncio
from functools import cache
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring import Own

from bon import BestOfN, Fixed, Flip, Group, RewardFunction, StopAt, Task
from bon.budget import MOST, Budget, as_budget
from bon.engines.base import Completion
from bon.engines.scripted import ScriptedEngine
from bon.errors import BonError, EngineError, InputError, UnknownNameError
from bon.models import ModelPool
from bon.pipeline import Pipeline

numbers = count()
PROMPT = "Write a slogan for a bakery called Sunrise and its warm bread"


class Rounds:
    """Asks for the given numbers, one a round, and remembers what it saw."""

    def __init__(self, *sizes):
        self.sizes, self.seen = sizes, []

    def more(self, group):
        assert len(group.candidates) == len(group.scores) == group.asked, "all that was asked for is scored"
        self.seen.append(group.rewards)
        return self.sizes[len(self.seen) - 1] if len(self.seen) <= len(self.sizes) else 0


class Recorder(ScriptedEngine):
    """Remembers the samples that it was asked for."""

    def generate(self, requests, *, keep=None):
        self.asked = getattr(self, "asked", []) + [(r.first_sample, r.n) for r in requests]
        return super().generate(requests, keep=keep)


divisions = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@given(divisions, st.booleans(), st.booleans())
@settings(max_examples=40)
def test_however_the_samples_are_divided_the_candidates_are_the_same(sizes, concurrent, whole):
    """A later round repeated the first one's samples, because every call began at sample 0."""
    n = sum(sizes)
    texts = {}
    for budget in (Fixed(n), Rounds(*sizes)):
        engine = Recorder(concurrent=concurrent)
        scorer = (lambda p, rs: [len(r) for r in rs]) if whole else Own(lambda e: len(e.candidate.text))
        result = BestOfN(engine, scorer, n=budget, sampling={"seed": 5})(PROMPT)
        texts[type(budget)] = ([c.text for c in result.candidates], result.text, [s.reward for s in result.scores])
        assert sum(asked for _, asked in engine.asked) == n
    assert texts[Fixed] == texts[Rounds]
    assert engine.asked == [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


@cache
def mini():
    return ModelPool().engine("mini")


@given(divisions)
@settings(max_examples=5)
def test_rounds_give_the_same_candidates_on_torch(sizes):
    scorer = Own(lambda e: len(e.candidate.text))
    options = {"sampling": {"seed": 5, "max_tokens": 16}}
    whole = BestOfN(mini(), scorer, n=sum(sizes), **options)(PROMPT)
    rounds = BestOfN(mini(), scorer, n=Rounds(*sizes), **options)(PROMPT)
    assert [c.text for c in rounds.candidates] == [c.text for c in whole.candidates]
    assert len({c.text for c in whole.candidates}) > len(whole.candidates) / 2, "they are samples, and differ"


def test_a_budget_sees_every_reward_of_the_rounds_before():
    budget = Rounds(1, 2, 1)
    result = BestOfN(ScriptedEngine(["a", "bb", "ccc", "d"]), Own(lambda e: len(e.candidate.text)), n=budget)(PROMPT)
    assert budget.seen == [(), (1,), (1, 2, 3), (1, 2, 3, 1)]
    assert result.text == "ccc"
    assert result.timing.sample <= result.timing.total


def test_each_prompt_of_a_file_has_rounds_of_its_own():
    class UntilLong:
        def more(self, group):
            return 0 if (group.best_reward or 0) >= len(group.task.instruction) else 1

    def script(text, draw):
        return "x" * (draw + 1)

    for concurrent in (True, False):
        bon = BestOfN(
            ScriptedEngine(script, concurrent=concurrent), Own(lambda e: len(e.candidate.text)), n=UntilLong()
        )
        assert [len(r.candidates) for r in bon.map(["abc", "a", "abcde"])] == [3, 1, 5]


def test_a_budget_of_numpy_numbers_is_a_budget():
    class Numpy:
        def more(self, group):
            return np.int64(3) - group.asked

    assert len(BestOfN(ScriptedEngine(), Own(lambda e: 0.5), n=Numpy())(PROMPT).candidates) == 3


def test_a_budget_that_wants_nothing_gives_a_result_that_says_so():
    result = BestOfN(ScriptedEngine(), Own(lambda e: 0.5), n=Rounds())(PROMPT)
    assert (result.text, result.candidates, result.selection.reason) == (None, (), "there are no candidates")


def test_a_policy_that_is_gone_is_not_asked_for_ever():
    """A budget that goes on until there is a good reward went on for ever with a policy that answered nothing."""

    class UntilGood:
        def more(self, group):
            return 0 if group.best_reward else 2

    class Gone(Recorder):
        async def _generate(self, requests, keep):
            for index, request in enumerate(requests):
                for sample in request.samples:
                    yield Completion.failed(index, sample, EngineError("gone"))

    engine = Gone()
    with pytest.raises(EngineError, match="gone"):
        BestOfN(engine, Own(lambda e: 0.5), n=UntilGood())(PROMPT)
    assert engine.asked == [(0, 2), (2, 2)], "one failure may pass, four in a row do not"


def test_a_budget_without_most_that_waits_for_a_reward_that_never_comes_ends():
    """A scorer that gave no reward, or never a good one, was sampled for until the process was ended."""

    class UntilGood:
        def more(self, group):
            return 300 if (group.best_reward or 0) < 0.9 else 0

    for reward in (None, 0.5):
        group = asyncio.run(collected(UntilGood(), reward))
        assert (group.asked, group.best_reward) == (MOST, reward)


async def collected(budget, reward):
    group = Group(Task.of(PROMPT), whole=True)
    scorer = RewardFunction(lambda prompt, responses: [reward for _ in responses])
    await Pipeline(scorer, ScriptedEngine(["word"]), budget).run([group])
    return group


def test_a_policy_that_dies_between_rounds_leaves_the_first():
    class Dies(Recorder):
        async def _generate(self, requests, keep):
            if requests[0].first_sample:
                for sample in requests[0].samples:
                    yield Completion.failed(0, sample, EngineError("gone"))
                return
            async for completion in super()._generate(requests, keep):
                yield completion

    result = BestOfN(Dies(), Own(lambda e: 0.5), n=Rounds(2, 3, 1, 2))(PROMPT)
    assert [c.finish_reason for c in result.candidates] == ["stop"] * 2 + ["error"] * 4
    assert result.reward == 0.5


def test_a_deadline_ends_the_rounds():
    class Forever:
        def more(self, group):
            return 1

    bon = BestOfN(ScriptedEngine(step_seconds=0.005), Own(lambda e: 0.5), n=Forever())
    result = asyncio.run(bon.run(PROMPT, deadline=0.3))
    assert result.reward == 0.5
    assert 0 < len(result.candidates) < 100


# --- StopAt -----------------------------------------------------------------------------------------------------------

answers = st.lists(st.sampled_from(["a", "a b", "a b c", "a b c d", "x", "x y z"]), min_size=1, max_size=6)


@given(answers, st.booleans(), st.booleans())
@settings(max_examples=60)
def test_stopping_at_the_largest_reward_never_changes_the_winners_reward(texts, concurrent, prune):
    engine = ScriptedEngine(lambda text, draw: text.rpartition("Response:\n")[2], concurrent=concurrent)
    options = {"sampling": {"temperature": 1.0}, "prune": prune}
    policy = ScriptedEngine(texts, concurrent=concurrent)
    full = BestOfN(policy, Flip(engine), n=len(texts), **options)("a b c")
    stopped = BestOfN(policy, Flip(engine), n=StopAt(1.0, most=len(texts)), **options)("a b c")
    assert stopped.reward == full.reward
    assert len(stopped.candidates) == len(full.candidates)


def test_stop_at_works_with_a_scorer_of_ones_own_which_posts_nothing():
    """A scorer had to note its rewards itself, and one that forgot made ``stop_at`` silently do nothing."""
    engine = ScriptedEngine(["good", "word " * 400])
    result = BestOfN(engine, Own(lambda e: 1.0 if e.candidate.text == "good" else 0.1), n="stop-at:1.0,most=2")(PROMPT)
    assert [c.finish_reason for c in result.candidates] == ["stop", "abort"]
    assert engine.decoded < 100


def test_what_comes_after_the_reward_to_stop_at_is_not_scored():
    """A function cannot be stopped, so its other answers still came, and each was scored for nothing."""
    scorer = Own(lambda e: 1.0)
    result = BestOfN(lambda prompt: f"answer {next(numbers)}", scorer, n="stop-at:1.0,most=9", schedule="each")(PROMPT)
    assert len(result.candidates) == 9
    assert sum(map(len, scorer.calls)) < 9
    assert [s.status for s in result.scores].count("pruned") == 9 - sum(map(len, scorer.calls))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_as", "made"),
    [
        (4, Fixed(4)),
        ("4", Fixed(4)),
        (" 4 ", Fixed(4)),
        ("fixed:4", Fixed(4)),
        ("stop-at:0.9", StopAt(0.9)),
        ("stop-at:0.9,most=16", StopAt(0.9, 16)),
        (StopAt(1, most=2), StopAt(1, 2)),
    ],
)
def test_a_budget_is_a_number_or_a_spec_or_an_object(given_as, made):
    assert as_budget(given_as) == made
    assert isinstance(made, Budget)


@pytest.mark.parametrize(
    ("given_as", "complaint"),
    [
        (0, "n must be a whole number of at least 1, got 0"),
        ("0", "n must be"),
        ("-3", "n must be"),
        (True, "n must be"),
        (2.0, "n must be"),
        (StopAt, "n must be"),
        ("stop-at", "stop-at:REWARD"),
        ("stop-at:high", "the reward to stop at must be a number, got 'high'"),
        ("stop-at:0.5,most=0", "most must be a whole number"),
        ("stop-at:0.5,moss=2", "Did you mean 'most'"),
        ("stopat:0.5", "Did you mean 'stop-at'"),
        ("²", "a whole number"),
        ("2.5", "n must be a whole number of at least 1, or a budget such as stop-at:0.9, got 2.5"),
    ],
)
def test_what_is_no_budget_is_refused_with_a_hint(given_as, complaint):
    with pytest.raises(InputError, match=complaint):
        as_budget(given_as)


@pytest.mark.parametrize("attributes", [{"most": "many"}, {"most": 0}, {"stop_at": "high"}, {"stop_at": float("nan")}])
def test_a_budget_whose_limits_are_no_numbers_is_refused_when_it_is_passed(attributes):
    """They were compared with rewards in the middle of a run, and that error ended the whole file."""
    budget = type("Odd", (), {"more": lambda self, group: 1, **attributes})()
    with pytest.raises(BonError, match=f"the budget's {next(iter(attributes))} must be"):
        BestOfN(ScriptedEngine(), Own(lambda e: 0.5), n=budget)


def test_an_unknown_budget_names_the_known_ones():
    with pytest.raises(UnknownNameError, match="stop-at"):
        as_budget("adaptiv:3")


def test_a_batch_that_is_good_enough_is_the_last_one():
    """All samples were asked for at once, so that a good one could only stop what was still running."""
    for reward, rounds in ((0.0, 1), (2.0, 3)):
        engine = Recorder(concurrent=True)
        result = BestOfN(engine, Own(lambda e: 1.0), n=StopAt(reward, most=5, batch=2), sampling={"seed": 5})(PROMPT)
        assert engine.asked == [(0, 2), (2, 2), (4, 1)][:rounds]
        assert len(result.candidates) == sum(n for _, n in engine.asked)
    with pytest.raises(InputError, match="batch"):
        as_budget("stop-at:1.0,batch=0")
