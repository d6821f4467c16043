"""The pipeline: schedules, waves, whose an error is, cancellation and deadlines. Nothing hangs and nothing is lost."""

import asyncio
import sqlite3
import threading
import time
from contextlib import aclosing
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring import Own, group_of, scored

import bon.pipeline
from bon import BestOfN, Flip, RewardFunction, Sampling, Scorer, StopAt, score
from bon.engines.base import Completion
from bon.engines.function import FunctionEngine
from bon.engines.scripted import ScriptedEngine
from bon.errors import (
    BonError,
    EngineError,
    InputError,
    PromptTooLongError,
    UnavailableError,
    UserCodeError,
)
from bon.group import Group
from bon.models import ModelPool
from bon.pipeline import Pipeline, in_order, rank
from bon.scorers.base import Needs
from bon.selectors import Best
from bon.task import Message, Task
from bon.types import Result, Score

PROMPT = "Write a short poem about the red fox"
SCHEDULES = [True, False]


def outcomes_of(bon, prompts, **kwargs):
    async def collect():
        async with aclosing(bon.stream(prompts, **kwargs)) as stream:
            return [outcome async for outcome in stream]

    return [outcome for _, outcome in sorted(asyncio.run(collect()), key=lambda pair: pair[0])]


async def idle(before):
    """The tasks that are left over; what ends by itself may take a turn of the loop."""
    await asyncio.sleep(0)
    return {task for task in asyncio.all_tasks() - before if not task.done()}


# --- schedules --------------------------------------------------------------------------------------------------------


def test_reaching_the_reward_to_stop_at_stops_sampling_and_scoring():
    policy = ScriptedEngine(["A red fox.", "word " * 500])
    result = BestOfN(policy, Flip(ScriptedEngine([PROMPT])), n=StopAt(1.0, most=2))(PROMPT)
    assert (result.text, result.reward) == ("A red fox.", 1.0)
    assert policy.decoded < 100
    assert result.candidates[1].finish_reason == "abort"
    assert result.scores[1].status == "pruned"
    assert "1.0 was reached" in result.scores[1].reason
    assert (result.saved.unsampled, result.saved.pruned, result.saved.share) == (1, 0, 0.5)


def test_scoring_overlaps_sampling_where_both_engines_allow_it():
    policy = ScriptedEngine(["short", "word " * 30], step_seconds=0.002)
    result = BestOfN(policy, ScriptedEngine([PROMPT], step_seconds=0.002), n=2, prune=False)(PROMPT)
    assert result.scores[0].finished < result.candidates[1].finished
    assert result.timing.overlap > 0


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({}, "each"),
        ({"prune": False}, "all"),
        ({"prune": False, "n": "stop-at:1.0,most=2"}, "each"),
        ({"prune": False, "schedule": "each"}, "each"),
        ({"schedule": "all"}, "all"),
    ],
)
def test_one_engine_that_does_both_scores_at_the_end_where_nothing_can_be_skipped(options, schedule):
    engine = ScriptedEngine(["short", "word " * 30], step_seconds=0.001)
    result = BestOfN(engine, "flip", **{"n": 2, **options})(PROMPT)
    last = max(candidate.finished for candidate in result.candidates)
    assert (min(score.started for score in result.scores) >= last) == (schedule == "all")


def test_somebody_who_waits_for_single_scores_gets_each_at_once():
    engine = ScriptedEngine(["short", "word " * 30], step_seconds=0.001)
    bon = BestOfN(engine, "flip", n=2, prune=False)
    for options in ({"callback": lambda event: None}, {"deadline": 60.0}):
        result = asyncio.run(bon.run(PROMPT, **options))
        assert result.scores[0].started < result.candidates[1].finished


def test_an_engine_is_told_whether_anybody_waits_for_single_completions():
    """Over HTTP one request for all samples is cheaper, and all of them come, fail and are given up together."""
    seen = []

    class Told(ScriptedEngine):
        def generate(self, requests, *, keep=None):
            seen.append({request.together for request in requests})
            return super().generate(requests, keep=keep)

    def told(deadline=None, callback=None, **options):
        seen.clear()
        engine = Told(["short", "word " * 9])
        asyncio.run(
            BestOfN(engine, **{"scorer": "flip", "n": 2, **options}).run(PROMPT, deadline=deadline, callback=callback)
        )
        return seen

    assert told(prune=False) == [{True}, {True}], "samples, then scores"
    assert told(scorer="consensus") == [{True}]
    assert told()[0] == {False}, "a reward that is there early may prune others"
    for options in ({"callback": lambda event: None}, {"deadline": 60.0}, {"n": "stop-at:1.0,most=2"}):
        assert told(prune=False, **options)[0] == {False}


def test_a_scorer_that_wants_batches_gets_what_is_ready_while_it_was_busy():
    batches = []

    class Slow(Scorer):
        async def score(self, pending):
            batches.append(len(pending))
            await asyncio.sleep(0.05)
            for position in range(len(pending)):
                yield position, Score(0.5)

    BestOfN(ScriptedEngine(["a", "b c", "d e f", "g h i j", "k l m n o"]), Slow(), n=5)(PROMPT)
    assert sum(batches) == 5
    assert 1 < len(batches) < 5


