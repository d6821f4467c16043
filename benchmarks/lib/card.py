"""A run of several parts on a card that is lent for minutes: its clock, its models and its report."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

from bon.bench.harness import Report, conditions, table
from bon.engines.torch.engine import TorchEngine
from bon.models import Model, ModelPool
from lib.models import Filler, random_model
from lib.scripts import warn

T = TypeVar("T")

SCORER, POLICY = "qwen3-0.6b", "qwen3-4b"
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 0,
}
SPARE = 1 / 16  # of the time, for what is under way when it is over


class Clock:
    """Divides the time: a part has its share of what is left, and starts a step only where one fits.

    Args:
        seconds: until the last step should be over.
        shares: part -> its share, in the order in which they run.
    """

    def __init__(self, seconds: float, shares: dict[str, float]) -> None:
        self._end, self._shares = perf_counter() + seconds, dict(shares)
        self.budget = 0.0
        self._part_end = self._end

    def begin(self, part: str) -> bool:
        """Start a part; False where no time is left."""
        left = self._end - perf_counter()
        self.budget = max(0.0, left) * self._shares[part] / sum(self._shares.values())
        del self._shares[part]
        self._part_end = perf_counter() + self.budget
        return self.budget > 0

    def within(self, steps: Iterable[T]) -> Iterator[T]:
        """Those steps that fit, where each takes as long as the longest before it; the first in any case."""
        longest = 0.0
        for step in steps:
            started = perf_counter()
            if longest and started + longest > self._part_end:
                return
            yield step
            longest = max(longest, perf_counter() - started)


class Bench:
    """The models, the clock and the report of one run.

    Args:
        options: of the command line.
        folder: where models are written.
        parts: what runs, in this order.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, parts: Parts) -> None:
        self.options, self.folder = options, folder
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.small = options.quick or self.device.type != "cuda"
        self.clock = Clock(60 * options.minutes * (1 - SPARE), {name: share for name, (share, _) in parts.items()})
        self._parts = parts
        self.pool = ModelPool()
        facts = {"device": str(self.device), "dtype": options.dtype, "minutes": options.minutes}
        shapes = f"{SCORER} and {POLICY}" + (" made tiny" if self.small else "")
        self.report = Report("gpu", conditions(seed=options.seed, shapes=shapes, **facts))
        if self.device.type == "cuda":
            self.report.conditions["gpu_bytes"] = torch.cuda.mem_get_info(self.device)[1]
        self.failed: list[str] = []

    @property
    def rounds(self) -> int:
        """Rounds of a comparison."""
        return 1 if self.small else 2

    @cached_property
    def filler(self) -> Filler:
        """Makes text."""
        return Filler(self.engine(SCORER, dtype="float32").renderer.tokenizer, self.options.seed)

    def model(self, shape: str) -> Path:
        """The folder of a random model, made when it is first asked for."""
        folder = self.folder / shape
        if not folder.exists():
            random_model(folder, shape, seed=self.options.seed, **(TINY if self.small else {}))
            self.free()
        return folder

    def engine(self, shape: str, **options: Any) -> TorchEngine:
        """The engine of a shape, loaded once for the same options."""
        given = {"device": str(self.device), "dtype": self.options.dtype, **options}
        engine = self.pool.engine(Model(str(self.model(shape)), "torch", given))
        assert isinstance(engine, TorchEngine)
        return engine

    def run(self) -> None:
        """Run the parts; one that fails does not keep the others from running."""
        lines = []
        for name, (_, part) in self._parts.items():
            started, rows = perf_counter(), len(self.report.rows)
            outcome = "ok"
            try:
                if self.clock.begin(name):
                    part(self)
                else:
                    outcome = "no time left"
            except Exception as error:  # the card is lent for minutes: what else can be found out should be
                outcome = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                self.failed.append(f"{name}: {outcome}")
            self.free()
            seconds = perf_counter() - started
            warn(f"{name}: {outcome}, {seconds:.0f} s {self.report.rows[rows:]}")
            row = {"case": "part", "part": name, "seconds": seconds, "budget": self.clock.budget, "outcome": outcome}
            self.report.rows.append(row)
            lines.append([name, f"{seconds:.1f}", f"{self.clock.budget:.0f}", outcome[:50]])
        self.report.text.append(table(["part", "seconds", "budget", "outcome"], lines))

    def free(self) -> None:
        """Give memory back that nothing refers to, so that the next model finds it."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak(self, work: Callable[[], object]) -> int | None:
        """Bytes that a piece of work takes at most beyond what is there; None where torch does not count them."""
        self.free()
        if self.device.type != "cuda":
            work()
            return None
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return torch.cuda.max_memory_allocated(self.device) - before


Parts = Mapping[str, tuple[float, Callable[[Bench], None]]]
"""Part -> share of the time, and what it does."""
