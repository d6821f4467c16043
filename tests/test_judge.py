"""Judges: what is asked of them, how their answers are read, who is compared with whom, and what the rewards are."""

import itertools
import json
import re
from pathlib import Path

import pytest
from scoring import group_of, scored, scores_of

from bon import BestOfN
from bon.engines.base import Turn
from bon.engines.function import FunctionEngine
from bon.engines.scripted import ScriptedEngine
from bon.errors import InputError, UnknownNameError
from bon.prompts.judging import judging_from_files, load_judging
from bon.scorers.judge import Judge
from bon.scorers.judge.contests import all_pairs, knockout, listed, pivot
from bon.scorers.judge.verdict import choices, read, schema
from bon.spec import SCORERS
from bon.task import Task

TASK = "Name a colour."
WORDS = [f"colour {n}" for n in range(9)]


def worth(text):
    """How good the scripted judge finds a response: the number at its end."""
    return int(re.findall(r"\d+", text)[-1])


def honest(text, draw):
    """Answers each kind of question by the numbers in the responses."""
    if "Responses:\n" in text:
        shown = [
            worth(part) for part in re.split(r"\[\d+\]\n", text.split("Responses:\n")[1].split("\n\nReply")[0])[1:]
        ]
        return json.dumps({"reasoning": "the larger number", "best": shown.index(max(shown))})
    if "Response B:\n" in text:
        a, b = re.search(r"Response A:\n(.*)\n\nResponse B:\n(.*)\n\nReply", text).groups()
        return json.dumps({"reasoning": "the larger number", "better": "A" if worth(a) > worth(b) else "B"})
    return json.dumps({"reasoning": "the number", "score": 1 + worth(re.search(r"Response:\n(.*)\n", text)[1])})


def judge(script=honest, **options):
    return Judge(ScriptedEngine(script), **{"expected": False, **options})


def rewards(scorer, texts, task=TASK):
    return [score.reward for score in scores_of(scorer, task, *texts, whole=scorer.needs.group)]


# --- the three kinds --------------------------------------------------------------------------------------------------


def test_a_pointwise_judge_rewards_with_its_rating():
    [low, high] = scores_of(judge(), TASK, "colour 2", "colour 7")
    assert (low.reward, high.reward) == (3.0, 8.0)
    assert high.explanation == "the number"
    assert high.details.verdicts == (8.0,)


@pytest.mark.parametrize("options", [{}, {"pairs": "knockout"}, {"pairs": "pivot"}])
def test_a_pairwise_judge_finds_the_best_whatever_the_pairing(options):
    found = rewards(judge(style="pairwise", **options), WORDS)
    assert found.index(max(found)) == 8
    assert max(found) == 1.0
    assert all(0 <= reward <= 1 for reward in found)


def test_a_listwise_judge_finds_the_best_in_every_order():
    assert rewards(judge(style="listwise", times=3), WORDS) == [0.0] * 8 + [1.0]


@pytest.mark.parametrize("style", ["pairwise", "pairwise,pairs=knockout", "pairwise,pairs=pivot", "listwise"])
def test_the_order_of_the_candidates_changes_no_reward(style):
    def always_first(text, draw):
        return '{"better": "A", "best": 0}'

    name, _, pairs = style.partition(",pairs=")
    scorer = judge(always_first, style=name, pairs=pairs or "all")
    texts = WORDS[:4]
    alone = dict(zip(texts, rewards(scorer, texts), strict=True))
    for order in itertools.permutations(texts):
        assert dict(zip(order, rewards(scorer, order), strict=True)) == alone


def test_both_orders_are_shown_so_that_a_judge_who_prefers_the_first_prefers_nobody():
    scorer = judge(lambda text, draw: '{"better": "A"}', style="pairwise")
    assert rewards(scorer, WORDS[:3]) == [0.5, 0.5, 0.5]


