"""Rewards that look at the whole group: what the candidates have in common, and several rewards added up."""

import asyncio

import numpy as np
import pytest
from scoring import Own

import bon
from bon import BestOfN
from bon.engines.base import Loglikelihood
from bon.engines.scripted import ScriptedEngine
from bon.errors import EngineError, InputError, UnknownNameError
from bon.models import ModelPool
from bon.scorers.base import Scorer
from bon.scorers.consensus import Consensus
from bon.scorers.default import Default
from bon.scorers.ensemble import Ensemble
from bon.selectors import Best
from bon.similarity import WordF1
from bon.spec import SCORERS
from bon.types import Score

TEXTS = ["the cat sat on a mat", "a cat sat there", "dogs bark at night", "the cat sat on the mat"]


def scored(scorer, *rows):
    return asyncio.run(bon.score(scorer, rows))


def lengths(entry):
    return float(len(entry.candidate.text))


class Silent(Scorer):
    """Has no reward for some candidates."""

    def __init__(self, *without, error=None):
        self.without, self.error = without, error

    async def score(self, pending):
        for position, each in enumerate(pending):
            reward = None if each.candidate.index in self.without else float(each.candidate.index)
            missing = {"status": "failed", "reason": "no idea", "error": self.error} if reward is None else {}
            yield position, Score(reward, **missing)


def test_consensus_is_the_mean_similarity_with_all_candidates():
    [group] = scored("consensus", ("x", TEXTS))
    assert group.rewards == pytest.approx([np.mean([WordF1()(a, b).f1 for b in TEXTS]) for a in TEXTS])
    assert group.rewards.index(max(group.rewards)) in (0, 3)


def test_copies_count_as_often_as_they_were_sampled():
    """Copies are scored once by other scorers; here they are votes."""
    [group] = scored("consensus", ("x", ["42", "41", "42"]))
    assert group.rewards == pytest.approx([2 / 3, 1 / 3, 2 / 3])


def test_groups_of_one_call_do_not_mix():
    apart = [scored("consensus", ("x", texts))[0].rewards for texts in (TEXTS, ["one", "two"])]
    together = [group.rewards for group in scored("consensus", ("x", TEXTS), ("y", ["one", "two"]))]
    assert together == apart


def test_one_candidate_has_nothing_to_be_compared_with_and_stops_no_sampling():
    """It agreed with itself, reward 1.0, and a budget that stops at 0.9 never saw another."""
    [group] = scored("consensus", ("x", ["one"]))
    assert (group.rewards, group.scores[0].status) == ((None,), "failed")
    assert "no other candidate" in group.scores[0].reason
    for scorer in ("consensus", "default"):
        result = BestOfN(ScriptedEngine(TEXTS), scorer, n="stop-at:0.99,most=3,batch=1")("hello")
        assert len(result.candidates) == 3
    single = BestOfN(ScriptedEngine(TEXTS), "default", n=1)("hello")
    assert single.text in TEXTS, "the default picks it all the same"
    assert (single.reward, single.scores[0].reason) == (0.0, group.scores[0].reason)


def test_consensus_needs_no_model_and_takes_other_similarities():
    engine = ScriptedEngine(TEXTS)
    result = BestOfN(engine, "consensus:rouge_l", n=4)("hello")
    assert result.text in (TEXTS[0], TEXTS[3])
    assert result.usage.scorer_prompt_tokens == result.usage.scorer_completion_tokens == 0
    with pytest.raises(UnknownNameError, match="similarity"):
        SCORERS.make("consensus:nope")


def test_an_ensemble_adds_what_each_scorer_says_on_one_scale():
    """Added as they are, the rewards of one scorer would drown those of another."""
    [group] = scored(Ensemble([Own(lengths), Consensus()], [1, 3]), ("x", TEXTS))
    rows = [[len(t) for t in TEXTS], [np.mean([WordF1()(a, b).f1 for b in TEXTS]) for a in TEXTS]]
    z = [(np.array(row) - np.mean(row)) / np.std(row) for row in rows]
    assert group.rewards == pytest.approx(list((z[0] + 3 * z[1]) / 4))
    assert [*group.scores[0].parts.values()] == pytest.approx([rows[0][0], rows[1][0]]), "rewards as they were"


def given(*rewards):
    return Own(lambda entry: rewards[entry.candidate.index])


@pytest.mark.parametrize(
    ("normalise", "rewards"),
    [
        ("rank", [0, 0.5, 0.5, 1]),
        ("minmax", [0, 0.1, 0.1, 1]),
        ("zscore", [-3 / 4.062, -2 / 4.062, -2 / 4.062, 7 / 4.062]),
    ],
)
def test_an_ensemble_brings_rewards_to_the_scale_that_is_asked_for(normalise, rewards):
    """By rank an outlier counts no more than any other best."""
    [group] = scored(Ensemble([given(-1, 0, 0, 9)], normalise=normalise), ("x", TEXTS))
    assert group.rewards == pytest.approx(rewards, abs=1e-3)


