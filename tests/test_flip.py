"""Flip through its public door, on the scripted engine: rewards, statuses, ties, samples, retries, usage."""

import asyncio
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scoring import group_of, scored, scores_of

from bon.engines.base import Completion
from bon.engines.scripted import ScriptedEngine
from bon.errors import EngineError, InputError, UnknownNameError
from bon.prompts import from_files, load_style
from bon.scorers.base import Scorer
from bon.scorers.flip import Flip, FlipDetails
from bon.scorers.flip.reconstruction import before_stop
from bon.scorers.flip.repeats import Repeats
from bon.scorers.guard import Guard
from bon.selectors import Best
from bon.similarity import WordF1
from bon.spec import SCORERS
from bon.task import Message, Task
from bon.types import Sampling, Score

X = "Write one short haiku"
TASK = Task.of(X)


def score(scorer, *texts, task=TASK, **options):
    return scores_of(scorer, task, *texts, **options)


def answers(*texts):
    """An engine that gives candidate "0" the first answer, candidate "1" the second, and so on."""

    def script(prompt, draw):
        answer = texts[int(prompt.rsplit("Response:\n", 1)[1].split()[0])]
        return answer if isinstance(answer, str) else answer[draw % len(answer)]

    return ScriptedEngine(script)


def test_the_reward_is_word_f1_of_the_inferred_instruction_with_all_its_parts():
    [found] = score(Flip(answers("Write one long haiku please")), "0")
    assert found.reward == pytest.approx(2 * 3 / (5 + 4))
    assert (found.details.precision, found.details.recall) == (3 / 5, 3 / 4)
    assert isinstance(found.details, FlipDetails)
    assert found.details.inferred == found.explanation == "Write one long haiku please"
    assert found.status == "ok"
    assert found.tie_break < 0
    assert found.details.samples == ()


def test_all_items_are_one_call_of_the_engine():
    engine = answers("a", "b", "c", "d")
    score(Flip(engine, tie_break="logprob"), "0", "1", "2", "3")
    assert engine.calls == 1


def test_flip_is_a_scorer():
    flip = Flip(answers("x"))
    assert isinstance(flip, Scorer)
    assert flip.name == "flip-direct(scripted)"
    assert flip.concurrent
    assert flip.range == (0.0, 1.0)


def test_without_a_model_it_waits_for_the_policys_engine():
    engine, flip = answers(X), Flip(samples=2)
    assert flip.models == (None,)
    moved = flip.on(engine)
    assert moved.engine is engine
    assert moved.samples == 2
    assert moved.models == ()
    with pytest.raises(InputError, match="has no engine yet"):
        flip.engine  # noqa: B018 - a property that raises


def test_an_engine_stays_its_owners_when_the_scorer_is_closed():
    class Engine(ScriptedEngine):
        async def aclose(self):
            raise AssertionError("closed")

    asyncio.run(Flip(Engine()).aclose())


def test_thinking_in_a_candidate_is_not_shown_and_nothing_but_thinking_is_empty():
    seen = []
    engine = ScriptedEngine(lambda prompt, draw: seen.append(prompt) or X)
    first, second = score(Flip(engine), "<think>secret</think>\nRain.", "<think>secret")
    assert seen == ["Response:\nRain."]
    assert first.reward == 1.0
    assert (second.status, second.reward) == ("empty", None)
    assert "nothing but thinking" in second.reason


def test_context_is_shown_and_the_instruction_is_not():
    seen = []
    engine = ScriptedEngine(lambda prompt, draw: seen.append(prompt) or X)
    task = Task.of([Message("user", "Hi"), Message("assistant", "Hello"), Message("user", X)])
    score(Flip(engine), "Rain.", task=task)
    assert seen == ["Conversation before the response:\nUser: Hi\nAssistant: Hello\n\nResponse:\nRain."]


