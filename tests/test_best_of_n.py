import asyncio
import sqlite3
import threading
import time

import pytest

from bon import BackwardLikelihood, BestOfN, Candidate, Flip, RewardFunction, Sampling, Softmax, TopK
from bon.best_of_n import in_order
from bon.engines.scripted import ScriptedEngine
from bon.errors import BonError, EngineError, InputError, PromptTooLongError, UnknownNameError, UserCodeError
from bon.scorers.base import Scored
from bon.types import Score

PROMPT = "Write a short poem about the red fox"


def inverts(responses):
    """A scripted scorer: response -> the instruction that it "infers"."""

    def script(text, draw):
        return responses[text.rpartition("Response:\n")[2]]

    return ScriptedEngine(script)


def best_of(answers, inferred, **options):
    policy = ScriptedEngine(answers, overlaps=options.pop("overlaps", True))
    flip = inverts(dict(zip(answers, inferred, strict=True)))
    flip.overlaps = policy.overlaps
    options.setdefault("n", len(answers))
    return BestOfN(policy, flip, **options)


def test_the_candidate_whose_inferred_instruction_is_nearest_wins():
    bon = best_of(["A cat.", "A red fox.", "A dog."], ["Write about a cat", PROMPT, "Write about a dog"])
    result = bon(PROMPT)
    assert (result.text, result.reward, result.best) == ("A red fox.", 1.0, 1)
    assert result.scores[1].inferred == PROMPT


@pytest.mark.parametrize("overlaps", [True, False])
def test_all_evidence_is_in_the_result(overlaps):
    bon = best_of(["A cat.", "A red fox."], ["Write about a cat", PROMPT], prune=False, overlaps=overlaps)
    result = bon(PROMPT)
    assert [c.text for c in result.candidates] == ["A cat.", "A red fox."]
    assert [s.candidate for s in result.scores] == [0, 1]
    assert result.selection.ranking == (1, 0)
    assert result.counts == {"ok": 2}
    assert 0 < result.timing.sample <= result.timing.total
    assert result.usage.policy_prompt_tokens == 8, "a prompt that is sampled twice counts once"
    assert result.usage.policy_completion_tokens == 2 + 1 + 3 + 1, "end tokens count"
    assert result.usage.scorer_completion_tokens > 0
    for score in result.scores:
        assert 0 <= score.started <= score.finished <= result.timing.total


def test_identical_candidates_are_scored_once():
    policy = ScriptedEngine(["same", "same", "other"])
    flip = inverts({"same": PROMPT, "other": "x"})
    result = BestOfN(policy, flip, n=3)(PROMPT)
    assert flip.calls == 2
    first, second = sorted(result.scores[:2], key=lambda s: s.same_as is not None)
    assert second.same_as == first.candidate
    assert second.reward == first.reward == 1.0
    assert result.best == first.candidate, "the copy does not win for having cost nothing"


def test_candidates_without_text_are_kept_but_never_scored_nor_picked():
    result = best_of(["", "  \n", "bad"], ["x", "x", "nothing alike"])(PROMPT)
    assert [s.status for s in result.scores] == ["empty", "empty", "ok"]
    assert result.scores[0].reward is None
    assert result.text == "bad", "a scored candidate wins even with reward 0"


def test_nothing_is_picked_when_no_candidate_has_a_reward():
    result = best_of(["", " "], ["x", "x"])(PROMPT)
    assert result.best is None
    assert result.text is None
    assert "empty" in result.selection.reason


def test_truncated_candidates_are_scored_like_any_other_and_say_so():
    bon = BestOfN(ScriptedEngine(["a b c d"]), ScriptedEngine([PROMPT]), n=1, sampling={"max_tokens": 2})
    result = bon(PROMPT)
    assert result.candidates[0].finish_reason == "length"
    assert result.reward == 1.0


def test_a_reward_below_the_minimum_makes_the_result_abstain():
    result = best_of(["A cat."], ["nothing alike"], min_reward=0.5)(PROMPT)
    assert result.text is None
    assert "0.5" in result.selection.reason


