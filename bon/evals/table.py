"""A report as text that fits 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 80
_NAME = 19
# Columns and their widths; ~ is the correlation of the reward with something.
_PICKS = {"mean": 7, "share [95%]": 18, "- random": 18, "- longest": 18}
_COSTS = {"failed": 7, "tied": 5, "~label": 7, "~length": 8, "~echo": 6, "tokens": 9, "per right": 10, "s": 7}
_INVERSION = {"at 1 of 8": 10, "of 64": 8, "margin": 8, "echo rate": 10}


def format_table(report: Mapping[str, Any]) -> str:
    """The figures of a report that say most, and those of its parts."""
    return "\n\n".join(map(_section, [report, *report["parts"].values()]))


def _section(report: Mapping[str, Any]) -> str:
    rules: Mapping[str, Any] = report["scorers"]
    left_out = f" ({report['left_out']} left out)" if report["left_out"] else ""
    title = f"{report['dataset']}: {report['rows']} rows{left_out}, up to {report['n']} candidates each"
    first = {name: [_number(rule["score"]), _interval(rule["share"])] for name, rule in rules.items()}
    for name, rule in rules.items():
        first[name] += [_interval(rule["minus_random"]), _interval(rule["minus_longest"])]
    sizes = next(iter(rules.values()))["best_of"]
    best_of = {name: [_number(value) for value in rule["best_of"].values()] for name, rule in rules.items()}
    scorers = {name: rule for name, rule in rules.items() if rule["kind"] == "scorer"}
    costs = _blocks("rewards", _COSTS, {name: _costs(rule) for name, rule in scorers.items()})
    if "attacks" in report:  # to pick an honest candidate is no merit: labels and baselines say nothing
        return "\n".join([title, *_attacks(report["attacks"]), *costs])
    blocks = [
        title,
        *_blocks("label of the pick", _PICKS, first),
        "share: of the way from a random pick (0) to the best candidate (1)",
        *_blocks("best of", dict.fromkeys(sizes, 7), best_of),
        *_equal_time(report["bigger"]),
        *_blocks("own protocol", *_official(rules)),
        *costs,
        *_blocks("inversion", _INVERSION, {name: _inversion(check) for name, check in report["inversion"].items()}),
        *_blocks(
            "by subset",
            {f"{_short(name, 12)} ({part['rows']})": 19 for name, part in report["subsets"].items()},
            {name: [_number(part["scores"][name]) for part in report["subsets"].values()] for name in rules},
        ),
        textwrap.fill(report["diagnosis"], WIDTH),
        *(line for name, found in report.get("budgets", {}).items() for line in _budgets(name, found)),
    ]
    return "\n".join(blocks)


def _attacks(attacks: Mapping[str, Any]) -> list[str]:
    """How often each kind of attack wins."""
    names = next(iter(attacks.values()))["by_scorer"]
    columns = {"rows": 5, "chance": 7, **{_short(name, 18): 19 for name in names}}
    cells = {
        kind: [str(found["rows"]), _number(found["chance"]), *map(_number, found["by_scorer"].values())]
        for kind, found in attacks.items()
    }
    return _blocks("attack wins", columns, cells)


def _equal_time(bigger: Mapping[str, Any] | None) -> list[str]:
    """What best-of-N gets in the time of a bigger model's answer."""
    if bigger is None:
        return []
    rows = {
        name: ["-", "-"] if found is None else [str(found["n"]), _number(found["score"])]
        for name, found in bigger["equal_time"].items()
    }
    told = f"One answer of {bigger['name']}: {_number(bigger['score'])}, in {bigger['seconds']:.1f} s for all rows."
    return [*_blocks("in the same time", {"N": 7, "score": 8}, rows), textwrap.fill(told, WIDTH)]


def _budgets(scorer: str, found: Mapping[str, Any]) -> list[str]:
    """How many samples: fixed numbers, what rules save at no loss, and the line to type."""
    columns = {"score": 8, "samples": 9, "tokens": 9, "saved [95%]": 18}
    cells = {f"fixed N={each['n']}": [*_spent(each), "-"] for each in found["fixed"]}
    for judged in found["halves"]:
        cells[f"{judged['rule'][:11]}, N={judged['n']}"] = [*_spent(judged), _interval(judged["saved"])]
    told = "saved: the policy's tokens, beside the fixed N that the rule is as good as on half of the rows"
    ran = []
    for spec, each in found["ran"].items():
        label, samples, tokens = _spent(each)
        line = (
            f"run with -n {spec}: score {label}, {tokens} tokens and {samples} samples a row, {each['seconds']:.1f} s"
        )
        ran.append(textwrap.fill(line, WIDTH))
    best = [*found["recommended"].values()][-1]
    return [*_blocks(_short(scorer), columns, cells), told, *ran, f"To type: --scorer {scorer} -n {best}"]


def _spent(each: Mapping[str, float]) -> list[str]:
    return [_number(each["label"]), f"{each['samples']:.1f}", f"{each['tokens']:.0f}"]


def _official(rules: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Columns and rows of what the dataset's own protocol says."""
    told = {name: rule["official"] for name, rule in rules.items() if rule["official"] is not None}
    columns = {_short(name, 11): 12 for name in next(iter(told.values()), ())}
    return columns, {name: [_number(value) for value in figures.values()] for name, figures in told.items()}


def _blocks(title: str, columns: Mapping[str, int], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of a name and its cells, in as many blocks side by side as the width asks for; none without columns."""
    lines, start, heads = [], 0, list(columns)
    while start < len(heads) and rows:
        end, room = start, WIDTH - _NAME
        while end < len(heads) and columns[heads[end]] <= room:
            room -= columns[heads[end]]
            end += 1
        for name, cells in [(title, heads), *rows.items()]:
            row = "".join(f"{cells[i]:>{columns[heads[i]]}}" for i in range(start, end))
            lines.append(f"{_short(name):<{_NAME}}{row}")
        lines.insert(len(lines) - len(rows) - 1, "")
        start = end
    return lines


def _short(name: str, width: int = _NAME) -> str:
    return name if len(name) <= width else f"{name[: (width - 1) // 2]}…{name[-(width // 2) :]}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _interval(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    mean, low, high = (round(end, 2) + 0.0 for end in value.values())  # + 0.0: there is no -0
    return f"{'+' * (mean >= 0)}{_short_number(mean)} [{_short_number(low)}, {_short_number(high)}]"


def _short_number(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.1f}"


def _costs(rule: Mapping[str, Any]) -> list[str]:
    correlations = [_number(value, 2) for value in rule["correlation"].values()]
    per_right = "-" if rule["tokens_per_correct"] is None else f"{rule['tokens_per_correct']:.0f}"
    shares = (f"{rule['failed']:.0%}", f"{rule['tied']:.0%}")
    return [*shares, *correlations, str(rule["tokens"]), per_right, f"{rule['seconds']:.1f}"]


def _inversion(check: Mapping[str, Any]) -> list[str]:
    retrieved = check["retrieval_at_1"]
    return [_number(value) for value in (*retrieved.values(), check["margin"], check["echo_rate"])]