def test_equal_candidates_are_one_before_the_judge():
    scorer = judge(style="pairwise")
    assert rewards(scorer, ["colour 1", "colour 2", "colour 1"]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("style", ["pairwise", "listwise"])
def test_with_nothing_to_compare_there_is_no_reward_and_a_reason(style):
    [only] = scores_of(judge(style=style), TASK, "colour 1", whole=True)
    assert (only.reward, only.status) == (None, "failed")
    assert "nothing to compare" in only.reason
    assert "style=pointwise" in only.reason


def test_all_tasks_of_a_call_are_asked_together_round_by_round():
    scorer = judge(style="pairwise", pairs="knockout")
    scored(scorer, group_of("Name a colour.", WORDS[:4], whole=True), group_of("Another.", WORDS[:4], whole=True))
    assert scorer.engine.calls == 2, "two rounds for two tasks, not two for each"


# --- contests ---------------------------------------------------------------------------------------------------------


def play(contest, answer):
    """Rewards of a contest whose questions ``answer(shown)`` answers, and how many there were."""
    asked, shown = 0, next(contest)
    while True:
        asked += len(shown)
        try:
            shown = contest.send([answer(each) for each in shown])
        except StopIteration as ended:
            return ended.value, asked


def larger(shown):
    return tuple(float(each == max(shown)) for each in shown)


def test_a_knockout_takes_15_comparisons_where_all_pairs_take_120():
    for contest, comparisons in ((knockout(16), 15), (all_pairs(16), 120)):
        found, asked = play(contest, larger)
        assert asked == 2 * comparisons, "each in both orders"
        assert found.index(max(found)) == 15


@pytest.mark.parametrize(("entrants", "pivots"), [(2, 1), (5, 2), (16, 3), (3, 9)])
def test_pivots_take_the_comparisons_of_the_formula(entrants, pivots):
    found, asked = play(pivot(entrants, pivots), larger)
    k = min(entrants, pivots)
    assert asked == entrants + k * (entrants - k) + k * (k - 1) // 2
    assert found.index(max(found)) == entrants - 1


def test_in_the_ring_each_is_shown_once_in_each_place():
    ring = next(pivot(5, 1))
    assert sorted(a for a, _ in ring) == sorted(b for _, b in ring) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("entrants", range(2, 12))
def test_a_knockout_of_any_size_ends_with_the_best(entrants):
    found, asked = play(knockout(entrants), larger)
    assert (found.index(max(found)), asked) == (entrants - 1, 2 * (entrants - 1))


@pytest.mark.parametrize("fits", [2, 3, 5])
def test_the_winners_of_lists_that_had_to_be_split_meet(fits):
    lists = []

    def answer(shown):
        lists.append(shown)
        return larger(shown)

    found, _ = play(listed([tuple(range(9))], fits), answer)
    assert found == [0.0] * 8 + [1.0]
    assert all(2 <= len(shown) <= fits + 1 for shown in lists), "none of one, which would be no comparison"


def test_a_list_that_does_not_fit_the_context_is_split():
    def size(engine):
        return [len(re.findall(r"\[\d+\]", text)) for text in engine.seen]

    class Seen(ScriptedEngine):
        def __post_init__(self):
            super().__post_init__()
            self.seen = []

        def generate(self, requests, *, keep=None):
            self.seen += [request.prompt.turns[-1].text for request in requests]
            return super().generate(requests, keep=keep)

    engine = Seen(honest, max_model_len=190)
    texts = [f"{'word ' * 20}{n}" for n in range(6)]
    found = rewards(Judge(engine, style="listwise", expected=False), texts)
    assert found == [0.0] * 5 + [1.0]
    assert size(engine)[0] == 6
    assert max(size(engine)[1:]) <= 3


def test_what_is_too_long_for_a_pointwise_judge_has_no_reward():
    scorer = Judge(ScriptedEngine(honest, max_model_len=170), expected=False)
    short, long = scores_of(scorer, TASK, "colour 3", f"{'word ' * 200}3")
    assert short.reward == 4.0
    assert (long.reward, long.status) == (None, "failed")


def test_a_comparison_between_two_that_cannot_win_any_more_is_given_up():
    def slowly(text, draw):
        a, b = re.search(r"Response A:\n(.*)\n\nResponse B:\n(.*)\n\nReply", text).groups()
        talk = "" if "colour 8" in (a, b) else "so " * 60  # those of the best end first
        return f'{talk}{{"better": "{"A" if worth(a) > worth(b) else "B"}"}}'

    whole, pruned = (
        scored(judge(slowly, style="pairwise"), group_of(TASK, WORDS, whole=True, prune=prune))[0]
        for prune in (False, True)
    )
    assert max(range(9), key=lambda i: pruned.rewards[i] or 0) == max(range(9), key=lambda i: whole.rewards[i]) == 8
    given_up = [score for score in pruned.scores if score.status == "pruned"]
    assert given_up
    assert all(score.upper_bound < 1.0 and score.reward is None for score in given_up)
    assert pruned.usage.scorer_completion_tokens < whole.usage.scorer_completion_tokens


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "raw", "weights", "status"),
    [
        ("pointwise", '{"reasoning": "a 3 of 10 at first", "score": 7}', (7.0,), "ok"),
        ("pointwise", '{"REASONING": "good", "SCORE": "8"}', (8.0,), "ok"),
        ("pointwise", 'Here: {"reasoning": "good", "score": 8.5} Thanks!', (8.5,), "repaired"),
        ("pointwise", "Score: 6/10", (6.0,), "repaired"),
        ("pointwise", "All in all I give it a 4.", (4.0,), "fallback"),
        ("pointwise", '<think>score: 2</think>{"score": 9}', (9.0,), "ok"),
        ("pointwise", '{"score": 11}', None, "failed"),
        ("pointwise", '{"score": 0}', None, "failed"),
        ("pointwise", '{"score": -3}', None, "failed"),
        ("pointwise", "It is good.", None, "failed"),
        ("pairwise", '{"REASONING": "A is short", "BETTER_RESPONSE": "B"}', (0.0, 1.0), "ok"),
        ("pairwise", "better: [[A]]", (1.0, 0.0), "repaired"),
        ("pairwise", "My verdict: [[B]]", (0.0, 1.0), "fallback"),
        ("pairwise", '{"better": "Anna"}', None, "failed"),
        ("pairwise", '{"better": "C"}', None, "failed"),
        ("listwise", '{"REASONING": "1 and 2 are bad", "BEST_RESPONSE_INDEX": 0}', (1.0, 0.0, 0.0), "ok"),
        ("listwise", '{"best": 3}', None, "failed"),
        ("listwise", "", None, "failed"),
    ],
)
def test_a_judges_answer_is_read_with_a_status(kind, raw, weights, status):
    found = read(kind, {"pointwise": 1, "pairwise": 2, "listwise": 3}[kind], raw)
    assert (found.weights, found.status) == (weights, status)
    assert (found.reason is None) == (status == "ok")
    if weights is not None:
        assert raw[slice(*found.span)].upper() in {f"{weights[0]:g}", "A", "B", "0"}


