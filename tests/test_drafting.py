"""The instruction as a draft of its own reconstruction: the same scores for less, and only where it pays."""

import asyncio

import pytest
from scoring import group_of, scored, scores_of

from bon.budget import Fixed
from bon.engines.base import Completion
from bon.engines.scripted import ScriptedEngine
from bon.group import Group
from bon.mini.tasks import sample_instructions
from bon.models import ModelPool
from bon.pipeline import Pipeline
from bon.scorers.flip import Flip
from bon.scorers.flip.drafting import Drafting
from bon.task import Task
from bon.types import Sampling


def test_scores_are_the_same_with_and_without_drafts_and_cost_less():
    engine = ModelPool().engine()
    sampled = [Group(Task.of(text)) for text in sample_instructions(12, 3)]
    plain = Flip(engine, sampling=Sampling(temperature=0.0, max_tokens=64), draft=False)
    asyncio.run(Pipeline(plain, engine, Fixed(4), Sampling(seed=1, max_tokens=64)).run(sampled))
    flip = Flip(engine, sampling=Sampling(temperature=0.0, max_tokens=64))
    scored(flip, *(group_of(g.task, g.candidates) for g in sampled[:8]))  # on trial
    again = scored(flip, *(group_of(g.task, g.candidates) for g in sampled))
    decoded = {True: 0, False: 0}
    for before, after in zip(sampled, again, strict=True):
        for undrafted, drafted in zip(before.scores, after.scores, strict=True):
            assert (drafted.reward, drafted.explanation) == (undrafted.reward, undrafted.explanation)
            assert drafted.tokens == undrafted.tokens
            assert drafted.tie_break == pytest.approx(undrafted.tie_break, abs=1e-5)
            assert undrafted.usage.drafted_tokens == 0
            for draft, score in ((True, drafted), (False, undrafted)):
                if score.same_as is None:
                    decoded[draft] += score.tokens - score.usage.drafted_tokens
    assert decoded[True] < 0.6 * decoded[False]
    asyncio.run(engine.aclose())


class Asked(ScriptedEngine):
    """Notes the drafts it was handed; takes none, like an engine that cannot read them."""

    def __init__(self):
        super().__init__(["Write"])
        self.drafts = []

    def generate(self, requests, *, keep=None):
        self.drafts += [request.prompt.draft for request in requests]
        return super().generate(requests, keep=keep)


@pytest.mark.parametrize(
    ("options", "drafts"),
    [
        ({}, {"Write a haiku"}),
        ({"draft": False}, {""}),
        ({"style": "json"}, {""}),
        ({"samples": 2}, {""}),
        ({"sampling": Sampling(temperature=0.7)}, {""}),
    ],
)
def test_only_a_greedy_bare_instruction_is_drafted(options, drafts):
    engine = Asked()
    scores_of(Flip(engine, **options), " Write a haiku\n", "rain")
    assert set(engine.drafts) == drafts


def test_drafts_that_are_never_taken_are_given_up_and_tried_again_now_and_then():
    engine = Asked()
    flip = Flip(engine)
    for i in range(400):
        scores_of(flip, "Write a haiku", f"rain {i}")
    drafted = [bool(draft) for draft in engine.drafts]
    assert all(drafted[:16])
    assert 0 < sum(drafted[16:]) <= 400 // 32 + 1
    assert flip.on(Asked())._drafting.pays(), "nothing is known of another model"


def test_a_new_scorer_is_tried_with_a_few_drafts_first():
    engine = Asked()
    scores_of(Flip(engine), "Write a haiku", *(f"rain {i}" for i in range(30)))
    assert sum(bool(draft) for draft in engine.drafts) == 16


def test_nothing_is_drafted_while_the_engines_batch_is_full():
    """On vLLM's CPU build drafts made a file of prompts take a tenth longer: nothing is idle that could read them."""
    engine = Asked()
    flip = Flip(engine)
    for i, engine.full in enumerate((True, False, True)):
        scores_of(flip, "Write a haiku", f"rain {i}")
    assert engine.drafts == ["", "Write a haiku", ""]


def completion(drafted):
    return Completion(0, 0, "x", "stop", completion_tokens=10, drafted_tokens=drafted)


def test_drafts_that_are_taken_again_come_back():
    drafting = Drafting()
    for _ in range(100):
        if drafting.pays():
            drafting.learn(completion(0))
    assert not all(drafting.pays() for _ in range(8))
    for _ in range(40):
        drafting.learn(completion(9))
    assert all(drafting.pays() for _ in range(100))
