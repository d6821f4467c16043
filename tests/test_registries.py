"""Names: what another package adds, what adding one takes, and what is a model's name all the same."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from command import ROOT, in_process_of_its_own, process, rows_of, write_rows

from bon.spec import BUDGETS, DATASETS, ENGINES, SCORERS, SELECTORS, Registry

REGISTRIES = (ENGINES, SCORERS, SELECTORS, BUDGETS, DATASETS)

THEIRS = '''
"""Somebody else's package."""

import asyncio

from bon.engines.base import Completion
from bon.scorers.base import Scorer
from bon.spec import Specified
from bon.types import Score, Selection


class Counting:
    """Answers with a number.

    Nothing more.
    """

    concurrent, max_model_len = True, None

    def __init__(self, model, *, step=1, threads=None):
        self.name, self.step, self.threads = f"counting {model}", step, threads

    async def generate(self, requests, *, keep=None):
        for index, request in enumerate(requests):
            for sample in request.samples:
                text = f"{self.name} {sample * self.step} on {self.threads}"
                yield Completion(index, sample, text, "stop", completion_tokens=4)

    async def aclose(self):
        pass


class Alone(Counting):
    """Answers without a model."""

    def __init__(self, *, step=1, threads=None):
        super().__init__("alone", step=step, threads=threads)


class Numbers(Scorer):
    """Rewards numbers."""

    def __init__(self, sign=1):
        self.sign = sign

    async def score(self, pending):
        for position, each in enumerate(pending):
            yield position, Score(self.sign * float(each.candidate.text.split()[2]))


class Second(Specified):
    """Picks the second best."""

    def __call__(self, rewards, order, texts):
        ranking = tuple(int(i) for i in order)
        return Selection(ranking[1], ranking, ranking[1:2])


class Two(Specified):
    """Two tasks."""

    def __init__(self, first="one"):
        self.tasks = [first, "two"]
