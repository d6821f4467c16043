"""BestOfN through its public methods: what a result holds, prompts one and many, arguments, evidence."""

import asyncio
import gc
import json
import re
import threading
import time
from collections.abc import Sequence
from typing import get_origin, get_overloads, get_type_hints

import pytest
from scoring import Own

from bon import (
    BackwardLikelihood,
    BestOfN,
    Candidate,
    Flip,
    Group,
    RewardFunction,
    Sampling,
    Score,
    Softmax,
    StopAt,
    Task,
    TopK,
)
from bon.data.sink import to_json
from bon.engines.scripted import ScriptedEngine
from bon.errors import BonError, InputError, UnknownNameError, UserCodeError
from bon.scorers.default import Default
from bon.scorers.ensemble import Ensemble
from bon.types import Result

PROMPT = "Write a short poem about the red fox"


def inverts(responses, **options):
    """A scripted scorer: response -> the instruction that it "infers"."""

    def script(text, draw):
        return responses[text.rpartition("Response:\n")[2]]

    return ScriptedEngine(script, **options)


def best_of(answers, inferred, *, concurrent=True, **options):
    policy = ScriptedEngine(answers, concurrent=concurrent)
    scorer = inverts(dict(zip(answers, inferred, strict=True)), concurrent=concurrent)
    return BestOfN(policy, scorer, **{"n": len(answers), **options})


# --- a result ---------------------------------------------------------------------------------------------------------


def test_the_candidate_whose_inferred_instruction_is_nearest_wins():
    bon = best_of(["A cat.", "A red fox.", "A dog."], ["Write about a cat", PROMPT, "Write about a dog"])
    result = bon(PROMPT)
    assert (result.text, result.reward, result.best) == ("A red fox.", 1.0, 1)
    assert result.best_candidate is result.candidates[1]
    assert result.scores[1].explanation == PROMPT


@pytest.mark.parametrize("concurrent", [True, False])
def test_all_evidence_is_in_the_result(concurrent):
    bon = best_of(["A cat.", "A red fox."], ["Write about a cat", PROMPT], prune=False, concurrent=concurrent)
    result = bon(PROMPT)
    assert [c.text for c in result.candidates] == ["A cat.", "A red fox."]
    assert [s.candidate for s in result.scores] == [0, 1]
    assert result.selection.ranking == (1, 0)
    assert result.picked == (result.candidates[1],)
    assert result.counts == {"ok": 2}
    assert 0 < result.timing.sample <= result.timing.total
    assert result.usage.policy_prompt_tokens == 8, "a prompt that is sampled twice counts once"
    assert result.usage.policy_completion_tokens == 2 + 1 + 3 + 1, "end tokens count"
    assert result.usage.scorer_completion_tokens > 0
    for score in result.scores:
        assert 0 <= score.started <= score.finished <= result.timing.total


def test_policy_scorer_and_group_are_short_where_they_are_printed():
    """They were ``<bon.best_of_n.BestOfN object at 0x7f…>``."""
    policy, flip = ScriptedEngine(["A fox."], name="writer"), Flip(ScriptedEngine(name="reader"), samples=2)
    assert repr(flip) == "Flip(flip-direct(reader))"
    assert repr(BestOfN(policy, flip, n=4)) == "BestOfN(writer, flip-direct(reader), n=4)"
    assert repr(BestOfN(policy, flip, n=StopAt(0.9))).endswith(", n=StopAt(reward=0.9, most=8, batch=None))")
    group = Group.of(PROMPT, ["A cat.", "A fox."])
    assert repr(group) == f"Group({PROMPT!r}, n=2)"
    group.post(group.candidates[0], Score(1 / 3))
    assert repr(group) == f"Group({PROMPT!r}, n=2, best reward 0.3333)"


def test_any_sequence_of_prompts_is_typed_as_one():
    """``list[str]`` was refused by type checkers: a list of a union is no list of one of its members."""
    one, several = get_overloads(BestOfN.__call__)
    assert get_type_hints(one)["return"] is Result
    assert get_origin(get_type_hints(several)["prompt"]) is Sequence


def test_everything_in_a_result_can_be_written_as_json():
    result = best_of(["A cat.", "A red fox.", " "], ["x", PROMPT, "x"])(PROMPT)
    read = json.loads(to_json(result.to_dict()))
    assert (read["text"], read["reward"], read["best"], read["instruction"]) == ("A red fox.", 1.0, 1, PROMPT)
    assert [c["text"] for c in read["candidates"]] == ["A cat.", "A red fox.", " "]
    assert [s["inferred"] for s in read["scores"][:2]] == ["x", PROMPT]
    assert {"precision", "recall", "samples", "tokens", "explanation"} <= read["scores"][0].keys()
    assert read["usage"]["total_tokens"] == result.usage.total_tokens


