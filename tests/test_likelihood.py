"""Backward likelihood: prefill only, one call, mean log p per token of the instruction."""

import pytest
from scoring import group_of, scored, scores_of

from bon.engines.base import Loglikelihood
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError
from bon.scorers.base import Scorer
from bon.scorers.likelihood import FOILS, BackwardLikelihood
from bon.task import Task

TASK = Task.of(" Write one haiku \n")


def score(scorer, *texts):
    return scores_of(scorer, TASK, *texts)


class Recorder(ScriptedEngine):
    """Remembers what it was asked to rate."""

    async def loglikelihood(self, prompts, continuations, *, end=True):
        self.asked = ([p.turns[-1].text for p in prompts], list(continuations), end)
        return await super().loglikelihood(prompts, continuations, end=end)


def test_the_reward_is_the_mean_logprob_per_token_of_the_instruction_and_its_end():
    engine = Recorder()
    group = group_of(TASK, ["Rain", "<think>hm</think>Snow"])
    scored(BackwardLikelihood(engine), group)
    first, second = group.scores
    assert engine.asked == (["Response:\nRain", "Response:\nSnow"], ["Write one haiku"] * 2, True)
    assert engine.calls == 1
    assert engine.decoded == 0
    assert first.reward < 0
    assert first.tie_break is None
    assert group.best_reward == max(first.reward, second.reward)


def test_tokens_are_counted_as_prefill():
    [found] = score(BackwardLikelihood(ScriptedEngine()), "Rain")
    assert found.usage.scorer_completion_tokens == 0
    assert found.usage.scorer_prompt_tokens >= 4


def test_a_candidate_with_nothing_but_thinking_is_empty():
    [found] = score(BackwardLikelihood(ScriptedEngine()), "<think>hm")
    assert (found.status, found.reward) == ("empty", None)


def test_a_response_too_long_for_the_scorer_fails_alone():
    first, second = score(BackwardLikelihood(ScriptedEngine(max_model_len=30)), "Rain", "rain " * 50)
    assert first.reward is not None
    assert second.status == "failed"
    assert "does not fit" in second.reason


def test_an_impossible_instruction_is_a_failure_and_not_a_number():
    class Engine(ScriptedEngine):
        async def loglikelihood(self, prompts, continuations, *, end=True):
            return [Loglikelihood(float("-inf"), 3)]

    [found] = score(BackwardLikelihood(Engine()), "Rain")
    assert (found.status, found.reward) == ("failed", None)
    assert "log-likelihood of -inf" in found.reason


def test_it_is_a_scorer_and_waits_for_the_policys_engine_without_a_model():
    engine, scorer = ScriptedEngine(), BackwardLikelihood()
    assert scorer.models == (None,)
    assert scorer.on(engine).engine is engine
    assert isinstance(scorer.on(engine), Scorer)
    assert scorer.on(engine).name == "likelihood(scripted)"


def test_a_json_prompt_is_refused():
    with pytest.raises(InputError, match="asks for JSON"):
        BackwardLikelihood(ScriptedEngine(), style="json")


def test_a_contrast_takes_away_what_a_response_does_for_any_instruction():
    """A response that restates everything, or nothing, made any instruction likely, and was preferred for it."""
    engine = Recorder()
    plain = score(BackwardLikelihood(engine), "Rain", "Snow")
    contrasted = score(BackwardLikelihood(engine, contrast=2), "Rain", "Snow")
    assert engine.asked[0] == ["Response:\nRain"] * 3 + ["Response:\nSnow"] * 3, "neighbours share their prefix"
    assert engine.asked[1] == ["Write one haiku", *FOILS[:2]] * 2
    for text, own, found in zip(("Rain", "Snow"), plain, contrasted, strict=True):
        foils = [scores_of(BackwardLikelihood(engine), Task.of(foil), text)[0].reward for foil in FOILS[:2]]
        assert found.reward == pytest.approx(own.reward - sum(foils) / 2)
        assert found.usage.scorer_prompt_tokens > 2 * own.usage.scorer_prompt_tokens


@pytest.mark.parametrize("contrast", [-1, 5, 1.5])
def test_a_contrast_that_cannot_be_is_refused(contrast):
    with pytest.raises(InputError, match="contrast"):
        BackwardLikelihood(contrast=contrast)


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("You want me to write one haiku. Rain falls.", "You want me to write one haiku. Rain falls."),
        ("Write one haiku: rain falls on leaves.", "rain falls on leaves."),
        ("I write one haiku.\n\nRain. Rain falls.", "Rain. Rain falls."),
        ("Write one haiku", "Write one haiku"),
        ("Haiku!", "Haiku!"),
    ],
)
def test_a_sentence_that_restates_the_instruction_is_not_read_unless_there_is_nothing_else(response, shown):
    """Such sentences make the instruction likely: the answers that repeat it were picked, and were the worst."""
    engine = Recorder()
    score(BackwardLikelihood(engine, drop_restated=True), response)
    assert engine.asked[0] == [f"Response:\n{shown}"]
