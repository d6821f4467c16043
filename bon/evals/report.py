"""An evaluation to look at: plots as PNG files, and one HTML page that holds everything and loads nothing.

Both draw the report of ``bon.evals.harness.evaluate``. Candidates are untrusted text: the template escapes everything,
and the page forbids scripts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from bon.errors import InputError, MissingExtraError
from bon.evals.budgets import front
from bon.similarity import matched_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]

COLOURS = ("#2f7fd0", "#d9782d", "#3f9f5f", "#a866c4", "#c9485b", "#2fa3a3", "#9a8233", "#7a7fd0")
GREY = "#8a8a8a"
_INK = "#0b0c0d"  # of text and axes; the page puts its own colour in its place
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.parse_math": False,  # a dollar in a scorer's name is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.color": GREY,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "bon",
}
_WIDTH = 4.2  # inches: readable on a phone, and two fit beside each other on a desk
CAPTIONS = {
    "share": "How far each pick gets from a random candidate to the best one of its row (100%), with 95% intervals.",
    "best_of": "What the pick among N candidates is worth, over all subsets of N.",
    "tokens": "What the pick is worth against all tokens that a row takes, for every N.",
    "budgets": "What the pick is worth against the policy's tokens: fixed N, and rules that stop by themselves.",
    "length": "What the pick is worth in rows of short and of long candidates (median words of a row).",
}


def write_plots(report: Report, folder: str | Path) -> list[Path]:
    """Draw a report as PNG files, those of ``CAPTIONS`` for which it has figures: share.png, best_of.png and so on.

    Args:
        report: of ``evaluate``.
        folder: made if it is not there.

    Returns:
        The files.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: the folder cannot be written.
    """
    paths = []
    with _style(), _writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, figure in _figures(report).items():
            paths.append(Path(folder) / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def budget_plot(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw labels against policy tokens, a line for each way to decide how many samples there are, as a PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    with _style(), _writing(path):
        _budget_figure(lines).savefig(path, dpi=150)


def write_report(report: Report, path: str | Path) -> None:
    """Write a report as one HTML page.

    Args:
        report: of ``evaluate``.
        path: of the page, which is replaced.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: the file cannot be written.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "share": _share,
        "signed": _signed,
        "number": _number,
        "rows": lambda rows: f"{rows:,} row" + "s" * (rows != 1),
        "marked": _marked,
    }
    template = environment.from_string(files("bon.evals").joinpath("report.html").read_text("utf-8"))
    with _style():
        plots = {name: Markup(_svg(figure)) for name, figure in _figures(report).items()}
    page = template.render(
        report=report,
        headline=headline(report),
        plots=plots,
        captions=CAPTIONS,
        scorers=dict(sorted(report["scorers"].items(), key=lambda item: -_mean(item[1]["share"]))),
        protocol=[*next((s["official"] for s in report["scorers"].values() if s["official"]), ())],
        bins=next(iter(report["scorers"].values()))["by_length"],
        disagreements=[_best_first(row) for row in report["disagreements"]],
    )
    with _writing(path):
        Path(path).write_text(page, "utf-8", errors="xmlcharrefreplace")  # a lone surrogate has no UTF-8


def headline(report: Report) -> str:
    """One sentence or two: what pays here, or that nothing does."""
    scorers = {name: s for name, s in report["scorers"].items() if s["kind"] == "scorer" and s["share"]}
    free = {
        name: s
        for name, s in report["scorers"].items()
        if s["kind"] == "baseline" and s["share"] and name not in ("random", "oracle")
    }

    def best(of: Mapping[str, Any]) -> str:
        return max(of, key=lambda name: _mean(of[name]["share"]))

    rule = best(free) if free else None
    costless = f"; the best rule without a model, “{rule}”, gets {_share(free[rule]['share'])}" if rule else ""
    if not scorers:
        return f"No scorer could be compared{costless}."
    name, share = best(scorers), scorers[best(scorers)]["share"]
    reach = f"goes {_share(share)} of the way from a random pick to the best one"
    if share["low"] <= 0:
        return f"Nothing pays here: the best scorer, “{name}”, {reach}{costless}."
    if rule and _mean(free[rule]["share"]) >= share["mean"]:
        got = _share(free[rule]["share"])
        return f"“{name}” {reach}, but the rule “{rule}” needs no model and gets {got}."
    return f"“{name}” pays: it {reach}{costless}."


