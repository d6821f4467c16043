"""The README is executed: its examples run, and the figures in it are those of the recorded evaluation."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
    plain = README.replace("**", "")
    rows = json.loads((ROOT / "benchmarks/results/real_text.json").read_text())["rows"]
    all_rows = {case: max(row["rows"] for row in rows if row["case"] == case) for case in {r["case"] for r in rows}}
    stated = ("longest", "consensus", "majority")
    for row in rows:
        share, with_a_model = row["share"], row["scorer"].startswith("default:")
        if with_a_model or (row["scorer"] in stated and row["rows"] == all_rows[row["case"]] and share["low"]):
            cell = f"{share['mean']:.2f} [{share['low']:.2f}, {share['high']:.2f}]"
            assert (f"{cell} ({row['rows']})" if with_a_model else cell) in plain, row


def test_every_file_that_the_readme_names_exists():
    for path in re.findall(r"`((?:bon|benchmarks)/[\w/.]+)`", README) + re.findall(
        r"\]\((benchmarks/[\w/.]+)\)", README
    ):
        assert (ROOT / path).exists(), path