@pytest.mark.parametrize(
    ("options", "held"),
    [({"style": "json"}, True), ({"style": "json", "thinking": True}, False), ({"style": "direct"}, False)],
)
def test_an_engine_that_can_be_held_to_a_schema_is_where_the_style_has_one(options, held):
    class Engine(ScriptedEngine):
        def json_options(self, schema):
            return {"grammar": sorted(schema["properties"])}

        def generate(self, requests, *, keep=None):
            extras.extend(dict(request.sampling.extra) for request in requests)
            plain = [replace(r, sampling=r.sampling.replace(extra={})) for r in requests]
            return super().generate(plain, keep=keep)

    extras = []
    score(Flip(Engine(["x"]), **options), "0")
    assert extras == [{"grammar": ["instruction", "reasoning"]} if held else {}]


def test_models_are_told_not_to_think_unless_they_may():
    class Engine(ScriptedEngine):
        def generate(self, requests, *, keep=None):
            templates.extend(request.prompt.template for request in requests)
            return super().generate(requests, keep=keep)

    templates = []
    score(Flip(Engine()), "Rain.")
    score(Flip(Engine(), thinking=True), "Rain.")
    assert templates == [{"enable_thinking": False}, {"enable_thinking": True}]


@pytest.mark.parametrize(
    ("answer", "status", "reward"),
    [
        (json.dumps({"reasoning": "r", "instruction": X}), "ok", 1.0),
        (f'```json\n{{"instruction": "{X}"}}\n```', "repaired", 1.0),
        (X, "fallback", 1.0),
        ('{"reasoning": "Write one short haiku"}', "failed", None),
    ],
)
def test_every_parse_status_reaches_the_score(answer, status, reward):
    [found] = score(Flip(answers(answer), style="json"), "0 falls")
    assert (found.status, found.reward) == (status, reward)
    assert (found.reason is None) == (status == "ok")
    assert (found.explanation is None) == (reward is None)


def test_users_own_templates_and_the_reference_parser_go_together(tmp_path):
    (tmp_path / "user").write_text('Response:\n{response}\nJSON: {{"INFERRED INSTRUCTION": "..."}}', encoding="utf-8")
    flip = Flip(
        answers(json.dumps({"INFERRED INSTRUCTION": X})), style=from_files(None, tmp_path / "user"), parser="reference"
    )
    [found] = score(flip, "0")
    assert (found.status, found.reward) == ("ok", 1.0)


def test_the_reward_of_several_samples_is_their_mean_and_the_nearest_one_is_shown():
    engine = answers(["Write one short haiku", "Write one", "Write one short"])
    [found] = score(Flip(engine, samples=3), "0")
    single = (1.0, 2 / 3, 6 / 7)
    assert found.details.samples == pytest.approx(single)
    assert found.reward == pytest.approx(sum(single) / 3)
    assert found.details.inferred == "Write one short"
    assert engine.calls == 1


def test_samples_that_cannot_be_parsed_are_left_out_of_the_mean_and_named():
    engine = answers(["", X, "Write one"])
    [found] = score(Flip(engine, samples=3), "0")
    assert found.reward == pytest.approx((1 + 2 / 3) / 2)
    assert found.status == "ok"
    assert found.reason.startswith("1 of 3 reconstructions failed")


def test_the_status_of_several_samples_is_the_worst():
    engine = answers([json.dumps({"instruction": X}), X, f'{{"instruction": "{X}'])
    [found] = score(Flip(engine, style="json", samples=3), "0 x")
    assert found.status == "fallback"


def test_several_samples_are_drawn_at_temperature_1_and_one_is_greedy():
    assert Flip(answers(X)).sampling == Sampling(temperature=0, max_tokens=512, logprobs=True)
    assert Flip(answers(X), samples=2).sampling == Sampling(temperature=1, max_tokens=512, logprobs=True)
    assert Flip(answers(X), sampling=Sampling(max_tokens=7)).sampling.max_tokens == 7


def test_a_failed_reconstruction_is_tried_again_at_a_temperature():
    engine = answers(["", X], [X])
    asked = []
    generate = engine.generate

    class Engine(ScriptedEngine):
        def generate(self, requests, *, keep=None):
            asked.append([(r.sampling.temperature, r.first_sample) for r in requests])
            again = len(asked) > 1
            engine.script = (lambda p, d: X) if again else (lambda p, d: "" if p.endswith("0") else "Write")
            return generate(requests, keep=keep)

    first, second = score(Flip(Engine(), retries=2), "0", "1")
    assert asked == [[(0.0, 0), (0.0, 0)], [(0.7, 1)]], "the second try is another sample"
    assert first.reward == 1.0
    assert second.reward == pytest.approx(0.4)


