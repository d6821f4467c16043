"""Evaluations: given candidates and sampled ones, what is reported of them, and what makes no evaluation."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bon import BestOfN
from bon.engines.scripted import ScriptedEngine
from bon.errors import BonError, InputError, UnknownNameError, UserCodeError
from bon.evals.dataset import Dataset, Example, as_dataset
from bon.evals.harness import SCORERS, evaluate
from bon.evals.mini import MiniWorld
from bon.evals.table import format_table
from bon.scorers.base import Pending, Scorer
from bon.scorers.flip import Flip
from bon.task import Task
from bon.types import Score, Usage

BASELINES = ["random", "first", "longest", "shortest", "consensus", "oracle"]
SAMPLED = [*BASELINES[:-1], "greedy", "oracle"]


class Sums(Dataset):
    """Right answers say "right"; the scripted policies below answer differently at each draw."""

    name = "sums"

    def rows(self, limit: int | None = None, seed: int = 0) -> Iterator[Example]:
        for number in range(limit or 3):
            yield Example(Task.of(f"sum {number}"), lambda text: text.endswith("right"))


class Rows(Dataset):
    """Rows that a test brings."""

    name = "rows"

    def __init__(self, *rows: Example) -> None:
        self.examples = rows

    def rows(self, limit: int | None = None, seed: int = 0) -> Iterator[Example]:
        yield from self.examples[:limit]


def row(labels: list[float], *texts: str, prompt: str = "Name a colour.", **fields: Any) -> Example:
    return Example(Task.of(prompt), candidates=texts, labels=labels, **fields)


GRADED = Rows(
    row([2, 5, 9], "a blue one", "red", "green, a colour", generators=("x", "y", "z"), subset="short"),
    row([3, 1, 1], "blue is a colour that I would name", "red", "it is", generators=("x", "y", "z"), subset="long"),
    row([4, 4], "blue", "it is red", generators=("x", "y"), subset="short"),
)


def prefers_right(prompt: str, responses: list[str]) -> list[float]:
    return [float("right" in response) for response in responses]


def prefers_wrong(prompt: str, responses: list[str]) -> list[float]:
    return [float("wrong" in response) for response in responses]


def length(prompt: str, responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def indifferent(prompt: str, responses: list[str]) -> list[float]:
    return [0.5] * len(responses)


def answers(*texts: str) -> ScriptedEngine:
    return ScriptedEngine(list(texts))


# --- Given candidates ------------------------------------------------------------------------------------------------


def test_given_candidates_are_scored_without_a_policy() -> None:
    report = evaluate(GRADED, scorers=[length, indifferent])
    assert list(report["scorers"]) == ["length", "indifferent", *BASELINES]
    assert [report["scorers"][name]["kind"] for name in ("length", "longest")] == ["scorer", "baseline"]
    keys = ("dataset", "rows", "left_out", "policy", "policy_tokens", "n", "seed")
    assert [report[key] for key in keys] == ["rows", 3, 0, None, None, 3, 0]
    scores = {name: rule["score"] for name, rule in report["scorers"].items()}
    assert scores == pytest.approx(
        {
            "length": 16 / 3, "indifferent": (16 / 3 + 5 / 3 + 4) / 3, "random": (16 / 3 + 5 / 3 + 4) / 3,
            "first": 9 / 3, "longest": 16 / 3, "shortest": 10 / 3, "consensus": scores["consensus"], "oracle": 16 / 3,
        }
    )  # fmt: skip
    json.dumps(report)


def test_the_share_is_0_for_random_and_1_for_the_oracle_and_rows_that_do_not_differ_do_not_count() -> None:
    rules = evaluate(GRADED, scorers=[indifferent])["scorers"]
    assert rules["oracle"]["share"] == pytest.approx({"mean": 1, "low": 1, "high": 1})
    assert rules["random"]["share"] == {"mean": 0, "low": 0, "high": 0}
    mean, best = 16 / 3 + 5 / 3, 9 + 3
    assert rules["shortest"]["share"]["mean"] == pytest.approx((5 + 1 - mean) / (best - mean))


def test_a_scorer_that_says_nothing_is_no_better_than_random() -> None:
    rule = evaluate(GRADED, scorers=[indifferent])["scorers"]["indifferent"]
    assert rule["minus_random"] == {"mean": 0, "low": 0, "high": 0}
    assert rule["minus_longest"]["low"] <= rule["minus_longest"]["mean"] <= rule["minus_longest"]["high"]
    assert rule["minus_longest"]["mean"] == pytest.approx(11 / 3 - 16 / 3)
    assert (rule["tied"], rule["correlation"]) == (1, {"label": None, "length": None, "echo": None})


def test_equal_rewards_are_told_apart_as_the_selector_does_and_what_is_still_equal_shares_the_pick() -> None:
    class Tied(Scorer):
        """Rewards all alike, with a tie-break and tokens that tell some of ``GRADED``'s candidates apart."""

        async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
            details = {"a blue one": (0.0, 1), "red": (-1.0, 5), "green, a colour": (-1.0, 2)}
            for i, each in enumerate(pending):
                tie_break, tokens = details.get(each.candidate.text, (0.0, 3))
                yield i, Score(0.5, tie_break=tie_break, usage=Usage(scorer_completion_tokens=tokens))

    rule = evaluate(GRADED, scorers=[Tied()])["scorers"]["Tied"]
    assert rule["score"] == pytest.approx((2 + 2 + 4) / 3)
    assert rule["best_of"]["2"] == pytest.approx(((2 + 2 + 9) / 3 + (3 + 2 + 1) / 3 + 4) / 3)
    assert rule["tied"] == 1
    best = BestOfN(scorer=Tied()).rerank("Name a colour.", list(GRADED.examples[0].candidates))
    assert best.text == "a blue one"