def test_engines_that_want_whole_batches_score_everything_in_one_call():
    flip = ScriptedEngine(lambda text, draw: PROMPT if text.endswith("b") else "x", concurrent=False)
    bon = BestOfN(ScriptedEngine(["a", "b"], concurrent=False), flip, n=2)
    assert [r.text for r in bon.map([PROMPT] * 3)] == ["b"] * 3
    assert flip.calls == 1


# --- group rewards (fault 1) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize("schedule", [None, "each", "ready", "all"])
def test_a_reward_function_is_called_once_for_each_task_copies_included(concurrent, schedule):
    """With a policy whose requests run together it was called for each candidate, and never saw a copy."""
    calls = []

    def majority(prompt, responses):
        calls.append((prompt, list(responses)))
        return [responses.count(r) / len(responses) for r in responses]

    policy = ScriptedEngine(["42", "42", "42", "41"], concurrent=concurrent)
    results = outcomes_of(BestOfN(policy, majority, n=4, schedule=schedule), ["a", "b", "c"])
    assert sorted(calls) == [(prompt, ["42", "42", "42", "41"]) for prompt in "abc"]
    assert [[s.reward for s in r.scores] for r in results] == [[0.75, 0.75, 0.75, 0.25]] * 3
    assert all(s.same_as is None for r in results for s in r.scores)


def test_groups_that_were_made_for_another_scorer_are_whole_for_one_that_needs_them():
    groups = asyncio.run(score(lambda p, texts: [texts.count(t) for t in texts], [Group.of("x", ["42", "42", "41"])]))
    assert groups[0].rewards == (2, 2, 1)


def test_a_group_may_be_scored_again_by_another_scorer():
    """It had its scores already, so nothing happened, and the first scorer's rewards stood for the second's."""
    [first] = asyncio.run(score(Own(lambda each: 0.1), [("x", ["a", "b"])]))
    [second] = asyncio.run(score(Own(lambda each: 0.9), [first]))
    assert (first.rewards, second.rewards) == ((0.1, 0.1), (0.9, 0.9))


def test_scoring_needs_no_policy_and_fuses_groups():
    scorer = Own(lambda each: len(each.candidate.text), concurrent=False)
    groups = asyncio.run(score(scorer, [("x", ["a", "bb"]), ("y", ["ccc"]), ("z", ["d", "d"])]))
    assert [g.rewards for g in groups] == [(1, 2), (3,), (1, 1)]
    assert scorer.calls == [["a", "bb", "ccc", "d"]]
    assert groups[0].result(Best()).text == "bb"


def test_a_bad_list_of_candidates_is_refused_before_anything_is_scored():
    for bad in [("x", []), ("", ["a"]), ("x", [3])]:
        with pytest.raises(InputError):
            asyncio.run(score(Own(lambda each: 0.1), [("x", ["a"]), bad]))


def test_a_scorer_gets_what_it_needs_or_the_task_says_what_is_missing():
    class Picky(Own):
        needs = Needs(reference=True, logprobs=True)

    asked = []

    class Policy(ScriptedEngine):
        def generate(self, requests, *, keep=None):
            asked.extend(request.sampling.logprobs for request in requests)
            return super().generate(requests, keep=keep)

    bon = BestOfN(Policy(["a"]), Picky(lambda each: float(each.candidate.text == each.task.reference)), n=1)
    with_one = Task((Message("user", "x"),), "x", reference="a")
    result, missing = outcomes_of(bon, [with_one, "y"])
    assert result.reward == 1.0
    assert isinstance(missing, InputError)
    assert "compares with a reference, and the task has none" in str(missing)
    assert asked == [True]


# --- whose an error is (fault 4) --------------------------------------------------------------------------------------


def raising(error):
    def reward(each):
        if "bad" in each.task.instruction:
            raise error
        return 0.5

    return reward


def broken_selector(rewards, order, texts):
    if any("bad" in text for text in texts):
        raise ZeroDivisionError("selector")
    return Best()(rewards, order, texts)


class Yields(Scorer):
    """Yields for a bad task what ``make`` says, and good scores for the others."""

    def __init__(self, make, concurrent):
        self.make, self.concurrent = make, concurrent

    async def score(self, pending):
        for position, each in enumerate(pending):
            for found in self.make(position) if "bad" in each.task.instruction else [(position, Score(0.5))]:
                yield found


class BrokenBudget:
    most = 2

    def __init__(self, more):
        self._more = more

    def more(self, group):
        if "bad" in group.task.instruction and group.asked == 0:
            return self._more()
        return 2 - group.asked


def policy(concurrent, **options):
    return ScriptedEngine(lambda text, draw: f"{text} {draw}", concurrent=concurrent, **options)


def refuses(concurrent):
    """A policy that refuses one prompt, as engines do that know no tools."""

    class Refuses(ScriptedEngine):
        def generate(self, requests, *, keep=None):
            if any("bad" in request.prompt.turns[-1].text for request in requests):
                raise InputError("not this prompt")
            return super().generate(requests, keep=keep)

    return Refuses(concurrent=concurrent)