def test_without_retries_a_failed_reconstruction_stays_failed():
    [found] = score(Flip(answers(["", X])), "0")
    assert (found.status, found.reward) == ("failed", None)


def test_a_response_too_long_for_the_scorer_fails_alone():
    engine = answers(X, X)
    engine.max_model_len = 30
    first, second = score(Flip(engine), "0", "1 " + "word " * 40)
    assert first.reward == 1.0
    assert second.status == "failed"
    assert "does not fit" in second.reason


def test_a_reconstruction_that_could_not_be_made_fails_alone_and_says_why():
    class Engine(ScriptedEngine):
        async def generate(self, requests, *, keep=None):
            yield Completion(1, 0, "", "error", error=EngineError("the server said no"))
            yield Completion(0, 0, X, "stop")

    first, second = score(Flip(Engine()), "0", "1")
    assert (first.reward, first.tie_break) == (1.0, None)
    assert (second.status, second.reason) == ("failed", "the server said no")


def test_usage_counts_the_prompt_once_for_all_samples():
    [one] = score(Flip(answers([X])), "0")
    [three] = score(Flip(answers([X]), samples=3), "0")
    assert three.usage.scorer_prompt_tokens == one.usage.scorer_prompt_tokens > 0
    assert three.usage.scorer_completion_tokens == 3 * one.usage.scorer_completion_tokens == 3 * 5
    assert three.tokens == 15


def test_what_a_failed_try_cost_is_counted():
    tries = iter(["", X])
    [found] = score(Flip(ScriptedEngine(lambda prompt, draw: next(tries)), retries=1), "0")
    [once] = score(Flip(answers(X)), "0")
    assert found.usage.scorer_prompt_tokens == 2 * once.usage.scorer_prompt_tokens
    assert found.tokens == once.tokens + 1, "the end token of the try that said nothing"


@pytest.mark.parametrize("tie_break", ["logprob", "likelihood"])
def test_equal_rewards_are_decided_by_the_tie_break(tie_break):
    group = group_of(TASK, ["0 zzz", "1 yyy", "2 xxx"])
    scored(Flip(answers(X, X, X), tie_break=tie_break), group)
    ties = [score.tie_break for score in group.scores]
    assert len(set(ties)) == 3
    assert group.result(Best()).best == ties.index(max(ties))


def test_without_a_tie_break_the_shorter_reconstruction_wins_and_no_logprobs_are_asked_for():
    group = group_of(TASK, ["0 zzz", "1 yyy", "2 xxx"])
    flip = Flip(answers(f"the {X}", X, X), tie_break="none")
    assert not flip.sampling.logprobs
    scored(flip, group)
    assert [(score.reward, score.tie_break) for score in group.scores] == [(1.0, None)] * 3
    assert group.result(Best()).best == 1


@pytest.mark.parametrize("guarded", [False, True])
def test_where_reconstructions_say_nothing_the_instructions_likelihood_decides(guarded):
    """Three reconstructions share no word with the instruction: each reward is 0, and the likeliest of these wins."""
    told = []
    engine = answers("qqq", "www eee rrr", "ttt", "qqq")
    group = group_of(TASK, ["0 like pizza", "1 haiku", "2 no", "1 haiku"], callback=told.append)
    scorer = Flip(engine)
    scored(Guard(scorer) if guarded else scorer, group)
    prompts = [load_style("direct").prompt(TASK, text) for text in ("0 like pizza", "1 haiku", "2 no")]
    rated = asyncio.run(engine.loglikelihood(prompts, [X] * 3))
    assert group.rewards == (0.0,) * 4
    ties = [score.tie_break for score in group.scores]
    assert ties == [rated[at].mean for at in (0, 1, 2, 1)], "a copy has its twin's"
    assert group.candidates[group.result(Best()).best].text == group.candidates[ties.index(max(ties))].text
    assert sorted(s.candidate for s in told if isinstance(s, Score)) == [0, 1, 2, 3], "nobody is told a second time"
    assert engine.calls == 3, "one for the reconstructions, one for the tie, one of this test"
    read = sum(score.usage.scorer_prompt_tokens for score in group.scores if score.same_as is None)
    assert group.usage.scorer_prompt_tokens == read
    [once] = score(Flip(answers("qqq")), "0 like pizza")
    both = once.usage.scorer_prompt_tokens + rated[0].prompt_tokens + rated[0].tokens
    assert group.scores[0].usage.scorer_prompt_tokens == both