def test_a_result_is_short_where_it_is_printed():
    """It was 9,000 characters of nested dataclasses."""
    result = BestOfN(ScriptedEngine(["word " * 400]), Own(lambda each: 0.5), n=3)(PROMPT)
    assert repr(result) == f"Result(text='{'word ' * 16}…', reward=0.5, n=3)"
    assert repr(BestOfN(ScriptedEngine([""]), n=1)(PROMPT)) == "Result(text=None, reward=None, n=1)"


HOSTILE = "</td><script>alert(1)</script><img src=x onerror='alert(2)'> & \"quoted\""


def test_a_notebook_shows_a_table_in_which_nothing_is_markup():
    scorer = Own(lambda each: Score(None, "failed", reason=HOSTILE) if "worse" in each.candidate.text else 0.123456)
    policy = ScriptedEngine([HOSTILE, f"worse {HOSTILE}", f"worse {HOSTILE}", "word " * 300])
    html = BestOfN(policy, scorer, n=4)(f"Say {HOSTILE}")._repr_html_()
    assert not re.search(r"<(?!/?(p|strong|em|table|thead|tbody|tr|th|td)\b)", html)
    assert not re.search(r"<[^>]*\bon\w+=", html)
    assert html.count("&lt;script&gt;alert(1)") == 1 + 3 + 2
    assert html.count("★") == 1
    assert "0.1235" in html
    assert "failed, same as 1" in html
    assert len(html) < 6000


def test_a_notebook_says_why_nothing_was_picked():
    html = best_of(["A cat."], ["nothing alike"], min_reward=0.5)(PROMPT)._repr_html_()
    assert "nothing picked: the best reward, 0, is below the minimum of 0.5" in html
    assert "★" not in html


def test_a_reward_below_the_minimum_makes_the_result_abstain():
    result = best_of(["A cat."], ["nothing alike"], min_reward=0.5)(PROMPT)
    assert (result.text, result.best_candidate, result.picked) == (None, None, ())
    assert "0.5" in result.selection.reason


def test_pruning_keeps_the_winner_and_saves_words():
    answers = ["A cat.", "A red fox.", "A dog."]
    inferred = [" ".join(f"zig{i}" for i in range(60)), PROMPT, " ".join(f"zoo{i}" for i in range(40))]
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


# --- one prompt and many ----------------------------------------------------------------------------------------------


def test_run_is_the_same_inside_an_event_loop():
    result = asyncio.run(best_of(["A cat.", "A red fox."], ["x", PROMPT]).run(PROMPT))
    assert result.text == "A red fox."


def test_the_instruction_of_a_task_may_be_named_in_the_call():
    """``run(task, instruction=...)`` ignored the instruction."""
    bon = BestOfN(ScriptedEngine(["x"]), Own(lambda each: len(each.task.instruction)), n=1)
    task = Task.of("Here is a text. Summarise it.")
    assert bon(task, instruction="Summarise it.").reward == len("Summarise it.")
    assert bon(task).reward == len("Here is a text. Summarise it.")
    assert asyncio.run(bon.run(task, instruction="Summarise it.")).task.instruction == "Summarise it."


def test_a_list_of_prompts_gives_a_list_of_results_in_their_order():
    bon = BestOfN(ScriptedEngine(), n=2)
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say four"}]
    results = bon(["Say one thing", Task.of("Say two"), [{"role": "user", "content": "Say three"}], conversation])
    assert [r.task.instruction for r in results] == ["Say one thing", "Say two", "Say three", "Say four"]
    assert bon(conversation).task.instruction == "Say four", "a list of messages is one prompt"


def test_the_first_prompt_that_fails_raises_or_stands_in_its_place():
    bon = BestOfN(ScriptedEngine(), n=2)
    with pytest.raises(InputError, match="empty"):
        bon(["Say one thing", "", "Say three"])
    first, second, third = bon(["Say one thing", "", "Say three"], on_error="return")
    assert isinstance(second, InputError)
    assert [first.task.instruction, third.task.instruction] == ["Say one thing", "Say three"]
    assert [type(o) for o in bon.map(["", "Say one"], on_error="return")] == [InputError, Result]