def test_pruning_keeps_the_winner_and_saves_words():
    answers = ["A cat.", "A red fox.", "A dog."]
    inferred = ["zig zag " * 30, PROMPT, "zoo " * 40]
    pruned = best_of(answers, inferred)(PROMPT)
    full = best_of(answers, inferred, prune=False)(PROMPT)
    assert pruned.best == full.best == 1
    assert [s.status for s in pruned.scores] == ["pruned", "ok", "pruned"]
    assert pruned.scores[0].upper_bound < 1.0
    assert [s.status for s in full.scores] == ["ok"] * 3
    assert pruned.usage.scorer_completion_tokens < full.usage.scorer_completion_tokens
    assert pruned.saved.pruned == 2
    assert pruned.saved.decoded == pruned.usage.scorer_completion_tokens
    assert full.saved.share == 0 <= pruned.saved.share


@pytest.mark.parametrize(("selector", "pruned"), [("best", 2), (TopK(2), 0), (Softmax(0.1, 0), 0)])
def test_nothing_is_pruned_for_selectors_that_look_at_more_than_the_best(selector, pruned):
    answers, inferred = ["A cat.", "A red fox.", "A dog."], ["zig zag " * 30, PROMPT, "zoo " * 40]
    result = best_of(answers, inferred, selector=selector, min_reward=0.0)(PROMPT)
    assert result.counts.get("pruned", 0) == pruned


def test_reaching_stop_at_stops_sampling_and_scoring():
    policy = ScriptedEngine(["A red fox.", "word " * 500])
    result = BestOfN(policy, inverts({"A red fox.": PROMPT}), n=2, stop_at=1.0)(PROMPT)
    assert result.text == "A red fox."
    assert result.reward == 1.0
    assert policy.decoded < 100
    assert result.candidates[1].finish_reason == "pruned"
    assert result.scores[1].status == "pruned"
    assert (result.saved.unsampled, result.saved.pruned, result.saved.share) == (1, 0, 0.5)


def test_scoring_overlaps_sampling_where_both_engines_allow_it():
    policy = ScriptedEngine(["short", "word " * 30], step_seconds=0.002)
    flip = ScriptedEngine([PROMPT], step_seconds=0.002)
    result = BestOfN(policy, flip, n=2, prune=False)(PROMPT)
    assert result.scores[0].finished < result.candidates[1].finished
    assert result.timing.overlap > 0


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({}, "each"),
        ({"prune": False}, "all"),
        ({"prune": False, "stop_at": 1.0}, "each"),
        ({"prune": False, "schedule": "each"}, "each"),
        ({"schedule": "all"}, "all"),
    ],
)
def test_one_engine_that_does_both_scores_at_the_end_where_nothing_can_be_skipped(options, schedule):
    engine = ScriptedEngine(["short", "word " * 30], step_seconds=0.001)
    bon = BestOfN(engine, n=2, **options)
    assert bon.schedule_for() == bon.replace(n=3).schedule_for() == schedule
    result = bon(PROMPT)
    last = max(candidate.finished for candidate in result.candidates)
    assert (min(score.started for score in result.scores) >= last) == (schedule == "all")
    if "schedule" not in options:
        assert bon.schedule_for(live=True) == "each", "somebody waits for single scores"
        assert BestOfN(engine, ScriptedEngine(["x"]), **options).schedule_for() == "each", "two engines"


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UnknownNameError, match="each"):
        BestOfN(ScriptedEngine(["x"]), schedule="eech")


def test_a_scorer_that_wants_batches_gets_what_is_ready_while_it_was_busy():
    batches = []

    class Slow:
        name, overlaps = "slow", False

        async def score(self, items):
            batches.append(len(items))
            await asyncio.sleep(0.05)
            for i, item in enumerate(items):
                yield Scored(i, Score(item.candidate.index, 0.5))

        async def aclose(self):
            pass

    answers = ["a", "b c", "d e f", "g h i j", "k l m n o"]
    BestOfN(ScriptedEngine(answers), Slow(), n=5)(PROMPT)
    assert sum(batches) == 5
    assert 1 < len(batches) < 5


def test_engines_that_want_whole_batches_score_everything_in_one_call():
    flip = inverts({"a": "x", "b": PROMPT})
    flip.overlaps = False
    bon = BestOfN(ScriptedEngine(["a", "b"], overlaps=False), flip, n=2)
    assert [r.text for r in bon.map([PROMPT] * 3)] == ["b"] * 3
    assert flip.calls == 1


def test_map_keeps_the_order_of_the_prompts():
    prompts = [f"Say {'word ' * (9 - i)}{i}" for i in range(9)]
    results = list(BestOfN(ScriptedEngine(), n=2).map(iter(prompts)))
    assert [r.task.instruction for r in results] == prompts