@pytest.mark.parametrize(
    ("answered", "why"),
    [
        ((X, "Write", "Write"), "one is better than the two that share a reward"),
        ((X, X, X), "the instruction came back from all, and how likely is known"),
    ],
)
def test_the_likelihood_is_read_only_where_it_decides(answered, why):
    engine = answers(*answered)
    group = group_of(TASK, ["0", "1", "2"])
    scored(Flip(engine), group)
    assert engine.calls == 1, why
    assert None not in [score.tie_break for score in group.scores]


def test_a_model_that_can_only_be_sampled_leaves_it_to_what_it_wrote():
    group = group_of(TASK, ["0 a", "1 b"])
    scored(Flip(lambda prompt: "qqq"), group)
    assert group.rewards == (0.0, 0.0)
    assert not group.warnings


def test_an_engines_failure_is_raised_and_what_ran_is_stopped():
    engine = answers(X, X)
    engine.fail_after = 3
    with pytest.raises(EngineError):
        score(Flip(engine), "0", "1")
    assert engine.running == 0


def test_closing_the_scores_stops_the_engine():
    engine = answers("Write", "Write one short haiku and much more text after that")

    async def first_only():
        scores = Flip(engine).score(group_of(TASK, ["0", "1"]).pending())
        async for _ in scores:
            break
        await scores.aclose()

    asyncio.run(first_only())
    assert engine.running == 0
    assert engine.decoded < 8


def test_the_end_of_a_text_that_may_become_a_stop_string_does_not_count():
    assert before_stop("one two EN", ("END",)) == "one two "
    assert before_stop("one two", ("END", "\n")) == "one two"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"style": "jsn"}, "Did you mean 'json'"),
        ({"parser": "robus"}, "Did you mean 'robust'"),
        ({"similarity": "rouge"}, "Did you mean 'rouge_l'"),
        ({"tie_break": "likelyhood"}, "Did you mean 'likelihood'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_one(options, problem):
    with pytest.raises(UnknownNameError, match=problem):
        Flip(answers(X), **options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"samples": 0}, "samples must be a whole number of at least 1, got 0"),
        ({"samples": 1.5}, "samples must be"),
        ({"retries": -1}, "retries must be a whole number of at least 0"),
        ({"device": "cpu"}, "device: options are for models loaded by name"),
    ],
)
def test_bad_options_are_refused(options, problem):
    with pytest.raises(InputError, match=problem):
        Flip(answers(X), **options)


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError, match="a scorer's model is a name, a folder, an engine or a function, not 3"):
        Flip(3)
    with pytest.raises(InputError, match="not <class"):
        Flip(ScriptedEngine)


def test_sampling_may_be_a_mapping_of_what_differs_from_the_usual():
    """``Flip(sampling={})`` raised AttributeError; then a mapping of one field made a greedy scorer draw at random."""
    assert Flip(answers(X), sampling={}).sampling == Flip(answers(X)).sampling
    assert Flip(answers(X), sampling={"max_tokens": 9}).sampling == Sampling(0, max_tokens=9, logprobs=True)
    assert Flip(answers(X), samples=2, sampling={"top_p": 0.5}).sampling.temperature == 1.0
    assert Flip(answers(X), sampling=Sampling(max_tokens=9)).sampling.temperature is None
    with pytest.raises(UnknownNameError, match="Did you mean 'temperature'"):
        Flip(answers(X), sampling={"temprature": 0.5})


