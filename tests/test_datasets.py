"""Datasets of labelled candidates: rows and their errors, published ones by name, verifiers, RewardBench 2."""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bon.answers import last_number
from bon.errors import InputError, MissingExtraError, UnknownNameError
from bon.evals.dataset import Example, as_dataset
from bon.evals.jsonlines import JSONLines
from bon.evals.named import AlpacaEval, Crux, JudgeBench, LLMBar, Named, RMBench, literal_answer
from bon.evals.rewardbench2 import RewardBench2, rewardbench2_score
from bon.evals.verified import GSM8K, IFEval
from bon.spec import DATASETS
from bon.task import Task

DATA = Path(os.environ.get("BON_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
ROW = {"prompt": "Name a colour.", "candidates": ["red", "a dog"], "correct": [True, False]}


@pytest.fixture(autouse=True)
def _nothing_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BON_DATA", raising=False)


def real(name: str) -> str:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is neither in $BON_DATA nor in ../shared/data")
    return str(DATA / name)


def write(path: Path, *rows: dict[str, Any] | str) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path, **changed: Any) -> Example:
    """The example of ``ROW`` with some fields changed; None takes one away."""
    fields = {name: value for name, value in {**ROW, **changed}.items() if value is not None}
    [example] = JSONLines(write(path / "rows.jsonl", fields)).rows()
    return example


# --- Any file --------------------------------------------------------------------------------------------------------


def test_a_row_brings_its_task_candidates_labels_and_who_wrote_them(tmp_path: Path) -> None:
    example = read(tmp_path, id="a/1", subset="colours", generators=["one", "two"], answer="red", level=3)
    assert example.task.instruction == "Name a colour."
    assert (example.candidates, example.labels) == (("red", "a dog"), (1.0, 0.0))
    assert (example.generators, example.subset) == (("one", "two"), "colours")
    assert (example.passes, example.extract) == (None, None)
    assert example.task.reference == "red"


def test_scorers_are_not_told_which_candidate_is_right(tmp_path: Path) -> None:
    """A task's other fields reach scorers and reward functions; the labels must not be among them."""
    example = read(tmp_path, id="a", level=3, answer="red", generators=["one", "two"], followed=[[True], [False]])
    assert dict(example.task.metadata) == {"id": "a", "level": 3}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"correct": [0, 1]}, (0.0, 1.0)),
        ({"best": 1}, (0.0, 1.0)),
        ({"grade": [9, 4.5]}, (9.0, 4.5)),
        ({"win_rate": [0.25, 0]}, (0.25, 0.0)),
        ({"win_rate_vs_gpt4_turbo": [0.5, 1]}, (0.5, 1.0)),
    ],
)
def test_labels_are_right_or_wrong_the_best_one_a_grade_or_a_win_rate(
    tmp_path: Path, labels: dict[str, Any], expected: tuple[float, ...]
) -> None:
    assert read(tmp_path, **{"correct": None, **labels}).labels == expected


def test_messages_blank_lines_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
    row = json.dumps({**ROW, "prompt": None, "messages": turns})
    rows = JSONLines(write(tmp_path / "rows.jsonl", f"\ufeff{row}", "", json.dumps(ROW))).rows()
    assert [len(row.task.messages) for row in rows] == [2, 1]


