"""Adaptive N: what holds for every rule, what each rule estimates, and where the reason for stopping is to be read."""

import asyncio
import json
import math
import signal
import time

import numpy as np
import pytest
from command import in_process_of_its_own, process, rows_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scoring import Own, group_of

from bon import Adaptive, BestOfN, Fixed, Limited, TopK
from bon.adaptive import RULES
from bon.allocation import Allocation
from bon.budget import StopAt, as_budget, spec_of
from bon.config import Config
from bon.engines.scripted import ScriptedEngine
from bon.engines.torch.engine import TorchEngine
from bon.errors import BonError, InputError
from bon.mini import WEIGHTS
from bon.scorers.base import Needs
from bon.stopping import Seen, bound, exact, excess, improvement, pandora, votes
from bon.types import Score, Stop

PROMPT = "Say a number"
SCRIPTED = ("--policy", "scripted", "--scorer", "longest")
RULE_NAMES = [*(name for name in RULES if name != "vote"), "vote:number"]


class Table(Own):
    """Gives the n-th candidate the n-th reward; None is a failure."""

    range = (0.0, 1.0)

    def __init__(self, rewards):
        super().__init__(lambda each: rewards[each.candidate.index])


def sampled(rewards, n, **options):
    engine = ScriptedEngine([f"answer {i}" for i in range(len(rewards))])
    return BestOfN(engine, Table(rewards), n=n, sampling={"temperature": 1.0}, **options)(PROMPT)


rewards_of_64 = st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.75, 0.9, 1.0, None]), min_size=64, max_size=64)
budgets = st.builds(
    lambda least, more, **others: Adaptive(least=least, most=least + more, **others),
    least=st.integers(1, 9),
    more=st.integers(0, 20),
    rule=st.sampled_from(RULE_NAMES),
    price=st.sampled_from([None, 1e-6, 0.01, 0.5]),
    batch=st.integers(1, 7),
)


@given(rewards_of_64, budgets)
@settings(max_examples=60)
def test_never_fewer_than_least_nor_more_than_most_and_the_candidates_are_those_of_a_fixed_n(rewards, budget):
    result = sampled(rewards, budget)
    assert budget.least <= len(result.candidates) <= budget.most
    whole = sampled(rewards, budget.most)
    assert [c.text for c in result.candidates] == [c.text for c in whole.candidates[: len(result.candidates)]]
    assert result.stop.reason
    assert result.stop.gain is None or result.stop.gain >= 0


@given(rewards_of_64, st.integers(1, 9), st.integers(1, 7), st.booleans())
@example([None, None, *[0.0] * 62], 1, 1, False)  # it ended with the second, and without a winner
@settings(max_examples=50)
def test_stopping_at_the_largest_reward_never_changes_the_winner(rewards, least, batch, prune):
    stopped = sampled(rewards, Adaptive(least=least, most=32, rule="exact", batch=batch), prune=prune)
    full = sampled(rewards, 32)
    assert stopped.reward == full.reward
    if not prune:  # where it is on, what is still running beside the first perfect one is given up
        assert stopped.best == full.best


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_perfect_candidate_ends_the_search_after_its_round(rule):
    result = sampled([0.1, 0.2, 1.0, *[0.5] * 61], Adaptive(least=2, rule=rule, price=1e-6, batch=2))
    if rule.startswith("vote"):
        assert len(result.candidates) > 4, "votes do not look at rewards"
    else:
        assert (len(result.candidates), result.reward, result.stop.gain) == (4, 1.0, 0.0)


@pytest.mark.parametrize("rule", ["improvement", "pandora", "excess"])
@pytest.mark.parametrize(("reward", "said"), [(0.0, "rewards that do not differ"), (None, "no reward")])
def test_where_the_rewards_say_nothing_it_ends_at_twice_the_least(rule, reward, said):
    """A spread of zero looks like no gain at all: four answers of reward 0 would end the hardest prompts first."""
    result = sampled([reward] * 64, Adaptive(rule=rule))
    assert (len(result.candidates), result.stop) == (8, Stop(f"so many samples have {said}"))