def test_a_dataset_with_a_protocol_of_its_own_says_what_it_gives(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "0", "prompt": "Q", "candidates": ["right", "no", "nope", "never"], "best": 0, "subset": "Focus"},
        {"id": "ref:1", "prompt": "One?", "candidates": ["right", "no"], "correct": [1, 0], "subset": "Ties"},
        {"id": "tied:1", "prompt": "Two?", "candidates": ["right", "no", "right"], "correct": [1, 0, 1]},
    ]
    rows[2]["subset"] = "Ties"
    path = tmp_path / "rb2.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = evaluate(f"rewardbench2:{path}", scorers=[prefers_right, prefers_wrong])
    own = {name: report["scorers"][name]["official"] for name in ("prefers_right", "prefers_wrong", "random")}
    assert own["prefers_right"] == {"Focus": 1.0, "Ties": pytest.approx(1.01), "mean": pytest.approx(1.005)}
    assert own["prefers_wrong"] == own["random"] == {"Focus": 0.25, "Ties": 0.0, "mean": 0.125}
    table = format_table(report)
    assert "own protocol" in table
    assert "Focus" in table
    assert evaluate(GRADED, scorers=[length])["scorers"]["length"]["official"] is None
    path.write_text(json.dumps({**rows[1], "id": 7}) + "\n")
    with pytest.raises(InputError, match=r"rb2.jsonl, line 1.*ref:NUMBER or tied:NUMBER, not '7'"):
        evaluate(f"rewardbench2:{path}", scorers=[length])


def test_a_scorer_that_draws_lots_has_an_interval_around_random() -> None:
    import random

    lots = random.Random(7)

    def drawn(prompt: str, responses: list[str]) -> list[float]:
        return [lots.random() for _ in responses]

    rows = [row([float(i % 4 == 0), float(i % 3 == 0), 1.0, 0.0], "a", "b", "c", "d") for i in range(60)]
    found = evaluate(Rows(*rows), scorers=[drawn])["scorers"]["drawn"]
    assert found["minus_random"]["low"] < 0 < found["minus_random"]["high"]
    assert found["share"]["low"] < 0 < found["share"]["high"]