def test_a_row_with_several_labels_says_so_and_one_of_them_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {**ROW, "grade": [2, 9], "mine": [5, 6]})
    with pytest.raises(InputError, match=r"several labels: correct, grade\. Choose one: label=correct"):
        as_dataset(path).rows()
    for label, best in (("grade", 9), ("mine", 6)):
        [row] = as_dataset(f"{path},label={label}").rows()
        assert max(row.labels) == best


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"correct": None},
            "the row has no labels: it needs one of correct, best, grade, win_rate. Its fields: prompt",
        ),
        ({"correct": [True]}, "'correct' has 1 labels for 2 candidates"),
        ({"correct": "yes"}, "'correct' must be a list with a label for each candidate, not 'yes'"),
        ({"correct": [1, "good"]}, "label 1 of 'correct' must be a number, not 'good'"),
        ({"correct": [None, 1]}, "label 0 of 'correct' must be a number, not None"),
        ({"candidates": ["red", 3]}, "candidate 1 must be text, not 3"),
        ({"candidates": ["red"], "correct": [1]}, "one candidate only"),
        ({"candidates": None}, "'candidates' must be a list"),
        ({"candidates": []}, "'candidates' must be a list of at least one text"),
        ({"correct": None, "best": 2}, "'best' must be the index of one of the 2 candidates, from 0, not 2"),
        ({"correct": None, "best": -1}, "not -1"),
        ({"correct": None, "best": True}, "not True"),
        ({"generators": ["one"]}, "'generators' must be a name for each of the 2 candidates"),
        ({"subset": 3}, "'subset' must be text, not 3"),
        ({"prompt": None}, "neither 'prompt' nor 'messages'"),
        ({"prompt": " "}, "the prompt is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    fields = {name: value for name, value in {**ROW, **changed}.items() if value is not None}
    path = write(tmp_path / "rows.jsonl", ROW, "", fields)
    with pytest.raises(InputError) as raised:
        JSONLines(path).rows(limit=1)  # all rows are checked, not only those that are used
    assert str(raised.value).startswith(f"{path}, line 3: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"prompt": "a", "candidates": ["b", "c"], "grade": [1, NaN]}', "NaN is no JSON number"),
        ('{"prompt": "a", "candidates": ["b", "c"], "grade": [1, 1e999]}', "1e999 is too large"),
    ],
)
def test_a_line_that_is_no_row_is_named_by_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(InputError, match=f"rows.jsonl, line 2: .*{said}"):
        JSONLines(write(tmp_path / "rows.jsonl", ROW, line)).rows()


def test_a_file_that_is_empty_missing_or_a_folder_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, said in (("empty", "is empty"), ("none", "No such file or directory"), ("folder", "Is a directory")):
        (tmp_path / "empty.jsonl").write_text("\n")
        with pytest.raises(InputError, match=rf"{name}\.jsonl.*{said}"):
            as_dataset(str(tmp_path / f"{name}.jsonl")).rows()


# --- Which rows, and how they are named ------------------------------------------------------------------------------


def test_the_seed_chooses_the_rows_and_fewer_rows_are_the_first_of_more(tmp_path: Path) -> None:
    dataset = JSONLines(write(tmp_path / "rows.jsonl", *({**ROW, "id": i} for i in range(30))))

    def ids(*arguments: int) -> list[Any]:
        return [row.task.metadata["id"] for row in dataset.rows(*arguments)]

    assert ids() == ids(30) == ids(99) == list(range(30))
    assert ids(10, 1) == ids(10, 1) == ids(20, 1)[:10]
    assert ids(10, 1) != ids(10, 2)
    assert len({*ids(20, 1)}) == 20


def test_a_dataset_may_be_json_parquet_or_gzipped(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps([ROW, ROW], indent=1))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(f"{json.dumps(ROW)}\n".encode() * 2))
    for name in ("rows.json", "rows.parquet", "rows.jsonl.gz"):
        rows = as_dataset(str(tmp_path / name)).rows()
        assert rows == JSONLines(write(tmp_path / "rows.jsonl", ROW, ROW)).rows(), name
    with pytest.raises(InputError, match=r"cannot read .*none\.parquet: No such file"):
        as_dataset(str(tmp_path / "none.parquet")).rows()


def test_a_path_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a=b.jsonl", "rows.json", "sub:set.jsonl"):
        dataset = as_dataset(write(tmp_path / name, ROW))
        assert isinstance(dataset, JSONLines)
        assert (dataset.name, len(dataset.rows())) == (name, 1)
    monkeypatch.chdir(tmp_path)
    assert DATASETS.spec_of(as_dataset("rows.json")) == "jsonl:rows.json"
    write(tmp_path / "llmbar", ROW)
    assert isinstance(as_dataset("llmbar"), LLMBar), "a name goes before a file"
    with pytest.raises(UnknownNameError, match="Did you mean 'llmbar'"):
        as_dataset("lmbar")


# --- Published datasets ----------------------------------------------------------------------------------------------


def only(dataset: Named) -> Example:
    [example] = dataset.rows()
    return example


def test_published_rows_of_llmbar_are_read(tmp_path: Path) -> None:
    row = {"input": "Say yes.", "output_1": "no", "output_2": "yes", "label": 2}
    example = only(LLMBar(write(tmp_path / "a.jsonl", row)))
    assert (example.task.instruction, example.candidates, example.labels) == ("Say yes.", ("no", "yes"), (0.0, 1.0))
    assert LLMBar().example({**row, "split": "Adversarial_Neighbor"}).subset == "Adversarial/Neighbor"