def test_leaving_map_early_stops_the_work():
    engine = ScriptedEngine(step_seconds=0.001)
    for _ in BestOfN(engine, n=4).map(f"Prompt number {i}" for i in range(1000)):
        break
    time.sleep(0.02)
    assert engine.running == 0


def test_one_prompt_that_is_too_long_does_not_take_the_others_with_it():
    engine = ScriptedEngine(overlaps=False, max_model_len=40)
    prompts = ["Say one thing", "word " * 50, "Say another thing", ""]

    async def collect():
        return [outcome async for outcome in BestOfN(engine, n=2).stream(prompts)]

    outcomes = dict(asyncio.run(collect()))
    assert isinstance(outcomes[1], PromptTooLongError)
    assert isinstance(outcomes[3], InputError)
    assert outcomes[0].reward is not None
    assert outcomes[2].reward is not None
    assert sorted(outcomes) == [0, 1, 2, 3]


def outcomes_of(bon, prompts):
    async def collect():
        return [outcome async for outcome in bon.stream(prompts)]

    return [outcome for _, outcome in sorted(asyncio.run(collect()), key=lambda pair: pair[0])]


def picky(wave):
    """A policy and a scorer, both functions, that refuse prompts with "bad" in them; and what they were called with."""
    called = []

    def check(prompt):
        called.append(prompt)
        if "bad" in prompt:
            raise ValueError(f"not {prompt}")

    def policy(prompt, n):
        check(prompt)
        return [f"{prompt} {i}" for i in range(n)]

    def reward(prompt, responses):
        check(prompt)
        return [len(r) for r in responses]

    plain = ScriptedEngine(overlaps=not wave)
    return {"policy": BestOfN(policy, plain, n=2), "scorer": BestOfN(plain, RewardFunction(reward), n=2)}, called


@pytest.mark.parametrize("wave", [True, False])
@pytest.mark.parametrize("role", ["policy", "scorer"])
def test_a_function_that_raises_costs_the_prompts_that_it_raised_for(role, wave):
    makers, called = picky(wave)
    prompts = ["a", "bad b", "c", "bad d", "e"]
    outcomes = outcomes_of(makers[role], prompts)
    for prompt, outcome in zip(prompts, outcomes, strict=True):
        if "bad" in prompt:
            assert isinstance(outcome, UserCodeError)
            assert f"raised ValueError: not {prompt}" in str(outcome)
        else:
            assert outcome.reward is not None
    if role == "policy":
        assert sorted(called) == sorted(prompts), "nothing is sampled twice"
    results = makers[role].map(prompts)
    assert next(results).task.instruction == "a"
    with pytest.raises(UserCodeError, match="not bad b"):
        next(results)


@pytest.mark.parametrize("wave", [True, False])
def test_a_prompt_that_is_too_long_for_the_scorer_is_no_fault_of_the_others(wave):
    """The scorer's positions are those of candidates; they were once taken for positions of prompts."""

    class Narrow:
        name = "narrow"
        overlaps = not wave

        async def score(self, items):
            long = [i for i, item in enumerate(items) if "long" in item.task.instruction]
            if long:
                raise PromptTooLongError(9, 8, indices=long)
            for i, item in enumerate(items):
                yield Scored(i, Score(item.candidate.index, 0.5))

        async def aclose(self):
            pass

    bon = BestOfN(ScriptedEngine(overlaps=not wave), Narrow(), n=3)
    outcomes = outcomes_of(bon, ["a", "b", "a long one", "c", "d"])
    assert [isinstance(outcome, PromptTooLongError) for outcome in outcomes] == [False, False, True, False, False]
    assert {outcome.reward for outcome in outcomes if not isinstance(outcome, BonError)} == {0.5}


def test_what_was_scored_before_a_scorer_died_is_kept():
    class Dying:
        name, overlaps = "dying", False

        async def score(self, items):
            for i, item in enumerate(items):
                if i == 5:
                    raise EngineError("out of memory")
                yield Scored(i, Score(item.candidate.index, 0.5))

        async def aclose(self):
            pass

    policy = ScriptedEngine(lambda text, draw: f"{text} {draw}", overlaps=False)
    outcomes = outcomes_of(BestOfN(policy, Dying(), n=2), ["a", "b", "c", "d"])
    assert [type(outcome).__name__ for outcome in outcomes] == ["Result", "Result", "EngineError", "EngineError"]


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


