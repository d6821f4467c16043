"""Exports for trainers: what pairs, groups and winners a result gives, from a run's rows and from result objects."""

import math
from dataclasses import replace

import pytest
from command import rows_of, write_rows

from bon import BestOfN, portal
from bon.cli import main
from bon.data.export import PAIRINGS, SFT, Groups, Pairs, reference_logps, save
from bon.data.results import read_results, result_of, run_row
from bon.errors import InputError
from bon.models import ModelPool
from bon.selectors import Best, TopK, select
from bon.task import Task
from bon.types import Candidate, Result, Score, Timing, Usage

PROMPT = "Write a reminder for Anna to water the plants on Monday."


def result(*rated, selector=None, spreads=None, reasons=None, prompt=PROMPT, **columns):
    """A result whose candidates have these (text, reward)."""
    candidates = tuple(
        Candidate(i, text, (reasons or {}).get(i, "stop"), cumulative_logprob=-float(i))
        for i, (text, _) in enumerate(rated)
    )
    scores = tuple(
        Score(reward, "ok" if reward is not None else "pruned", candidate=i, spread=spreads and spreads[i])
        for i, (_, reward) in enumerate(rated)
    )
    task = replace(Task.of(prompt), metadata=columns)
    return Result(task, candidates, scores, select(selector or Best(), scores, candidates), Timing(0, 0, 0), Usage())


FOUR = (("good", 0.8), ("bad", 0.1), ("best", 0.9), ("fair", 0.5))


def texts(row):
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_the_best_stands_against_the_worst():
    [row] = Pairs()(result(*FOUR, id=7))
    assert row == {
        "id": "7",
        "prompt": [{"role": "user", "content": PROMPT}],
        "chosen": [{"role": "assistant", "content": "best"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
        "chosen_reward": 0.9,
        "rejected_reward": 0.1,
        "margin": 0.8,
    }


def test_adjacent_pairs_are_each_candidate_with_the_next_in_order():
    rows = Pairs(pairing="adjacent")(result(*FOUR))
    assert [texts(row) for row in rows] == [("best", "good"), ("good", "fair"), ("fair", "bad")]
    assert [row["margin"] for row in rows] == pytest.approx([0.1, 0.3, 0.4])


def test_a_random_loser_is_any_but_the_best_and_the_same_for_the_same_seed():
    many = [result(*FOUR, (f"other {i}", 0.2)) for i in range(40)]
    drawn = [texts(row) for one in many for row in Pairs(pairing="best-random")(one)]
    assert {chosen for chosen, _ in drawn} == {"best"}
    assert {"good", "bad", "fair"} <= {rejected for _, rejected in drawn}
    assert drawn == [texts(row) for one in many for row in Pairs(pairing="best-random")(one)]
    assert drawn != [texts(row) for one in many for row in Pairs(pairing="best-random", seed=1)(one)]


def test_optimistic_pairs_go_by_the_mean_plus_c_standard_deviations():
    bold = result(("sure", 0.6), ("bold", 0.5), ("weak", 0.1), ("poor", 0.2), spreads=[0.0, 0.3, 0.2, 0.0])
    [plain] = Pairs(pairing="optimistic:0")(bold)
    assert texts(plain) == ("sure", "weak")
    [row] = Pairs(pairing="optimistic")(bold)
    assert texts(row) == ("bold", "poor")
    assert (row["chosen_reward"], row["rejected_reward"]) == (0.5, 0.2)
    assert row["margin"] == pytest.approx(0.6)
    with pytest.raises(InputError, match="optimistic pairs need rewards whose standard deviation is known"):
        Pairs(pairing="optimistic")(result(*FOUR))


def test_the_same_text_stands_in_no_pair_with_itself():
    pairs = Pairs()
    assert pairs(result(("same", 0.5), ("same", 0.5))) == []
    assert pairs.refused["prompts with fewer than two different candidates to compare"] == 1
    assert len(Pairs(pairing="adjacent")(result(*FOUR, ("best", 0.9)))) == 3


def test_ties_stay_unless_they_are_to_be_dropped_and_so_do_small_margins():
    tied = result(("a", 0.5), ("b", 0.5))
    [row] = Pairs()(tied)
    assert (texts(row), row["margin"]) == (("a", "b"), 0.0)
    strict = Pairs(drop_ties=True)
    assert (strict(tied), strict.refused["pairs that are ties"]) == ([], 1)
    assert len(strict(result(*FOUR))) == 1
    rows = Pairs(pairing="adjacent", min_margin=0.2)(result(*FOUR))
    assert [texts(row) for row in rows] == [("good", "fair"), ("fair", "bad")]


def test_what_has_no_reward_or_was_cut_off_stands_in_no_pair_and_is_counted():
    pairs = Pairs()
    one = result(*FOUR, ("pruned", None), reasons={2: "length"})
    assert [texts(row) for row in pairs(one)] == [("good", "bad")]
    assert pairs.refused["candidates without a reward (pruned)"] == 1
    assert pairs.refused["candidates that were cut off"] == 1
    assert [texts(row) for row in Pairs(cut_off=True)(one)] == [("best", "bad")]


def test_the_reference_response_is_any_candidate_whatever_its_reward():
    many = [result(*FOUR, (f"pruned {i}", None)) for i in range(60)]
    drawn = [row["reference_response"] for one in many for row in Pairs(reference_response=True)(one)]
    assert {"good", "bad", "best", "fair"} <= {*drawn}
    assert any(text.startswith("pruned") for text in drawn)
    assert "reference_response" not in Pairs()(many[0])[0]


def test_a_conversation_keeps_its_messages_and_its_tool_calls_and_an_image_is_refused():
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sky"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "Rain.", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It "},
    ]
    [row] = Pairs()(result(("It rains.", 1.0), ("It is dry.", 0.0), prompt=messages))
    assert row["prompt"] == [*messages[:2], {**messages[2], "content": None}, messages[3]]
    assert texts(row) == ("It rains.", "It is dry.")
    seen = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(InputError, match="the prompt has images"):
        Pairs()(result(*FOUR, prompt=[{"role": "user", "content": seen}]))