def test_rewards_that_fail_half_of_the_time_halve_the_gain():
    good = [0.2, 0.6, 0.4, 0.5]
    whole = sampled(good, Adaptive(most=4)).stop
    half = sampled([reward for each in good for reward in (each, None)], Adaptive(least=8, most=8)).stop
    assert half.gain == pytest.approx(whole.gain / 2)
    assert half.reason == "there are as many samples as there may be"


def test_of_a_pruned_candidate_the_bound_of_its_reward_counts():
    def gain(third):
        group = group_of("x", ["a", "b", "c", "d"])
        group.range = (0.0, 1.0)
        for candidate, score in zip(group.candidates, [Score(0.5), Score(0.7), third, Score(0.2)], strict=True):
            group.post(candidate, score)
        return Adaptive().gain(group)

    assert gain(Score(None, "pruned", upper_bound=0.6)) == gain(Score(0.6)) != gain(Score(0.1))


@given(st.floats(0.01, 100), st.floats(-50, 50))
@settings(max_examples=20)
def test_without_a_range_scale_and_origin_of_the_rewards_change_nothing(scale, origin):
    rewards = np.random.default_rng(3).normal(size=64)
    engine = ScriptedEngine([str(i) for i in range(64)])
    for rule in ("improvement", "pandora", "excess"):
        found = set()
        for each in (rewards, scale * rewards + origin):
            scorer = Own(lambda p, each=each: float(each[p.candidate.index]))
            found.add(len(BestOfN(engine, scorer, n=f"adaptive:rule={rule}")(PROMPT).candidates))
        assert len(found) == 1


def test_a_scorer_of_whole_groups_scores_again_in_each_round():
    calls = []

    def rewards(prompt, responses):
        calls.append(len(responses))
        return [len(each) / 10 for each in responses]

    engine = ScriptedEngine([str(10**i) for i in range(20)])
    result = BestOfN(engine, rewards, n=Adaptive(least=3, most=20, batch=5, price=0.001))(PROMPT)
    assert calls == [3, 8, 13, 18, 20][: len(calls)]
    assert len(calls) > 2
    assert len(result.candidates) == calls[-1]


def test_the_best_of_a_group_that_compares_its_candidates_is_not_the_largest_reward_there_can_be():
    """Who beat all others had reward 1, and the search ended with the first four, whoever they were."""

    class Ranks(Own):
        needs, range = Needs(group=True), (0.0, 1.0)

        def __init__(self):
            super().__init__(lambda e: e.candidate.index / max(1, len(e.group.candidates) - 1))

    engine = ScriptedEngine([f"answer {i}" for i in range(64)])
    result = BestOfN(engine, Ranks(), n="adaptive:most=20,price=0.001")(PROMPT)
    assert len(result.candidates) > 4
    with pytest.raises(InputError, match="the rewards of 'Ranks' change with the other candidates"):
        BestOfN(engine, Ranks(), n="adaptive:rule=exact")


def test_the_candidates_are_the_same_whatever_the_rounds_and_their_prompt_is_read_once():
    policy = TorchEngine(WEIGHTS)
    found = []
    for size in (1, 2, 4, 8):
        before = policy.stats.computed
        rounds = StopAt(1e9, most=8, batch=size)  # a reward that none has
        result = BestOfN(policy, "longest", n=rounds, sampling={"seed": 3, "max_tokens": 40})(f"Write {size} notes.")
        tokens = result.usage.policy_prompt_tokens * size // 8
        assert (
            policy.stats.computed - before == tokens == result.usage.policy_prompt_tokens - result.usage.cached_tokens
        )
        again = BestOfN(policy, "longest", n=8, sampling={"seed": 3, "max_tokens": 40})(f"Write {size} notes.")
        assert [c.text for c in result.candidates] == [c.text for c in again.candidates]
        found += [c.text for c in result.candidates]
    assert len({*found}) > 8


# --- What the rules estimate ------------------------------------------------------------------------------------------


