"""The cost model: what it computes from rates, and that what is measured gives the time that was measured."""

import json
import math
import os
import sys
import time

import pytest
from command import write_rows

from bon import BestOfN
from bon.bench.plan import Cost, Meter, Plan, Stage, growth_of, measure
from bon.cli import main
from bon.config import Config
from bon.data.rows import row_of
from bon.errors import InputError
from bon.mini.tasks import sample_instructions

POLICY = Stage(read=100.0, written=50.0, prefill=1000.0, decode=500.0)
SCORER = Stage(read=60.0, written=10.0, prefill=1200.0, decode=100.0)
COST = Cost(POLICY, SCORER, n=8.0, prompts=64, setup=3.0)


def test_a_prompt_is_read_once_by_the_policy_and_each_candidate_by_the_scorer():
    assert COST.seconds() == pytest.approx(100 / 1000 + 8 * 50 / 500 + 8 * (60 / 1200 + 10 / 100))
    assert COST.seconds(1) == pytest.approx(0.1 + 0.1 + 0.05 + 0.1)
    assert COST.seconds(1, longer=2) == pytest.approx(0.2 + 0.1 + 0.05 + 0.1)
    assert COST.tokens(2) == {"policy_read": 100, "policy_written": 100, "scorer_read": 120, "scorer_written": 20}


def test_workers_add_up_and_the_last_blocks_leave_some_of_them_idle():
    alone = COST.seconds()
    assert Plan((COST,), 4, 64).rate() == pytest.approx(4 / alone)
    assert Plan((COST,), 1, 64).seconds(1000) == pytest.approx(1000 * alone)
    assert Plan((COST,), 4, 64).seconds(5 * 64) == pytest.approx(2 * 64 * alone)
    assert Plan((COST,), 4, 64).seconds(10) == pytest.approx(10 * alone)
    slow = Cost(POLICY, Stage(0.0, 0.0, None, None, rest=1.0), n=8.0, prompts=64, setup=9.0)
    both = Plan((COST, slow), 2, 64)
    assert both.rate() == pytest.approx(1 / alone + 1 / slow.seconds())
    assert both.setup == 9.0


def test_copies_are_scored_once_so_what_is_scored_grows_less_than_n():
    def growth(*texts, scorer="likelihood:mini"):
        with BestOfN(lambda prompt, n: list(texts), scorer, n=len(texts)) as bon:
            return growth_of([bon("Say hi")])

    assert growth("a", "b", "c", "d") == pytest.approx(1)
    assert growth("a", "a", "a", "a") == pytest.approx(0)
    # Of "a", "a", "b", "c" two that are drawn are the same once in six: 11/6 texts on average, and 3 of all four.
    assert growth("a", "a", "b", "c") == pytest.approx(math.log2(3 / (11 / 6)))
    assert growth("a") == 1
    assert growth("a", "a", "b", "c", scorer="consensus") == pytest.approx(1)  # it looks at copies as well
    fewer = Cost(POLICY, SCORER, n=8.0, prompts=64, setup=3.0, growth=0.5)
    assert fewer.seconds() == COST.seconds()
    assert fewer.seconds(2) == pytest.approx(0.1 + 2 * 0.1 + 4 * 0.15)
    assert fewer.tokens(2)["scorer_read"] == pytest.approx(240)


@pytest.mark.parametrize("prefill", [None, 1000.0, 1.0, 1e9])
@pytest.mark.parametrize(("read", "written"), [(200, 400), (200, 0), (0, 400), (0, 0)])
def test_however_time_is_divided_between_reading_and_writing_its_sum_is_what_was_measured(prefill, read, written):
    stage = Stage.of(2.0, 16, read, written, prefill, 4)
    assert 4 * stage.seconds(4, each=False) == pytest.approx(2.0)
    stage = Stage.of(2.0, 16, read, written, prefill, 16)
    assert 4 * stage.seconds(4, each=True) == pytest.approx(2.0)


