"""The README is executed: its examples run, and the figures in it are those of the recorded evaluation."""

import itertools
import json
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from bon.spec import SCORERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", [block for block in BLOCKS if ":8000/" not in block])  # those: tests/test_serve.py
def test_the_readmes_python_runs(block):
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readmes_first_command_ends_with_a_ranked_table():
    command = re.search(r"&& (bon run .*)", README)
    assert command
    arguments = shlex.split(command.group(1))[1:]
    done = subprocess.run([sys.executable, "-m", "bon", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Best of 8")
    assert "instruction inferred" in done.stdout


def test_every_command_in_the_readme_exists():
    listed = set(re.findall(r"`bon (\w+)", README))
    helped = subprocess.run([sys.executable, "-m", "bon", "--help"], capture_output=True, text=True, check=True).stdout
    assert listed
    for command in listed:
        assert re.search(rf"\b{command}\b", helped), command


def test_the_readmes_pass_rates_are_those_of_the_recorded_evaluation():
    report = json.loads((ROOT / "benchmarks/results/mini_eval.json").read_text())
    rules = ("flip", "likelihood", "random", "oracle", "longest", "shortest", "consensus")
    for label, n in (("N = 1", "1"), ("best of 4", "4"), ("best of 8", "8"), ("best of 16", "16")):
        row = re.search(rf"\| {label} \|(.*)\|", README)
        assert row
        stated = [float(cell) for cell in row.group(1).split("|")]
        assert stated == [round(100 * report["scorers"][rule]["best_of"][n], 1) for rule in rules]


def test_the_readmes_figures_on_real_text_are_those_recorded():
    lines = README.replace("**", "").splitlines()
    [head] = [line for line in lines if line.startswith("| set (rows) |")]
    names = [name.strip(" `") for name in head.strip("|").split("|")][1:-1]
    table = [line for line in lines[lines.index(head) + 2 :] if line.startswith("|")][: len(REAL_SETS)]
    for name, line in zip(REAL_SETS, table, strict=True):
        recorded = json.loads((ROOT / f"benchmarks/results/eval_{name}.json").read_text())["rows"]
        rows = {(row["scorer"], row["part"]): row for row in recorded if row["candidates"] is None}
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        expected = [_share(rows.get((rule, "all"))) for rule in names]
        assert cells == [*expected, _share(rows[names[-1], "report"])]
        assert first.endswith(f"({rows['longest', 'all']['rows']})")


@pytest.mark.parametrize(
    ("file", "opening", "told"),
    [
        ("real_heads", "| set (rows that train, others) | `default` | longest |", ("head", "both", "default")),
        ("real_heads_05b", "| set (rows that train, others) | `default` | head |", ("joint + default",)),
    ],
)
def test_the_figures_of_heads_on_real_text_are_those_recorded(file, opening, told):
    recorded = json.loads((ROOT / f"benchmarks/results/{file}.json").read_text())["rows"]
    rows = {(row["case"], row["pick"]): row for row in recorded}
    lines = (ROOT / "benchmarks/README.md").read_text().splitlines()
    [head] = [line for line in lines if line.startswith(opening)]
    picks = [pick.strip(" `") for pick in head.strip("|").split("|")][1:]
    table = lines[lines.index(head) + 2 :][: len(REAL_SETS)]
    for case, line in zip([*REAL_SETS[:-1], "mean"], table, strict=True):
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells == [_share(rows[case, pick]) for pick in picks], case
        assert case == "mean" or first.endswith(f"({rows[case, 'head']['trained']}, {rows[case, 'head']['rows']})")
    for pick in told:
        assert _share(rows["mean", pick]) in README.replace("\n", " ")


def test_the_figures_of_rewards_of_a_larger_model_are_those_recorded():
    recorded = json.loads((ROOT / "benchmarks/results/rewards_05b.json").read_text())["rows"]
    lines = (ROOT / "benchmarks/README.md").read_text().replace("**", "").splitlines()
    [head] = [at for at, line in enumerate(lines) if line.startswith("| reward | IFEval |")]
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[head + 2 :])
    for spec, line in zip(dict.fromkeys(row["scorer"] for row in recorded), table, strict=True):
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert spec.partition(":")[0] in name
        shares = [row for row in recorded if row["scorer"] == spec]
        assert cells == [_share(row) for row in shares], spec


def test_the_readmes_pass_rates_of_a_real_policy_are_those_recorded():
    lines = README.splitlines()
    [head] = [line for line in lines if line.startswith("| set (rows), best of |")]
    names = [name.strip(" `") for name in head.strip("|").split("|")][1:]
    long = {"likelihood": "likelihood:style=turns", "FLIP, turns": "flip:style=turns"}
    table = iter(lines[lines.index(head) + 2 :])
    for name, title in (("ifeval", "IFEval"), ("gsm8k", "GSM8K")):
        report = json.loads((ROOT / f"benchmarks/results/eval_{name}_policy.json").read_text())
        for n in ("1", "2", "4", "8"):
            first, *cells = [cell.strip() for cell in next(table).strip("|").split("|")]
            assert first == f"{title} ({report['rows']}), {n}"
            rules = [[r for r in report["scorers"] if r.startswith(long.get(rule, rule))] for rule in names]
            rates = [f"{100 * report['scorers'][found[0]]['best_of'][n]:.1f}" if found else "" for found in rules]
            assert cells == rates


def test_the_figures_of_adaptive_n_are_those_recorded():
    report = json.loads((ROOT / "benchmarks/results/adaptive.json").read_text())
    ratios, quartiles, [found] = report["ratios"], report["quartiles"], report["rows"]
    default = next(each for each in found["tried"]["improvement"] if "price=0.003,batch=4" in each["spec"])
    fixed = next(each for each in found["fixed"] if each["n"] == 16)
    told = " ".join(README.split())
    assert f"{ratios['tokens_saved_8']:.0%} fewer" in told
    assert f"{ratios['tokens_saved_16']:.0%} fewer than best of 16" in told
    assert f"passes {default['label']:.1%} with {default['tokens']:.0f} tokens a prompt" in told
    assert f"best of 16 {fixed['label']:.1%} with {fixed['tokens']:.0f}" in told
    lines = (ROOT / "benchmarks/README.md").read_text()
    for n in (8, 16):
        low, high = quartiles[f"tokens_saved_{n}"]
        assert f"{ratios[f'tokens_saved_{n}']:.2f} [{low:.2f}, {high:.2f}]" in lines
    assert f"| {ratios['samples_to_best_64']:.1f} |" in lines
    assert f"| {ratios['points_gained_by_allocation_8']:.1f} |" in lines
    walls = {}
    for name in ("wall", "wall_vllm", "partial", "partial_gsm8k"):
        recorded = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
        for key in recorded["ratios"].keys() - {"best_kept_by_chance"}:
            low, high = recorded["quartiles"][key]
            walls[key] = f"{recorded['ratios'][key]:.2f}"
            spread = "" if low == high else f" ({low:.2f} to {high:.2f})"
            assert f"{walls[key]}{spread} |" in lines.replace("**", "")
    torch, vllm = (walls[f"adaptive_vs_fixed_run_{engine}"] for engine in ("torch", "vllm"))
    assert f"it takes {torch} of best of 16's wall-clock on torch and {vllm} on vLLM" in told


def test_what_was_predicted_of_many_prompts_and_what_they_took_are_those_recorded():
    report = json.loads((ROOT / "benchmarks/results/many_machines.json").read_text())
    lines = (ROOT / "benchmarks/README.md").read_text().splitlines()
    [head] = [at for at, line in enumerate(lines) if line.startswith("| workers | predicted |")]
    for line, (key, ratio) in zip(lines[head + 2 :], report["ratios"].items(), strict=False):
        runs = [row for row in report["rows"] if f"seconds_{row['workers']}" == key]
        seconds = [statistics.median(row[side] for row in runs) for side in ("predicted", "measured")]
        hours = statistics.median(row["plan"]["million"]["hours"] for row in runs)
        cells = [f"{seconds[0]:.0f} s", f"{seconds[1]:.0f} s", f"{ratio:.2f}", f"{hours:.1f} h"]
        assert [cell.strip() for cell in line.strip("|").split("|")] == [key.removeprefix("seconds_"), *cells]


def test_the_times_of_other_libraries_are_those_recorded():
    rows = json.loads((ROOT / "benchmarks/results/peers.json").read_text())["ratios"]
    table = (ROOT / "benchmarks/README.md").read_text().replace("**", "")
    for side in ("fixed", "adaptive", "stop", "prune", "single", "gather", "dspy", "optillm"):
        [line] = [line for line in table.splitlines() if line.startswith(f"| `{side}` |")]
        for n in (16, 32):
            assert f"| {rows[f'{side}_vs_its_hub_{n}']:.2f}" in line
            assert side == "gather" or f"| {rows[f'{side}_vs_gather_{n}']:.2f} |" in line


def test_what_training_on_rewards_brought_is_what_is_recorded():
    lines = (ROOT / "benchmarks/README.md").read_text().replace("**", "").splitlines()
    for row in json.loads((ROOT / "benchmarks/results/training.json").read_text())["rows"]:
        told = [line for line in lines if line.startswith(f"| {row['method']} |")]
        passed, rewarded = ([cell.strip() for cell in line.strip("|").split("|")] for line in told)
        splits = [row["heldout"], row["unseen_wording"]]
        rates = [split[figure] for split in splits for figure in ("sampled", "greedy", "best")]
        spans = [f"{100 * each['mean']:.1f} [{100 * each['low']:.1f}, {100 * each['high']:.1f}]" for each in rates]
        assert passed[1:] == [f"{row['samples']:,}", *spans]
        shares = [[split["reward"] * 100, split["full"] * 100, 100 * (split["fooled"] or 0)] for split in splits]
        assert rewarded[1:] == [f"{share:.1f}" for some in shares for share in some]


def test_every_scorer_has_a_row_whose_figures_are_those_recorded():
    lines = README.splitlines()
    [head] = [at for at, line in enumerate(lines) if line.startswith("| reward |")]
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[head + 2 :]))
    shown = [[cell.strip() for cell in line.strip("|").replace("`", "").split("|")] for line in table]
    assert {name.partition(",")[0] for name, *_ in shown} == {*SCORERS}
    recorded = json.loads((ROOT / "benchmarks/results/scorers.json").read_text())["rows"]
    mini = {row["scorer"]: row for row in recorded if "minus_flip" in row}
    assert {*mini} <= {name for name, *_ in shown}
    for name, needs, *figures in shown:
        assert needs
        assert figures == [*_picks(mini.get(name)), _sets_above_random(name)], name