def test_an_answer_that_was_cut_off_says_so():
    assert "cut off at the token limit" in read("pointwise", 1, '{"reasoning": "it is', "length").reason


@pytest.mark.parametrize(("kind", "shown"), [("pointwise", 1), ("pairwise", 2), ("listwise", 3)])
def test_what_the_schema_allows_can_be_read(kind, shown):
    name, value = list(schema(kind, shown)["properties"].items())[1]
    allowed = value.get("enum") or [*range(value["minimum"], value["maximum"] + 1)]
    assert [str(one) for one in allowed] == [*choices(kind, shown)]
    for one in allowed:
        assert read(kind, shown, json.dumps({"reasoning": "", name: one})).status == "ok"


def test_reading_takes_time_in_proportion_to_the_text():
    # A pattern that backtracks takes minutes for this.
    for hostile in ('"reasoning": "' + "\\" * 50_000, "score" * 20_000, '"score": "' * 20_000, "[" * 100_000):
        for kind in ("pointwise", "pairwise", "listwise"):
            read(kind, 2, hostile)


def test_an_answer_that_cannot_be_read_gives_no_reward():
    [unread] = scores_of(judge(lambda text, draw: "Nice!"), TASK, "colour 1")
    assert (unread.reward, unread.status) == (None, "failed")
    assert "names no rating" in unread.reason