def test_prompts_that_cannot_be_read_on_end_the_run_with_their_own_error():
    def broken():
        yield "Say one thing"
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(BestOfN(ScriptedEngine(), n=2).map(broken()))


def test_results_before_a_failing_prompt_are_not_lost():
    results = BestOfN(ScriptedEngine(), n=2).map(["Say one thing", "", "Say three"])
    assert next(results).task.instruction == "Say one thing"
    with pytest.raises(InputError, match="empty"):
        next(results)


def test_rerank_scores_what_came_from_elsewhere():
    bon = best_of(["A cat.", "A red fox."], ["Write about a cat", PROMPT])
    result = bon.rerank(PROMPT, ["A cat.", Candidate(7, "A red fox.")])
    assert result.text == "A red fox."
    assert [c.index for c in result.candidates] == [0, 1]
    assert result.usage.policy_completion_tokens == 0


@pytest.mark.parametrize("overlaps", [True, False])
def test_many_prompts_are_ranked_together_and_a_bad_one_fails_alone(overlaps):
    flip = ScriptedEngine(lambda text, draw: text.rpartition("Response:\n")[2], overlaps=overlaps)
    rows = [(f"Say {i}", [f"Say {i}", "x"]) for i in range(5)]
    rows[1:1] = [("Say nothing", []), ("Say three", [3]), ("", ["x"])]

    async def collect():
        ranked = BestOfN(lambda prompt: "", flip).stream_ranked(rows)
        return [outcome async for _, outcome in in_order(ranked)]

    outcomes = asyncio.run(collect())
    assert [type(o) for o in outcomes[1:4]] == [InputError] * 3
    assert [o.text for o in outcomes if not isinstance(o, InputError)] == [f"Say {i}" for i in range(5)]
    assert flip.calls == (10 if overlaps else 1)


@pytest.mark.parametrize("candidates", [[], [3]])
def test_rerank_refuses_candidates_that_are_none(candidates):
    with pytest.raises(InputError, match="candidate"):
        BestOfN(ScriptedEngine()).rerank(PROMPT, candidates)


def test_run_is_the_same_inside_an_event_loop():
    result = asyncio.run(best_of(["A cat.", "A red fox."], ["x", PROMPT]).run(PROMPT))
    assert result.text == "A red fox."


def test_calls_from_many_threads_do_not_mix_their_answers():
    bon = BestOfN(ScriptedEngine(step_seconds=0.001), n=2)
    texts = {}
    threads = [
        threading.Thread(target=lambda i=i: texts.update({i: bon(f"Say {i}").task.instruction})) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {i: f"Say {i}" for i in range(8)}


def test_context_comes_before_the_response_and_is_not_part_of_the_instruction():
    seen = []

    def script(text, draw):
        seen.append(text)
        return "Shorter please"

    messages = [
        {"role": "user", "content": "Write about foxes"},
        {"role": "assistant", "content": "Foxes are red and quick."},
        {"role": "user", "content": "Shorter please"},
    ]
    result = BestOfN(ScriptedEngine(["Foxes: red."]), ScriptedEngine(script), n=1)(messages)
    assert result.reward == 1.0
    assert seen[0].index("Foxes are red and quick.") < seen[0].index("Foxes: red.")
    assert "Shorter please" not in seen[0]


def test_the_policys_own_model_scores_when_no_other_is_named():
    engine = ScriptedEngine()
    assert BestOfN(engine).scorer.engine is engine
    assert BestOfN(engine, Flip(samples=2)).scorer.engine is engine
    assert BestOfN(engine, BackwardLikelihood()).scorer.engine is engine


def test_a_function_policy_needs_a_scorer_and_says_so():
    with pytest.raises(InputError, match="flip="):
        BestOfN(lambda prompt: "x")


def test_an_engine_and_a_function_can_be_named_by_their_module(tmp_path, monkeypatch):
    (tmp_path / "own_engines.py").write_text(
        "from bon.engines.scripted import ScriptedEngine\nmodel = ScriptedEngine()\ndef say(prompt): return 'x'\n"
    )
    monkeypatch.chdir(tmp_path)
    bon = BestOfN("own_engines:model", "own_engines:say", n=2)
    assert isinstance(bon.policy, ScriptedEngine)
    assert bon(PROMPT).scores[0].inferred == "x"


def test_functions_serve_as_policy_and_as_flip():
    bon = BestOfN(
        lambda prompt, n: [f"answer {i}" for i in range(n)],
        lambda prompt: PROMPT if "answer 2" in str(prompt) else "no",
        n=4,
    )
    assert bon(PROMPT).text == "answer 2"


def test_a_reward_function_is_a_scorer():
    bon = BestOfN(
        ScriptedEngine(["a", "bbb", "cc"]), RewardFunction(lambda prompt, texts: [len(t) for t in texts]), n=3
    )
    assert (bon(PROMPT).text, bon(PROMPT).reward) == ("bbb", 3.0)


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda prompt, texts: [1.0], "must return 3 rewards, but returned 1"),
        (lambda prompt, texts: 1 / 0, "raised ZeroDivisionError"),
        (lambda prompt, texts: ["good"] * 3, "must return numbers"),
        (lambda prompt, texts: [float("nan")] * 3, "finite"),
    ],
)
def test_a_reward_function_that_fails_is_an_error_and_never_a_reward(function, complaint):
    with pytest.raises(UserCodeError, match=complaint):
        BestOfN(ScriptedEngine(["a", "b", "c"]), RewardFunction(function), n=3)(PROMPT)