def test_what_is_for_lists_is_refused_for_one_prompt_and_the_other_way_round():
    bon = BestOfN(ScriptedEngine(), n=1)
    for options in ({"on_error": "return"}, {"progress": True}):
        with pytest.raises(InputError, match="for a list of prompts"):
            bon("Say one thing", **options)
    with pytest.raises(InputError, match=r"pass Task\.of"):
        bon(["Say one thing"], instruction="one")
    with pytest.raises(UnknownNameError, match="Did you mean 'return'"):
        bon(["Say one thing"], on_error="retrun")
    with pytest.raises(InputError, match="Put it into a list"):
        list(bon.map("Say one thing"))
    with pytest.raises(InputError, match="Put it into a list"):
        bon.stream("Say one thing")


def test_progress_is_written_to_a_terminal_and_nowhere_else(capsys):
    assert len(BestOfN(ScriptedEngine(), n=1)(["Say one", "Say two"], progress=True)) == 2
    assert capsys.readouterr() == ("", "")


def test_map_keeps_the_order_of_the_prompts():
    prompts = [f"Say {'word ' * (9 - i)}{i}" for i in range(9)]
    results = list(BestOfN(ScriptedEngine(), n=2).map(iter(prompts)))
    assert [r.task.instruction for r in results] == prompts


def wait_until_idle(engine):
    deadline = time.monotonic() + 10
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.005)
    return engine.running == 0


def test_leaving_map_early_stops_the_work():
    engine = ScriptedEngine(step_seconds=0.001)
    for _ in BestOfN(engine, n=4).map(f"Prompt number {i}" for i in range(1000)):
        break
    gc.collect()
    assert wait_until_idle(engine)


def test_the_error_of_a_prompt_that_is_kept_does_not_keep_the_others_running():
    """Its traceback held the iterator, so a thousand prompts went on while the caller looked at the error."""
    engine = ScriptedEngine(step_seconds=0.001)
    bon = BestOfN(engine, Own(lambda each: 0.5), n=4)
    with pytest.raises(InputError, match="empty") as kept:
        list(bon.map(f"Prompt number {i}" if i != 2 else "" for i in range(1000)))
    assert engine.running == 0, kept.value


def test_results_before_a_failing_prompt_are_not_lost():
    results = BestOfN(ScriptedEngine(), n=2).map(["Say one thing", "", "Say three"])
    assert next(results).task.instruction == "Say one thing"
    with pytest.raises(InputError, match="empty"):
        next(results)


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


def test_a_callback_sees_every_candidate_and_score_copies_and_empty_ones_too():
    """Copies and candidates without text were left out: whoever drew them waited for ever."""
    seen = []
    bon = best_of(["A cat.", "A red fox.", " "], ["x", PROMPT, ""], prune=False, n=6)
    result = asyncio.run(bon.run(PROMPT, callback=seen.append))
    candidates = [event for event in seen if isinstance(event, Candidate)]
    scores = [event for event in seen if isinstance(event, Score)]
    assert sorted(candidates, key=lambda c: c.index) == list(result.candidates)
    assert sorted(scores, key=lambda s: s.candidate) == list(result.scores)
    assert [s.status for s in result.scores] == ["ok", "ok", "empty"] * 2
    assert sum(s.same_as is not None for s in result.scores) == 2


def test_who_follows_sees_the_text_of_each_sample_grow():
    grown = {0: [], 1: []}
    bon = BestOfN(ScriptedEngine(["one two three", "four five six"]), lambda prompt, texts: [1.0, 0.0], n=2)
    asyncio.run(bon.run(PROMPT, follow=lambda partial: grown[partial.sample_index].append(partial.text)))
    assert grown == {0: ["one", "one two", "one two three"], 1: ["four", "four five", "four five six"]}


def test_who_follows_and_raises_ends_the_call():
    with pytest.raises(UserCodeError, match="the callback raised KeyError"):
        asyncio.run(BestOfN(ScriptedEngine(["one two three"]), "flip", n=2).run(PROMPT, follow=lambda partial: {}[0]))


def test_an_async_callback_is_refused():
    """Nobody awaited it: it was never run, and nothing said so."""

    async def callback(event):
        raise AssertionError

    with pytest.raises(InputError, match="called and not awaited"):
        asyncio.run(BestOfN(ScriptedEngine(), n=1).run(PROMPT, callback=callback))


# --- rerank -----------------------------------------------------------------------------------------------------------


def test_rerank_scores_what_came_from_elsewhere():
    bon = best_of(["A cat.", "A red fox."], ["Write about a cat", PROMPT])
    result = bon.rerank(PROMPT, ["A cat.", Candidate(7, "A red fox.")])
    assert result.text == "A red fox."
    assert [c.index for c in result.candidates] == [0, 1]
    assert result.usage.policy_completion_tokens == 0