def crashes(concurrent):
    class Crashes(ScriptedEngine):
        async def _generate(self, requests, keep):
            if any("bad" in request.prompt.turns[-1].text for request in requests):
                raise IndexError("no such thing")
            async for completion in super()._generate(requests, keep):
                yield completion

    return Crashes(concurrent=concurrent)


FAULTS = {
    "scorer raises ValueError": (
        lambda c: {"scorer": Own(raising(ValueError("no")), concurrent=c)},
        "raised ValueError: no",
    ),
    "scorer raises InputError": (
        lambda c: {"scorer": Own(raising(PromptTooLongError(9, 8)), concurrent=c)},
        "9 tokens",
    ),
    "scorer was cancelled from within": (
        lambda c: {"scorer": Own(raising(asyncio.CancelledError()), concurrent=c)},
        "was cancelled",
    ),
    "scorer times out": (lambda c: {"scorer": Own(raising(TimeoutError("slow")), concurrent=c)}, "raised TimeoutError"),
    "scorer yields one twice": (lambda c: {"scorer": Yields(lambda p: [(p, Score(0.5))] * 2, c)}, "twice or unasked"),
    "scorer forgets one": (lambda c: {"scorer": Yields(lambda p: [], c)}, "did not score candidate 0"),
    "scorer yields no score": (lambda c: {"scorer": Yields(lambda p: [(p, 0.5)], c)}, "raised AttributeError"),
    "scorer yields no pair": (lambda c: {"scorer": Yields(lambda p: [0.5], c)}, "raised TypeError"),
    "scorer yields no position": (lambda c: {"scorer": Yields(lambda p: [([p], Score(0.5))], c)}, "raised TypeError"),
    "selector raises": (lambda c: {"selector": broken_selector}, "selector raised ZeroDivisionError"),
    "budget raises": (lambda c: {"n": BrokenBudget(lambda: 1 / 0)}, "the budget raised ZeroDivisionError"),
    "budget returns text": (lambda c: {"n": BrokenBudget(lambda: "many")}, "asked for 'many' more"),
    "budget returns less than nothing": (lambda c: {"n": BrokenBudget(lambda: -1)}, "asked for -1 more"),
    "budget returns a fraction": (lambda c: {"n": BrokenBudget(lambda: 0.5)}, "asked for 0.5 more"),
    "budget returns True": (lambda c: {"n": BrokenBudget(lambda: True)}, "asked for True more"),
    "policy refuses": (lambda c: {"policy": refuses(c)}, "not this prompt"),
    "policy raises IndexError": (lambda c: {"policy": crashes(c)}, "raised IndexError: no such thing"),
    "prompt too long for the policy": (lambda c: {"policy": policy(c, max_model_len=30)}, "more than"),
    "prompt is empty": (lambda c: {}, "empty"),
}


@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_goes_wrong_with_one_prompt_ends_that_prompt_alone(fault, concurrent):
    """A selector that raised, a NaN, a scorer's ValueError: each ended the whole file."""
    make, complaint = FAULTS[fault]
    options = {"policy": policy(concurrent), "scorer": Own(lambda e: 0.5, concurrent=concurrent), "n": 2}
    bon = BestOfN(**{**options, **make(concurrent)})
    bad = " " if fault == "prompt is empty" else "bad " * (40 if "too long" in fault else 1)
    prompts = ["Say a", "Say b", bad, "Say c", "Say d"]
    outcomes = outcomes_of(bon, prompts)
    assert isinstance(outcomes.pop(2), BonError)
    assert [o.reward for o in outcomes] == [0.5, 0.5, 0.5, 0.5] if fault != "policy refuses" else True
    first, second, failed, *rest = bon.map(prompts, on_error="return")
    assert [type(o) for o in (first, second, *rest)] == [Result] * 4
    with pytest.raises(type(failed), match=complaint):
        asyncio.run(bon.run(bad))
    with pytest.raises(type(failed), match=complaint):
        list(bon.map(prompts))


@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize("fault", [name for name in FAULTS if name.startswith("scorer")])
def test_a_scorers_fault_is_the_error_of_its_group_where_there_is_no_policy(fault, concurrent):
    make, complaint = FAULTS[fault]
    first, bad, last = asyncio.run(
        score(make(concurrent)["scorer"], [("x", ["a", "b"]), ("bad", ["c", "d"]), ("y", ["e"])])
    )
    assert (first.error, last.error) == (None, None)
    assert first.rewards == (0.5, 0.5)
    assert last.rewards == (0.5,)
    with pytest.raises(BonError, match=complaint):
        bad.result(Best())


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_reward_that_is_not_a_number_leaves_the_other_candidates(concurrent):
    bon = BestOfN(policy(concurrent), Own(lambda e: float("nan") if e.candidate.index else 0.5), n=3)
    results = outcomes_of(bon, ["Say a", "Say b"])
    assert [r.reward for r in results] == [0.5, 0.5]
    assert [s.status for s in results[0].scores] == ["ok", "failed", "failed"]


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_callback_that_raises_ends_its_call_and_what_it_started(concurrent):
    engine = policy(concurrent, step_seconds=0.001)
    seen = []

    def broken(event):
        seen.append(event)
        raise RuntimeError("the screen is gone")

    async def run():
        before = asyncio.all_tasks()
        with pytest.raises(UserCodeError, match="the callback raised RuntimeError"):
            await BestOfN(engine, Own(lambda e: 0.5), n=4).run("word " * 50, callback=broken)
        return await idle(before)

    assert not asyncio.run(run())
    assert engine.running == 0
    assert len(seen) == 1