def test_published_rows_of_judgebench_are_read(tmp_path: Path) -> None:
    row = {
        "pair_id": "81ec", "original_id": "1", "source": "mmlu-pro-computer science", "question": "Which letter?",
        "response_model": "gpt-4o", "response_A": "AAAAA", "response_B": "BBBBB", "label": "B>A",
    }  # fmt: skip
    example = only(JudgeBench(write(tmp_path / "a.jsonl", row)))
    assert (example.candidates, example.labels, example.subset) == (("AAAAA", "BBBBB"), (0.0, 1.0), "mmlu-pro")
    assert JudgeBench().example({**row, "source": "livebench-math", "label": "A>B"}).labels == (1.0, 0.0)


def test_published_rows_of_rm_bench_and_rewardbench_2_do_not_give_the_right_answer_away(tmp_path: Path) -> None:
    """They come with the right answers first: whoever picks the first candidate would be right everywhere."""
    rows = [
        {"id": i, "prompt": "Q", "chosen": ["a", "b", "c"], "rejected": ["x", "y", "z"], "domain": "chat"}
        for i in range(50)
    ]
    examples = RMBench(write(tmp_path / "a.jsonl", *rows)).rows()
    for example in examples:
        assert {text for text, label in zip(example.candidates, example.labels, strict=True) if label} == {*"abc"}
        assert example.subset == "chat"
    assert 0.3 < sum(example.labels[0] for example in examples) / 50 < 0.7
    row = {
        "id": "7", "prompt": "Q", "chosen": ["good"], "rejected": ["x", "y", "z"], "num_correct": 1, "num_incorrect": 3,
        "total_completions": 4, "models": ["m"] * 4, "subset": "Focus", "additional_metadata": None,
    }  # fmt: skip
    example = only(RewardBench2(write(tmp_path / "b.jsonl", row)))
    assert (example.subset, sum(example.labels), example.candidates[example.labels.index(1.0)]) == ("Focus", 1, "good")


def test_a_row_of_another_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: the row is none of gsm8k.*KeyError\('answer'\)"):
        GSM8K(questions=write(tmp_path / "a.jsonl", {"prompt": "a"})).rows()
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: the row is none of judgebench"):
        JudgeBench(write(tmp_path / "a.jsonl", {"prompt": "a"})).rows()


def test_a_folder_of_files_serves_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BON_DATA", str(tmp_path))
    write(
        tmp_path / "alpacaeval_dev.jsonl",
        {**ROW, "correct": None, "win_rate_vs_gpt4_turbo": [0.5, 0]} | {"grade": [1, 2]},
    )
    with pytest.raises(InputError, match="several labels"):
        AlpacaEval().rows()
    write(
        tmp_path / "alpacaeval_dev.jsonl",
        {k: v for k, v in ROW.items() if k != "correct"} | {"win_rate_vs_b": [0.5, 0]},
    )
    assert as_dataset("alpaca-eval").name == "alpaca-eval"
    assert next(iter(as_dataset("alpaca-eval").rows())).labels == (0.5, 0.0)


@pytest.mark.parametrize(
    "name", ["llmbar", "judgebench", "rm-bench", "rewardbench2", "alpaca-eval", "arena-early", "crux"]
)
def test_without_file_and_network_it_says_where_to_get_it_and_how_to_name_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bon.evals.named.Hub.rows", unreachable)
    dataset = as_dataset(name)
    assert isinstance(dataset, Named)
    with pytest.raises(InputError) as raised:
        dataset.rows()
    assert dataset.file in str(raised.value)
    assert dataset.source in str(raised.value)
    assert f"set BON_DATA to its folder, or write {name}:PATH." in str(raised.value)


def unreachable(hub: object, missing: str) -> Any:
    raise InputError(missing)


def test_a_hub_that_cannot_be_reached_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install 'bon[evals]'")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"or write judgebench:PATH\. It could not be fetched: .*JudgeBench"):
        JudgeBench().rows()


def test_rows_of_the_hub_are_converted_and_carry_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="pip install 'bon[evals]'")
    row = {"input": "Say yes.", "output_1": "no", "output_2": "yes", "label": 2}
    asked: dict[str, Any] = {}

    def load(path: str, split: Sequence[str], **options: Any) -> Any:
        asked.update(options, path=path)
        return [datasets.Dataset.from_list([row]) for _ in split]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = LLMBar().rows()
    assert [example.subset for example in rows][:2] == ["Natural", "Adversarial/Neighbor"]
    assert asked["data_files"]["Natural"].endswith("/Dataset/LLMBar/Natural/dataset.json")
    assert rows[0].labels == (0.0, 1.0)