def test_a_reward_function_may_have_no_reward_for_some():
    result = BestOfN(ScriptedEngine(["a", "b"]), RewardFunction(lambda p, t: [None, -5.0]), n=2)(PROMPT)
    assert result.text == "b"
    assert result.scores[0].status == "failed"


def test_a_policy_that_returns_too_few_samples_is_found_out():
    class Short(ScriptedEngine):
        async def _generate(self, prompts, sampling, n, keep):
            async for completion in super()._generate(prompts, sampling, n - 1, keep):
                yield completion

    with pytest.raises(EngineError, match="1 of 2"):
        BestOfN(Short(), n=2)(PROMPT)


def test_a_scorer_that_leaves_a_candidate_out_is_found_out():
    class Forgetful:
        name, overlaps = "forgetful", False

        async def score(self, items):
            yield Scored(0, Score(0, 1.0))

        async def aclose(self):
            pass

    with pytest.raises(EngineError, match="did not score candidate 1"):
        BestOfN(ScriptedEngine(["a", "b"]), Forgetful(), n=2)(PROMPT)


@pytest.mark.parametrize("overlaps", [True, False])
def test_an_engine_that_fails_raises_its_own_error_not_a_group(overlaps):
    with pytest.raises(EngineError, match="told to fail"):
        BestOfN(ScriptedEngine(fail_after=5, overlaps=overlaps), n=4)(PROMPT)


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "8"])
def test_n_must_be_a_positive_whole_number(n):
    with pytest.raises(InputError, match="n must be"):
        BestOfN(ScriptedEngine(), n=n)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"policy": 5}, "a policy is"),
        ({"flip": 5}, "flip is"),
        ({"engine": "tortch", "policy": "x"}, "Did you mean 'torch'"),
        ({"selector": "bets"}, "Did you mean 'best'"),
        ({"sampling": {"temprature": 1}}, "Did you mean 'temperature'"),
        ({"policy": "no_such_module_here:f"}, "no module 'no_such_module_here'"),
        ({"policy": "json:dumpz"}, "has no 'dumpz'"),
        ({"policy": "json:__name__"}, "no function and no engine, but str"),
    ],
)
def test_bad_arguments_are_refused_with_a_hint(options, complaint):
    with pytest.raises(BonError, match=complaint):
        BestOfN(**{"policy": ScriptedEngine(), **options})


def test_the_same_seed_gives_the_same_candidates():
    bon = BestOfN(ScriptedEngine(), n=4, sampling=Sampling(seed=3))
    assert [c.text for c in bon(PROMPT).candidates] == [c.text for c in bon(PROMPT).candidates]


def test_a_watcher_sees_every_candidate_and_score_as_it_comes():
    seen = []
    bon = best_of(["A cat.", "A red fox."], ["x", PROMPT], prune=False)
    result = asyncio.run(bon.run(PROMPT, watch=seen.append))
    assert {event.text for event in seen if isinstance(event, Candidate)} == {"A cat.", "A red fox."}
    assert {event.reward for event in seen if isinstance(event, Score)} == {score.reward for score in result.scores}
