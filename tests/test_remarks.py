"""Warnings of a result: a reward that says nothing, and what cannot be relied on, are said beside the answer."""

import asyncio

import pytest

from bon import BestOfN, Candidate, RewardFunction, score
from bon.engines.scripted import ScriptedEngine
from bon.mini import WEIGHTS
from bon.remarks import OFF_WORLD

HAIKU = "Write a haiku about autumn leaves."
TEXTS = ["Crimson leaves descend", "I like pizza."]
needs_weights = pytest.mark.skipif(not (WEIGHTS / "config.json").exists(), reason="the embedded weights are not there")


def warnings_of(rewards, texts=TEXTS, **options):
    scorer = RewardFunction(lambda prompt, responses: rewards, name="given")
    result = BestOfN(ScriptedEngine(texts), scorer, n=len(texts), **options)(HAIKU)
    assert result.to_dict()["warnings"] == list(result.warnings)
    return list(result.warnings)


@pytest.mark.parametrize("reward", [0, 0.25])
def test_equal_rewards_of_different_texts_say_nothing(reward):
    """ "I like pizza." won over a haiku, both with a reward of 0, and nothing said so."""
    [warning] = warnings_of([reward, reward])
    assert warning == f"all rewards are {reward}, so they say nothing: the tie-break picked."


def test_rewards_that_differ_and_copies_of_one_text_are_fine():
    assert warnings_of([0, 1]) == []
    assert warnings_of([1, 1], ["A cat.", "A cat."]) == []
    assert warnings_of([1], ["A cat."]) == []


def test_a_winner_that_was_cut_off_is_said_and_a_loser_is_not():
    bon = BestOfN(ScriptedEngine(), lambda prompt, responses: [len(text) for text in responses])
    cut = [Candidate(0, "A long text that", "length"), Candidate(1, "A cat.")]
    assert bon.rerank(HAIKU, cut).warnings == ("the winner was cut off by the token limit: raise max_tokens.",)
    cut = [Candidate(0, "A", "length"), Candidate(1, "A cat.")]
    assert bon.rerank(HAIKU, cut).warnings == ()


def test_several_greedy_candidates_are_one():
    [warning] = warnings_of([1, 1], sampling={"temperature": 0})
    assert warning.startswith("at temperature 0 the 2 candidates are 2 times the same greedy one")
    assert warnings_of([1], ["A cat."], sampling={"temperature": 0}) == []


def test_a_scorer_that_repeats_the_response_is_said():
    repeats = ScriptedEngine(lambda prompt, draw: prompt.rpartition("Response:\n")[2])
    [warning] = BestOfN(ScriptedEngine(["Leaves fall to the ground", TEXTS[1]]), repeats, n=2)("Leaves").warnings
    assert warning.startswith("of 2 candidates the scorer repeated 2, where it should infer an instruction")


@needs_weights
def test_the_embedded_model_says_what_is_outside_its_world_as_policy_and_as_scorer():
    with BestOfN(n=1, sampling={"max_tokens": 4}) as bon:
        assert OFF_WORLD in bon("What is the capital of France?").warnings
        assert OFF_WORLD not in bon("Write a reminder for Anna to water the plants.").warnings
        assert OFF_WORLD in bon.rerank("What is the capital of France?", ["Paris.", "Rome."]).warnings


@needs_weights
def test_groups_that_were_scored_by_themselves_carry_their_warnings():
    [group] = asyncio.run(score("flip", [(HAIKU, TEXTS)]))
    assert group.warnings == [OFF_WORLD]