def test_a_misspelt_option_is_not_taken_for_one_of_the_engine():
    with pytest.raises(UnknownNameError, match="Did you mean 'style'"):
        Flip("some/model", stile="json")
    assert Flip("some/model", device="cpu").model.options == {"device": "cpu"}


@pytest.mark.parametrize(
    ("response", "inferred", "status"),
    [
        ("0 I like pizza.", "I like pizza.", "echo"),
        ("0 Crimson leaves descend, whispering to the cold earth.", "Crimson leaves descend, whispering", "echo"),
        ("0 红叶纷飞，秋意渐浓。", "红叶纷飞，秋意渐浓。", "echo"),
        ("0 Leaves fall to the cold earth.", "Write one short haiku about leaves.", "ok"),
        ("0 Many thanks to Helen for bringing a kite.", "Thank Helen for bringing a kite to the park.", "ok"),
    ],
)
def test_a_reconstruction_that_repeats_the_response_is_an_echo_whose_reward_stays(response, inferred, status):
    """A model of 135M parameters repeated 16 of 30 responses, and each of those scores was "ok"."""
    [found] = score(Flip(answers(inferred)), response)
    assert (found.status, found.explanation) == (status, inferred)
    assert found.reward == pytest.approx(WordF1()(inferred, X).f1)


def test_one_echo_of_several_reconstructions_is_the_worst_status():
    [found] = score(Flip(answers([X, "I like pizza."]), samples=2), "0 I like pizza.")
    assert (found.status, found.details.samples) == ("echo", (1.0, 0.0))


def test_a_reward_has_no_rounding_noise():
    """A reconstruction of 7 words that are all among the 9 had the reward 0.8750000000000001."""
    task = Task.of("one two three four five six seven eight nine")
    [found] = score(Flip(answers("one two three four five six seven")), "0", task=task)
    assert found.reward == 0.875


def test_a_reconstruction_is_limited_by_the_length_of_the_instruction_unless_the_user_says_otherwise():
    """A model that rambled wrote 512 tokens for an instruction of four words, eight times."""

    class Engine(ScriptedEngine):
        def generate(self, requests, *, keep=None):
            limits.extend(request.sampling.max_tokens for request in requests)
            return super().generate(requests, keep=keep)

    def limit(task=TASK, **options):
        limits.clear()
        score(Flip(Engine(["x"]), **options), "0", task=task)
        return limits[0]

    limits = []
    assert limit() == 64 + len(X)
    assert limit(task=Task.of("写一首俳句")) == 64 + 15
    assert limit(task=Task.of("word " * 200)) == limit(style="json") == limit(thinking=True) == 512
    assert limit(max_tokens=9) == limit(sampling={"max_tokens": 9}) == limit(sampling=Sampling(max_tokens=9)) == 9
    assert SCORERS.make("flip:some/model,max_tokens=9").sampling.max_tokens == 9


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("unit", ["and ", "as it is and as it ever was, so they say, ", "啊", "\n"])
def test_a_reconstruction_that_repeats_itself_ends_and_has_the_same_reward_pruned_or_not(unit, prune):
    engine = answers("Write one short " + unit * 1000)
    [found] = score(Flip(engine, max_tokens=5000), "0", prune=prune)
    [other] = score(Flip(answers("Write one short " + unit * 1000), max_tokens=5000), "0", prune=not prune)
    assert (found.status, found.reason) == ("repaired", "the answer repeats itself")
    assert (found.reward, found.explanation) == (other.reward, other.explanation)
    if prune and unit.strip() and " " in unit:  # the scripted engine's tokens are words
        assert engine.decoded < 100


@given(st.text("ab", max_size=600), st.lists(st.integers(0, 600)))
def test_where_a_text_repeats_itself_depends_on_the_text_alone(text, looks):
    growing = Repeats()
    for length in sorted(looks):
        growing.end(text[:length])
    assert growing.end(text) == Repeats().end(text)


def test_a_list_of_similar_things_does_not_repeat_itself():
    assert Repeats().end("".join(f"Write a slogan for a shop on Main Street {i}.\n" for i in range(4))) is None
    assert Repeats().end("Write a haiku. Write a limerick. Write a sonnet. Write a slogan. Write a letter.") is None
