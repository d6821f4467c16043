"""Flip through its public door, on the scripted engine: rewards, statuses, ties, samples, retries, usage."""

import asyncio
import json

import pytest

from bon.engines.base import Completion
from bon.engines.scripted import ScriptedEngine
from bon.errors import EngineError, InputError, UnknownNameError
from bon.prompts import from_files, load_style
from bon.scorers import Board, Flip, Item, Scorer
from bon.scorers.reconstruction import before_stop
from bon.selectors import as_selector, select
from bon.task import Message, Task
from bon.types import Candidate, Sampling

X = "Write one short haiku"
TASK = Task.of(X)


def items(*texts, task=TASK, **board):
    shared = Board(**board)
    return [Item(task, Candidate(i, text), shared) for i, text in enumerate(texts)]


def score(scorer, things):
    async def collect():
        return [scored async for scored in scorer.score(things)]

    found = asyncio.run(collect())
    assert sorted(s.item for s in found) == list(range(len(things))), "every item exactly once"
    return sorted(found, key=lambda s: s.item)


def answers(*texts):
    """An engine that gives candidate "0" the first answer, candidate "1" the second, and so on."""

    def script(prompt, draw):
        answer = texts[int(prompt.rsplit("Response:\n", 1)[1].split()[0])]
        return answer if isinstance(answer, str) else answer[draw % len(answer)]

    return ScriptedEngine(script)


def test_the_reward_is_word_f1_of_the_inferred_instruction_with_all_its_parts():
    [scored] = score(Flip(answers("Write one long haiku please")), items("0"))
    assert scored.score.reward == pytest.approx(2 * 3 / (5 + 4))
    assert (scored.score.precision, scored.score.recall) == (3 / 5, 3 / 4)
    assert scored.score.inferred == "Write one long haiku please"
    assert scored.score.status == "ok"
    assert scored.score.tie_break < 0
    assert scored.score.samples == ()


def test_all_items_are_one_call_of_the_engine():
    engine = answers("a", "b", "c", "d")
    score(Flip(engine), items("0", "1", "2", "3", prune=False))
    assert engine.calls == 1


def test_flip_is_a_scorer():
    flip = Flip(answers("x"))
    assert isinstance(flip, Scorer)
    assert flip.name == "flip-direct(scripted)"
    assert flip.overlaps


def test_without_a_model_it_waits_for_the_policys_engine():
    engine, flip = answers(X), Flip(samples=2)
    assert flip.engine is None
    moved = flip.on(engine)
    assert moved.engine is engine
    assert moved.samples == 2
    assert flip.engine is None


def test_an_engine_stays_its_owners_when_the_scorer_is_closed():
    class Engine(ScriptedEngine):
        async def aclose(self):
            raise AssertionError("closed")

    asyncio.run(Flip(Engine()).aclose())


def test_finished_rewards_are_on_the_board_before_the_score_is_out():
    things = items("0", "1")

    async def watch():
        async for scored in Flip(answers("Write", X)).score(things):
            assert things[0].board.best >= scored.score.reward

    asyncio.run(watch())
    assert things[0].board.best == 1.0


def test_thinking_in_a_candidate_is_not_shown_and_nothing_but_thinking_is_empty():
    seen = []
    engine = ScriptedEngine(lambda prompt, draw: seen.append(prompt) or X)
    first, second = score(Flip(engine), items("<think>secret</think>\nRain.", "<think>secret"))
    assert seen == ["Response:\nRain."]
    assert first.score.reward == 1.0
    assert (second.score.status, second.score.reward) == ("empty", None)
    assert "nothing but thinking" in second.score.reason


def test_context_is_shown_and_the_instruction_is_not():
    seen = []
    engine = ScriptedEngine(lambda prompt, draw: seen.append(prompt) or X)
    task = Task.of([Message("user", "Hi"), Message("assistant", "Hello"), Message("user", X)])
    score(Flip(engine), items("Rain.", task=task))
    assert seen == ["Conversation before the response:\nUser: Hi\nAssistant: Hello\n\nResponse:\nRain."]


