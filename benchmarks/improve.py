"""Improve a policy on its own rewards, round after round: sample, score, export, train, evaluate. Made to be adapted.

A round is ``bon run PROMPTS --all`` with the policy of the round before, an export of what came out (as ``bon export``
makes it), one of the methods of ``lib/rounds.py``, and ``bon eval``. The scorer is the same in all rounds and must not
run on the policy: name its model. Everything stays in ``--work``: a run that was broken off goes on, and the policy of
a round is a folder that bon loads (``--policy WORK/round-1``).

    python benchmarks/improve.py --work runs/improve --rounds 3
    python benchmarks/improve.py --work runs/smol --policy smollm2-135m --scorer flip:smollm2-135m \\
        --prompts mine.jsonl --dataset gsm8k --method SFT --learning-rate 1e-5

needs TRL (pip install 'bon[trl]') for SFT and DPO. To learn another way, put a function beside those in ``METHODS``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bon.bench.harness import Report, Spread, conditions, table
from bon.cli import main as bon_main
from bon.data.results import read_results
from bon.errors import InputError
from bon.evals.harness import evaluate
from bon.mini.tasks import sample_instructions
from bon.models import MINI, Model, as_scorer
from bon.scorers.base import ModelScorer
from lib.rounds import METHODS, Round
from lib.scripts import parser, same_settings, script, warn

_SETTINGS = (
    *("policy", "scorer", "prompts", "dataset", "method", "n", "count", "judged", "max_tokens"),
    *("learning_rate", "batch", "epochs", "seed"),
)
"""What a folder of rounds has in common; there may always be more of them."""


def main(argv: list[str] | None = None) -> None:
    """Run the rounds that are not there yet; print a table and one JSON object."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    same_settings(options.work, {name: getattr(options, name) for name in _SETTINGS})
    prompts = _prompts(options)
    policy, rows = options.policy, [_judged(0, options.policy, options)]
    for number in range(1, options.rounds + 1):
        run, folder = options.work / f"round-{number}.jsonl", options.work / f"round-{number}"
        done = folder / "done.json"
        if not done.exists():
            warn(f"round {number}: {policy} writes {options.n} answers to each prompt, {options.scorer} rates them")
            _sample(policy, prompts, run, number, options)
            results = list(read_results(str(run)))
            learnt = METHODS[options.method](results, _round(policy, folder, options))
            rewards = [score.reward for result in results for score in result.scores if score.reward is not None]
            facts = {"answered": len(results), "learnt_from": len(learnt), "reward": float(np.mean(rewards))}
            done.write_text(json.dumps(facts))
        policy = str(folder)
        rows.append({**json.loads(done.read_text()), **_judged(number, policy, options)})
    facts = {name: str(getattr(options, name)) for name in _SETTINGS}
    report = Report("improve", conditions(**facts), rows=rows)
    report.ratios = {f"greedy_{row['round']}": Spread.of([row["greedy"]]) for row in rows}
    columns = ("round", "policy", "reward", "sampled", "greedy", "best")
    lines = [[f"{v:.3f}" if isinstance(v := row.get(name, ""), float) else v for name in columns] for row in rows]
    report.text.append(table([*columns[:-1], f"best of {options.n}"], lines))
    report.emit(options.out)


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--work", type=Path, required=True, metavar="DIR", help="candidates and policies stay here")
    options.add_argument("--policy", default=MINI, help="what is improved: a model that transformers can train")
    options.add_argument("--scorer", default=f"flip:{MINI}", help="what rewards, with a model of its own")
    options.add_argument("--prompts", type=Path, metavar="FILE", help="as for bon run; the mini world's if not given")
    options.add_argument("--dataset", default="mini", help="as for bon eval: prompts whose answers can be checked")
    options.add_argument("--method", default="DPO", choices=sorted(METHODS), help="how a round learns")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--n", type=int, default=16, help="answers to a prompt")
    options.add_argument("--count", type=int, help="prompts of a round; 400, or 32 with --quick")
    options.add_argument("--judged", type=int, help="rows of the dataset; 200, or 14 with --quick")
    options.add_argument("--max-tokens", type=int, default=96, help="of an answer")
    options.add_argument("--learning-rate", type=float, default=1e-4)
    options.add_argument("--batch", type=int, default=16, help="prompts of a step")
    options.add_argument("--epochs", type=int, default=1)
    options.add_argument("--threads", type=int, default=1, help="of the arithmetic")
    found = options.parse_args(argv)
    found.count = found.count or (32 if found.quick else 400)
    found.judged = found.judged or (14 if found.quick else 200)
    if Model.of(found.policy).runs_on not in ("torch", "vllm"):
        raise InputError(f"--policy {found.policy} cannot be trained here: name a folder or a Hugging Face name.")
    scorer = as_scorer(found.scorer)
    if isinstance(scorer, ModelScorer) and scorer.model is None:
        raise InputError(f"--scorer {found.scorer} would run on the policy, which changes. Name its model: flip:MODEL.")
    return found


def _prompts(options: argparse.Namespace) -> Path:
    """The file of prompts; that of the mini world is written."""
    if options.prompts is not None:
        return Path(options.prompts)
    if options.policy != MINI:
        raise InputError(f"--policy {options.policy} needs --prompts FILE: the mini world's are the mini model's.")
    path = Path(options.work / "prompts.jsonl")
    asked = sample_instructions(options.count, options.seed + 1, "train")
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    return path


def _sample(policy: str, prompts: Path, run: Path, number: int, options: argparse.Namespace) -> None:
    """``bon run``, which goes on where it was broken off."""
    command = ["run", str(prompts), "--policy", policy, "--scorer", options.scorer, "-n", str(options.n)]
    command += ["--seed", str(options.seed + number), "--max-tokens", str(options.max_tokens)]
    command += ["--threads", str(options.threads), "--limit", str(options.count)]
    command += ["--all", "--no-prune", "-o", str(run), *(["--resume"] if run.exists() else [])]
    if code := bon_main(command):
        raise SystemExit(code)  # it has said why


def _round(policy: str, folder: Path, options: argparse.Namespace) -> Round:
    how = {name: getattr(options, name) for name in ("learning_rate", "batch", "epochs", "seed")}
    return Round(policy=policy, out=folder, **how)


def _judged(number: int, policy: str, options: argparse.Namespace) -> dict[str, Any]:
    """Pass rates on the dataset and on its parts, which are never trained on; kept beside the policy."""
    path = options.work / f"judged-{number}.json"
    if not path.exists():
        sampling = {"max_tokens": options.max_tokens}
        shared = {"n": options.n, "limit": options.judged, "seed": options.seed, "threads": options.threads}
        report = evaluate(options.dataset, policy=policy, scorers=[options.scorer], sampling=sampling, **shared)
        sections = {"": report, **{f"{name}_": part for name, part in report["parts"].items()}}
        rules = {"sampled": "random", "greedy": "greedy", "best": options.scorer}
        found = {
            f"{section}{name}": part["scorers"][rule]["score"]
            for section, part in sections.items()
            for name, rule in rules.items()
        }
        path.write_text(json.dumps({"round": number, "policy": policy, **found}))
    judged: dict[str, Any] = json.loads(path.read_text())
    return judged


if __name__ == "__main__":
    script(main)
