"""Draw the results: one PNG beside each JSON file of a benchmark that has a drawing; the others are passed over.

python benchmarks/plot.py benchmarks/results/*.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

BLUE, ORANGE, GREEN, GREY = "#2f6fb0", "#d9782d", "#3f8f4f", "#8a8a8a"
plt.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.3,
        "legend.frameon": False,
    }
)


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("results", nargs="+", type=Path, help="JSON files written with --out")
    for path in options.parse_args(argv).results:
        result = json.loads(path.read_text())
        if result.get("benchmark") not in DRAWINGS:
            print(f"{path}: nothing to draw")
            continue
        figure = DRAWINGS[result["benchmark"]](result)
        figure.text(0.01, 0.01, _caption(result["conditions"]), fontsize=7, color=GREY)
        figure.savefig(path.with_suffix(".png"), dpi=150)
        plt.close(figure)
        print(path.with_suffix(".png"))


def _prefix_sharing(result: dict[str, Any]) -> Figure:
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    for column, (varied, fixed, at) in enumerate((("prefix", "rows", 32), ("rows", "prefix", 512))):
        for row, (case, title) in enumerate((("prefill", "prefill"), ("decode", "decode step"))):
            rows = sorted(
                (r for r in result["rows"] if r["case"] == case and r.get(fixed) == at), key=lambda r: r[varied]
            )
            axis = axes[row][column]
            _two_lines(axis, rows, varied)
            where = f"{at} rows" if fixed == "rows" else f"prefix of {at} tokens"
            axis.set_title(f"{title}, {where}", fontsize=11)
            axis.set_xlabel("common prefix (tokens)" if varied == "prefix" else "rows")
            axis.set_ylabel("milliseconds")
    axes[0][0].legend(loc="upper left")
    return figure


def _two_lines(axis: Axes, rows: Rows, varied: str) -> None:
    """Both sides on logarithmic axes, the ratio written at each point."""
    sizes = [r[varied] for r in rows]
    for side, (colour, label) in enumerate(((GREY, "transformers, batched"), (BLUE, "bon, prefix shared"))):
        axis.plot(sizes, [1e3 * r["medians"][side] for r in rows], "o-", color=colour, label=label, markersize=4)
    for r in rows:
        at = (r[varied], 1e3 * r["medians"][1])
        axis.annotate(f"{r['ratio']:.3g}x", at, (0, -13), textcoords="offset points", ha="center", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, [str(s) for s in sizes])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.margins(x=0.09)
    low, high = axis.get_ylim()
    axis.set_ylim(low / 1.8, high)


def _latency(result: dict[str, Any]) -> Figure:
    if result["conditions"]["engine"] == "vllm":
        return _schedules(result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    scorers = sorted({r["scorer"] for r in result["rows"]})
    colours = dict(zip(scorers, (BLUE, ORANGE, GREEN), strict=False))
    alone = sorted({r["n"]: r["alone_p50"] for r in result["rows"]}.items())
    times = [1e3 * seconds for _, seconds in alone]
    left.plot([n for n, _ in alone], times, "o-", color=GREY, label="sampling alone", markersize=4)
    for scorer in scorers:
        rows = sorted((r for r in result["rows"] if r["scorer"] == scorer), key=lambda r: r["n"])
        ns = [r["n"] for r in rows]
        left.plot(ns, [1e3 * r["total_p50"] for r in rows], "o-", color=colours[scorer], label=scorer, markersize=4)
        left.fill_between(
            ns,
            [1e3 * r["total_p50"] for r in rows],
            [1e3 * r["total_p95"] for r in rows],
            color=colours[scorer],
            alpha=0.15,
            linewidth=0,
        )
        error = [
            [r["ratio"] - r["ratio_quartiles"][0] for r in rows],
            [r["ratio_quartiles"][1] - r["ratio"] for r in rows],
        ]
        right.errorbar(ns, [r["ratio"] for r in rows], error, fmt="o-", color=colours[scorer], markersize=4, capsize=2)
    for axis, title, label in (
        (left, "time of one prompt (median; shaded to p95)", "milliseconds"),
        (right, "best-of-N / sampling alone (median, quartiles)", "ratio"),
    ):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("N (candidates)")
        axis.set_ylabel(label)
        axis.set_xscale("log", base=2)
        axis.set_xticks([n for n, _ in alone], [str(n) for n, _ in alone])
        axis.set_ylim(bottom=0)
    left.legend()
    return figure


def _schedules(result: dict[str, Any]) -> Figure:
    """Beside the same work written against vLLM itself, at the lengths of real responses."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.05, 1, 0.95))
    real = [r for r in result["rows"] if r.get("workload") == "real lengths"]
    colours = (GREY, ORANGE, GREEN, BLUE, "#7fb2e5")
    for side, colour in zip(dict.fromkeys(r["side"] for r in real), colours, strict=False):
        rows = sorted((r for r in real if r["side"] == side), key=lambda r: r["n"])
        ns = [r["n"] for r in rows]
        left.plot(ns, [1e3 * r["p50"] for r in rows], "o-", color=colour, label=side, markersize=4)
        low, high = ([abs(r["ratio"] - r["ratio_quartiles"][i]) for r in rows] for i in (0, 1))
        right.errorbar(ns, [r["ratio"] for r in rows], (low, high), fmt="o-", color=colour, markersize=4, capsize=2)
    for axis, title, label in (
        (left, "time of one prompt (median)", "milliseconds"),
        (right, "time / sampling alone (median, quartiles)", "ratio"),
    ):
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("N (candidates)")
        axis.set_ylabel(label)
        axis.set_xscale("log", base=2)
        ticks = sorted({r["n"] for r in real})
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.set_ylim(bottom=0)
    left.legend()
    return figure


