"""What every scorer promises: the same checks run on each that is registered, and on reward functions.

A scorer that is registered joins by its name; one with a way of its own joins by a line in ``WAYS``.
"""

import asyncio
import itertools
from contextlib import aclosing
from typing import get_args

import pytest
import tiny
from planted import trained
from scoring import Own, scored
from scoring import group_of as plain_group_of
from serving import served

from bon import BestOfN
from bon.credit import credited
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError
from bon.group import Group
from bon.mini import WEIGHTS
from bon.models import ModelPool
from bon.pipeline import Pipeline, score
from bon.scorers.base import Scorer
from bon.scorers.free import First
from bon.scorers.function import RewardFunction
from bon.scorers.judge import Judge
from bon.selectors import Best
from bon.spec import SCORERS
from bon.task import Task
from bon.types import Candidate, Score, ScoreStatus

TASK = Task.of("Write a slogan for a bakery called Sunrise.")
OTHER = Task.of("Name three colours.")
TEXTS = [
    "Sunrise: warm bread for every morning.",
    "Red, green and blue.",
    "Dear Anna, the meeting is on Friday at nine.",
    "Sunrise bakery. Good bread, good day!",
]


def length(prompt, responses):
    return [float(len(r)) for r in responses]


def share(prompt, responses):
    return [responses.count(r) / len(responses) for r in responses]


async def later(prompt, responses):
    await asyncio.sleep(0)
    return [float(len(r)) for r in responses]


def rating(prompt, draw):
    return f'{{"reasoning": "by its length", "score": {1 + len(prompt) % 9}}}'


WAYS = [
    # One needs a second model, one labels that are a token each of the embedded model, which writes no verdicts.
    *(name for name in SCORERS if not SCORERS.takes_argument(name) and name not in ("implicit", "slot", "judge")),
    'ensemble:"likelihood,style=turns + consensus"',
    'flip:samples=2,sampling={"seed": 1, "max_tokens": 24}',
    'ensemble:"likelihood + consensus",normalise=rank',
    "guard:flip",
    "flip:mini,adapter=ADAPTER",
    "likelihood:mini,adapter=ADAPTER",
    "guard:consensus",
    "flip:style=json",
    "flip:tie_break=likelihood",
    "implicit:mini,reference=mini",
    "majority:number",
    "head:probe",
    "head:bnrm",
    "judge:style=pairwise,reasoning=false",
    "judge:style=pairwise,pairs=knockout,reasoning=false",
    "judge:style=listwise,times=2,reasoning=false",
    "judge:reasoning=false",
    "reward-model:TINY",
    "consensus:embedding:BERT",
    'slot:explain=0,labels=["a", "b"]',
    'slot:explain=9,labels=["a", "b"]',
    Judge(ScriptedEngine(rating, max_model_len=2000), expected=False),
    length,
    share,
    later,
]