@pytest.mark.parametrize("normalise", ["rank", "minmax", "zscore"])
def test_a_reward_that_is_missing_stands_at_the_mean_of_the_others(normalise):
    """At 0 it would be the worst of all, by rank and from 0 to 1."""
    [group] = scored(Ensemble([Silent(1), given(5, 5, 5, 5)], normalise=normalise), ("x", TEXTS))
    lowest, missing, *others = group.rewards
    assert missing == pytest.approx(np.mean([lowest, *others]))


def test_a_scorer_that_finds_all_alike_says_nothing():
    for normalise in ("zscore", "rank", "minmax"):
        ensemble = Ensemble([Own(lambda e: 0.1 + 0.2), Own(lengths)], normalise=normalise)
        [group] = scored(ensemble, ("x", TEXTS))
        assert np.argsort(group.rewards).tolist() == np.argsort([len(t) for t in TEXTS]).tolist()


def test_a_reward_that_one_scorer_lacks_is_told_and_the_others_count():
    [group] = scored(Ensemble([Silent(0), Own(lengths)]), ("x", TEXTS))
    assert group.scores[0].reward is not None
    assert (group.scores[0].status, "no idea" in group.scores[0].reason) == ("repaired", True)
    assert group.scores[1].status == "ok"


def test_a_candidate_that_no_scorer_can_score_has_no_reward():
    error = EngineError("the model is gone")
    [group] = scored(Ensemble([Silent(1, error=error), Silent(1, 2)]), ("x", TEXTS))
    assert [score.status for score in group.scores] == ["ok", "failed", "repaired", "ok"]
    assert group.scores[1].error is error
    [group] = scored(Ensemble([Silent(1, error=error), Own(lengths)]), ("x", TEXTS))
    assert (group.scores[1].status, group.scores[1].error) == ("repaired", error), "a store keeps no half of a score"


def test_an_ensemble_loads_each_model_once_and_is_written_as_it_is_read():
    spec = 'ensemble:"likelihood:mini,style=turns + flip:mini + consensus",weights=[1, 1, 2]'
    made = SCORERS.make(spec)
    assert SCORERS.spec_of(made) == spec
    pool = ModelPool()
    bound = pool.scorer(made)
    assert bound.parts[0].engine is bound.parts[1].engine
    [group] = scored(bound, ("Write a slogan", ["Good bread, good day!", "Bread", "Good bread"]))
    assert all(len(score.parts) == 3 and score.explanation for score in group.scores)
    assert group.scores[0].usage.scorer_completion_tokens > 0
    asyncio.run(pool.aclose())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([],), "at least one scorer"),
        ((["consensus"], [1, 2]), "as many positive weights"),
        ((["consensus"], [0]), "positive weights"),
        ((["consensus", "longest"], [0, 0]), "positive weights"),
        ((["consensus", "longest"], [1, -1]), "positive weights"),
        ((["consensus"], [float("inf")]), "positive weights"),
        (("consensus + longest + consensus",), "names 'consensus' twice"),
        (("consensus + ensemble:longest",), "no part of an ensemble"),
        (("consensus", None, "softmax"), "scale of an ensemble"),
        ((["consensus", "nope"],), "nope"),
        (("os:system",), "os"),
    ],
)
def test_an_ensemble_of_nonsense_is_refused(arguments, error):
    with pytest.raises(InputError, match=error):
        Ensemble(*arguments[:2], **dict(zip(["normalise"], arguments[2:], strict=False)))


def test_of_two_candidates_consensus_prefers_neither_however_it_compares():
    """Where recall counts more, the longer of two always had more in common with the shorter than that with it."""
    for similarity in ("word_f1", "chrf"):
        [group] = scored(Consensus(similarity), ("x", ["It is four.", "It is four, since two and two are that much."]))
        assert group.rewards[0] == group.rewards[1]


def test_the_order_of_candidates_changes_no_reward():
    shuffled = [TEXTS[i] for i in (2, 0, 3, 1)]
    for similarity in ("word_f1", "chrf", "rouge_l"):
        by_text = [
            dict(zip(t, scored(Consensus(similarity), ("x", t))[0].rewards, strict=True)) for t in (TEXTS, shuffled)
        ]
        assert by_text[0] == by_text[1]


# --- The default -----------------------------------------------------------------------------------------------------


class Reads(ScriptedEngine):
    """Gives log-probabilities: the shorter the response, the likelier any instruction; keeps what it read."""

    def __init__(self, error=None):
        super().__init__()
        self.read, self.error = [], error

    async def loglikelihood(self, prompts, continuations):
        texts = [str(prompt.turns[-1].pieces[-1]) for prompt in prompts]
        self.read += texts
        return [Loglikelihood(-float(len(text)), 1, 7, error=self.error) for text in texts]