def _throughput(result: dict[str, Any]) -> Figure:
    rows = [r for r in result["rows"] if r["case"] == "side"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained", sharey=True)
    figure.get_layout_engine().set(rect=(0, 0.08, 1, 0.92))
    for axis, key, label in ((axes[0], "prompts_per_s", "prompts/s"), (axes[1], "tokens_per_s", "decoded tokens/s")):
        values = [r[key] for r in rows]
        colours = [BLUE if r["side"] == "bon" else GREY for r in rows]
        bars = axis.barh([r["side"] for r in rows], values, color=colours)
        axis.bar_label(bars, [f"{v:,.1f}" if v < 100 else f"{v:,.0f}" for v in values], padding=3)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.15 * max(values))
        axis.grid(axis="y", visible=False)
    axes[0].invert_yaxis()
    return figure


def _pruning(result: dict[str, Any]) -> Figure:
    rows = result["rows"]
    figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.08, 1, 0.92))
    names = ["everything", *(r["scoring"] for r in rows)]
    tokens = [rows[0]["tokens_everything"], *(r["tokens"] for r in rows)]
    bars = axis.barh(names, tokens, color=[GREY, *(BLUE for _ in rows)])
    saved = ["", *(f"{r['saved']:.1%} saved" for r in rows)]
    axis.bar_label(bars, [f"{t:,}  {s}" for t, s in zip(tokens, saved, strict=True)], padding=3)
    axis.set_xlabel(f"tokens the scorer decoded, {rows[0]['prompts']} prompts, n={rows[0]['n']}")
    axis.set_xlim(0, 1.35 * max(tokens))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    return figure


def _memory(result: dict[str, Any]) -> Figure:
    rows = [r for r in result["rows"] if r["case"] == "memory" and r["row"]]
    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.08, 1, 0.92))
    axis.plot([r["row"] for r in rows], [r["mib"] for r in rows], color=BLUE)
    axis.set_xlabel(f"prompts done, n={result['conditions']['n']}")
    axis.set_ylabel("resident memory (MiB)")
    axis.set_ylim(bottom=0)
    return figure


DRAWINGS: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "prefix_sharing": _prefix_sharing,
    "latency": _latency,
    "throughput": _throughput,
    "pruning": _pruning,
    "memory": _memory,
}


def _caption(conditions: dict[str, Any]) -> str:
    models = [v for v in conditions.values() if isinstance(v, dict) and "parameters" in v]
    shown = list(dict.fromkeys(f"{m['model']} ({m['parameters'] / 1e6:.1f}M parameters)" for m in models))
    machine = conditions.get("gpu") or f"{conditions['cpu']}, {conditions['threads']} threads"
    facts = [conditions[name] for name in ("dtype",) if name in conditions]
    return "; ".join([*shown, *facts, machine, f"torch {conditions['torch']}", conditions["date"]])


if __name__ == "__main__":
    main()