def _picks(row):
    """What a scorer reads and writes for a candidate of the mini world, how often its pick passes, and less FLIP's."""
    if row is None:
        return ["not measured"] * 2
    passes, low, high = 100 * row["passes"]["mean"], 100 * row["minus_flip"]["low"], 100 * row["minus_flip"]["high"]
    less = "" if row["scorer"] == "flip" else f" ({low:+.0f} to {high:+.0f})"
    return [f"{row['read']:.0f} + {row['written']:.0f}", f"{passes:.0f}{less}"]


def _sets_above_random(name):
    rule = {"default": "default:smollm2-135m", "consensus, chrf": "consensus:chrf"}.get(name, name)
    shares = []
    for real in REAL_SETS:
        rows = json.loads((ROOT / f"benchmarks/results/eval_{real}.json").read_text())["rows"]
        shares += [
            row["share"] for row in rows if (row["scorer"], row["part"], row["candidates"]) == (rule, "all", None)
        ]
    if not shares:
        return "not measured"
    above, below = sum(one["low"] > 0 for one in shares), sum(one["high"] < 0 for one in shares)
    return f"{above} / {below} of {len(shares)}"


REAL_SETS = ("ifeval", "arena-early", "gsm8k", "alpaca-eval", "llmbar-natural", "llmbar-adversarial", "crux")


