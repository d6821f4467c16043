"""The instruction as a draft of its own reconstruction: the same scores for less, and only where it pays."""

import asyncio
from dataclasses import replace

import pytest

from bon.engines.base import Completion, load_engine
from bon.engines.scripted import ScriptedEngine
from bon.mini.tasks import sample_instructions
from bon.sampler import sample
from bon.scorers import Board, Flip, Item
from bon.scorers.drafting import Drafting
from bon.task import Task
from bon.types import Candidate, Sampling


async def collect(stream):
    return [one async for one in stream]


def test_scores_are_the_same_with_and_without_drafts_and_cost_less():
    engine = load_engine()
    tasks = [Task.of(text) for text in sample_instructions(12, 3)]
    sampled = asyncio.run(collect(sample(engine, tasks, Sampling(seed=1, max_tokens=64), 4)))
    found = {}
    for draft in (True, False):
        boards = [Board(prune=False) for _ in tasks]
        items = [Item(tasks[s.task], s.candidate, boards[s.task]) for s in sampled if s.candidate.text]
        flip = Flip(engine, sampling=Sampling(temperature=0.0, max_tokens=64), draft=draft)
        asyncio.run(collect(flip.score([replace(item, board=Board(prune=False)) for item in items[:16]])))  # on trial
        found[draft] = sorted(asyncio.run(collect(flip.score(items))), key=lambda s: s.item)
    for drafted, plain in zip(found[True], found[False], strict=True):
        assert (drafted.score.reward, drafted.score.inferred) == (plain.score.reward, plain.score.inferred)
        assert drafted.score.tokens == plain.score.tokens
        assert drafted.score.tie_break == pytest.approx(plain.score.tie_break, abs=1e-5)
        assert plain.usage.drafted_tokens == 0
    decoded = {
        draft: sum(s.usage.scorer_completion_tokens - s.usage.drafted_tokens for s in scored)
        for draft, scored in found.items()
    }
    assert decoded[True] < 0.6 * decoded[False]


class Asked(ScriptedEngine):
    """Notes the drafts it was handed; takes none, like an engine that cannot read them."""

    def __init__(self):
        super().__init__(["Write"])
        self.drafts = []

    def generate(self, prompts, sampling, n=1, *, keep=None):
        self.drafts += [prompt.draft for prompt in prompts]
        return super().generate(prompts, sampling, n, keep=keep)


@pytest.mark.parametrize(
    ("options", "drafts"),
    [
        ({}, {"Write a haiku"}),
        ({"draft": False}, {""}),
        ({"prompt": "json"}, {""}),
        ({"samples": 2}, {""}),
        ({"sampling": Sampling(temperature=0.7)}, {""}),
    ],
)
def test_only_a_greedy_bare_instruction_is_drafted(options, drafts):
    engine = Asked()
    item = Item(Task.of(" Write a haiku\n"), Candidate(0, "rain"))
    asyncio.run(collect(Flip(engine, **options).score([item])))
    assert set(engine.drafts) == drafts


def test_drafts_that_are_never_taken_are_given_up_and_tried_again_now_and_then():
    engine = Asked()
    flip = Flip(engine)
    for i in range(400):
        asyncio.run(collect(flip.score([Item(Task.of("Write a haiku"), Candidate(i, f"rain {i}"))])))
    drafted = [bool(draft) for draft in engine.drafts]
    assert all(drafted[:16])
    assert 0 < sum(drafted[16:]) <= 400 // 32 + 1
    assert flip.on(Asked())._drafting.pays(), "nothing is known of another model"


def test_a_new_scorer_is_tried_with_a_few_drafts_first():
    engine = Asked()
    board = Board(prune=False)
    items = [Item(Task.of("Write a haiku"), Candidate(i, f"rain {i}"), board) for i in range(30)]
    asyncio.run(collect(Flip(engine).score(items)))
    assert sum(bool(draft) for draft in engine.drafts) == 16


def test_nothing_is_drafted_while_the_engines_batch_is_full():
    """On vLLM's CPU build drafts made a file of prompts take a tenth longer: nothing is idle that could read them."""
    engine = Asked()
    flip = Flip(engine)
    for i, engine.full in enumerate((True, False, True)):
        asyncio.run(collect(flip.score([Item(Task.of("Write a haiku"), Candidate(i, "rain"))])))
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