def test_a_torch_policy_that_knows_no_tools_answers_the_other_prompts():
    pool = ModelPool()
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    tools = [Message("user", "x"), Message("assistant", "", (call,)), Message("tool", "y", (), "1")]
    bon = BestOfN(pool.engine("mini"), Own(lambda e: 0.5), n=2, sampling={"max_tokens": 4})
    first, refused, last = outcomes_of(bon, ["Say a", tools, "Say b"])
    assert "reads only text" in str(refused)
    assert [first.reward, last.reward] == [0.5, 0.5]
    asyncio.run(pool.aclose())


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_reward_function_that_raises_is_not_called_for_that_task_again(concurrent):
    calls = []

    def reward(prompt, responses):
        calls.append(prompt)
        if prompt == "bad":
            raise ValueError("no")
        return [0.5 for _ in responses]

    outcomes = outcomes_of(BestOfN(policy(concurrent), reward, n=2), ["a", "bad", "c"])
    assert [type(o).__name__ for o in outcomes] == ["Result", "UserCodeError", "Result"]
    assert sorted(calls) == ["a", "bad", "c"]


def test_an_async_reward_function_object_is_awaited():
    """An object with an async ``__call__`` was taken for a plain function, and its coroutine for the rewards."""

    class Reward:
        async def __call__(self, prompt, responses):
            await asyncio.sleep(0)
            return [float(len(r)) for r in responses]

    assert BestOfN(ScriptedEngine(["a", "bbb"]), Reward(), n=2)("x").text == "bbb"
    assert BestOfN(ScriptedEngine(["a", "bbb"]), RewardFunction(Reward()), n=2)("x").scores[1].reward == 3.0


def test_a_reward_function_may_ask_for_the_task():
    def reward(prompt, responses, task):
        return [float(r == task.reference) + task.metadata["bonus"] for r in responses]

    async def by_name(prompt, responses, *, task):
        return reward(prompt, responses, task)

    task = Task((Message("user", "x"),), "x", reference="b", metadata={"bonus": 10})
    for function in (reward, by_name):
        assert BestOfN(ScriptedEngine(["a", "b"]), function, n=2)(task).reward == 11.0


class Dying(Scorer):
    """Dies after five scores."""

    def __init__(self, error):
        self.error = error

    async def score(self, pending):
        for position in range(len(pending)):
            if position == 5:
                raise self.error
            yield position, Score(0.5)


def test_what_was_scored_before_a_model_died_is_kept():
    bon = BestOfN(policy(False), Dying(EngineError("out of memory")), n=2)
    outcomes = outcomes_of(bon, ["a", "b", "c", "d"])
    assert [type(outcome).__name__ for outcome in outcomes] == ["Result", "Result", "EngineError", "EngineError"]


def test_what_a_model_could_not_score_this_time_leaves_the_other_candidates():
    bon = BestOfN(policy(False), Dying(UnavailableError("timed out")), n=2)
    outcomes = outcomes_of(bon, ["a", "b", "c", "d"])
    assert [type(outcome).__name__ for outcome in outcomes] == ["Result", "Result", "Result", "UnavailableError"]
    assert [s.status for s in outcomes[2].scores] == ["ok", "failed"]


@pytest.mark.parametrize("error", [EngineError("at the end"), ValueError("at the end")])
@pytest.mark.parametrize("tasks", [1, 2])
def test_an_error_that_comes_after_the_last_score_is_not_lost(error, tasks):
    class Late(Own):
        async def score(self, pending):
            async for found in super().score(pending):
                yield found
            raise error

    groups = asyncio.run(score(Late(lambda e: 0.5, concurrent=False), [("x", ["a"])] * tasks))
    assert ["at the end" in str(group.error) for group in groups] == [True] * tasks


@pytest.mark.parametrize("error", [UnavailableError("gone"), InputError("no log-probabilities here"), KeyError("x")])
def test_a_tie_that_cannot_be_decided_costs_no_result(error):
    """The rewards are there: what goes wrong after them is said and takes none away."""

    class Settles(Own):
        async def settle(self, tied):
            assert [each.candidate.text for each in tied] == ["b", "a"]
            yield 0, Score(2.0)
            raise error

    group = group_of(PROMPT, ["b", "a", "b"])
    other = group_of("another", ["x"])
    scored(Settles(lambda pending: 1.0), group, other)
    assert group.rewards == (1.0, 1.0, 1.0)
    assert [score.tie_break for score in group.scores] == [2.0, None, 2.0]
    [warning] = group.warnings
    assert str(error) in warning
    assert not other.warnings