def test_a_comparison_that_cannot_be_read_is_said_and_the_others_count():
    def half(text, draw):
        return "Hm." if "A:\ncolour 1" in text else honest(text, draw)

    first, second = scores_of(judge(half, style="pairwise"), TASK, "colour 1", "colour 2", whole=True)
    assert first.reward < second.reward
    assert first.status == second.status == "repaired"
    assert "1 of 2 answers of the judge could not be read" in first.reason


# --- criteria, repetitions, references --------------------------------------------------------------------------------


def test_each_criterion_is_asked_for_by_itself_and_the_ratings_are_averaged():
    class Criteria:
        def __call__(self, messages):
            return (
                '{"score": 9}'
                if "alone" in messages[0]["content"] and "accuracy" in messages[0]["content"]
                else '{"score": 2}'
            )

    scorer = Judge(FunctionEngine(Criteria()), criteria=["accuracy", "style"], expected=False)
    [found] = scores_of(scorer, TASK, "colour 1")
    assert found.reward == 5.5
    assert sorted(found.details.verdicts) == [2.0, 9.0]


def test_criteria_come_from_a_file_or_from_text(tmp_path):
    file = tmp_path / "criteria.txt"
    file.write_text("accuracy\n\nstyle\n")
    assert Judge("mini", criteria=str(file)).criteria == Judge("mini", criteria="accuracy + style").criteria
    file.write_text("\n")
    with pytest.raises(InputError, match=re.escape(f"there are no criteria in {file}")):
        Judge("mini", criteria=file)


def test_a_repeated_question_is_averaged():
    scorer = judge(["Score: 2", "Score: 5"], times=2)
    [found] = scores_of(scorer, TASK, "colour 1")
    assert (found.reward, scorer.sampling.temperature) == (3.5, 1.0)


def test_the_reference_answer_is_shown_where_there_is_one():
    seen = []

    def look(messages):
        seen.append(messages[-1]["content"])
        return "Score: 5"

    for reference in (None, "Blue."):
        task = Task(Task.of(TASK).messages, TASK, reference=reference)
        scores_of(Judge(FunctionEngine(look)), task, "colour 1")
    assert ["A right answer:\nBlue." in text for text in seen] == [False, True]


# --- probabilities ----------------------------------------------------------------------------------------------------


def test_a_rating_is_expected_over_what_the_judge_could_have_said():
    [said], [expected] = (scores_of(judge(expected=on), TASK, "colour 3") for on in (False, True))
    assert said.reward == 4.0
    assert 1 < expected.reward < 10
    assert expected.reward != said.reward
    assert expected.usage.scorer_prompt_tokens > said.usage.scorer_prompt_tokens, "the readings are counted"


def test_the_reasoning_is_read_once_and_not_with_each_rating_that_could_have_followed():
    seen = []

    class Seen(ScriptedEngine):
        async def loglikelihood(self, prompts, continuations, *, end=True):
            seen.extend(zip([prompt.turns[-1] for prompt in prompts], continuations, strict=True))
            return await super().loglikelihood(prompts, continuations, end=end)

    scores_of(Judge(Seen(honest)), TASK, "colour 3")
    begun = Turn("assistant", ('{"reasoning": "the number", "score":',))
    assert seen == [(begun, f" {rating}}}") for rating in range(1, 11)]