'''
POINTS = """
[bon.engines]
counting = theirs:Counting
alone = theirs:Alone
broken = theirs_is_not_here:Nothing
[bon.scorers]
numbers = theirs:Numbers
[bon.selectors]
second = theirs:Second
[bon.datasets]
two = theirs:Two
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A package that is installed in a folder of its own; the environment in which it is found."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "theirs.py").write_text(THEIRS)
    info = folder / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


def test_another_packages_engine_scorer_and_selector_are_named_like_ours(
    theirs: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("--policy", "x,engine=counting,step=2", "--scorer", "numbers:-1", "--selector", "second", "-n", 3)
    code, out, err = in_process_of_its_own(
        "run", "Count", *arguments, "--threads", 5, "--json", cwd=tmp_path, env=theirs
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert [score["reward"] for score in result["scores"]] == [0, -2, -4]
    assert result["text"] == "counting x 2 on 5"
    code, out, err = in_process_of_its_own(
        "run", "Count", "--policy", "alone", "--scorer", "numbers", "-n", 2, "--json", cwd=tmp_path, env=theirs
    )
    assert json.loads(out)["text"] == "counting alone 1 on None", "an engine without a model is a policy by its name"


def test_another_packages_classes_are_named_in_a_file_and_in_python(theirs: dict[str, str], tmp_path: Path) -> None:
    settings = ("--policy", "alone,step=3", "--scorer", "numbers", "--selector", "second", "-n", 2, "--print-config")
    code, out, _ = in_process_of_its_own("run", *settings, cwd=tmp_path, env=theirs)
    (tmp_path / "theirs.toml").write_text(out)
    write_rows(tmp_path / "in.jsonl", [{"prompt": "Count", "candidates": ["a b 1", "a b 2", "a b 3"]}])
    for command, best in (("run", "counting alone 0 on None"), ("rerank", "a b 2")):
        arguments = (command, "in.jsonl", "--config", "theirs.toml", "-o", f"{command}.jsonl")
        code, _, err = in_process_of_its_own(*arguments, cwd=tmp_path, env=theirs)
        assert code == 0, err
        assert rows_of(tmp_path / f"{command}.jsonl")[0]["text"] == best
    program = (
        "from bon import BestOfN\nfrom bon.spec import DATASETS, SCORERS\n"
        "print(BestOfN('alone', 'numbers', n=4)('Count').text)\n"
        "print(DATASETS.make('two:three').tasks, SCORERS.spec_of(SCORERS.make('numbers:-1')))\n"
    )
    environment = {**os.environ, **theirs}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "counting alone 3 on None\n['three', 'two'] numbers:-1\n", done.stderr


def test_another_packages_classes_are_served(theirs: dict[str, str], tmp_path: Path) -> None:
    arguments = ("serve", "alone", "--scorer", "numbers", "--selector", "second", "-n", 3, "--port", 0)
    running = process(*arguments, cwd=tmp_path, env=theirs)
    assert running.stderr is not None
    try:
        address = next(found[0] for line in running.stderr if (found := re.search(r"http://[\d.:]+", line.decode())))
        body = json.dumps({"messages": [{"role": "user", "content": "Count"}]}).encode()
        request = Request(f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=30) as response:
            answer = json.load(response)
        assert answer["choices"][0]["message"]["content"] == "counting alone 1 on None"
    finally:
        running.terminate()
        running.communicate(timeout=30)


def test_doctor_lists_what_other_packages_add_and_what_they_lack(theirs: dict[str, str], tmp_path: Path) -> None:
    """An engine that doctor's own table did not have used to kill it with a KeyError."""
    code, out, err = in_process_of_its_own("doctor", "--json", cwd=tmp_path, env=theirs)
    assert (code, err) == (0, "")
    report = json.loads(out)
    engines = {each["name"]: each for each in report["engines"]}
    assert engines["counting"] == {"name": "counting", "ok": True, "detail": "Answers with a number."}
    assert not engines["broken"]["ok"]
    assert engines["broken"]["detail"].endswith("is not installed. Type: pip install theirs")
    assert {each["name"] for each in report["datasets"]} >= {"two"}


def test_a_wrong_option_of_another_packages_engine_is_refused(theirs: dict[str, str], tmp_path: Path) -> None:
    code, out, err = in_process_of_its_own("run", "Count", "--policy", "alone,stp=2", cwd=tmp_path, env=theirs)
    assert (code, out) == (2, "")
    assert "unknown option of the engine 'alone' 'stp'. Did you mean 'step'?" in err


# --- Adding one ------------------------------------------------------------------------------------------------------

USED = {
    "flip": {"bon.models", "bon.tuning.flip"},  # what scores where nobody says what, for the embedded model
    "default": {"bon.models"},  # and for every other
    "consensus": {"bon.scorers.default"},
    "likelihood": {"bon.scorers.default", "bon.scorers.flip.scorer"}  # between equal rewards
    | {"bon.tuning.encoding", "bon.tuning.flip", "bon.tuning.training"},  # whose prompt it is trained in
    "guard": {"bon.scorers.default"},
    "forward": {"bon.cli.export"},  # checks that a model can rate what an export asks of it
    "fixed": {"bon.evals.budgets", "bon.evals.harness", "bon.serve.plan"},  # what a plain number of candidates is
    "stop-at": {"bon.serve.plan"},  # the field stop_at of a request
    "adaptive": {
        "bon.allocation",
        "bon.evals.budgets",
        "bon.evals.replay",
    },  # what estimates gains; the rules beside it
    "best": {"bon.data.results", "bon.evals.harness", "bon.evals.replay", "bon.serve.scoring"},
}
"""Who makes one by its class; a new one changes none of these."""
PARTICULAR = ("bon.bench.",)
"""Benchmarks are about particular engines and scorers."""
SHARED = {"bon", "bon.engines", "bon.scorers", "bon.evals"}


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_adding_one_takes_one_file_and_one_line(registry: Registry) -> None:
    """A class is known to its own module, or folder, and to no other that would have to learn of a new one."""
    for name, entry in registry._builtin.items():
        home, _, class_name = entry.target.partition(":")
        folder = home.rpartition(".")[0]
        own = (home,) if folder in SHARED else (home, folder)
        users = {
            module
            for module, tree in _modules().items()
            if any(class_name in _names(node) for node in ast.walk(tree)) and not module.startswith((*own, *PARTICULAR))
        }
        assert users - {"bon"} == USED.get(name, set()), name  # "bon" exports it


def _modules() -> dict[str, ast.AST]:
    if not _TREES:
        for path in ROOT.glob("bon/**/*.py"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            _TREES[module] = ast.parse(path.read_text(encoding="utf-8"))
    return _TREES


_TREES: dict[str, ast.AST] = {}


def _names(node: ast.AST) -> set[Any]:
    """What a part of a program mentions."""
    return {getattr(node, "id", None), getattr(node, "attr", None)} | (
        {node.name} if isinstance(node, ast.alias | ast.ClassDef) else set()
    )


# --- Names with a colon ----------------------------------------------------------------------------------------------


def test_a_file_in_the_current_folder_never_takes_the_place_of_a_library(tmp_path: Path) -> None:
    """The current folder came first on the path of modules: a file torch.py was run in place of torch."""
    for name in ("torch", "statistics", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open('{name} was run', 'w')\nraise SystemExit(3)\n")
    (tmp_path / "mine.py").write_text("def reward(prompt, responses): return [1.0] * len(responses)\n")
    arguments = ("run", "Say it", "--policy", "scripted", "--scorer")
    code, _, err = in_process_of_its_own(*arguments, "statistics:mean", cwd=tmp_path)
    assert code == 2
    assert "statistics:mean takes (data)" in err
    assert not list(tmp_path.glob("*was run"))
    code, _, err = in_process_of_its_own(*arguments, "mine:reward", cwd=tmp_path)
    assert code == 0, err
    assert not list(tmp_path.glob("*was run"))


def test_a_folder_beside_a_models_name_is_no_module(tmp_path: Path) -> None:
    (tmp_path / "qwen").mkdir()
    for name in ("qwen:latest", "llama3:8b"):
        code, _, err = in_process_of_its_own("run", "hi", "--policy", name, cwd=tmp_path)
        assert code == 2
        assert f"{name!r} is neither a folder nor a" in err