def test_what_is_measured_has_the_lengths_of_the_model_and_rates_that_give_the_time_that_it_took(tmp_path):
    rows = [row_of(place, {"prompt": text}) for place, text in enumerate(sample_instructions(24, 1), 1)]
    meter = Meter(Config(n=4, threads=1, sampling={"seed": 1}), os.getcwd())
    started = time.perf_counter()
    cost = measure(meter, rows, 8)
    seconds = time.perf_counter() - started
    results = [outcome.usage for outcome in meter.outcomes(rows)]
    meter.bon.close()
    assert (cost.n, cost.prompts) == (4.0, 24)
    assert cost.policy.read == pytest.approx(sum(usage.policy_prompt_tokens for usage in results) / 24, rel=0.05)
    assert cost.policy.written == pytest.approx(sum(u.policy_completion_tokens for u in results) / 96, rel=0.3)
    assert cost.scorer.read > 0
    assert 0 < 24 * cost.seconds() < seconds


def test_a_policy_that_counts_no_tokens_is_planned_by_its_time_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(
        "import time\ndef policy(prompt, n):\n    time.sleep(0.02 * n)\n    return [str(i) for i in range(n)]\n"
    )
    write_rows(tmp_path / "in.jsonl", [*({"prompt": f"Say {number}"} for number in range(12)), {"no": 1}])
    command = ["plan", "in.jsonl", "--policy", "slow:policy", "--scorer", "longest", "-n", "2", "--block", "4"]
    assert main([*command, "--workers", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prompts"], report["bad"], report["workers"]) == (12, 1, 3)
    assert report["costs"][0]["policy"]["prefill"] is None
    assert report["costs"][0]["policy"]["rest"] > 0
    assert report["million"]["worker_hours"] == pytest.approx(report["by_n"]["2"]["worker_hours"])
    assert report["by_n"]["64"]["hours"] > 4 * report["by_n"]["16"]["hours"] * 0.99
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "measured on 12 prompts, 2 candidates each, in one worker" in out
    assert "in.jsonl: 12 prompts (and 1 bad row) take" in out
    assert "a million such prompts" in out


def test_the_sample_is_from_all_over_the_file_and_knows_how_much_longer_the_others_are():
    from bon.cli.plan import _Sample

    rows = [row_of(line, {"prompt": "a" * (1 if line <= 500 else 99)}) for line in range(1, 1001)]
    sample = _Sample(100)
    sample.read(rows)
    lines = [row.line for row in sample.taken]
    assert lines == sorted(set(lines))
    assert len(lines) == 100
    assert min(lines) < 100
    assert max(lines) > 900
    taken = sum(len(row.task.instruction) for row in sample.taken) / 100
    assert sample.longer == pytest.approx(50 / taken)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan"], "FILE is missing. Type: bon plan --help"),
        (["plan", "none.jsonl"], "there is no file 'none.jsonl'"),
        (["plan", "bad.jsonl"], "bad.jsonl has no prompt that can be read. Give bon plan --prompt-field NAME?"),
        (["plan", "bad.jsonl", "--prompt-field", "no", "--policy", "/no/such/model"], "cannot be set up:"),
        (["plan", "bad.jsonl", "--prompt-field", "no", "--policy", "mine:policy"], "line 1, which was to be measured"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text("def policy(prompt, n):\n    raise ValueError('no')\n")
    write_rows(tmp_path / "bad.jsonl", [{"no": "Say hi"}])
    scorer = ["--scorer", "longest"] if "--policy" in arguments else []
    assert main([*arguments, *scorer]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_an_error_of_the_measured_worker_is_raised():
    meter = Meter(Config(policy="/no/such/model", scorer="longest"), os.getcwd())
    with pytest.raises(InputError, match="cannot be set up"):
        measure(meter, [row_of(1, {"prompt": "Say hi"})], 1)