@contextmanager
def _style() -> Iterator[None]:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib, which draws the plots,", "pip install 'bon[bench]'") from error
    with matplotlib.rc_context(_STYLE):
        yield


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from error


def _figures(report: Report) -> dict[str, Figure]:
    drawn = {"share": _shares, "best_of": _best_of, "tokens": _tokens, "budgets": _budgets, "length": _length}
    figures = {name: draw(report) for name, draw in drawn.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def _svg(figure: Figure) -> str:
    """The figure as an element of a page, in the page's own text colour."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return "<svg" + text.getvalue().partition("<svg")[2].replace(_INK, "currentColor")


def _shares(report: Report) -> Figure | None:
    shown = {n: s for n, s in report["scorers"].items() if s["share"] and n not in ("random", "oracle")}
    if not shown:
        return None
    figure, axes = _figure(0.7 + 0.44 * len(shown))
    colours = _colours(report)
    for y, (name, scorer) in enumerate(sorted(shown.items(), key=lambda item: _mean(item[1]["share"]))):
        share, colour = scorer["share"], colours.get(name, GREY)
        axes.plot([share["low"], share["high"]], [y, y], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot(share["mean"], y, "o", color=colour, markersize=7)
        where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(_short(name, 44), (0, y), (2, 7), color=colour, fontsize=8, **where)
        axes.annotate(_share(share), (1, y), (0, 7), ha="right", fontsize=9, **where)
        axes.vlines([0, 0.25, 0.5, 0.75, 1], y - 0.13, y + 0.13, GREY, linewidth=[2, 0.5, 0.5, 0.5, 2], zorder=0)
    low = min(s["share"]["low"] for s in shown.values())
    axes.set(xlim=(min(-0.25, low - 0.05), 1.05), ylim=(-0.4, len(shown) - 0.3), yticks=[])
    axes.grid(False)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["random", "25%", "50%", "75%", "best"])
    axes.spines["left"].set_visible(False)
    return figure


def _best_of(report: Report) -> Figure | None:
    sizes = sorted({int(n) for scorer in report["scorers"].values() for n in scorer["best_of"]})
    if len(sizes) < 2:
        return None
    figure, axes = _figure(2.8, legend=len(_drawn(report)))
    for name, line in _drawn(report).items():
        curve = sorted((int(n), score) for n, score in report["scorers"][name]["best_of"].items())
        axes.plot(*zip(*curve, strict=True), label=_short(name, 44), **line)
    axes.set(xscale="log", xlabel="N (candidates)", ylabel="score of the pick")
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.minorticks_off()
    figure.legend(loc="outside lower left")
    return figure


def _tokens(report: Report) -> Figure | None:
    """Score against tokens, those of a policy and of the scorer; what costs nothing is a line across."""
    from matplotlib.ticker import LogLocator

    curves = {}
    for name, line in _drawn(report).items():
        rule = report["scorers"][name]
        spent = rule["tokens"] + (report.get("policy_tokens") or 0) * (name != "oracle")
        each = spent / report["rows"] / report["n"]
        curves[name] = sorted((int(n) * each, score) for n, score in rule["best_of"].items()), rule["score"], line
    if not any(curve[-1][0] for curve, _, _ in curves.values() if curve):
        return None
    figure, axes = _figure(2.8, legend=len(curves))
    for name, (curve, score, line) in curves.items():
        if curve and curve[-1][0]:
            axes.plot(*zip(*curve, strict=True), label=_short(name, 44), **line)
        else:
            axes.axhline(score, label=_short(name, 44), **{**line, "marker": ""})
    axes.set(xscale="log", xlabel="tokens for a row", ylabel="score of the pick")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    figure.legend(loc="outside lower left")
    return figure


def _budgets(report: Report) -> Figure | None:
    lines = {}
    for name, found in report.get("budgets", {}).items():
        lines[f"{_short(name, 34)}, fixed N"] = front(found["fixed"])
        lines[f"{_short(name, 34)}, rules"] = front([each for tried in found["tried"].values() for each in tried])
    return _budget_figure(lines) if lines else None


def _budget_figure(lines: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(2.8, legend=len(lines))
    for name, line in lines.items():
        axes.plot(*zip(*line, strict=True), "o--" if "fixed" in name else "o-", label=name, markersize=4)
    axes.set(xscale="log", xlabel="the policy's tokens for a row", ylabel="score of the pick")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    figure.legend(loc="outside lower left")
    return figure


def _length(report: Report) -> Figure | None:
    bins = next(iter(report["scorers"].values()))["by_length"]
    if len(bins) < 2:
        return None
    figure, axes = _figure(2.8, legend=len(_drawn(report)))
    for name, line in _drawn(report).items():
        scores = [each["score"] for each in report["scorers"][name]["by_length"]]
        axes.plot(range(len(scores)), scores, label=_short(name, 44), **line)
    axes.set(xlabel="words of a row's candidates (rows)", ylabel="score of the pick")
    axes.set_xticks(range(len(bins)), ["{:.0f}–{:.0f}\n({})".format(*each["words"], each["rows"]) for each in bins])
    figure.legend(loc="outside lower left")
    return figure


def _figure(height: float, legend: int = 0) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height + 0.19 * legend), layout="constrained")
    return figure, figure.add_subplot()


def _colours(report: Report) -> dict[str, str]:
    """A colour for each scorer, the same in all plots; baselines are grey."""
    names = [name for name, scorer in report["scorers"].items() if scorer["kind"] == "scorer"]
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _drawn(report: Report) -> dict[str, dict[str, Any]]:
    """The lines of a plot: every scorer, a random pick, the best one, and the best of the other baselines."""
    lines: dict[str, dict[str, Any]] = {
        name: {"color": colour, "marker": "o", "markersize": 4} for name, colour in _colours(report).items()
    }
    others = [n for n, s in report["scorers"].items() if n not in (*lines, "random", "oracle") and s["share"]]
    free = max(others, key=lambda name: _mean(report["scorers"][name]["share"]), default=None)
    for name, style in ((free, "-"), ("random", "--"), ("oracle", ":")):
        if name is not None and name in report["scorers"]:
            lines[name] = {"color": GREY, "linestyle": style, "marker": ""}
    return lines


def _mean(share: Mapping[str, float] | None) -> float:
    return share["mean"] if share else float("-inf")


def _share(share: Mapping[str, float] | None) -> str:
    """A share of the way with its interval, in percent."""
    if not share:
        return "–"
    return "{:.0f}% [{:.0f}, {:.0f}]".format(*(100 * share[end] for end in ("mean", "low", "high"))).replace("-", "−")


def _signed(difference: Mapping[str, float] | None) -> str:
    """A difference of labels with its interval."""
    if not difference:
        return "–"
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(difference[end] for end in ("mean", "low", "high"))).replace("-", "−")


def _number(value: float | None) -> str:
    """Three decimals at most, fewer the larger it is."""
    if value is None:
        return "–"
    digits = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    text = f"{value:,.{digits}f}"
    return (text.rstrip("0").rstrip(".") if digits else text).replace("-", "−")


def _short(name: str, most: int) -> str:
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[-half + 1 :]}"


def _best_first(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its candidates from the best label to the worst: those to show, and the others."""
    best = max(one["label"] for one in row["candidates"])
    candidates = [
        {**one, "best": one["label"] == best, "by": [name for name, pick in row["picks"].items() if pick == index]}
        for index, one in enumerate(row["candidates"])
    ]
    candidates.sort(key=lambda one: -one["label"])
    shown = [one for one in candidates if one["by"] or one["best"]]
    return {**row, "shown": shown, "others": [one for one in candidates if one not in shown]}


def _marked(text: str, prompt: str) -> Sequence[tuple[str, bool]]:
    """The text in pieces: which of them the prompt has too."""
    pieces, at = [], 0
    for start, end in matched_words(text, prompt):
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [*pieces, (text[at:], False)]