def test_best_of_runs_over_the_powers_of_two_and_ends_with_all_candidates() -> None:
    rules = evaluate(GRADED, scorers=[length])["scorers"]
    assert list(rules["length"]["best_of"]) == ["1", "2", "3"]
    for rule in rules.values():
        assert rule["best_of"]["1"] == pytest.approx(rules["random"]["score"])
        assert rule["best_of"]["3"] == pytest.approx(rule["score"])
    # Of all pairs of each row the longer one: 9, 9, 2; 3, 3, 1; 4.
    assert rules["length"]["best_of"]["2"] == pytest.approx((20 / 3 + 7 / 3 + 4) / 3)


def test_length_bins_subsets_and_correlations_are_those_of_the_rows() -> None:
    report = evaluate(GRADED, scorers=[length])
    found = report["scorers"]["length"]
    assert [(bin_["words"], bin_["rows"]) for bin_ in found["by_length"]] == [
        ([2.0, 2.0], 1), ([2.0, 2.0], 1), ([3.0, 3.0], 1)
    ]  # fmt: skip
    assert sum(bin_["score"] for bin_ in found["by_length"]) / 3 == pytest.approx(found["score"])
    assert report["subsets"]["short"]["rows"] == 2
    assert report["subsets"]["long"]["scores"]["length"] == 3
    assert found["correlation"]["length"] > 0.9
    assert evaluate(Rows(row([0, 1], "a", "b")), scorers=[])["subsets"] == {}


def test_generators_of_equal_strength_make_a_pool_of_their_own() -> None:
    rows = [row([0.5, 0.52, 1.0], "right", "wrong", "x", generators=("a", "b", "best"), prompt=f"{i}") for i in (1, 2)]
    rules = evaluate(Rows(*rows), scorers=[prefers_right])["scorers"]
    assert rules["prefers_right"]["same_strength"] == {"rows": 2, "share": {"mean": -1, "low": -1, "high": -1}}
    assert rules["oracle"]["same_strength"]["share"]["mean"] == 1
    assert evaluate(Rows(row([0, 1], "a", "b")), scorers=[])["scorers"]["oracle"]["same_strength"] is None


def test_candidates_without_labels_are_checked_where_the_dataset_can() -> None:
    example = Example(Task.of("sum"), lambda text: text == "right", ["wrong", "right"])
    assert evaluate(Rows(example), scorers=[prefers_right])["scorers"]["prefers_right"]["score"] == 1


def test_a_score_that_could_not_be_had_is_counted_and_never_picked() -> None:
    def unsure(prompt: str, responses: list[str]) -> list[float | None]:
        return [None if response == "red" else -1.0 for response in responses]

    found = evaluate(Rows(row([1, 0], "red", "blue")), scorers=[unsure])["scorers"]["unsure"]
    assert (found["score"], found["failed"], found["pruned"], found["tied"]) == (0, 0.5, 0, 0)


def test_the_majority_votes_where_answers_can_be_extracted() -> None:
    rows = [row([1, 1, 0], "is 4", "4", "5", extract=lambda text: text[-1]) for _ in range(2)]
    rules = evaluate(Rows(*rows), scorers=[])["scorers"]
    assert rules["majority"]["score"] == 1
    assert "majority" not in evaluate(Rows(*rows, row([1, 0], "4", "5")), scorers=[])["scorers"]


def test_long_candidates_are_left_out_and_so_are_rows_with_fewer_than_two(caplog: pytest.LogCaptureFixture) -> None:
    rows = row([1, 0, 1], "a b c", "d", "e f"), row([0, 1], "a b c d", "e")
    with caplog.at_level(logging.WARNING, "bon"):
        report = evaluate(Rows(*rows), scorers=[length], max_words=2)
    assert (report["rows"], report["left_out"], report["n"]) == (1, 1, 2)
    assert "row 1 has 1 of 2 candidates with at most 2 words" in caplog.text
    with pytest.raises(InputError, match="at most 1 words: there must be two"):
        evaluate(Rows(rows[1]), scorers=[], max_words=1)