def test_the_default_picks_by_consensus_and_reads_nothing_where_that_decides():
    engine = Reads()
    [group] = scored(Default(engine), ("x", ["the cat sat on a mat", "the cat sat on the mat", "dogs bark"]))
    assert group.rewards == scored("consensus:chrf", ("x", [c.text for c in group.candidates]))[0].rewards
    assert (engine.read, {score.tie_break for score in group.scores}) == ([], {None})


def test_the_default_lets_the_model_decide_between_two_and_between_those_that_tie():
    engine = Reads()
    groups = scored(Default(engine), ("x", ["longer one", "short"]), ("y", ["abc", "abc", "xyz!", "xyz!", "0"]))
    assert sorted(engine.read) == ["abc", "longer one", "short", "xyz!"], "copies once"
    assert [score.tie_break for score in groups[0].scores] == [-10, -5]
    assert [score.tie_break for score in groups[1].scores] == [-3, -3, -4, -4, None]
    assert groups[0].result(Best()).text == "short"
    assert groups[1].result(Best()).text == "abc"


def test_an_answer_that_works_on_the_model_alone_loses_the_defaults_ties():
    """The shorter the response the likelier here, and an echo is the shorter of the two."""
    engine = Reads()
    prompt = "Write a haiku about autumn leaves."
    [group] = scored(Default(engine), (prompt, [prompt, "Red leaves drift and fall, and the wind forgets them all."]))
    assert (group.scores[0].tie_break, group.result(Best()).best) == (None, 1)
    assert "guard" in group.scores[0].reason
    assert len(engine.read) == 1


@pytest.mark.parametrize("normalise", ["rank", "minmax", "zscore"])
def test_in_an_ensemble_a_part_breaks_its_ties_as_it_does_by_itself(normalise):
    """Of two candidates the default's consensus prefers neither, and an ensemble never asked its model."""
    engine = Reads()
    parts = [Default(engine), given(5, 5, 5, 5, 5)]
    pairs, more = [("x", ["longer one", "short"]), ("z", ["a cat", "a cat"])], ("y", ["abc", "abc", "xyz!", "0"])
    groups = scored(Ensemble(parts, normalise=normalise), *pairs, more)
    assert sorted(engine.read) == ["longer one", "short"], "neither copies nor where consensus decides"
    assert groups[0].result(Best()).text == "short"
    assert groups[0].scores[1].parts[parts[0].name] == groups[0].scores[0].parts[parts[0].name], "rewards as they were"
    assert groups[0].scores[1].usage.scorer_prompt_tokens > 0 == groups[1].scores[0].usage.scorer_prompt_tokens
    assert groups[1].rewards[0] == groups[1].rewards[1]
    prompt = "Write a haiku about autumn leaves."
    [group] = scored(Ensemble(parts), (prompt, [prompt, "Red leaves drift and fall, and the wind forgets them all."]))
    assert group.result(Best()).best == 1, "an echo, which the guard voids, is not the winner for being likelier"
    assert "guard" in group.scores[0].reason
    [group] = scored(Ensemble([Default(Reads(EngineError("gone"))), given(1, 2)]), ("x", ["one", "two"]))
    assert (group.result(Best()).text, isinstance(group.scores[0].error, EngineError)) == ("two", True)
    assert "gone" in group.scores[0].reason

    class Lost(Own):
        async def settle(self, tied):
            raise ConnectionError("lost the model")
            yield

    [group] = scored(Ensemble([Lost(lambda e: 1.0), given(1, 2)]), ("x", ["one", "two"]))
    assert (group.result(Best()).text, None in group.rewards) == ("two", False), "a tie that stays costs no reward"
    assert "lost the model" in group.scores[0].reason


def test_the_credit_of_sentences_reads_nothing_to_tell_ties_apart():
    """Of two candidates consensus prefers neither, whichever sentence is left out: only rewards count there."""
    engine = Reads()
    bon_ = BestOfN(ScriptedEngine(), Default(engine))
    result = bon_.rerank("x", ["The cat sat. The dog ran.", "The cat sat. A bird sang."])
    read = len(engine.read)
    assert len(bon_.credit(result).credit) == 2
    assert (read, len(engine.read)) == (2, 2)


def test_a_model_that_cannot_read_leaves_a_tie_and_says_so():
    [group] = scored(Default(Reads(EngineError("gone"))), ("x", ["one", "two"]))
    assert [score.tie_break for score in group.scores] == [None, None]
    assert None not in group.rewards
    assert "gone" in group.scores[0].reason
    assert isinstance(group.scores[0].error, EngineError), "so a store does not keep it"


def test_the_defaults_model_is_named_like_any_other():
    made = SCORERS.make("default:mini,contrast=1")
    assert SCORERS.spec_of(made) == "default:mini,contrast=1"
    assert made.parts[1].parts[0].style.name == "turns"
    pool = ModelPool()
    [group] = scored(pool.scorer(made), ("Write a slogan", ["Good bread, good day!", "Bread"]))
    assert None not in [score.tie_break for score in group.scores]
    with pytest.raises(InputError, match="log-probabilities"):
        pool.scorer(Default(lambda prompt: "x"))
    asyncio.run(pool.aclose())
