import asyncio
import time

import pytest

from bon import BestOfN, RewardFunction, Sampling
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError

PROMPT = "Write a short poem about the red fox"


def test_a_copy_with_other_settings_shares_the_engines():
    bon = BestOfN(ScriptedEngine(["a", "b"]), n=8, stop_at=1.0, sampling=Sampling(top_p=0.5))
    copy = bon.replace(n=2, prune=False, stop_at=None)
    assert (copy.policy, copy.scorer) == (bon.policy, bon.scorer)
    assert (copy.n, copy.prune, copy.stop_at, copy.sampling) == (2, False, None, bon.sampling)
    assert (bon.n, bon.prune, bon.stop_at) == (8, True, 1.0), "the original is as it was"
    assert bon.replace(min_reward=2.0)(PROMPT).best is None, "another minimum"
    by_length = RewardFunction(lambda prompt, texts: [len(t) for t in texts])
    assert bon.replace(scorer=by_length)("x").reward == 1
    with pytest.raises(InputError, match="n must be"):
        bon.replace(n=0)
    with pytest.raises(TypeError, match="tempo"):
        bon.replace(tempo=1)


@pytest.mark.parametrize("overlaps", [True, False])
def test_a_deadline_returns_the_best_so_far_and_stops_the_rest(overlaps):
    answers = ["red fox", "fox", "a very long answer " * 100, "another long one " * 100]
    policy = ScriptedEngine(answers, step_seconds=0.01)
    flip = ScriptedEngine(step_seconds=0.0)
    flip.overlaps = policy.overlaps = overlaps
    bon = BestOfN(policy, flip, n=4)
    start = time.perf_counter()
    result = asyncio.run(bon.run(PROMPT, deadline=0.3))
    assert time.perf_counter() - start < 0.5
    assert [s.status for s in result.scores[2:]] == ["late", "late"]
    assert "0.3 s passed before it was finished" in result.scores[3].reason
    assert policy.running == flip.running == 0, "nothing goes on after the deadline"
    if overlaps:
        assert (result.text, result.counts) == ("red fox", {"late": 2, "ok": 2})
    else:
        assert (result.text, result.counts) == (None, {"late": 4}), "it would have been scored after the last candidate"
        assert result.candidates[0].text == "red fox", "what was sampled is kept"


def test_a_deadline_that_does_not_pass_changes_nothing():
    bon = BestOfN(ScriptedEngine(["red fox", "red fox"]), n=2)
    result = asyncio.run(bon.run(PROMPT, deadline=60))
    assert result.counts == {"ok": 2}