def test_the_diagnosis_says_whether_picking_or_sampling_is_at_fault() -> None:
    unpicked = row([0, 1], "wrong", "right")
    never = row([0, 0], "wrong", "right")
    assert evaluate(Rows(unpicked, unpicked, never), scorers=[prefers_wrong])["diagnosis"] == (
        "Selection: 67% of the rows have a right answer among their candidates and prefers_wrong picks it in 0%; "
        "67 points are lost by picking, 33 because no candidate is right."
    )
    assert evaluate(Rows(unpicked, never), scorers=[prefers_right])["diagnosis"].startswith("Sampling: 50%")
    assert evaluate(Rows(never, never), scorers=[prefers_right])["diagnosis"].startswith("Sampling: 0%")
    assert "has the label 5.33 on average" in evaluate(GRADED, scorers=[length])["diagnosis"]


def test_rows_where_scorers_disagree_are_shown_with_what_each_said() -> None:
    rows = [row([1, 0], "right", "wrong", prompt="apart"), row([1, 1], "right", "wrong", prompt="alike")]
    [shown] = evaluate(Rows(*rows), scorers=[prefers_right, prefers_wrong])["disagreements"]
    assert (shown["row"], shown["prompt"]) == (0, "apart")
    assert shown["picks"] == {"prefers_right": 0, "prefers_wrong": 1}
    assert shown["candidates"][0] == {
        "text": "right", "label": 1, "rewards": {"prefers_right": 1, "prefers_wrong": 0}, "explanations": {},
    }  # fmt: skip
    [alone] = evaluate(Rows(*rows), scorers=[prefers_wrong])["disagreements"]  # with the best there is
    assert alone["prompt"] == "apart"
    assert evaluate(Rows(*rows), scorers=[])["disagreements"] == []


def test_an_inferred_instruction_is_checked_against_its_own_prompt_and_others() -> None:
    prompts = [f"topic{i} of number{i}" for i in range(9)]
    rows = [row([1, 0], "It speaks.", prompt, prompt=prompt) for prompt in prompts]
    engine = ScriptedEngine(lambda prompt, seed: next((p for p in prompts if p in prompt), "a thing"))
    report = evaluate(Rows(*rows), scorers=[Flip(engine)])
    [(name, check)] = report["inversion"].items()
    assert name.startswith("flip")
    assert check["retrieval_at_1"]["8"] == pytest.approx((1 + 1 / 8) / 2), "half are found, half say nothing"
    assert check["retrieval_at_1"]["64"] is None
    assert check["echo_rate"] == pytest.approx(0.5)
    assert report["scorers"][name]["tokens"] > 0
    assert report["scorers"][name]["tokens_per_correct"] is None, "it picks the echo every time"
    shown = report["disagreements"][0]
    assert shown["candidates"][1]["explanations"] == {name: shown["prompt"]}


def test_a_second_run_takes_its_scores_from_the_store(tmp_path: Path) -> None:
    options: dict[str, Any] = {"scorers": ["flip:scripted", length], "store": tmp_path / "scores.db"}
    data = Rows(row([1, 0], "red", "a number", prompt="Name a colour."), row([0, 1], "two", "red", prompt="Count."))
    first, second = (evaluate(data, **options) for _ in range(2))
    assert untimed(second) == untimed(first)
    seconds = [report["scorers"]["flip:scripted"]["seconds"] for report in (first, second)]
    assert seconds[1] == pytest.approx(seconds[0], rel=1e-9), "what they took when they were made"


# --- A policy's candidates -------------------------------------------------------------------------------------------


def test_every_scorer_rates_the_same_samples() -> None:
    asked: list[int] = []

    def policy(prompt: str, n: int) -> list[str]:
        asked.append(n)
        return ["so wrong", "right", "wrong", "it is right"][:n]

    report = evaluate(Sums(), policy=policy, scorers=[prefers_right, prefers_wrong], n=4)
    assert sorted(asked) == [1, 1, 1, 4, 4, 4]  # greedy and sampled, once each: no scorer samples for itself
    assert list(report["scorers"]) == ["prefers_right", "prefers_wrong", *SAMPLED]
    scores = {name: rule["score"] for name, rule in report["scorers"].items() if name != "consensus"}
    assert scores == {
        "prefers_right": 1, "prefers_wrong": 0, "random": 0.5, "first": 0, "longest": 1, "shortest": 0.5, "greedy": 0,
        "oracle": 1,
    }  # fmt: skip
    assert set(report["scorers"]["greedy"]["best_of"].values()) == {0}
    assert (report["rows"], report["left_out"], report["n"], report["policy"]) == (3, 0, 4, "policy")
    assert report["sampling"]["seed"] == 0


