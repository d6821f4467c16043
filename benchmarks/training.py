"""A policy trained on its own rewards, by five methods: does it pass the verifier more often, and how does it cheat?

The policy is the embedded model, the reward FLIP by the same model before any training, the prompts are the mini
world's of training. GRPO (TRL's trainer) samples as it goes. One best-of-16 run with as many samples is exported as
pairs, groups and winners, from which DPO and SFT (TRL's trainers), SELM and GDRO learn, and DPO again in the loop of
these two. A second GRPO has prompts in wordings that neither the policy nor the reward's model ever saw. Each trained
policy is judged by the verifier, which no training knows: on held-out instructions, and on others in unseen wordings.

    python benchmarks/training.py --work runs/training --plot benchmarks/results/training.png

needs TRL (pip install 'bon[trl]'). What is in ``--work`` already is not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch

from bon import BestOfN, ModelPool
from bon.bench.harness import Report, Spread, conditions, table
from bon.evals.metrics import bootstrap, interval
from bon.evals.mini import MiniWorld
from bon.integrations.trl import reward
from bon.mini.tasks import Split, Task, instruction, sample_tasks, verify
from bon.types import Result
from lib.rounds import METHODS, Round, grpo
from lib.scripts import parser, same_settings, script, warn

SCORER = "flip:mini"
SPLITS: tuple[Split, ...] = ("heldout", "unseen_wording")
LEARNING_RATES = {"GRPO": 3e-4, "SFT": 3e-4, "DPO": 1e-4, "SELM": 1e-4, "GDRO": 1e-4}
"""The better of 1e-4 and 3e-4 for SFT and DPO on prompts of training; SELM and GDRO have DPO's."""
ONLINE, OFFLINE, JUDGED = 8, 16, 8  # samples of a prompt: of GRPO, of the best-of-N run, of the judgement
FIGURES = {"sampled": "one sample", "greedy": "greedy", "best": f"best of {JUDGED}"}