@pytest.mark.parametrize("style", ["pointwise", "pairwise", "listwise"])
def test_a_judge_without_reasoning_samples_nothing(style):
    scorer = Judge(ScriptedEngine(lambda text, draw: pytest.fail("it was sampled")), style=style, reasoning=False)
    found = scores_of(scorer, TASK, *WORDS[:3], whole=scorer.needs.group)
    assert [score.status for score in found] == ["ok"] * 3
    assert len({score.reward for score in found}) == 3
    assert sum(score.tokens for score in found) == 0
    if style != "pointwise":
        assert sum(score.reward for score in found) == pytest.approx(1.5 if style == "pairwise" else 1.0)


def test_a_judge_without_reasoning_needs_log_probabilities():
    with pytest.raises(InputError, match="reasoning=false needs a model that gives log-probabilities"):
        Judge(FunctionEngine(lambda messages: "7"), reasoning=False)


def test_the_real_engines_probabilities_sum_to_one_and_share_their_prompts():
    scorer = "judge:mini,reasoning=false,style=pairwise"
    result = BestOfN(scorer=scorer).rerank("Write a slogan for a bakery.", ["Good bread.", "Dear Tom.", "Sunrise!"])
    assert sum(score.reward for score in result.scores) == pytest.approx(1.5)
    assert result.usage.cached_tokens > result.usage.scorer_prompt_tokens / 3


# --- templates --------------------------------------------------------------------------------------------------------

RELEASED = {
    "pointwise": (
        "[Query]\n{prompt}\n\n[AI Answer]\n{response}\n",
        '{{"REASONING": "[...]", "SCORE": "<your-score>"}}',
    ),
    "pairwise": ("{prompt}\n{response1}\n{response2}", '{{"BETTER_RESPONSE": "A" or "B"}}'),
    "listwise": ("{prompt}\n{response_list}", '{{"BEST_RESPONSE_INDEX": <index>}}'),
}


@pytest.mark.parametrize("kind", RELEASED)
def test_templates_with_the_fields_of_the_papers_code_load_unchanged(kind, tmp_path):
    for name, text in zip(("user.txt", "system.txt"), RELEASED[kind], strict=True):
        (tmp_path / name).write_text(text)
    style = load_judging(tmp_path)
    assert (style.kind, style.headings) == (kind, False)
    shown = style.prompt(Task.of([{"role": "user", "content": "Hi"}]), ["one", "two"][: 1 + (kind != "pointwise")])
    assert shown.turns[0].text == RELEASED[kind][1].replace("{{", "{").replace("}}", "}")
    assert "one" in shown.turns[1].text
    assert ("two" in shown.turns[1].text) == (kind != "pointwise")
    assert SCORERS.make(f"judge:mini,style={tmp_path}").style == style


@pytest.mark.parametrize(
    "text", ["{response}", "{prompt}", "{prompt} {response1}", "{prompt} {response} {response_list}"]
)
def test_a_template_without_the_fields_of_one_kind_is_refused(text, tmp_path):
    user = tmp_path / "user.txt"
    user.write_text(text)
    with pytest.raises(InputError, match=re.escape(str(user))):
        judging_from_files(None, user)


def test_criteria_need_a_place_in_the_template(tmp_path):
    (tmp_path / "user.txt").write_text("{prompt} {response}")
    with pytest.raises(InputError, match=r"no \{criterion\}"):
        Judge("mini", style=tmp_path, criteria="accuracy")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"style": "pointwize"}, UnknownNameError),
        ({"pairs": "some"}, UnknownNameError),
        ({"times": 0}, InputError),
        ({"pivots": 0}, InputError),
        ({"criteria": []}, InputError),
        ({"style": Path("nowhere")}, UnknownNameError),
    ],
)
def test_options_that_are_none_are_refused(options, error):
    with pytest.raises(error):
        Judge("mini", **options)