@pytest.fixture(scope="module")
def pool():
    pool = ModelPool()
    yield pool
    asyncio.run(pool.aclose())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return tiny.save_classifier(tmp_path_factory.mktemp("classifier"), "Llama", tiny.tokenizer("chatml"), num_labels=1)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny.save_classifier(tmp_path_factory.mktemp("encoder"), "Bert", tiny.tokenizer("wordpiece"), "MaskedLM")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of the embedded model, which it changes a little: it still writes in words."""
    return tiny.save_adapter(tmp_path_factory.mktemp("adapter") / "mine", WEIGHTS, size=0.05, name="mini")


@pytest.fixture(params=WAYS, ids=lambda way: way if isinstance(way, str) else getattr(way, "__name__", repr(way)))
def scorer(request, pool, classifier, encoder, adapter, tmp_path):
    way = request.param
    if isinstance(way, str):
        way = way.replace("TINY", str(classifier)).replace("BERT", str(encoder)).replace("ADAPTER", str(adapter))
    if isinstance(way, str) and way.startswith("head:"):
        reader = pool.engine("mini")
        sizes = {"fingerprint": reader.fingerprint, "width": 128}
        way = f"head:{trained(tmp_path, way.removeprefix('head:'), **sizes)},model=mini"
    return pool.scorer(SCORERS.make(way, {"sampling": {"max_tokens": 24}}) if isinstance(way, str) else way)


def group_of(task, texts, **options):
    """A group whose candidates know how likely they were."""
    known = [Candidate(i, t, cumulative_logprob=-len(t) / 7, completion_tokens=3) for i, t in enumerate(texts)]
    return plain_group_of(task, known, **options)


def rewards(scorer, *groups):
    return [group.rewards for group in scored(scorer, *groups)]


def test_it_is_a_scorer_that_says_what_it_is(scorer):
    assert isinstance(scorer, Scorer)
    assert scorer.name
    assert isinstance(scorer.concurrent, bool)
    assert not scorer.models, "its models are in place"
    assert scorer.range is None or scorer.range[0] < scorer.range[1]


def test_each_candidate_is_scored_once_and_none_twice(scorer):
    groups = [group_of(TASK, TEXTS, whole=scorer.needs.group), group_of(OTHER, TEXTS[:2], whole=scorer.needs.group)]
    pending = [p for group in groups for p in group.pending()]

    async def collect():
        return [found async for found in scorer.score(pending)]

    found = asyncio.run(collect())
    assert sorted(position for position, _ in found) == list(range(6))
    for _, one in found:
        assert isinstance(one, Score)
        assert one.status in get_args(ScoreStatus)
        assert (one.reward is None) <= (one.reason is not None), "no reward without a reason"
        if one.reward is not None and scorer.range is not None:
            assert scorer.range[0] <= one.reward <= scorer.range[1]
        assert one.usage.scorer_prompt_tokens >= 0


def test_nothing_to_score_gives_nothing(scorer):
    async def collect():
        return [found async for found in scorer.score([])]

    assert asyncio.run(collect()) == []


def test_the_same_candidates_have_the_same_rewards_again(scorer):
    [first], [second] = (rewards(scorer, group_of(TASK, TEXTS, whole=scorer.needs.group)) for _ in range(2))
    assert first == pytest.approx(second, abs=1e-5)


def test_a_reward_does_not_depend_on_the_other_tasks_of_the_call(scorer):
    whole = scorer.needs.group
    [alone] = rewards(scorer, group_of(TASK, TEXTS, whole=whole))
    _, together, _ = rewards(
        scorer,
        group_of(OTHER, TEXTS, whole=whole),
        group_of(TASK, TEXTS, whole=whole),
        group_of(OTHER, TEXTS[:1], whole=whole),
    )
    assert together == pytest.approx(alone, abs=1e-4)


def test_the_order_of_the_candidates_does_not_change_what_wins(scorer):
    """Between candidates that are equal in reward, tie-break and tokens the lower index wins, so these may change."""
    if isinstance(scorer, First):
        return  # the order is what it rewards
    winners = set()
    for order in list(itertools.permutations(range(4)))[::9]:
        group = group_of(TASK, [TEXTS[i] for i in order], whole=scorer.needs.group)
        scored(scorer, group)
        result = group.result(Best())
        best = result.scores[result.best]
        tied = [
            s for s in result.scores if (s.reward, s.tie_break, s.tokens) == (best.reward, best.tie_break, best.tokens)
        ]
        winners.add(result.text if len(tied) == 1 else round(best.reward, 6))
    assert len(winners) == 1


def test_copies_are_scored_together_or_share_one_score(scorer):
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]]
    group = group_of(TASK, texts, whole=scorer.needs.group)
    seen = [p.candidate.text for p in group.pending()]
    assert seen == (texts if scorer.needs.group else TEXTS[:2])
    scored(scorer, group)
    assert group.rewards[0] == group.rewards[2] == group.rewards[3]
    assert sum(s.same_as is not None for s in group.scores) == (0 if scorer.needs.group else 2)


def test_a_scorer_of_whole_groups_gets_each_in_one_call_and_no_other_with_it():
    calls = []

    def seen(prompt, responses):
        calls.append((prompt, responses))
        return [0.5 for _ in responses]

    scored(RewardFunction(seen), group_of(TASK, ["a", "a"], whole=True), group_of(OTHER, ["b"], whole=True))
    assert calls == [(TASK.instruction, ["a", "a"]), (OTHER.instruction, ["b"])]


def test_what_cannot_be_scored_fails_in_its_place(scorer):
    if scorer.needs.group:
        return  # a function takes whatever text there is
    group = group_of(TASK, [TEXTS[0], "<think>nothing but thinking", "word " * 9000])
    scored(scorer, group)
    assert [s.status for s in group.scores][1:] == ["empty", "failed" if scorer.engines else "ok"]
    assert group.scores[0].reward is not None
    assert group.scores[1].reward is None


@pytest.mark.parametrize("after", [0, 1])
def test_scoring_that_is_left_leaves_nothing_running(scorer, after):
    async def leave():
        before = asyncio.all_tasks()
        group = group_of(TASK, TEXTS, whole=scorer.needs.group)
        async with aclosing(scorer.score(group.pending())) as found:
            for _ in range(after):
                await anext(found)
        await asyncio.sleep(0)
        return {task for task in asyncio.all_tasks() - before if not task.done()}

    assert not asyncio.run(leave())
    assert len(rewards(scorer, group_of(TASK, TEXTS, whole=scorer.needs.group))[0]) == 4, "and it still scores"


def test_scoring_that_is_cancelled_leaves_nothing_running(scorer):
    async def cancel():
        before = asyncio.all_tasks()
        group = group_of(TASK, [f"{text} {i}" for text in TEXTS for i in range(8)], whole=scorer.needs.group)
        task = asyncio.create_task(Pipeline(scorer).run([group]))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0)
        return {task for task in asyncio.all_tasks() - before if not task.done()}

    assert not asyncio.run(cancel())
    assert len(rewards(scorer, group_of(TASK, TEXTS, whole=scorer.needs.group))[0]) == 4, "and it still scores"


def test_pruning_changes_no_winner(scorer):
    plain, pruned = (
        group_of(TASK, TEXTS, whole=scorer.needs.group, prune=prune and not scorer.needs.all_rewards)
        for prune in (False, True)
    )
    scored(scorer, plain, pruned)
    assert plain.result(Best()).best == pruned.result(Best()).best
    for full, few in zip(plain.scores, pruned.scores, strict=True):
        if few.status == "pruned":
            assert full.reward <= few.upper_bound + 1e-9
        else:
            assert few.reward == pytest.approx(full.reward, abs=1e-5)


def test_the_credit_of_a_sentence_is_what_the_reward_loses_without_it(scorer):
    texts = ["Sunrise bakery. Good bread, good day!", "We bake. Sunrise has warm bread.", "Red and green. Or blue."]
    [group] = scored(scorer, group_of(TASK, texts, whole=scorer.needs.group))
    result = group.result(Best())
    if scorer.needs.logprobs:
        with pytest.raises(InputError, match="was not sampled"):
            asyncio.run(credited(scorer, result))
        return
    found = asyncio.run(credited(scorer, result)).credit
    assert len(found) == (0 if result.reward is None else 2)
    for each in found:
        short = [text.replace(each.text, "").strip() if i == result.best else text for i, text in enumerate(texts)]
        [without] = rewards(scorer, group_of(TASK, short, whole=scorer.needs.group))
        if without[result.best] is None:
            assert each.credit is None
            assert each.reason
        else:
            assert each.credit == pytest.approx(result.reward - without[result.best], abs=1e-4)


def test_it_needs_no_policy(scorer, pool):
    [group] = asyncio.run(score(scorer, [(TASK, [Candidate(5, TEXTS[0]), TEXTS[1]])], pool=pool))
    assert isinstance(group, Group)
    assert [s.candidate for s in group.scores] == [0, 1]


def test_a_server_answers_and_ranks_with_it(scorer):
    policy = ScriptedEngine(TEXTS)
    with served(BestOfN(policy, scorer, n=3)) as site:
        answer = site.chat(TASK.instruction, best_of_n={"return_candidates": True})
        assert answer.status_code == 200, answer.text
        shown = answer.json()["best_of_n"]["candidates"]
        assert len(shown) == 3
        assert all((one["reward"] is None) <= (one["reason"] is not None) for one in shown)
        ranked = site.http.post("/v1/rerank", json={"query": TASK.instruction, "documents": TEXTS})
        if scorer.needs.logprobs:
            assert ranked.status_code == 200 or "log-probabilities" in ranked.text
        else:
            assert ranked.status_code == 200, ranked.text
            assert {one["index"] for one in ranked.json()["results"]} == {0, 1, 2, 3}


def test_a_scorer_of_ones_own_is_held_to_the_same():
    group = group_of(TASK, TEXTS)
    scored(Own(lambda each: len(each.candidate.text)), group)
    assert group.result(Best()).text == TEXTS[2]