def test_a_scorer_whose_iterator_has_nothing_to_close_is_fine():
    class Plain(Scorer):
        def score(self, pending):
            return Iterator(len(pending))

    class Iterator:
        def __init__(self, count):
            self.left = iter(range(count))

        def __aiter__(self):
            return self

        async def __anext__(self):
            for position in self.left:
                return position, Score(0.5)
            raise StopAsyncIteration

    assert BestOfN(ScriptedEngine(["a", "b"]), Plain(), n=2)(PROMPT).reward == 0.5


def test_a_scorer_that_is_no_generator_is_said_to_be_none():
    class Wrong(Scorer):
        def score(self, pending):
            return [(0, Score(0.5))]

    with pytest.raises(UserCodeError, match="the scorer 'Wrong' raised TypeError"):
        BestOfN(ScriptedEngine(["a"]), Wrong(), n=1)(PROMPT)


def test_a_policy_that_returns_too_few_or_too_many_samples_is_found_out():
    class Short(ScriptedEngine):
        async def _generate(self, requests, keep):
            async for completion in super()._generate(requests, keep):
                if completion.sample_index < 1:
                    yield completion

    class Long(ScriptedEngine):
        async def _generate(self, requests, keep):
            async for completion in super()._generate(requests, keep):
                yield completion
                yield completion

    with pytest.raises(EngineError, match="1 of 2"):
        BestOfN(Short(), n=2)(PROMPT)
    with pytest.raises(EngineError, match="twice or unasked"):
        BestOfN(Long(), n=2)(PROMPT)


def test_a_policy_whose_text_is_none_is_found_out_and_the_other_prompts_go_on():
    class Bad(ScriptedEngine):
        async def _generate(self, requests, keep):
            for index, request in enumerate(requests):
                text = None if "bad" in request.prompt.turns[-1].text else "fine"
                for sample in request.samples:
                    yield Completion(index, sample, text, "stop")

    bad, good = outcomes_of(BestOfN(Bad(concurrent=False), Own(lambda e: 0.5), n=2), ["bad", "good"])
    assert "the text of candidate 0 must be text, not NoneType" in str(bad)
    assert good.reward == 0.5


@pytest.mark.parametrize("concurrent", [True, False])
def test_an_engine_that_fails_raises_its_own_error_not_a_group(concurrent):
    with pytest.raises(EngineError, match="told to fail"):
        BestOfN(ScriptedEngine(fail_after=5, concurrent=concurrent), n=4)(PROMPT)


def test_one_call_of_a_function_that_fails_costs_one_sample():
    """One failing call of eight lost the prompt."""
    calls = []

    def flaky(prompt):
        calls.append(prompt)
        if len(calls) == 3:
            raise ValueError("not now")
        return f"answer {len(calls)}"

    result = BestOfN(flaky, Own(lambda e: 0.5), n=8)(PROMPT)
    assert [s.status for s in result.scores].count("ok") == 7
    assert len(result.errors) == 1
    assert "raised ValueError: not now" in result.errors[0]


def test_scoring_starts_while_a_function_still_writes():
    """Functions filled the default executor, in which the scorer waited for a thread until sampling was over."""
    scored_one, seen = threading.Event(), []

    def slow(prompt):
        if seen:
            assert scored_one.wait(30), "the first answer is scored while the second is written"
        seen.append(prompt)
        return f"answer {len(seen)}"

    class Blocking(Scorer):
        concurrent = True

        async def score(self, pending):
            await asyncio.to_thread(scored_one.set)
            for position in range(len(pending)):
                yield position, Score(0.5)

    assert len(BestOfN(slow, Blocking(), n=40)(PROMPT).candidates) == 40


def test_prompt_tokens_are_counted_whichever_sample_fails():
    """They stood with sample 0, and were 0 when that one failed."""

    class Flaky(ScriptedEngine):
        async def _generate(self, requests, keep):
            async for completion in super()._generate(requests, keep):
                if completion.sample_index == 1:
                    yield Completion.failed(0, 0, EngineError("no"))
                    yield completion

    result = BestOfN(Flaky(["a b c", "d"]), Own(lambda e: 0.5), n=2)(PROMPT)
    assert result.usage.policy_prompt_tokens == 8
    assert result.candidates[0].finish_reason == "error"