@pytest.mark.parametrize(
    ("options", "held"),
    [({"prompt": "json"}, True), ({"prompt": "json", "thinking": True}, False), ({"prompt": "direct"}, False)],
)
def test_an_engine_that_can_be_held_to_a_schema_is_where_the_style_has_one(options, held):
    class Engine(ScriptedEngine):
        def json_options(self, schema):
            return {"grammar": sorted(schema["properties"])}

        def generate(self, prompts, sampling, n=1, *, keep=None):
            extras.append(dict(sampling.extra))
            return super().generate(prompts, sampling.replace(extra={}), n, keep=keep)

    extras = []
    score(Flip(Engine(["x"]), **options), items("0"))
    assert extras == [{"grammar": ["instruction", "reasoning"]} if held else {}]


def test_models_are_told_not_to_think_unless_they_may():
    class Engine(ScriptedEngine):
        def generate(self, prompts, sampling, n=1, *, keep=None):
            templates.extend(prompt.template for prompt in prompts)
            return super().generate(prompts, sampling, n, keep=keep)

    templates = []
    score(Flip(Engine()), items("Rain."))
    score(Flip(Engine(), thinking=True), items("Rain."))
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
    [scored] = score(Flip(answers(answer), prompt="json"), items("0 falls"))
    assert (scored.score.status, scored.score.reward) == (status, reward)
    assert (scored.score.reason is None) == (status == "ok")
    assert (scored.score.inferred is None) == (reward is None)


def test_users_own_templates_and_the_reference_parser_go_together(tmp_path):
    (tmp_path / "user").write_text('Response:\n{response}\nJSON: {{"INFERRED INSTRUCTION": "..."}}', encoding="utf-8")
    flip = Flip(
        answers(json.dumps({"INFERRED INSTRUCTION": X})), prompt=from_files(None, tmp_path / "user"), parser="reference"
    )
    [scored] = score(flip, items("0"))
    assert (scored.score.status, scored.score.reward) == ("ok", 1.0)


def test_the_reward_of_several_samples_is_their_mean_and_the_nearest_one_is_shown():
    engine = answers(["Write one short haiku", "Write one", "Write one short"])
    [scored] = score(Flip(engine, samples=3), items("0"))
    single = (1.0, 2 / 3, 6 / 7)
    assert scored.score.samples == pytest.approx(single)
    assert scored.score.reward == pytest.approx(sum(single) / 3)
    assert scored.score.inferred == "Write one short"
    assert engine.calls == 1


def test_samples_that_cannot_be_parsed_are_left_out_of_the_mean_and_named():
    engine = answers(["", X, "Write one"])
    [scored] = score(Flip(engine, samples=3), items("0"))
    assert scored.score.reward == pytest.approx((1 + 2 / 3) / 2)
    assert scored.score.status == "ok"
    assert scored.score.reason.startswith("1 of 3 reconstructions failed")


def test_the_status_of_several_samples_is_the_worst():
    engine = answers([json.dumps({"instruction": X}), X, f'{{"instruction": "{X}'])
    [scored] = score(Flip(engine, prompt="json", samples=3), items("0 x"))
    assert scored.score.status == "fallback"


def test_several_samples_are_drawn_at_temperature_1_and_one_is_greedy():
    assert Flip(answers(X)).sampling == Sampling(temperature=0, max_tokens=512, logprobs=True)
    assert Flip(answers(X), samples=2).sampling == Sampling(temperature=1, max_tokens=512, logprobs=True)
    assert Flip(answers(X), sampling=Sampling(max_tokens=7)).sampling.max_tokens == 7


def test_a_failed_reconstruction_is_tried_again_at_a_temperature():
    engine = answers(["", X], [X])
    temperatures = []
    generate = engine.generate

    class Engine(ScriptedEngine):
        def generate(self, prompts, sampling, n=1, *, keep=None):
            temperatures.append((len(prompts), sampling.temperature))
            again = len(temperatures) > 1
            engine.script = (lambda p, d: X) if again else (lambda p, d: "" if p.endswith("0") else "Write")
            return generate(prompts, sampling, n, keep=keep)

    first, second = score(Flip(Engine(), retries=2), items("0", "1"))
    assert temperatures == [(2, 0.0), (1, 0.7)]
    assert first.score.reward == 1.0
    assert second.score.reward == pytest.approx(0.4)