# --- groups and winners -----------------------------------------------------------------------------------------------


def test_a_group_has_all_that_a_loss_over_groups_needs():
    [row] = Groups(tau=0.5)(result(("a", 1.0), ("b", 0.0), ("c", 0.0), ("d", None)))
    assert [completion[0]["content"] for completion in row["completions"]] == ["a", "b", "c"]
    assert row["rewards"] == [1.0, 0.0, 0.0]
    assert row["ranks"] == [1, 2, 2]
    weights = [math.exp(2), 1, 1]
    assert row["soft_targets"] == pytest.approx([w / sum(weights) for w in weights])
    deviation = math.sqrt(1 / 3) + 1e-4
    assert row["advantages"] == pytest.approx([2 / 3 / deviation, -1 / 3 / deviation, -1 / 3 / deviation])
    assert row["logps"] == [0.0, -1.0, -2.0]
    assert row["finish_reasons"] == ["stop"] * 3
    assert row["unrated"] == 1
    [plain] = Groups(scale=False)(result(("a", 1.0), ("b", 0.0)))
    assert plain["advantages"] == [0.5, -0.5]


def test_a_group_of_equal_rewards_has_no_advantage_and_is_left_out_on_request():
    equal = result(("a", 0.5), ("b", 0.5))
    [row] = Groups()(equal)
    assert row["advantages"] == [0.0, 0.0]
    assert row["soft_targets"] == [0.5, 0.5]
    groups = Groups(drop_ties=True)
    assert (groups(equal), groups.refused["groups whose rewards are all the same"]) == ([], 1)
    assert (groups(result(("a", 0.5), ("b", None))), groups.refused.total()) == ([], 3)


def test_the_smallest_tau_gives_the_best_all_of_the_target():
    [row] = Groups(tau=1e-9)(result(*FOUR))
    assert row["soft_targets"] == [0.0, 0.0, 1.0, 0.0]


def test_winners_are_what_the_selector_picked():
    [row] = SFT()(result(*FOUR))
    assert (row["completion"], row["reward"]) == ([{"role": "assistant", "content": "best"}], 0.9)
    assert [row["reward"] for row in SFT()(result(*FOUR, selector=TopK(3)))] == [0.9, 0.8, 0.5]
    assert [row["reward"] for row in SFT(min_reward=0.8)(result(*FOUR, selector=TopK(3)))] == [0.9, 0.8]
    winners = SFT()
    assert winners(result(("a", None))) == []
    assert winners(result(("a", 0.5), reasons={0: "length"})) == []
    assert len(SFT(cut_off=True)(result(("a", 0.5), reasons={0: "length"}))) == 1
    assert winners.refused == {"prompts without a winner": 1, "candidates that were cut off": 1}