class Chaos:
    """A policy, a scorer, a budget and a selector that do what the prompt says, and every other prompt no harm."""

    KINDS = (
        "fine", "copies", "refused", "crash", "short", "twice", "half failed", "all failed", "empty",
        "scorer raises", "scorer unavailable", "scorer dies", "scorer forgets", "scorer twice", "scorer nan",
        "scorer cancelled", "budget raises", "selector raises",
    )  # fmt: skip
    FINE = ("fine", "copies", "half failed", "empty", "scorer nan")
    most = 4

    def __init__(self, *, concurrent, whole, rounds):
        self.concurrent, self.rounds = concurrent, rounds
        self.policy = self.Policy(lambda text, draw: f"{text} {draw}", concurrent=concurrent)
        self.scorer = self.Judge(concurrent, whole)

    class Policy(ScriptedEngine):
        def generate(self, requests, *, keep=None):
            if any("refused" in request.prompt.turns[-1].text for request in requests):
                raise InputError("refused")
            return super().generate(requests, keep=keep)

        async def _generate(self, requests, keep):
            kinds = [request.prompt.turns[-1].text.partition(": ")[2] for request in requests]
            if "crash" in kinds:
                raise IndexError("crash")
            async for c in super()._generate(requests, keep):
                kind = kinds[c.request_index]
                if kind == "copies":
                    c = replace(c, text=kind)
                elif kind == "empty":
                    c = replace(c, text=" " if c.sample_index % 2 else c.text)
                elif kind == "all failed" or (kind == "half failed" and c.sample_index % 2):
                    c = Completion.failed(c.request_index, c.sample_index, UnavailableError("gone"))
                elif kind == "short" and c.sample_index == 1:
                    continue
                yield c
                if kind == "twice":
                    yield c

    class Judge(Scorer):
        def __init__(self, concurrent, whole):
            self.concurrent, self.needs = concurrent, Needs(group=whole, all_rewards=whole)

        async def score(self, pending):
            for position, each in enumerate(pending):
                kind = each.task.instruction.partition(": ")[2]
                await asyncio.sleep(0)
                if kind == "scorer raises":
                    raise ValueError(kind)
                if kind == "scorer dies":
                    raise EngineError(kind)
                if kind == "scorer unavailable":
                    raise UnavailableError(kind)
                if kind == "scorer cancelled":
                    raise asyncio.CancelledError
                if kind != "scorer forgets":
                    yield position, Score(float("nan") if kind == "scorer nan" and each.candidate.index else 0.5)
                if kind == "scorer twice":
                    yield position, Score(0.5)

    def more(self, group):
        if "budget raises" in group.task.instruction and group.asked:
            raise KeyError("budget")
        return min(self.most // self.rounds, self.most - group.asked)

    @staticmethod
    def select(rewards, order, texts):
        if any("selector raises" in text for text in texts):
            raise KeyError("selector")
        return Best()(rewards, order, texts)


@given(
    st.lists(st.sampled_from(Chaos.KINDS), min_size=1, max_size=7),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, "each", "ready", "all"]),
    st.booleans(),
)
@settings(max_examples=150)
def test_whatever_goes_wrong_each_prompt_has_one_outcome_in_its_place(kinds, concurrent, whole, rounds, schedule, live):
    chaos = Chaos(concurrent=concurrent, whole=whole, rounds=rounds)
    bon = BestOfN(chaos.policy, chaos.scorer, n=chaos, selector=chaos.select, schedule=schedule)
    prompts = [f"{i}: {kind}" for i, kind in enumerate(kinds)]

    async def run():
        before = asyncio.all_tasks()
        async with asyncio.timeout(60), aclosing(bon.stream(prompts)) as stream:
            found = [outcome async for outcome in stream]
        if live:
            runs = (bon.run(p, callback=lambda event: None, deadline=60) for p in prompts)
            found += enumerate(await asyncio.gather(*runs, return_exceptions=True), len(prompts))
        return sorted(found, key=lambda pair: pair[0]), await idle(before)

    found, left = asyncio.run(run())
    assert not left
    assert [position for position, _ in found] == list(range(len(found)))
    # A model that died, and a policy that returned a sample twice, may take those with them that ran in one call.
    shared = not concurrent and {"scorer dies", "twice", "scorer unavailable"} & {*kinds}
    for kind, (_, outcome) in zip(kinds * 2, found, strict=False):
        assert isinstance(outcome, Result | BonError)
        if kind not in Chaos.FINE:
            assert isinstance(outcome, BonError)
        elif not shared:
            assert outcome.reward == 0.5
            assert [s.candidate for s in outcome.scores] == [0, 1, 2, 3]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrent", [True, False])
def test_many_prompts_are_ranked_together_and_a_bad_one_fails_alone(concurrent):
    flip = ScriptedEngine(lambda text, draw: text.rpartition("Response:\n")[2], concurrent=concurrent)
    rows = [(f"Say {i}", [f"Say {i}", "x"]) for i in range(5)]
    rows[1:1] = [("Say nothing", []), ("Say three", [3]), ("", ["x"])]

    async def collect():
        return [outcome async for _, outcome in in_order(rank(Flip(flip), rows, Best()))]

    outcomes = asyncio.run(collect())
    assert [type(o) for o in outcomes[1:4]] == [InputError] * 3
    assert [o.text for o in outcomes if not isinstance(o, InputError)] == [f"Say {i}" for i in range(5)]
    assert flip.calls == (5 if concurrent else 1)


def test_prompts_that_take_their_time_do_not_hold_up_what_is_running():
    finished = [threading.Event() for _ in range(3)]

    def slow():
        memory = sqlite3.connect(":memory:")  # wants to be used on one thread only
        for i in range(3):
            yield memory.execute(f"select 'Say {i}'").fetchone()[0]
            assert finished[i].wait(10), "the next prompt is not needed to finish this one"
            time.sleep(0.1)
        memory.close()

    async def collect():
        seen, ticks = [], 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        async for position, _ in BestOfN(ScriptedEngine(), n=2).stream(slow()):
            seen.append(position)
            finished[position].set()
        ticking.cancel()
        return seen, ticks

    seen, ticks = asyncio.run(collect())
    assert seen == [0, 1, 2]
    assert ticks > 1, "the loop goes on while the source sleeps"