def seen(rewards, top=math.inf, texts=(), left=60):
    return Seen(np.array(rewards, float), top, np.full(len(rewards), 20.0), texts, left)


def test_the_expected_improvement_is_that_of_students_t_clipped_at_the_largest_reward():
    rewards, draw = [0.2, 0.5, 0.6, 0.7, 0.4], np.random.default_rng(0)
    mean, scale = np.mean(rewards), np.std(rewards, ddof=1) * math.sqrt(1 + 1 / 5)
    drawn = mean + scale * draw.standard_t(4, size=2_000_000)
    for top in (1.0, 0.75, math.inf):
        expected = np.maximum(np.minimum(drawn, top) - 0.7, 0).mean()
        assert improvement(seen(rewards, top)) == pytest.approx(expected, rel=0.02)
    assert improvement(seen([0.2, 0.5, 1.0], 1.0)) == pytest.approx(0)
    assert improvement(seen([0.2, 0.5])) is None, "two rewards say nothing of their spread"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_the_bound_is_never_below_what_most_distributions_gain(rewards):
    """Of uniform rewards the true gain beyond M is (1 - M)^2 / 2, and M is rarely so low that it is more."""
    best = max(rewards)
    assert bound(seen(rewards, 1.0)) == pytest.approx((1 - best) * (1 - 0.05 ** (1 / len(rewards))))
    assert exact(seen(rewards, 1.0)) == 1 - best


def test_the_bound_holds_as_often_as_it_says():
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        rewards = draw.uniform(size=6)
        held += bound(seen(rewards, 1.0)) >= (1 - rewards.max()) ** 2 / 2
    assert held >= 950


@pytest.mark.parametrize("rule", [improvement, pandora, excess])
def test_the_gain_shrinks_as_samples_come(rule):
    draws = np.random.default_rng(1).normal(size=(50, 64))
    gains = [np.mean([rule(seen(draw[:n])) for draw in draws]) for n in (4, 8, 16, 32, 64)]
    assert gains == sorted(gains, reverse=True)


def test_a_better_half_that_ties_does_not_end_the_search():
    """Its mean excess is zero, and so was the gain, whatever the other half would have said."""
    assert excess(seen([0.9, 0.9, 0.9, 0.0, 0.1])) is None
    assert excess(seen([0.5, 0.1, 0.7, 0.9, 0.9])) > 0


def test_votes_stop_when_the_leader_will_hardly_be_overtaken():
    rule = votes("number")
    assert rule(seen([1.0] * 4, texts=["it is 7"] * 4)) == pytest.approx(1 / 32)
    assert rule(seen([1.0] * 4, texts=["7", "7", "8", "8"])) == pytest.approx(1 / 2)
    assert rule(seen([1.0] * 4, texts=["7", "7", "7", "8"], left=1)) == 0.0, "one vote cannot turn it"
    assert rule(seen([1.0] * 2, texts=["none", "at all"])) == pytest.approx(1 / 2)


# --- A number of samples for several prompts --------------------------------------------------------------------------


class Prompted(Own):
    """Prompt "k" gets its first good answer at sample k."""

    range = (0.0, 1.0)

    def __init__(self):
        super().__init__(
            lambda e: 1.0 if e.candidate.index >= int(e.task.instruction) else 0.1 + e.candidate.index / 99
        )


@pytest.mark.parametrize("concurrent", [True, False])
def test_samples_of_a_whole_go_where_they_can_still_gain(concurrent):
    engine = ScriptedEngine([f"answer {i}" for i in range(64)], concurrent=concurrent)
    prompts = ["0", "1", "11", "2", "0", "15"]
    even = [r.reward for r in BestOfN(engine, Prompted(), n=8)(prompts)]
    results = BestOfN(engine, Prompted(), n=Allocation(48), prune=False)(prompts)
    assert [r.reward for r in results] == [1.0] * 6 != even
    assert sum(len(r.candidates) for r in results) <= 48
    assert [len(r.candidates) for r in results][:2] == [4, 4], "a prompt that cannot gain gets no more"