@pytest.mark.parametrize(
    ("candidates", "complaint"),
    [([], "no candidates"), ([3], "candidate 0 must be text"), ("abc", "candidates are a list of texts")],
)
def test_rerank_refuses_candidates_that_are_none(candidates, complaint):
    with pytest.raises(InputError, match=complaint):
        BestOfN(ScriptedEngine()).rerank(PROMPT, candidates)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_n_and_sampling_may_be_those_of_one_call():
    bon = BestOfN(ScriptedEngine(), Own(lambda each: 0.5), n=2, sampling={"max_tokens": 3})
    assert (len(bon(PROMPT).candidates), len(bon(PROMPT, n=5).candidates)) == (2, 5)
    assert len(bon(PROMPT, n="stop-at:0.5,most=3").candidates) == 3
    assert {c.completion_tokens for c in bon(PROMPT, sampling={"max_tokens": 1}).candidates} == {1}
    assert [len(r.candidates) for r in bon([PROMPT, PROMPT], n=3)] == [3, 3]
    assert len(asyncio.run(bon.run(PROMPT, n=4)).candidates) == 4
    assert bon.n == 2, "the next call is as before"


def test_replace_changes_what_it_is_told_and_keeps_the_engines():
    bon = BestOfN(ScriptedEngine(), Own(lambda each: 0.5), n=2, selector="top-k:2", min_reward=0.3)
    other = bon.replace(n=5, prune=False)
    assert (other.n, other.prune, other.policy, other.scorer) == (5, False, bon.policy, bon.scorer)
    assert other.selector == bon.selector
    assert bon.replace(min_reward=0.7)(PROMPT).text is None
    assert bon.replace(min_reward=0.1).min_reward == 0.3, "beside the one that there is"
    with pytest.raises(InputError, match="min_reward must be a number"):
        bon.replace(min_reward="high")


def test_the_seed_of_one_call_is_that_of_the_selectors_draw():
    """A selector kept the seed that the constructor had, so a call with a seed could not be repeated."""
    bon = BestOfN(ScriptedEngine(), Own(lambda each: 0.5), n=4, selector="softmax:1.0")
    assert bon.replace(sampling={"seed": 3}).selector == Softmax(1.0, seed=3)
    drawn = {bon(PROMPT, sampling={"seed": 3}).text for _ in range(12)}
    assert len(drawn) == 1


def test_the_policys_own_model_scores_when_no_other_is_named():
    engine = ScriptedEngine()
    assert BestOfN(engine).scorer.engines == (engine,)
    assert BestOfN(engine, Flip()).scorer.engine is engine
    assert BestOfN(engine, Flip(samples=2)).scorer.engine is engine
    assert BestOfN(engine, BackwardLikelihood()).scorer.engine is engine


def test_a_function_policy_cannot_read_for_a_scorer_and_says_so():
    with pytest.raises(InputError, match="Name a model to score with, for example the scorer flip:"):
        BestOfN(lambda prompt: "x", Flip())


def test_without_a_scorer_the_embedded_model_has_flip_and_every_other_policy_the_default():
    assert isinstance(BestOfN().scorer, Flip)
    assert isinstance(BestOfN("mini").scorer, Flip)
    assert isinstance(BestOfN(ScriptedEngine()).scorer, Default)
    bon = BestOfN(lambda prompt, n: ["so it is 4", "5", "it is 4"][:n], n=3)
    assert (bon.scorer.engines, bon(PROMPT).text) == ((), "so it is 4"), "a function reads nothing: ties stay ties"


def test_functions_serve_as_policy_and_as_scorers_model():
    bon = BestOfN(
        lambda prompt, n: [f"answer {i}" for i in range(n)],
        Flip(lambda prompt: PROMPT if "answer 2" in str(prompt) else "no"),
        n=4,
    )
    assert bon(PROMPT).text == "answer 2"


def test_a_bare_reward_function_is_a_scorer():
    def length(prompt, texts):
        return [len(t) for t in texts]

    for scorer in (length, RewardFunction(length)):
        result = BestOfN(ScriptedEngine(["a", "bbb", "cc"]), scorer, n=3)(PROMPT)
        assert (result.text, result.reward) == ("bbb", 3.0)


def test_an_engine_and_a_function_can_be_named_by_their_module(tmp_path, monkeypatch):
    (tmp_path / "own_engines.py").write_text(
        "from bon.engines.scripted import ScriptedEngine\nmodel = ScriptedEngine()\n"
        "def say(prompt): return 'x'\ndef reward(prompt, texts): return [1.0 for t in texts]\n"
    )
    monkeypatch.chdir(tmp_path)
    bon = BestOfN("own_engines:model", "own_engines:reward", n=2)
    assert isinstance(bon.policy, ScriptedEngine)
    assert bon(PROMPT).reward == 1.0
    assert bon.scorer.name == "own_engines:reward"
    assert BestOfN("own_engines:say", "own_engines:reward", n=1)(PROMPT).text == "x"


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UnknownNameError, match="each"):
        BestOfN(ScriptedEngine(["x"]), schedule="eech")