def test_a_bad_prompt_is_told_before_the_next_good_one_is_there():
    """Errors counted as nothing, so they waited until enough good prompts had come with them."""
    told = threading.Event()

    def prompts():
        yield ""
        assert told.wait(10)
        yield "Say one"

    async def collect():
        async for position, outcome in BestOfN(ScriptedEngine(), n=2).stream(prompts()):
            told.set()
            yield position, type(outcome).__name__

    async def run():
        return [found async for found in collect()]

    assert asyncio.run(run()) == [(0, "InputError"), (1, "Result")]


@pytest.mark.parametrize("concurrent", [True, False])
def test_prompts_that_cannot_be_read_on_end_the_run_with_their_own_error_after_what_was_read(concurrent):
    """Results that were under way, and prompts that waited for their wave to fill, were thrown away."""

    def broken():
        yield "Say one thing"
        yield "Say another"
        raise OSError("the disk is gone")

    found = []
    engine = ScriptedEngine(concurrent=concurrent, step_seconds=0.001)
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(BestOfN(engine, Own(lambda e: 0.5), n=2).map(broken()))
    results = BestOfN(engine, Own(lambda e: 0.5), n=2).map(broken())
    assert [next(results).task.instruction for _ in range(2)] == ["Say one thing", "Say another"]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


def test_a_long_file_runs_in_waves_on_an_engine_that_wants_whole_batches(monkeypatch):
    monkeypatch.setattr(bon.pipeline, "WAVE", 6)
    engine = ScriptedEngine(concurrent=False)
    assert len(list(BestOfN(engine, Own(lambda e: 0.5, concurrent=False), n=2).map(f"Say {i}" for i in range(8)))) == 8
    assert engine.calls == 3, "three prompts of two candidates each, and the rest"


def test_prompts_that_are_over_make_room_for_the_next_so_that_each_round_is_full(monkeypatch):
    """Rounds got smaller until the last prompt of a wave was over, and only then the next one began."""
    monkeypatch.setattr(bon.pipeline, "WAVE", 8)
    asked = []

    class Noted(ScriptedEngine):
        def generate(self, requests, *, keep=None):
            asked.append(sum(request.n for request in requests))
            return super().generate(requests, keep=keep)

    class Until:
        most, least = 20, 2

        def more(self, group):
            return 2 if group.asked < 2 * int(group.task.instruction) else 0

    rounds = [1, 5, 1, 2, 1, 3, 1, 1, 4, 1, 2, 1]
    bon_ = BestOfN(Noted(concurrent=False), Own(lambda e: 0.5, concurrent=False), n=Until())

    async def collect():
        return [(position, len(result.candidates)) async for position, result in bon_.stream(map(str, rounds))]

    found = asyncio.run(collect())
    assert sorted(found) == [(position, 2 * count) for position, count in enumerate(rounds)]
    assert [position for position, _ in found][:4] == [0, 2, 3, 4], "each comes when it is over"
    assert asked == [8] * 5 + [4, 2]


# --- cancellation -----------------------------------------------------------------------------------------------------


class Hangs(Scorer):
    """Waits for ever, and says whether it was let go."""

    def __init__(self, concurrent=True):
        self.concurrent, self.closed, self.begun = concurrent, 0, asyncio.Event()

    async def score(self, pending):
        self.begun.set()
        try:
            await asyncio.sleep(3600)
            yield 0, Score(0.5)
        finally:
            await asyncio.sleep(0)  # a clean-up that awaits
            self.closed += 1


@pytest.mark.parametrize("concurrent", [True, False])
@pytest.mark.parametrize("where", ["sampling", "scoring"])
def test_a_cancelled_run_leaves_no_task_running(concurrent, where):
    async def run():
        before = asyncio.all_tasks()
        scorer = Hangs(concurrent)
        engine = policy(concurrent, step_seconds=0.05 if where == "sampling" else 0.0)
        task = asyncio.create_task(BestOfN(engine, scorer, n=3).run("word " * 20))
        await (asyncio.sleep(0.1) if where == "sampling" else scorer.begun.wait())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.running == 0
        assert scorer.closed == (where == "scoring") or concurrent
        return await idle(before)

    assert not asyncio.run(run())


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_stream_that_is_left_early_stops_what_runs(concurrent):
    async def run():
        before = asyncio.all_tasks()
        engine = policy(concurrent, step_seconds=0.001)
        async with aclosing(BestOfN(engine, Own(lambda e: 0.5), n=2).stream(f"Say {i}" for i in range(900))) as stream:
            async for _ in stream:
                break
        assert engine.running == 0
        return await idle(before)

    assert not asyncio.run(run())