def test_a_bigger_models_answer_is_compared_with_what_the_policy_gets_in_the_same_time() -> None:
    def slow_to_score(prompt: str, responses: list[str]) -> list[float]:
        time.sleep(0.3)
        return prefers_right(prompt, responses)

    def policy(prompt: str, n: int) -> list[str]:
        time.sleep(0.02 * n)
        return ["so wrong", "right", "wrong", "it is right"][:n]

    def bigger(prompt: str) -> str:
        time.sleep(0.25)
        return "right"

    report = evaluate(Sums(), policy=policy, bigger=bigger, scorers=[prefers_right, slow_to_score], n=4, limit=1)
    found = report["bigger"]
    assert (found["name"], found["score"], report["scorers"]["bigger"]["score"]) == ("bigger", 1, 1)
    assert found["seconds"] >= 0.25
    assert report["policy_seconds"] >= 0.08
    assert found["equal_time"]["prefers_right"] == found["equal_time"]["longest"] == {"n": 4, "score": 1}
    assert found["equal_time"]["slow_to_score"]["n"] < 4
    assert found["equal_time"].keys() == report["scorers"].keys() - {"greedy", "bigger", "oracle"}
    table = format_table(report)
    assert "One answer of bigger: 1.000" in table
    assert max(map(len, table.splitlines())) <= 80
    assert evaluate(Sums(), policy=policy, scorers=[], n=4)["bigger"] is None
    with pytest.raises(InputError, match="a bigger model is compared with a policy: name one"):
        evaluate(GRADED, bigger=bigger, scorers=[])


def test_a_policy_may_answer_anew_what_a_dataset_has_candidates_for() -> None:
    example = Example(Task.of("sum"), lambda text: text == "right", ["wrong", "wrong too"], [0.0, 0.0])
    assert evaluate(Rows(example), scorers=[])["scorers"]["oracle"]["score"] == 0
    assert evaluate(Rows(example), policy=answers("right"), scorers=[], n=2)["scorers"]["oracle"]["score"] == 1


def test_scorers_without_a_model_of_their_own_run_on_the_policys() -> None:
    report = evaluate(Sums(), policy=ScriptedEngine(), scorers=["flip", "flip:style=json", Flip()], n=2, limit=1)
    assert list(report["inversion"]) == ["flip", "flip:style=json", "flip-direct(scripted)"]


def test_an_example_that_goes_wrong_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    def sampled(prompt: str) -> str:
        if prompt == "sum 1":
            raise RuntimeError("no such sum")
        return "right"

    with caplog.at_level(logging.WARNING, "bon"):
        report = evaluate(Sums(), policy=sampled, scorers=[prefers_right], n=2)
    assert (report["rows"], report["left_out"], report["scorers"]["greedy"]["score"]) == (2, 1, 1)
    assert "1 of 3 rows are left out" in caplog.text
    assert "no such sum" in caplog.text
    assert "sums: 2 rows (1 left out)" in format_table(report)