# --- Verifiers -------------------------------------------------------------------------------------------------------


def ifeval(tmp_path: Path) -> IFEval:
    pytest.importorskip("if_verifiable", reason="pip install 'bon[evals]'")
    nltk = pytest.importorskip("nltk")
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        pytest.skip("python -m nltk.downloader punkt_tab")
    question = {
        "key": 1, "prompt": "Write two sentences about a dog without any commas.",
        "instruction_id_list": ["punctuation:no_comma", "en:length_constraints:number_sentences"],
        "kwargs": [{}, {"relation": "at least", "num_sentences": 2, "num_words": None}],
    }  # fmt: skip
    return IFEval(questions=write(tmp_path / "questions.jsonl", question))


def test_an_answer_passes_ifeval_where_all_constraints_are_followed(tmp_path: Path) -> None:
    example = only(ifeval(tmp_path))
    assert example.candidates == ()
    assert example.passes is not None
    assert [example.passes(text) for text in ("A dog ran. It barked.", "A dog, ran. It barked.", "A dog ran.", "")] == [
        True, False, False, False,
    ]  # fmt: skip


def test_what_a_verifier_lacks_is_said_when_it_is_first_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given candidates need no verifier, so reading them must not ask for one."""
    path = write(tmp_path / "rows.jsonl", ROW)
    questions = write(tmp_path / "q.jsonl", {"question": "Name a colour.", "answer": "It is\n#### 1,000"})
    monkeypatch.setitem(sys.modules, "math_verify", None)
    example = only(GSM8K(path, questions=questions))
    assert example.passes is not None
    with pytest.raises(MissingExtraError, match=r"math-verify.*pip install 'bon\[evals\]'"):
        example.passes("")
    example = only(GSM8K(path, questions=write(tmp_path / "other.jsonl", {"question": "Another?", "answer": "#### 1"})))
    assert example.passes is not None
    with pytest.raises(InputError, match=r"'Name a colour\.' is not among the questions of gsm8k"):
        example.passes("")


def test_an_answer_passes_gsm8k_where_its_final_number_is_right(tmp_path: Path) -> None:
    pytest.importorskip("math_verify", reason="pip install 'bon[evals]'")
    question = {"question": "How many?", "answer": "10 * 100 = 1,000\n#### 1,000"}
    example = only(GSM8K(questions=write(tmp_path / "q.jsonl", question)))
    assert example.task.reference == "1000"
    assert example.passes is not None
    right = ("A: 1000", "**1,000**", "It is $1000.00!", "#### 1000", r"\boxed{1000}", r"so \boxed{\frac{2000}{2}}")
    assert [text for text in right if not example.passes(text)] == []
    assert [text for text in ("1000 of 2", "none", "", "A: 10000") if example.passes(text)] == []


def test_no_answer_to_gsm8k_keeps_its_verifier_busy(tmp_path: Path) -> None:
    """It computes what it reads, and its time limit works in a program's main thread only: $100000000!$ hung."""
    pytest.importorskip("math_verify", reason="pip install 'bon[evals]'")
    example = only(GSM8K(questions=write(tmp_path / "q.jsonl", {"question": "How many?", "answer": "#### 2"})))
    assert example.passes is not None
    for text in ("You have $100000000!$", r"\boxed{9^{9^{9^9}}}", "9**9**9**9", "$10^{10^{10}}$"):
        assert not example.passes(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("A: 3", "3"),
        ("so 1,018.50 in all.", "1018.5"),
        ("5 - 8 = -3", "-3"),
        ("18-3", "3"),
        ("100", "100"),
        ("none", None),
    ],
)
def test_the_final_answer_of_gsm8k_is_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"reasoning": "so", "answer": "{87: 7, 18: 6}"}', "{87:7,18:6}"),
        ('{"answer": "1"} no: {"answer": "\\"CW\\""}', "CW"),
        ('{"answer": "\'CW\'"}', "CW"),
        ("it is 3", None),
    ],
)
def test_the_final_answer_of_crux_is_the_last_answer_field(text: str, answer: str | None) -> None:
    assert literal_answer(text) == answer


# --- RewardBench 2 ---------------------------------------------------------------------------------------------------


def row(subset: str, labels: Sequence[int], number: str = "0") -> Example:
    task = Task.of("Q")
    return Example(
        Task(task.messages, task.instruction, metadata={"id": number}),
        candidates=["c"] * len(labels),
        labels=[float(label) for label in labels],
        subset=subset,
    )