def test_columns_of_the_prompt_are_kept_by_name():
    one = result(*FOUR, id="q1", topic="plants")
    assert [row["topic"] for export in (Pairs, Groups, SFT) for row in export(keep=["topic"])(one)] == ["plants"] * 3
    with pytest.raises(InputError, match=r"no column 'topics' to keep\. Its columns: 'id', 'topic'"):
        Pairs(keep=["topics"])(one)
    with pytest.raises(InputError, match="the column 'margin' cannot be kept"):
        Pairs(keep=["margin"])(result(*FOUR, margin=1))


@pytest.mark.parametrize("name", ["id", "prompt"])
def test_no_column_takes_the_place_of_what_every_row_begins_with(name):
    """A kept ``id`` replaced the text with whatever it was, so that numbers and names made no Parquet together."""
    with pytest.raises(InputError, match=f"the column '{name}' cannot be kept: the rows have one of that name"):
        SFT(keep=[name])(result(*FOUR, id=7))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Pairs(pairing="best-worse"), "unknown pairing 'best-worse'. Did you mean 'best-worst'?"),
        (lambda: Pairs(pairing="adjacent:2"), "unknown pairing 'adjacent:2'"),
        (lambda: Pairs(pairing="optimistic:x"), "optimistic:C takes a number >= 0 of standard deviations, got 'x'"),
        (lambda: Pairs(pairing="optimistic:-1"), "got '-1'"),
        (lambda: Pairs(min_margin=-1), "min_margin must be a number >= 0, got -1"),
        (lambda: Pairs(min_margin=math.nan), "min_margin must be a number, got nan"),
        (lambda: Pairs(seed=-1), "seed must be a whole number of at least 0, got -1"),
        (lambda: Groups(tau=0), "tau must be a positive number, got 0"),
        (lambda: SFT(min_reward="high"), "min_reward must be a number, got 'high'"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_its_value(make, said):
    with pytest.raises(InputError) as refused:
        make()
    assert said in str(refused.value)


# --- from a run's rows ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's rows with everything, and the result objects of the same run."""
    folder = tmp_path_factory.mktemp("run")
    prompts = ["Write an invitation for Norah to a bonfire at the castle.", PROMPT, "Remind Tom of the milk."]
    write_rows(folder / "prompts.jsonl", [{"id": f"q{i}", "prompt": text} for i, text in enumerate(prompts)])
    options = ["-n", "6", "--seed", "1", "--no-prune"]
    assert main(["run", str(folder / "prompts.jsonl"), *options, "--all", "-o", str(folder / "run.jsonl")]) == 0
    with BestOfN(n=6, sampling={"seed": 1}, prune=False) as bon:
        return folder / "run.jsonl", bon(prompts)


@pytest.mark.parametrize("export", [*(Pairs(pairing=one) for one in PAIRINGS[:3]), Groups(), SFT()])
def test_a_runs_rows_and_its_result_objects_export_the_same(run, export):
    path, results = run
    from_rows = [row for one in read_results(str(path)) for row in export(one)]
    from_objects = [row for one in results for row in export(one)]
    assert [{**row, "id": None} for row in from_rows] == from_objects
    assert from_rows


def test_reference_log_probabilities_of_the_policy_itself_are_those_that_it_sampled_with(run):
    path, _ = run
    results = [*read_results(str(path))]
    cut = replace(results[0], candidates=tuple(replace(c, finish_reason="length") for c in results[0].candidates))
    pool = ModelPool()
    try:
        told = portal.run(reference_logps(pool.engine("mini"), [*results, cut]))
    finally:
        portal.run(pool.aclose())
    for one, logps in zip(results, told, strict=False):
        assert logps == pytest.approx([c.cumulative_logprob for c in one.candidates], abs=1e-4)
    assert all(without > whole for without, whole in zip(told[-1], told[0], strict=True)), "no end, no end token"


def test_names_that_a_run_moved_away_are_found_again():
    row = {"text": "Say hi.", "best": "old"}
    written = {"text": "Hi.", "best": 0, "candidates": [{"text": "Hi."}], "scores": [{"reward": 1.0}], "replaced": row}
    [message] = SFT()(result_of(run_row(1, written, prompt_field="text")))[0]["prompt"]
    assert message["content"] == "Say hi."


def test_a_run_that_was_turned_into_parquet_exports_the_same(run, tmp_path):
    pytest.importorskip("pyarrow")
    for row in (rows := rows_of(run[0])):
        for score in row["scores"]:
            assert score.pop("parts") == {}  # which Parquet has no form for
    save(rows, tmp_path / "run.parquet")
    for export in (Pairs(), Groups(), SFT()):
        one, other = (
            [row for found in read_results(str(path)) for row in export(found)]
            for path in (run[0], tmp_path / "run.parquet")
        )
        assert one == other


def test_candidates_that_a_rerank_was_given_as_texts_are_exported(tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"prompt": PROMPT, "candidates": ["Dear Tom,", "Anna, water the plants."]}])
    out = tmp_path / "out.jsonl"
    assert main(["rerank", str(tmp_path / "in.jsonl"), "--scorer", "longest", "--all", "-o", str(out)]) == 0
    [row] = Pairs()(next(read_results(str(out))))
    assert texts(row) == ("Anna, water the plants.", "Dear Tom,")
    assert row["id"] == "1"


