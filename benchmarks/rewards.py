"""Draw how reward picks candidates: the README's figure.

bon eval mini --json > benchmarks/results/mini_eval.json
python benchmarks/rewards.py

Left: the candidates of some held-out instructions of the mini world with their FLIP rewards, and which of them pass
the verifier. Right: pass rate against N, from the report of ``bon eval mini --json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bon import BestOfN, Sampling
from bon.mini.tasks import instruction, sample_tasks, verify

RESULTS = Path(__file__).parent / "results"
GREEN, GREY, BLACK = "#3f8f4f", "#c7c7c7", "#222222"
LINES = {
    "oracle": ("oracle (knows the truth)", "#8a8a8a", "--"),
    "flip": ("FLIP", "#2f6fb0", "-"),
    "longest": ("longest", "#d9782d", "-"),
    "random": ("random", "#8a8a8a", ":"),
    "shortest": ("shortest", "#b05a9a", "-"),
}


def main() -> None:
    """Sample, score and draw."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--report", type=Path, default=RESULTS / "mini_eval.json", help="from bon eval mini --json")
    options.add_argument("--out", type=Path, default=RESULTS / "rewards.png")
    options.add_argument("--instructions", type=int, default=24)
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.5, 1), layout="constrained")
    _candidates(left, chosen.instructions, chosen.seed)
    _pass_rates(right, json.loads(chosen.report.read_text()))
    figure.savefig(chosen.out, dpi=150)
    print(chosen.out)


def _candidates(axes: Axes, instructions: int, seed: int) -> None:
    tasks = sample_tasks(instructions, seed, "heldout")
    bon = BestOfN(n=16, sampling=Sampling(seed=seed, max_tokens=96), prune=False)
    results = list(bon.map([instruction(task) for task in tasks]))
    columns = sorted(range(len(tasks)), key=lambda i: sum(s.reward or 0 for s in results[i].scores))
    for x, column in enumerate(columns):
        for score, candidate in zip(results[column].scores, results[column].candidates, strict=True):
            if score.reward is not None:
                passes = verify(tasks[column], candidate.text)
                won = candidate.index == results[column].best
                axes.scatter(
                    x, score.reward, s=46, color=GREEN if passes else GREY, edgecolors=BLACK if won else "none"
                )
    for label, color, edge in (("passes the verifier", GREEN, "none"), ("fails", GREY, "none"), ("picked", "w", BLACK)):
        axes.scatter([], [], s=46, color=color, edgecolors=edge, label=label)
    axes.set(
        xlabel=f"{instructions} held-out instructions, 16 candidates each", ylabel="reward: word F1", ylim=(0, 1.04)
    )
    axes.set_xticks([])
    axes.set_title("The reward picks the candidate that meets every constraint", fontsize=11, loc="left")
    axes.legend(loc="lower right", frameon=False)


def _pass_rates(axes: Axes, report: dict[str, Any]) -> None:
    sizes = [int(n) for n in report["scorers"]["flip"]["best_of"]]
    for rule, (label, color, style) in LINES.items():
        rates = [100 * rate for rate in report["scorers"][rule]["best_of"].values()]
        axes.plot(sizes, rates, style, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.set(xlabel="candidates N", ylabel="pass rate, %", ylim=(0, 100))
    axes.set_title(f"Best-of-N on {report['rows']} held-out instructions", fontsize=11, loc="left")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