def _share(row):
    if row is None:
        return ""
    low, mean, high = (f"{row['share'][end] + 0.0:.2f}".replace("-0.00", "0.00") for end in ("low", "mean", "high"))
    return "0" if low == high else f"{mean} [{low}, {high}]"


def test_every_file_that_the_readme_names_exists():
    for path in re.findall(r"`((?:bon|benchmarks)/[\w/.]+)`", README) + re.findall(
        r"\]\((benchmarks/[\w/.]+)\)", README
    ):
        assert (ROOT / path).exists(), path


def test_the_figures_of_the_adapter_that_comes_with_bon_are_those_recorded():
    record = json.loads((ROOT / "bon/adapters/flip-135m/bon.json").read_text())
    before, after = record["measured"]["held-back pairs"].values()
    for label, key in (("reconstructions that echo", "echoes"), ("mean word F1", "f1")):
        [row] = [line for line in README.splitlines() if line.startswith(f"| {label}")]
        assert row.split("|")[2:4] == [f" {before[key]:.2f} ", f" {after[key]:.2f} "]
    rows = json.loads((ROOT / "benchmarks/results/backward.json").read_text())["rows"]
    shares = [row["share"] for row in rows if row["case"] == "mean" and row["scorer"].endswith(":flip-135m")]
    stated = [f"{share['mean']:.2f} [{share['low']:.2f}, {share['high']:.2f}]" for share in shares]
    assert f"| {', '.join(stated)} |" in README