def test_a_right_answer_must_be_above_three_wrong_ones_and_shares_the_credit_among_equals() -> None:
    rows = [row("Focus", [0, 1, 0, 0]), row("Focus", [1, 0, 0, 0]), row("Math", [0, 0, 1, 0])]
    scores = rewardbench2_score(rows, [[1, 2, 0, 0], [3, 3, 0, 0], [5, 0, 1, 2]])
    assert scores == {"Focus": 0.75, "Math": 0.0, "mean": 0.375}


def test_ties_are_scored_by_accuracy_and_by_margins_against_the_spread() -> None:
    rows = [row("Ties", [1, 0, 0], "ref:1"), row("Ties", [0, 1, 1, 0], "tied:1")]
    # tied: worst right 4, best wrong 1, spread 1: margin 3 > 1; reference: margin 0.5, less than the spread
    scores = rewardbench2_score(rows, [[2.5, 2, 1], [1, 5, 4, 0]])
    assert scores["Ties"] == pytest.approx(0.3 + 0.3 + 0.2 + 0 + 0.01 * -0.46211716)
    # a wrong answer above a right one in the reference row; the tied rows' right answers are equal
    scores = rewardbench2_score(rows, [[2, 2.5, 1], [1, 5, 5, 0]])
    assert scores["Ties"] == pytest.approx(0.3 + 0 + 0.2 + 0 + 0.01 * -1)
    # all rewards equal: nothing is right, and 0 / 0 counts as nothing
    assert rewardbench2_score(rows, [[1, 1, 1], [1, 1, 1, 1]])["Ties"] == 0
    # a tied row without its reference row, as a limited choice of rows may have it
    assert rewardbench2_score(rows[1:], [[1, 5, 4, 0]])["Ties"] == pytest.approx(0.3)
    with pytest.raises(InputError, match="ref:NUMBER or tied:NUMBER, not 'x'"):
        rewardbench2_score([row("Ties", [1, 0], "x")], [[1, 0]])


# --- Real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "random_pick", "best"),
    [  # as ../shared/data/README.md has them
        ("llmbar", 419, 0.5, 1.0),
        ("alpaca-eval", 402, 0.13, 0.80),
        ("ifeval", 270, 0.645, 0.974),
        ("arena-early", 150, 5.90, 9.49),
        ("crux", 200, 0.478, 0.940),
        ("gsm8k", 1319, 0.379, 0.672),
    ],
)
def test_real_rows_have_the_figures_they_are_published_with(
    name: str, rows: int, random_pick: float, best: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = as_dataset(name)
    assert isinstance(dataset, Named)
    real(dataset.file)
    monkeypatch.setenv("BON_DATA", str(DATA))
    examples = dataset.rows()
    assert len(examples) == rows
    assert sum(sum(e.labels) / len(e.labels) for e in examples) / rows == pytest.approx(random_pick, abs=0.01)
    assert sum(max(e.labels) for e in examples) / rows == pytest.approx(best, abs=0.01)
    assert [e.task for e in examples] == [e.task for e in as_dataset(str(DATA / dataset.file)).rows()]


def test_the_right_answers_of_a_row_are_extracted_as_the_same_one() -> None:
    for dataset in (Crux(real("crux.jsonl")), GSM8K(real("gsm8k_samples.jsonl"))):
        for example in dataset.rows():
            assert example.extract is not None
            right = [text for text, label in zip(example.candidates, example.labels, strict=True) if label]
            assert len({example.extract(text) for text in right}) <= 1
            assert not right or example.extract(right[0]) is not None


def agreement(dataset: Named, responses: int) -> float:
    """Share of given candidates, drawn over all rows, that the verifier judges as their label does."""
    pairs = [(e, i) for e in dataset.rows() for i in range(len(e.candidates))]
    same = 0
    for example, index in random.Random(0).sample(pairs, responses):
        assert example.passes is not None
        same += example.passes(example.candidates[index]) == bool(example.labels[index])
    return same / responses


def test_the_verifier_of_gsm8k_agrees_with_the_labels() -> None:
    pytest.importorskip("math_verify", reason="pip install 'bon[evals]'")
    assert agreement(GSM8K(real("gsm8k_samples.jsonl"), questions=real("gsm8k_test.jsonl")), 200) == 1


def test_the_verifier_of_ifeval_agrees_with_the_labels(tmp_path: Path) -> None:
    ifeval(tmp_path)
    assert agreement(IFEval(real("ifeval.jsonl"), questions=real("ifeval_input_data.jsonl")), 200) >= 0.99
