"""Scorers that read probabilities: one word behind an explanation, and the response itself under one model or two."""

import math

import pytest
from scoring import scores_of

from bon.engines.base import Loglikelihood
from bon.engines.scripted import ScriptedEngine
from bon.errors import EngineError, InputError
from bon.heads.data import prompt_of
from bon.models import ModelPool
from bon.scorers.forward import ForwardLikelihood, Implicit
from bon.scorers.slot import Slot
from bon.spec import SCORERS
from bon.task import Task

TASK = "Name a colour."


class Reader(ScriptedEngine):
    """Finds what it reads as likely as ``likely(prompt, continuation)`` says, and remembers what it was asked."""

    def __init__(self, likely, script=("It names one.",), tokens=1):
        super().__init__(list(script))
        self.likely, self.tokens, self.asked = likely, tokens, []

    async def loglikelihood(self, prompts, continuations, *, end=True):
        self.asked += [tuple(turn.text for turn in prompt.turns) for prompt in prompts]
        return [
            Loglikelihood(self.likely("\n".join(turn.text for turn in prompt.turns), text), self.tokens, 7)
            for prompt, text in zip(prompts, continuations, strict=True)
        ]


def yes(text, word):
    good = 0.8 if "blue" in text else 0.5 if "Response:\n\n" in text else 0.1
    return math.log(good if word == "Yes" else 1 - good)


def test_the_reward_is_the_probability_of_yes_beyond_that_of_an_empty_response():
    found = scores_of(Slot(Reader(yes), explain=0), TASK, "blue", "a dog")
    assert [score.reward for score in found] == pytest.approx([0.3, -0.4])
    assert sum(score.tokens for score in found) == 0, "nothing is sampled"


def test_the_explanation_stands_before_the_question_and_beside_the_reward():
    reader = Reader(yes)
    [score] = scores_of(Slot(reader), TASK, "blue")
    assert score.explanation == "It names one."
    assert score.tokens > 0
    assert reader.asked[0][-2] == "It names one."
    assert "Answer with one word" in reader.asked[0][-1]
    assert "blue" in reader.asked[0][-3]


def test_the_empty_response_is_read_once_for_each_task():
    reader = Reader(yes)
    scores_of(Slot(reader, explain=0), TASK, "blue", "red", "green")
    assert len(reader.asked) == 2 * (3 + 1)


def test_labels_must_be_one_token():
    with pytest.raises(InputError, match="label 'Yes' is 2 tokens"):
        scores_of(Slot(Reader(yes, tokens=2), explain=0), TASK, "blue")


@pytest.mark.parametrize("options", [{"explain": -1}, {"labels": ["Yes"]}, {"labels": "Yes"}, {"labels": ["a", "a"]}])
def test_slot_options_that_are_none_are_refused(options):
    with pytest.raises(InputError):
        Slot("mini", **options)


def test_an_explanation_that_cannot_be_made_leaves_the_others():
    class Failing(Reader):
        async def generate(self, requests, *, keep=None):
            async for done in super()._generate(requests, keep):
                failed = type(done).failed(done.request_index, 0, EngineError("it is down"))
                yield failed if done.request_index == 0 else done

    first, second = scores_of(Slot(Failing(yes)), TASK, "red", "blue")
    assert (first.status, first.reward) == ("failed", None)
    assert isinstance(first.error, EngineError)
    assert second.reward == pytest.approx(0.3)


# --- the response itself ----------------------------------------------------------------------------------------------


def test_forward_is_what_the_policy_says_of_its_own_samples():
    import bon

    with bon.BestOfN("mini", "logprob", n=1, sampling={"temperature": 0}) as policy:
        result = policy("Write a slogan for a bakery called Sunrise.")
    assert result.best_candidate.finish_reason == "stop"
    assert bon.BestOfN(scorer="forward:mini").rerank(result.task, [result.text]).reward == pytest.approx(
        result.reward, abs=1e-3
    )


def test_the_implicit_reward_is_the_difference_of_two_models():
    model, reference = (Reader(lambda text, word, k=k: -k * len(word), tokens=2) for k in (1, 3))
    for over, divided in (("sum", 1), ("mean", 2)):
        scorer = Implicit(model, reference=reference, beta=0.5, over=over)
        found = scores_of(scorer, TASK, "ab", "abcd")
        assert [score.reward for score in found] == pytest.approx([0.5 * 2 * 2 / divided, 0.5 * 2 * 4 / divided])
        assert len(found[0].parts) == 2
        assert found[0].usage.scorer_prompt_tokens == 2 * (7 + 2), "both readings are counted"


def test_the_same_model_twice_teaches_nothing():
    import bon

    found = bon.BestOfN(scorer="implicit:mini,reference=mini").rerank(TASK, ["Blue.", "Red."])
    assert [score.reward for score in found.scores] == [0.0, 0.0]


def test_two_tokenizers_cannot_be_compared():
    class Other(Reader):
        def __init__(self, fingerprint):
            super().__init__(yes)
            self.renderer = type("Renderer", (), {"fingerprint": fingerprint})

    scorer = Implicit(Other("a"), reference=Other("b"))
    with pytest.raises(InputError, match="one tokenizer"):
        ModelPool().scorer(scorer)


@pytest.mark.parametrize("spec", ["implicit:mini", "implicit:mini,reference=mini,beta=0", "forward:mini,over=all"])
def test_forward_options_that_are_none_are_refused(spec):
    with pytest.raises(InputError):
        SCORERS.make(spec)


def test_an_infinite_difference_is_no_reward():
    scorer = Implicit(Reader(lambda text, word: -1.0), reference=Reader(lambda text, word: -math.inf))
    [score] = scores_of(scorer, TASK, "blue")
    assert (score.reward, score.status) == (None, "failed")


def test_thinking_is_not_rated():
    [score] = scores_of(ForwardLikelihood(Reader(lambda text, word: -float(len(word)))), TASK, "<think>x</think>blue")
    assert score.reward == -4.0


def test_what_an_answer_begins_with_is_rated_once_as_a_part_of_the_answer():
    """The conversation was taken with its begun answer, so that it stood there twice."""
    task = Task.of([{"role": "user", "content": TASK}, {"role": "assistant", "content": "My favourite is"}])
    reader = Reader(lambda text, word: -float(len(word)))
    [score] = scores_of(ForwardLikelihood(reader), task, "My favourite is blue")
    assert (score.reward, reader.asked) == (-20.0, [(TASK,)])
    assert prompt_of(task).turns[-1].role == "user", "nor is it read twice for a head"