def test_without_retries_a_failed_reconstruction_stays_failed():
    [scored] = score(Flip(answers(["", X])), items("0"))
    assert (scored.score.status, scored.score.reward) == ("failed", None)


def test_a_response_too_long_for_the_scorer_fails_alone():
    engine = answers(X, X)
    engine.max_model_len = 30
    first, second = score(Flip(engine), items("0", "1 " + "word " * 40))
    assert first.score.reward == 1.0
    assert second.score.status == "failed"
    assert "does not fit" in second.score.reason


def test_a_reconstruction_that_could_not_be_made_fails_alone_and_says_why():
    class Engine(ScriptedEngine):
        async def generate(self, prompts, sampling, n=1, *, keep=None):
            yield Completion(1, 0, "", "error", error=EngineError("the server said no"))
            yield Completion(0, 0, X, "stop")

    first, second = score(Flip(Engine()), items("0", "1"))
    assert (first.score.reward, first.score.tie_break) == (1.0, None)
    assert (second.score.status, second.score.reason) == ("failed", "the server said no")


def test_usage_counts_the_prompt_once_for_all_samples():
    [one] = score(Flip(answers([X])), items("0"))
    [three] = score(Flip(answers([X]), samples=3), items("0"))
    assert three.usage.scorer_prompt_tokens == one.usage.scorer_prompt_tokens > 0
    assert three.usage.scorer_completion_tokens == 3 * one.usage.scorer_completion_tokens == 3 * 5
    assert three.score.tokens == 15


@pytest.mark.parametrize("tie_break", ["logprob", "likelihood"])
def test_equal_rewards_are_decided_by_the_tie_break(tie_break):
    things = items("0 zzz", "1 yyy", "2 xxx")
    scored = score(Flip(answers(X, X, X), tie_break=tie_break), things)
    ties = [s.score.tie_break for s in scored]
    assert len(set(ties)) == 3
    selection = select(as_selector("best"), [s.score for s in scored], [i.candidate for i in things])
    assert selection.best == ties.index(max(ties))


def test_without_a_tie_break_the_shorter_reconstruction_wins_and_no_logprobs_are_asked_for():
    things = items("0 zzz", "1 yyy", "2 xxx")
    flip = Flip(answers(f"the {X}", X, X), tie_break="none")
    assert not flip.sampling.logprobs
    scored = score(flip, things)
    assert [(s.score.reward, s.score.tie_break) for s in scored] == [(1.0, None)] * 3
    assert select(as_selector("best"), [s.score for s in scored], [i.candidate for i in things]).best == 1


def test_the_likelihood_tie_break_is_one_more_call_and_spares_the_pruned():
    engine = answers(X, "q q q q q q q q")
    first, second = score(Flip(engine, tie_break="likelihood"), items("0", "1"))
    assert engine.calls == 2
    [rated] = asyncio.run(engine.loglikelihood([load_style("direct").prompt(TASK, "0")], [X]))
    assert first.score.tie_break == rated.mean
    assert second.score.status == "pruned"
    assert second.score.tie_break is None
    [plain] = score(Flip(answers(X)), items("0"))
    assert first.usage.scorer_prompt_tokens == 2 * plain.usage.scorer_prompt_tokens + 5


def test_an_engines_failure_is_raised_and_what_ran_is_stopped():
    engine = answers(X, X)
    engine.fail_after = 3
    with pytest.raises(EngineError):
        score(Flip(engine), items("0", "1"))
    assert engine.running == 0


def test_closing_the_scores_stops_the_engine():
    engine = answers("Write", "Write one short haiku and much more text after that")

    async def first_only():
        scores = Flip(engine).score(items("0", "1", prune=False))
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
        ({"prompt": "jsn"}, "Did you mean 'json'"),
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
        ({"samples": 0}, "samples must be a whole number >= 1, got 0"),
        ({"samples": 1.5}, "samples must be"),
        ({"retries": -1}, "retries must be a whole number >= 0"),
        ({"device": "cpu"}, "device: options are for models loaded by name"),
    ],
)
def test_bad_options_are_refused(options, problem):
    with pytest.raises(InputError, match=problem):
        Flip(answers(X), **options)


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError, match="must be a name, a folder or an engine, got 3"):
        Flip(3)