def test_a_cancelled_stream_stops_what_runs_and_does_not_wait_for_the_next_prompt():
    release = threading.Event()

    def prompts():
        yield "Say one"
        release.wait(30)
        yield "Say two"

    async def run():
        before = asyncio.all_tasks()
        scorer = Hangs()

        async def consume():
            async with aclosing(BestOfN(policy(True), scorer, n=2).stream(prompts())) as stream:
                async for _ in stream:
                    pass

        task = asyncio.create_task(consume())
        await scorer.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scorer.closed == 2
        return await idle(before)

    assert not asyncio.run(run())
    release.set()


def test_scoring_that_is_cancelled_stops_and_closes_the_scorer():
    async def run():
        before = asyncio.all_tasks()
        scorer = Hangs()
        task = asyncio.create_task(score(scorer, [("x", ["a", "b"])]))
        await scorer.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scorer.closed == 1
        return await idle(before)

    assert not asyncio.run(run())


# --- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_deadline_that_passes_while_the_scorer_works_leaves_the_scores_that_are_there(concurrent):
    class HalfDone(Scorer):
        async def score(self, pending):
            yield 0, Score(0.5)
            await asyncio.sleep(3600)

    HalfDone.concurrent = concurrent

    async def run():
        before = asyncio.all_tasks()
        result = await BestOfN(policy(concurrent), HalfDone(), n=3, schedule="all").run(PROMPT, deadline=0.2)
        return result, await idle(before)

    result, left = asyncio.run(run())
    assert not left
    assert [s.status for s in result.scores] == ["ok", "late", "late"]
    assert (result.reward, len(result.candidates)) == (0.5, 3)
    assert "the deadline of 0.2 s passed before it was scored" in result.scores[1].reason


@pytest.mark.parametrize("concurrent", [True, False])
def test_a_deadline_that_passes_while_the_policy_writes_leaves_what_is_finished(concurrent):
    engine = ScriptedEngine(["short", "word " * 5000], step_seconds=0.002, concurrent=concurrent)
    bon = BestOfN(engine, Own(lambda e: 0.5), n=2)
    result = asyncio.run(bon.run(PROMPT, deadline=0.4))
    assert [c.finish_reason for c in result.candidates] == ["stop", "abort"]
    assert [s.status for s in result.scores] == ["ok", "late"]
    assert engine.running == 0


def test_without_anything_in_time_there_is_a_result_that_says_so():
    engine = ScriptedEngine(["word " * 5000], step_seconds=0.01)
    for deadline in (0.05, 0, -1):
        result = asyncio.run(BestOfN(engine, Own(lambda e: 0.5), n=2).run(PROMPT, deadline=deadline))
        assert result.text is None
        assert "2 late" in result.selection.reason


def test_a_deadline_does_not_swallow_what_failed_before_it():
    engine = FunctionEngine(lambda prompt: 1 / 0)
    with pytest.raises(UserCodeError, match="ZeroDivisionError"):
        asyncio.run(BestOfN(engine, Own(lambda e: 0.5), n=2).run(PROMPT, deadline=30))


def test_a_deadline_reaches_a_blocking_reward_function():
    release = threading.Event()

    def stuck(prompt, responses):
        release.wait(30)
        return [0.5 for _ in responses]

    bon = BestOfN(policy(True), stuck, n=2)
    result = asyncio.run(bon.run(PROMPT, deadline=0.2))
    release.set()
    assert [s.status for s in result.scores] == ["late", "late"]
    bon.close()


# --- seeds (fault 7) and threads (fault 3) ----------------------------------------------------------------------------


def test_prompts_of_a_file_draw_independently_under_one_seed():
    """``Softmax(seed)`` made the same draw for every prompt: always the second of the ranking, say."""
    bon = BestOfN(policy(False), Own(lambda e: 0.5), n=4, selector="softmax:1.0", sampling={"seed": 1})
    drawn = [result.best for result in bon.map(f"Say {i}" for i in range(40))]
    assert len(set(drawn)) == 4
    assert drawn == [result.best for result in bon.map(f"Say {i}" for i in range(40))]


def test_several_reconstructions_on_torch_do_not_race_with_the_event_loop():
    """The worker thread read the dict that the event loop filled: RuntimeError within 60 tries of this loop."""
    pool = ModelPool()
    engine = pool.engine("mini")
    flip = Flip(engine, samples=4, sampling=Sampling(max_tokens=24, seed=5))
    task = Task.of("Write a slogan for a bakery called Sunrise.")
    texts = [f"Sunrise bakery: {word} bread" for word in ("warm", "fresh", "good", "new", "our", "daily")]
    found = []
    for _ in range(12):
        groups = [group_of(task, texts, prune=True), group_of(task, texts)]
        scored(flip, *groups)
        found.append((groups[0].result(Best()).best, groups[1].rewards))
    assert len(set(found)) == 1
    asyncio.run(pool.aclose())


def test_a_pipeline_whose_scorer_has_no_engine_says_so():
    with pytest.raises(InputError, match="has no engine yet"):
        asyncio.run(Pipeline(Flip(), ScriptedEngine(), budget=StopAt(1.0)).run([Group(Task.of("x"))]))
