"""Backward likelihood: prefill only, one call, mean log p per token of the instruction."""

import asyncio

import pytest

from bon.engines.base import Loglikelihood
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError
from bon.scorers import BackwardLikelihood, Board, Item, Scorer
from bon.task import Task
from bon.types import Candidate

TASK = Task.of(" Write one haiku \n")


def score(scorer, *texts):
    board = Board()
    things = [Item(TASK, Candidate(i, text), board) for i, text in enumerate(texts)]

    async def collect():
        return [scored async for scored in scorer.score(things)]

    return board, sorted(asyncio.run(collect()), key=lambda s: s.item)


class Recorder(ScriptedEngine):
    """Remembers what it was asked to rate."""

    async def loglikelihood(self, prompts, continuations, *, end=True):
        self.asked = ([p.turns[-1].text for p in prompts], list(continuations), end)
        return await super().loglikelihood(prompts, continuations, end=end)


def test_the_reward_is_the_mean_logprob_per_token_of_the_instruction_and_its_end():
    engine = Recorder()
    board, [first, second] = score(BackwardLikelihood(engine), "Rain", "<think>hm</think>Snow")
    assert engine.asked == (["Response:\nRain", "Response:\nSnow"], ["Write one haiku"] * 2, True)
    assert engine.calls == 1
    assert engine.decoded == 0
    assert first.score.reward < 0
    assert first.score.tie_break is None
    assert board.best == max(first.score.reward, second.score.reward)


def test_tokens_are_counted_as_prefill():
    _, [scored] = score(BackwardLikelihood(ScriptedEngine()), "Rain")
    assert scored.usage.scorer_completion_tokens == 0
    assert scored.usage.scorer_prompt_tokens >= 4


def test_a_candidate_with_nothing_but_thinking_is_empty():
    _, [scored] = score(BackwardLikelihood(ScriptedEngine()), "<think>hm")
    assert (scored.score.status, scored.score.reward) == ("empty", None)


def test_a_response_too_long_for_the_scorer_fails_alone():
    _, [first, second] = score(BackwardLikelihood(ScriptedEngine(max_model_len=30)), "Rain", "rain " * 50)
    assert first.score.reward is not None
    assert second.score.status == "failed"
    assert "does not fit" in second.score.reason


def test_an_impossible_instruction_is_a_failure_and_not_a_number():
    class Engine(ScriptedEngine):
        async def loglikelihood(self, prompts, continuations, *, end=True):
            return [Loglikelihood(float("-inf"), 3)]

    board, [scored] = score(BackwardLikelihood(Engine()), "Rain")
    assert (scored.score.status, scored.score.reward, board.best) == ("failed", None, None)


def test_it_is_a_scorer_and_waits_for_the_policys_engine_without_a_model():
    engine, scorer = ScriptedEngine(), BackwardLikelihood()
    assert scorer.engine is None
    assert scorer.on(engine).engine is engine
    assert isinstance(scorer.on(engine), Scorer)
    assert scorer.on(engine).name == "likelihood(scripted)"


def test_a_json_prompt_is_refused():
    with pytest.raises(InputError, match="asks for JSON"):
        BackwardLikelihood(ScriptedEngine(), prompt="json")