def main(argv: list[str] | None = None) -> None:
    """Train what is not trained yet, judge it, print tables and one JSON object."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    facts = {name: getattr(options, name) for name in ("steps", "batch", "judged", "seed")}
    facts["learning_rates"] = LEARNING_RATES
    card = conditions(**facts)
    with TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        same_settings(work, facts)
        rows = [_once(work / f"{name}.json", name, make) for name, make in _stages(options, work).items()]
    report = Report("training", card, rows=rows)
    for row in rows:
        for split in SPLITS:
            for figure in FIGURES:
                found = row[split][figure]
                spread = Spread(found["mean"], found["low"], found["high"])
                report.ratios[f"{figure}_{split}_{row['method'].replace(' ', '_')}"] = spread
    report.text += [*(_passes(rows, split) for split in SPLITS), *(_cheats(rows, split) for split in SPLITS)]
    report.emit(options.out)
    if options.plot is not None:
        _plot(rows, options.plot)


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--work", type=Path, metavar="DIR", help="what is trained stays here; else it is thrown away")
    options.add_argument("--steps", type=int, help="of GRPO, 128 samples each; 200, or 2 with --quick")
    options.add_argument("--batch", type=int, default=16, help="prompts of a step")
    options.add_argument("--judged", type=int, help="instructions of each kind; 500, or 14 with --quick")
    options.add_argument("--threads", type=int, default=1, help="of the arithmetic")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw rewards, truth and the methods (PNG)")
    found = options.parse_args(argv)
    found.steps = found.steps or (2 if found.quick else 200)
    found.judged = found.judged or (14 if found.quick else 500)
    return found


def _stages(options: argparse.Namespace, work: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What makes each row of the table, by method."""
    prompts = options.steps * options.batch
    samples = prompts * ONLINE

    def how(name: str) -> Round:
        rate = LEARNING_RATES[name.split()[0].removesuffix("-loop")]
        return Round(
            policy="mini", out=work / name.replace(" ", "-"), learning_rate=rate, batch=options.batch, seed=options.seed
        )

    def online(name: str, split: Split) -> dict[str, Any]:
        judged = {example.task.instruction for some in SPLITS for example in _examples(some, options)}
        tasks = [t for t in sample_tasks(2 * prompts, options.seed + 1, split) if instruction(t) not in judged]
        return {"samples": samples, "curve": _grpo(tasks[:prompts], how(name), options)}

    @cache
    def run() -> list[Result]:
        tasks = sample_tasks(samples // OFFLINE, options.seed + 1, "train")
        sampling = {"seed": options.seed, "max_tokens": MiniWorld.max_tokens}
        with BestOfN("mini", SCORER, n=OFFLINE, prune=False, sampling=sampling, threads=options.threads) as bon:
            return list(bon.map([instruction(task) for task in tasks], progress=True))  # type: ignore[arg-type]

    def offline(name: str) -> dict[str, Any]:
        return {"samples": samples, "learnt_from": len(METHODS[name](run(), how(name)))}

    trained: dict[str, Callable[[], dict[str, Any]]] = {
        "GRPO": lambda: online("GRPO", "train"),
        **{name: (lambda name=name: offline(name)) for name in METHODS},
        "GRPO unseen": lambda: online("GRPO unseen", "unseen_wording"),
    }

    def made(name: str) -> dict[str, Any]:
        started = perf_counter()
        facts = trained[name]()
        return {**facts, "seconds": perf_counter() - started, **_judge(str(how(name).out), options)}

    before = {"before": lambda: {"samples": 0, "seconds": 0.0, **_judge("mini", options)}}
    return {**before, **{name: (lambda name=name: made(name)) for name in trained}}


def _once(path: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a stage found, now or in an earlier run."""
    if not path.exists():
        warn(f"training: {name}")
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"method": name, **make()}))
        part.replace(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _grpo(tasks: Sequence[Task], how: Round, options: argparse.Namespace) -> dict[str, list[float]]:
    """Train; the mean reward, the pass rate and the tokens of an answer at each step."""
    rows = [{"prompt": [{"role": "user", "content": instruction(t)}], "index": at} for at, t in enumerate(tasks)]

    def truth(completions: Any, index: Sequence[int], **_: Any) -> list[float]:
        return [float(verify(tasks[at], said[-1]["content"])) for at, said in zip(index, completions, strict=True)]

    rewards = [reward(SCORER, missing=0.0, name="flip", pool=ModelPool(options.threads)), truth]
    weights = {"reward_weights": [1.0, 0.0]}  # the truth is only looked at
    steps = grpo(rows, rewards, how, n=ONLINE, max_completion_length=MiniWorld.max_tokens, **weights)
    shown = {
        "reward": "rewards/flip/mean",
        "truth": "rewards/truth/mean",
        "echoes": "flip/echo",
        "tokens": "completions/mean_length",
    }
    return {name: [round(step[key], 4) for step in steps] for name, key in shown.items()}


def _examples(split: Split, options: argparse.Namespace) -> list[Any]:
    return list(MiniWorld(split).rows(options.judged, options.seed))


def _judge(policy: str, options: argparse.Namespace) -> dict[str, Any]:
    """Pass rates of a policy with 95% intervals over instructions, and what the reward makes of its answers.

    Returns:
        For each kind of instructions: ``FIGURES``; ``reward``, the mean of a sample; ``full``, the share of samples
        whose reward is 1; ``fooled``, the share of these that the verifier fails; and some of them as ``examples``.
    """
    found: dict[str, Any] = {}
    sampling = {"seed": options.seed, "max_tokens": MiniWorld.max_tokens}
    with BestOfN(policy, SCORER, n=JUDGED, prune=False, sampling=sampling, threads=options.threads) as bon:
        for split in SPLITS:
            examples = _examples(split, options)
            tasks = [example.task for example in examples]
            alone: Any = bon(tasks, n=1, sampling={**sampling, "temperature": 0.0})
            results: Any = bon(tasks)
            rows = list(zip(examples, results, strict=True))
            right = np.array([[e.passes(c.text) for c in r.candidates] for e, r in rows], float)
            rewards = np.array([[s.reward or 0.0 for s in r.scores] for _, r in rows])
            full = rewards >= 1.0
            each = {
                "sampled": right.mean(1),
                "greedy": np.array(
                    [e.passes(r.candidates[0].text) for e, r in zip(examples, alone, strict=True)], float
                ),
                "best": np.array([row[r.best or 0] for row, (_, r) in zip(right, rows, strict=True)]),
            }
            weights = bootstrap(len(rows), options.seed)
            wrong = full & (right == 0)
            found[split] = {
                **{name: interval(weights, values) for name, values in each.items()},
                "reward": float(rewards.mean()),
                "full": float(full.mean()),
                "fooled": float(wrong.sum() / full.sum()) if full.any() else None,
                "examples": [_example(results[i], int(wrong[i].argmax())) for i in np.flatnonzero(wrong.any(1))[:6]],
            }
    return found


def _example(result: Result, index: int) -> dict[str, Any]:
    said = {"prompt": result.task.instruction, "answer": result.candidates[index].text}
    return {**said, "inferred": result.scores[index].explanation}


def _passes(rows: Sequence[dict[str, Any]], split: Split) -> str:
    lines = []
    for row in rows:
        cells = ["{mean:.1%} [{low:.1%}, {high:.1%}]".format(**row[split][figure]) for figure in FIGURES]
        lines.append([row["method"], row["samples"], f"{row['seconds']:.0f}", *cells])
    return table([split, "samples", "s", *FIGURES.values()], lines)


def _cheats(rows: Sequence[dict[str, Any]], split: Split) -> str:
    lines = []
    for row in rows:
        found = row[split]
        fooled = "-" if found["fooled"] is None else f"{found['fooled']:.1%}"
        figures = (f"{found['reward']:.3f}", f"{found['sampled']['mean']:.1%}", f"{found['full']:.1%}", fooled)
        lines.append([row["method"], *figures])
    return table([split, "mean reward", "pass", "reward 1", "of these fail"], lines)


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Left, reward and truth over the steps of GRPO; right, greedy pass rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.3, 1), layout="constrained")
    for row in rows:
        if "curve" not in row:
            continue
        style = ":" if "unseen" in row["method"] else "-"
        for name, color in (("reward", "#2f6fb0"), ("truth", "#3f8f4f")):
            values = np.array(row["curve"][name])
            window = max(1, len(values) // 20)
            smooth = np.convolve(values, np.ones(window) / window, "valid")
            left.plot(np.arange(len(smooth)) + window, smooth, style, color=color, label=f"{row['method']}: {name}")
    left.set(xlabel="step of 128 samples", ylabel="mean FLIP reward, share that passes", ylim=(0, 1.02))
    left.set_title("What is rewarded, and what is right", fontsize=11, loc="left")
    left.legend(frameon=False, fontsize=8)
    names = [row["method"] for row in rows]
    for at, (split, color) in enumerate(zip(SPLITS, ("#2f6fb0", "#d9782d"), strict=True)):
        means, ends = [100 * row[split]["greedy"]["mean"] for row in rows], []
        for row in rows:
            found = row[split]["greedy"]
            ends.append([100 * (found["mean"] - found["low"]), 100 * (found["high"] - found["mean"])])
        places = np.arange(len(rows)) + 0.4 * at - 0.2
        kind = {"heldout": "held-out", "unseen_wording": "unseen wordings"}[split]
        right.bar(places, means, 0.38, color=color, yerr=np.array(ends).T, capsize=2, label=kind)
    right.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    right.set(ylabel="greedy pass rate, %", ylim=(0, 100))
    right.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    script(main)