WHOLE = {"prompt": PROMPT, "best": 0, "candidates": [{"text": "Hi."}], "scores": [{"reward": 1.0}]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scores": None}, "it was not written with --all. Type: bon run PROMPTS --all -o FILE"),
        ({"scores": []}, "the row has 1 candidates and 0 scores"),
        ({"candidates": [3]}, "candidate 0 must be text or an object with 'text', not 3"),
        ({"scores": [1.0]}, "score 0 must be an object with 'reward', not 1.0"),
        ({"scores": [{"reward": "high"}]}, "score 0: a reward must be a number or None, got 'high'"),
        ({"scores": [{"reward": 1.0, "status": "fine"}]}, "score 0: unknown status of a score 'fine'"),
        ({"scores": [{"reward": 1.0, "tie_break": "x"}]}, "score 0: 'tie_break' must be a number, not 'x'"),
        (
            {"candidates": [{"text": "a", "tool_calls": 3}]},
            "candidate 0: 'tool_calls' must be a list of objects, not 3",
        ),
        ({"candidates": [{"text": "a", "tool_calls": ["b"]}]}, "candidate 0: 'tool_calls' must be a list of objects"),
        ({"candidates": [{"text": "a", "finish_reason": 7}]}, "candidate 0: 'finish_reason' must be text, not 7"),
        (
            {"candidates": [{"text": "a", "cumulative_logprob": "-1"}]},
            "'cumulative_logprob' must be a number, not '-1'",
        ),
        ({"best": 4}, "'best' must be the index of one of the 1 candidates, not 4"),
        ({"status": "error", "reason": "No."}, "the run has no result for this row: No. --skip-bad leaves it out."),
        ({"prompt": None}, "neither 'prompt' nor 'messages'"),
    ],
)
def test_a_row_that_is_no_result_is_named_with_its_line(tmp_path, change, said):
    path = write_rows(tmp_path / "run.jsonl", [WHOLE, {**WHOLE, **change}])
    with pytest.raises(InputError) as refused:
        [*read_results(str(path))]
    assert str(refused.value).startswith(f"{path}:2: ")
    assert said in str(refused.value)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("export", [Pairs(reference_response=True), Groups(), SFT()])