@given(st.integers(6, 90), st.integers(0, 10**6))
@settings(max_examples=30)
def test_no_more_are_spent_than_there_are_and_every_prompt_gets_half_of_an_even_division(total, seed):
    draw = np.random.default_rng(seed)
    rewards = draw.uniform(0, 0.9, size=(6, 100)).round(int(draw.integers(0, 3)))
    scorer = Own(lambda e: float(rewards[int(e.task.instruction), e.candidate.index]))
    scorer.range = (0.0, 1.0)
    engine = ScriptedEngine([f"answer {i}" for i in range(100)], concurrent=False)
    results = BestOfN(engine, scorer, n=Allocation(total))([str(i) for i in range(6)])
    counts = [len(r.candidates) for r in results]
    assert sum(counts) <= total
    assert all(n >= min(max(1, total // 12), 64) or r.reward == 1.0 for n, r in zip(counts, results, strict=True))


def test_a_file_is_sampled_as_a_whole(tmp_path):
    (tmp_path / "in.txt").write_text("one\ntwo\nthree\n")
    arguments = ("run", "in.txt", *SCRIPTED, "--total-samples")
    code, out, err = in_process_of_its_own(*arguments, 20, cwd=tmp_path)
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert sum(row["n"] for row in rows) <= 20
    assert all(row["stop"]["reason"] for row in rows)
    for more, complaint in (
        ((2,), "--total-samples 2 is below the 3 prompts"),
        ((20, "-n", 8), "--total-samples takes the place of -n 8"),
        ((20, "-n", "adaptive:rule=bound"), "have no bounds"),
    ):
        code, out, err = in_process_of_its_own(*arguments, *more, cwd=tmp_path)
        assert (code, out, complaint in err) == (2, "", True), err
    code, _, err = in_process_of_its_own("run", "Hi", *SCRIPTED, "--total-samples", 9, cwd=tmp_path)
    assert (code, "--total-samples is for files of prompts" in err) == (2, True)


def test_ctrl_c_keeps_what_each_prompt_of_a_whole_has_and_resume_spends_the_rest_on_the_others(tmp_path):
    """Rows are written at the end, and an interrupted run had nothing."""
    script = """
from bon.engines.scripted import ScriptedEngine
from bon.scorers.base import Scorer
from bon.types import Score

model = ScriptedEngine(lambda text, draw: "word " * int(text) + str(draw), step_seconds={step})

class Last(Scorer):
    concurrent = True

    async def score(self, pending):
        for position, each in enumerate(pending):
            open("scored", "a").write("x")
            yield position, Score(0.1 * int(each.candidate.text.split()[-1]))

scorer = Last()
"""
    (tmp_path / "slow.py").write_text(script.format(step=0.02))
    (tmp_path / "in.txt").write_text("2\n5000\n3\n")
    arguments = ("run", "in.txt", "-o", "out.jsonl", "--policy", "slow:model", "--scorer", "slow:scorer")
    arguments += ("--total-samples", 14, "--max-tokens", 9000)
    running = process(*arguments, cwd=tmp_path)
    end = time.monotonic() + 120
    while not (tmp_path / "scored").exists() or (tmp_path / "scored").stat().st_size < 8:
        assert time.monotonic() < end
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert (running.returncode, b"interrupted: 2 rows done and in out.jsonl" in err) == (130, True), err
    kept = rows_of(tmp_path / "out.jsonl")
    assert [(row["prompt"], row["n"], row["text"].split()[-1]) for row in kept] == [("2", 4, "3"), ("3", 4, "3")]
    assert {row["stop"]["reason"] for row in kept} == {"the run was interrupted"}
    (tmp_path / "slow.py").write_text(script.format(step=0))
    code, _, err = in_process_of_its_own(*arguments, "--resume", cwd=tmp_path)
    assert code == 0, err
    rows = rows_of(tmp_path / "out.jsonl")
    assert rows[:2] == kept
    assert [(row["prompt"], row["n"]) for row in rows[2:]] == [("5000", 6)]


# --- Limits -----------------------------------------------------------------------------------------------------------


def test_limits_end_any_budget_and_say_so():
    texts = ScriptedEngine(["one two three"] * 3 + ["four five six"])

    def run(n):
        return BestOfN(texts, Own(lambda e: 0.5), n=n)(PROMPT)

    each = run(1).usage.policy_completion_tokens
    for n in (f"40,most_tokens={10 * each}", f"adaptive:rule=vote:number,most=40,most_tokens={10 * each}"):
        result = run(n)
        assert len(result.candidates) == 10
        assert f"{10 * each} of {10 * each} tokens are spent" in result.stop.reason
    assert len(run("fixed:3,most_tokens=100000").candidates) == 3
    slow = BestOfN(ScriptedEngine(step_seconds=0.02), Own(lambda e: 0.5), n=Limited(Fixed(500), most_seconds=0.2))(
        PROMPT
    )
    assert 4 <= len(slow.candidates) < 500
    assert "seconds are spent" in slow.stop.reason


def test_a_limited_budget_that_raises_fails_its_own_prompt_only():
    class Picky:
        def more(self, group):
            if group.task.instruction == "bad" and group.asked:
                raise KeyError("no")
            return 2 - group.asked

    for concurrent in (True, False):
        engine = ScriptedEngine(concurrent=concurrent)
        bon = BestOfN(engine, Own(lambda e: 0.5), n=Limited(Picky(), most_tokens=10**6))
        outcomes = [*bon.map(["fine", "bad", "good"], on_error="return")]
        assert [isinstance(each, BonError) for each in outcomes] == [False, True, False]
        assert "the budget raised KeyError" in str(outcomes[1])


@pytest.mark.parametrize(
    "n",
    [
        "adaptive",
        "adaptive:most=32,price=0.01",
        "adaptive:rule=vote:(\\d+),least=2,most_tokens=900",
        "16,most_seconds=2.5",
    ],
)
def test_a_budget_with_its_limits_is_its_spec_and_stands_in_a_configuration(n, tmp_path):
    written = spec_of(as_budget(n))
    assert as_budget(written) == as_budget(n)
    (tmp_path / "bon.toml").write_text(Config(n=n).to_toml())
    assert Config.read(tmp_path / "bon.toml").n == n
    assert Config.from_bon(BestOfN("mini", "flip", n=as_budget(n))).n == written


# --- Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("adaptive:least=9,most=8", "least=9 is above most=8"),
        ("adaptive:price=0", "price must be above 0, got 0"),
        ("adaptive:price=-0.1", "price must be above 0, got -0.1"),
        ("adaptive:price=free", "price must be a number, got 'free'"),
        ("adaptive:least=0", "least must be a whole number of at least 1, got 0"),
        ("adaptive:batch=1.5", "batch must be a whole number"),
        ("adaptive:rule=improvment", "Did you mean 'improvement'"),
        ("adaptive:rule=3", "unknown rule for stopping 3"),
        ("adaptive:rule=vote", "vote:number"),
        ("adaptive:rule=exact:1", "unknown rule for stopping 'exact:1'"),
        ("adaptive:rule=vote:(", "is not a regular expression"),
        ("adaptiv", "Did you mean 'adaptive'"),
        ("8,most_tokens=0", "most_tokens must be a whole number of at least 1, got 0"),
        ("8,most_seconds=0", "most_seconds must be above 0, got 0"),
        ("8,most_token=5", "unknown budget '8,most_token=5'"),
    ],
)  # fmt: skip
def test_what_is_no_adaptive_budget_is_refused_in_a_sentence(spec, complaint, tmp_path):
    with pytest.raises(InputError) as refused:
        as_budget(spec)
    assert complaint in str(refused.value)


def test_what_does_not_go_with_the_scorer_or_the_selector_is_refused_before_anything_is_sampled(tmp_path):
    for rule in ("exact", "bound"):
        with pytest.raises(InputError, match=f"the rule '{rule}' goes by the largest reward there can be"):
            BestOfN(ScriptedEngine(), Own(lambda e: 0.5), n=f"adaptive:rule={rule}")
    for selector, options in (("top-k:5", {}), (TopK(5), {"min_reward": 0.1})):
        with pytest.raises(InputError, match="5 candidates are to be picked, and least=4 may leave fewer: say least=5"):
            BestOfN(ScriptedEngine(), Own(lambda e: 0.5), n="adaptive,most_tokens=90", selector=selector, **options)
    code, out, err = in_process_of_its_own("run", "Hi", *SCRIPTED, "-n", "adaptive:rule=bound", cwd=tmp_path)
    assert (code, out) == (2, "")
    assert "the rewards of 'longest' have no bounds: take rule=improvement" in err


# --- Where it is to be read -------------------------------------------------------------------------------------------


def test_the_command_line_says_why_it_stopped_and_a_file_is_resumed_with_the_same_budget_only(tmp_path):
    arguments = ("run", "Hi", *SCRIPTED, "-n", "adaptive:least=2,most=3")
    code, out, _ = in_process_of_its_own(*arguments, cwd=tmp_path)
    assert code == 0
    assert "stopped after 3 samples: there are as many samples as there may be" in out
    _, out, _ = in_process_of_its_own(*arguments, "--json", cwd=tmp_path)
    assert json.loads(out)["stop"] == {"reason": "there are as many samples as there may be", "gain": None}
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    arguments = ("run", "in.txt", *SCRIPTED, "-o", "out.jsonl", "-n")
    assert in_process_of_its_own(*arguments, "adaptive:most=5", cwd=tmp_path)[0] == 0
    assert [set(row["stop"]) for row in rows_of(tmp_path / "out.jsonl")] == [{"reason", "gain"}] * 2
    before = (tmp_path / "out.jsonl").read_bytes()
    code, _, err = in_process_of_its_own(*arguments, "adaptive:most=6", "--resume", cwd=tmp_path)
    assert code == 2
    assert "was made with other settings" in err
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_server_takes_it_from_a_request_and_says_why_it_stopped():
    serving = pytest.importorskip("serving")
    engine = ScriptedEngine(lambda text, draw: "a red fox" if "Response" in text else f"fox {draw}")
    with serving.served(BestOfN(engine, "flip", n="adaptive:least=2,most=6")) as site:
        default = site.chat("a red fox").json()["best_of_n"]
        assert default["stop"] == {"reason": "a reward of 1 was reached", "gain": 0.0}
        assert site.chat("a blue bird", best_of_n={"n": 3}).json()["best_of_n"]["stop"] is None
        asked = site.chat("a blue bird", best_of_n={"n": "adaptive:least=3,most=5,rule=exact"}).json()["best_of_n"]
        assert (asked["n"], asked["stop"]["gain"] > 0) == (5, True)
        assert len(site.chat("a blue bird", n=2).json()["choices"]) == 2, "two are there when two were to be sampled"
        for n, scorer, said in (
            ("adaptive:price=0", "flip", "best_of_n.n: price must be above 0"),
            ("adaptive:rule=bound", "likelihood", "best_of_n.n: the rule 'bound' goes by the largest reward"),
            ("adaptive:most=65", "flip", "is 65, and this server samples 64 candidates at most"),
        ):
            refused = site.chat("a fox", best_of_n={"n": n, "scorer": scorer})
            assert (refused.status_code, said in refused.json()["error"]["message"]) == (400, True), refused.text
        stops = {
            reason: site.metric("bon_budget_stops_total", reason=reason)
            for reason in ("a reward of N was reached", "there are as many samples as there may be")
        }
        assert stops == {"a reward of N was reached": 1, "there are as many samples as there may be": 2}
        assert site.metric("bon_samples_saved_total") == 4, "two of six were sampled"
        assert "need every reward" in site.chat("a fox", best_of_n={"n": "adaptive"}, n=5).json()["error"]["message"]


def test_a_deadline_is_a_reason_too():
    bon = BestOfN(ScriptedEngine(step_seconds=0.01), Own(lambda e: 0.5), n="adaptive:rule=vote:number")
    assert asyncio.run(bon.run(PROMPT, deadline=0.2)).stop == Stop("the deadline of 0.2 s passed")