@pytest.mark.parametrize("n", [0, -1, 2.5, True, None])
def test_n_must_be_a_positive_whole_number(n):
    with pytest.raises(InputError, match="n must be"):
        BestOfN(ScriptedEngine(), n=n)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"policy": 5}, "a policy is"),
        ({"policy": ScriptedEngine}, "a policy is"),
        ({"scorer": 5}, "a scorer is"),
        ({"scorer": Flip}, r"not a class: write Flip\(\.\.\.\)"),
        ({"scorer": "flpi"}, "Did you mean 'flip'"),
        ({"policy": "x,engine=tortch"}, "Did you mean 'torch'"),
        ({"selector": "bets"}, "Did you mean 'best'"),
        ({"selector": TopK}, "a selector is"),
        ({"sampling": {"temprature": 1}}, "Did you mean 'temperature'"),
        ({"policy": "no_such_module_here:f", "scorer": "json:dumpz"}, "has no 'dumpz'"),
        ({"policy": "json:dumpz"}, "has no 'dumpz'"),
        ({"policy": "json:__name__"}, "no function and no engine, but str"),
        ({"policy": "json:JSONDecoder"}, "no function and no engine, but type"),
        ({"n": "stop-at"}, "stop-at:REWARD"),
    ],
)
def test_bad_arguments_are_refused_with_a_hint(options, complaint):
    with pytest.raises(BonError, match=complaint):
        BestOfN(**{"policy": ScriptedEngine(), **options})


def test_the_same_seed_gives_the_same_candidates():
    bon = BestOfN(ScriptedEngine(), n=4, sampling=Sampling(seed=3))
    assert [c.text for c in bon(PROMPT).candidates] == [c.text for c in bon(PROMPT).candidates]


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda prompt, texts: [1.0], "must return 3 rewards, but returned 1"),
        (lambda prompt, texts: 1 / 0, "raised ZeroDivisionError"),
        (lambda prompt, texts: ["0.5"] * 3, "must return numbers"),
        (lambda prompt, texts: None, "must return numbers"),
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


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((0.5, "too long"), "too long"),
        ({"score": 0.5, "why": "too long", "words": 7}, "why: too long; words: 7"),
        ({"score": 0.5}, None),
        (0.5, None),
    ],
)
def test_a_reward_may_come_with_what_explains_it(given, why):
    result = BestOfN(ScriptedEngine(["a"]), lambda prompt, texts: [given], n=1)(PROMPT)
    assert (result.reward, result.scores[0].explanation) == (0.5, why)


@pytest.mark.parametrize("given", [{"scroe": 1}, (1.0, 2.0), ("good", 1.0), [1.0, "good"]])
def test_what_is_neither_a_number_nor_one_with_an_explanation_is_refused(given):
    with pytest.raises(UserCodeError, match="must return numbers, but returned"):
        BestOfN(ScriptedEngine(["a"]), lambda prompt, texts: [given], n=1)(PROMPT)


@pytest.mark.parametrize("function", [len, lambda response: 1.0, lambda prompt, responses, more: []])
def test_a_function_that_cannot_be_called_with_prompt_and_responses_is_refused_before_anything_is_sampled(function):
    engine = ScriptedEngine()
    with pytest.raises(InputError, match=r"is called with \(prompt, responses\), and .* takes \("):
        BestOfN(engine, function)
    assert engine.calls == 0


def test_a_bare_reward_function_is_a_scorer_in_an_ensemble_too():
    longer = Ensemble([lambda prompt, texts: [len(text) for text in texts], "consensus"])
    assert BestOfN(ScriptedEngine(["a", "b b b"]), longer, n=2)(PROMPT).text == "b b b"


def test_a_deadline_is_a_number_of_seconds():
    with pytest.raises(InputError, match="deadline must be a number, got '5'"):
        asyncio.run(BestOfN(ScriptedEngine(), n=1).run(PROMPT, deadline="5"))


def test_no_prompts_have_no_results_and_one_message_is_no_list_of_prompts():
    bon = BestOfN(ScriptedEngine(), n=2)
    assert bon([]) == []
    with pytest.raises(InputError, match="prompts are a list of prompts"):
        list(bon.map({"role": "user", "content": "Say a"}))