def test_a_verifier_that_raises_fails_its_row_with_a_name() -> None:
    broken = Rows(Example(Task.of("a"), lambda text: bool(1 / 0)))
    with pytest.raises(UserCodeError, match=r"the dataset.*ZeroDivisionError"):
        evaluate(broken, policy=answers("right"), scorers=[], n=1)


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, InputError, "n must be a whole number of at least 1, got 0"),
        ({"limit": 0}, InputError, "limit must be a whole number of at least 1, got 0"),
        ({"max_words": 0}, InputError, "max_words must be a whole number of at least 1, got 0"),
        ({"dataset": Rows()}, InputError, "'rows' has no rows"),
        ({"dataset": "minni"}, UnknownNameError, "mini"),
        ({"dataset": "mini:unseen"}, UnknownNameError, "unseen_wording"),
        ({"dataset": 3}, InputError, "is a bon.evals.dataset.Dataset or its spec, not 3"),
        ({"dataset": GRADED}, InputError, "'rows' has labels of its own candidates only. Leave the policy out"),
        ({"policy": None}, InputError, "the rows of 'sums' have no candidates: name a policy"),
        ({"dataset": GRADED, "policy": None, "n": 4}, InputError, "the rows of 'rows' bring theirs"),
        ({"scorers": [prefers_right, prefers_right]}, InputError, "'prefers_right' is given twice"),
        ({"scorers": ["flipp"]}, UnknownNameError, "flip"),
        ({"sampling": {"temprature": 1}}, UnknownNameError, "temperature"),
    ],
)
def test_what_makes_no_evaluation_is_refused(options: dict[str, Any], error: type[BonError], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(**{"dataset": Sums(), "policy": answers("right"), "scorers": [], **options})


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (row([1], "a", "b"), "row 0 has 1 labels for 2 candidates"),
        (row([], "a", "b"), "row 0 has 0 labels for 2 candidates"),
        (row([1, 0], "a", "b", generators=("x",)), "row 0 has 1 generators for 2 candidates"),
        (row([1, float("nan")], "a", "b"), "labels of row 0 must be finite numbers"),
    ],
)
def test_a_row_whose_labels_do_not_fit_is_said(example: Example, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(Rows(example), scorers=[])


def test_a_dataset_is_known_by_its_spec_or_as_a_class_of_the_users_own() -> None:
    dataset = as_dataset("mini:unseen_wording")
    assert isinstance(dataset, MiniWorld)
    assert dataset.split == "unseen_wording"
    assert isinstance(as_dataset(f"{__name__}:Sums"), Dataset)


# --- The mini world --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return evaluate("mini", n=4, limit=14, seed=1)


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: untimed(one) for key, one in value.items() if not key.endswith("seconds")}
    return value


def test_the_report_has_the_promised_shape(report: dict[str, Any]) -> None:
    json.dumps(report)
    for part in (report, report["parts"]["unseen_wordings"]):
        assert part["rows"] == 14
        assert list(part["scorers"]) == [*SCORERS, *SAMPLED]
        for rule in part["scorers"].values():
            assert list(rule["best_of"]) == ["1", "2", "4"]
            assert rule["minus_random"]["low"] <= rule["minus_random"]["mean"] <= rule["minus_random"]["high"]


def test_with_one_candidate_every_rule_is_the_same_and_the_oracle_is_never_beaten(report: dict[str, Any]) -> None:
    rules = {name: rule["best_of"] for name, rule in report["scorers"].items() if name != "greedy"}
    assert len({round(best_of["1"], 9) for best_of in rules.values()}) == 1
    for size in ("2", "4"):
        assert max(best_of[size] for best_of in rules.values()) == pytest.approx(rules["oracle"][size])


def test_the_same_seed_gives_the_same_report(report: dict[str, Any]) -> None:
    assert untimed(evaluate("mini", n=4, limit=14, seed=1)) == untimed(report)


def test_the_table_fits_eighty_columns(report: dict[str, Any]) -> None:
    parts = [
        row([1, 0], "a", "b", subset=f"Adversarial/{part}") for part in ("Neighbor", "Manual", "GPTInst", "GPTOut")
    ]
    with_subsets = evaluate(Rows(*parts), scorers=[length, indifferent])
    for table in (format_table(report), format_table(with_subsets)):
        assert max(map(len, table.splitlines())) <= 80
    assert all(rule in format_table(report) for rule in (*SCORERS, *SAMPLED))
    assert "instructions in unseen wordings: 14 rows" in format_table(report)
    assert "Adver…ighbor (1)" in format_table(with_subsets)