def test_what_is_saved_is_what_datasets_loads(run, tmp_path, name, export, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [row for one in read_results(str(run[0])) for row in export(one)]
    assert save(rows, tmp_path / name) == len(rows)
    kind = "parquet" if name.endswith(".parquet") else "json"
    loaded = datasets.load_dataset(kind, data_files=str(tmp_path / name), split="train")
    assert [*loaded] == rows
    assert not [*tmp_path.glob("*.part")]


def test_columns_that_make_no_table_are_refused_and_what_was_there_stays(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    save([{"a": 1}], path)
    there = path.read_bytes()
    with pytest.raises(InputError, match=r"the rows make no table: .*Write JSON Lines"):
        save([{"a": 1}, {"a": "one"}], path)
    with pytest.raises(InputError, match=r"the rows make no table: .*Write JSON Lines"):
        save([{"a": {}}], path)
    assert not [*tmp_path.glob("*.part")]
    assert path.read_bytes() == there


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(run, capsys, monkeypatch, tmp_path):
    """bon export in this process, over the run and with -o: (exit code, rows, standard error)."""
    monkeypatch.chdir(tmp_path)

    def call(kind, *options, source=run[0], to="out.jsonl"):
        code = main(["export", kind, str(source), "-o", to, *map(str, options)])
        rows = rows_of(tmp_path / to) if to.endswith(".jsonl") and (tmp_path / to).exists() else []
        return code, rows, capsys.readouterr().err

    return call


def test_the_command_writes_what_the_functions_give(export, run):
    results = [*read_results(str(run[0]))]
    for kind, options, same in (
        ("pairs", (), Pairs()),
        ("pairs", ("--pairing", "adjacent", "--min-margin", 0.01), Pairs(pairing="adjacent", min_margin=0.01)),
        ("pairs", ("--reference-response", "--seed", 3), Pairs(reference_response=True, seed=3)),
        ("groups", ("--tau", 0.3, "--no-scale", "--drop-ties"), Groups(tau=0.3, scale=False, drop_ties=True)),
        ("sft", ("--min-reward", 0.5, "--keep", "run"), SFT(min_reward=0.5, keep=["run"])),
    ):
        code, rows, err = export(kind, *options, "--overwrite")
        assert (code, rows) == (0, [row for one in results for row in same(one)]), err
        assert f"{len(rows)} " in err


def test_several_files_and_a_system_message_are_taken_in_order(export, run, tmp_path):
    again = tmp_path / "again.jsonl"
    again.write_bytes(run[0].read_bytes())
    code, rows, _ = export("sft", run[0], "--system", "Be brief.", source=again)
    assert (code, [row["id"] for row in rows]) == (0, ["q0", "q1", "q2"] * 2)
    assert {row["prompt"][0]["content"] for row in rows} == {"Be brief."}


def test_a_folder_of_shards_is_taken_in_the_order_of_their_names(export, tmp_path):
    (folder := tmp_path / "run").mkdir()
    for at, name in enumerate("bca"):
        write_rows(folder / f"{name}.jsonl", [{**WHOLE, "id": f"q{at}"}])
    code, rows, _ = export("sft", source=folder)
    assert (code, [row["id"] for row in rows]) == (0, ["q2", "q0", "q1"])


def test_what_pruning_left_without_a_reward_is_said_with_the_option_that_helps(export, tmp_path):
    pruned = {**WHOLE, "candidates": ["a", "b", "c"], "scores": [{"reward": r} for r in (1.0, 0.5)]}
    pruned["scores"].append({"reward": None, "status": "pruned"})
    code, rows, err = export("pairs", source=write_rows(tmp_path / "run.jsonl", [pruned]))
    assert (code, [texts(row) for row in rows]) == (0, [("a", "b")])
    assert "1 pairs in out.jsonl; left out: 1 candidates without a reward (pruned)." in err
    assert "give bon run --no-prune" in err


def test_a_bad_row_ends_an_export_and_is_skipped_on_request_and_the_others_are_written(export, tmp_path):
    source = write_rows(tmp_path / "run.jsonl", [WHOLE, {"prompt": PROMPT, "text": "Hi.", "reward": 1.0}, WHOLE])
    code, rows, err = export("sft", source=source)
    assert (code, len(rows)) == (2, 1)
    assert f"error: {source}:2: the row has no 'candidates' with 'scores': it was not written with --all" in err
    code, rows, err = export("sft", "--skip-bad", "--overwrite", source=source)
    assert (code, len(rows)) == (0, 2)
    assert f"skipped {source}:2: " in err


def test_what_is_there_stays_unless_it_is_to_be_replaced_and_until_there_is_a_row(export, tmp_path):
    assert export("sft")[0] == 0
    code, rows, err = export("sft")
    assert (code, len(rows), "out.jsonl exists already. Add --resume" in err) == (2, 3, True)
    code, rows, err = export("sft", "--overwrite", "--min-reward", 2)
    assert (code, len(rows), "there are no winners" in err) == (2, 3, True)
    pytest.importorskip("pyarrow")
    assert export("sft", to="out.parquet")[0] == 0
    code, _, err = export("sft", to="out.parquet")
    assert (code, "out.parquet exists already. Add --overwrite" in err) == (2, True)
    code, _, err = export("sft", "--resume", to="out.parquet")
    assert (code, "--resume adds to JSON Lines" in err) == (2, True)


def test_rows_that_make_no_parquet_are_kept_beside_it(export, tmp_path):
    pytest.importorskip("pyarrow")
    source = write_rows(tmp_path / "run.jsonl", [{**WHOLE, "topic": "tea"}, {**WHOLE, "topic": ["a", "b"]}])
    code, _, err = export("sft", "--keep", "topic", source=source, to="out.parquet")
    assert (code, "the rows make no table" in err, "They are in out.parquet.jsonl" in err) == (2, True, True), err
    assert [row["topic"] for row in rows_of(tmp_path / "out.parquet.jsonl")] == ["tea", ["a", "b"]]


def test_a_broken_off_export_goes_on_where_it_stopped_and_rates_nothing_again(export, tmp_path):
    code, whole, _ = export("groups", "--reference", "mini")
    assert code == 0
    assert all(len(row["ref_logps"]) == len(row["completions"]) == 6 for row in whole)
    marked = [{**whole[0], "ref_logps": [0.5] * 6}, whole[1]]
    out = write_rows(tmp_path / "out.jsonl", marked)
    with out.open("a") as file:
        file.write('{"id": "q2", "prom')  # torn
    code, rows, err = export("groups", "--reference", "mini", "--resume")
    assert (code, rows) == (0, [*marked, whole[2]])
    assert "1 new groups in out.jsonl" in err
    code, _, err = export("groups", "--reference", "mini", "--resume", "--tau", 2)
    assert (code, "out.jsonl has 3 rows that these files and options do not give: cannot resume" in err) == (2, True)


def test_a_completion_that_does_not_fit_the_reference_is_a_row_of_its_own_and_the_others_are_written(export, tmp_path):
    two = {**WHOLE, "candidates": ["a", "b"], "scores": [{"reward": 1.0}, {"reward": 0.0}]}
    source = write_rows(tmp_path / "run.jsonl", [{**two, "candidates": ["water " * 3000, "b"]}, two])
    code, rows, err = export("groups", "--reference", "mini", "--skip-bad", source=source)
    assert (code, len(rows)) == (0, 1)
    assert f"skipped {source}:1: " in err
    assert "more than the" in err


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("pairs", ("--pairing", "bestworst"), "unknown pairing 'bestworst'. Did you mean 'best-worst'?"),
        ("pairs", ("--pairing", "optimistic"), "head:FILE does, and flip:MODEL,samples=4. Or take another pairing."),
        ("groups", ("--tau", 0), "tau must be a positive number, got 0.0"),
        ("groups", ("--reference", "no/such"), "'no/such' is neither a folder nor a model on this machine"),
        ("groups", ("--reference", "http://127.0.0.1:9/v1,model=m"), "Over HTTP it can where its tokenizer is named"),
        ("sft", ("--keep", "topic"), "the row has no column 'topic' to keep"),
        ("pairs", ("nothing.jsonl",), "there is no file 'nothing.jsonl'"),
        ("pairs", ("--prompt-field", "question"), "the row has no field 'question'"),
    ],
)
def test_bad_usage_of_the_command_is_a_sentence(export, kind, options, said):
    code, rows, err = export(kind, *options)
    assert (code, rows) == (2, [])
    assert said in err


@pytest.mark.parametrize("group", ["export", "train"])
def test_a_group_of_commands_without_one_says_that_one_is_missing(group, capsys):
    """It showed its help and then ``error: .``."""
    assert main([group]) == 2
    assert capsys.readouterr().err == f"bon: error: Missing command. Type: bon {group} --help\n"


def test_the_output_is_not_one_of_the_inputs(export, tmp_path):
    source = write_rows(tmp_path / "out.jsonl", [WHOLE])
    code, _, err = export("sft", "--overwrite", source=source)
    assert (code, "is both the input and the output" in err, rows_of(source)) == (2, True, [WHOLE])
