"""Memory over a long file of prompts: does it stay flat?

Claim: `bon run` over 1,000 prompts with 16 candidates each needs no more memory at the end than after the first
quarter (`memory_growth`, the median of the last quarter of the run / that of the second quarter, at most 1.05).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson
import psutil

from bon.bench.harness import Report, Spread, conditions, table
from bon.mini.tasks import sample_instructions
from lib.models import describe
from lib.scripts import parser, script

EVERY = 0.5  # seconds between two looks
MIB = 1 << 20


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    prompts = options.prompts or (100 if options.quick else 1000)
    facts = {"prompts": prompts, "n": options.n, "model": describe(None)}
    report = Report("memory", conditions(seed=options.seed, engine="torch", **facts))
    with tempfile.TemporaryDirectory() as folder:
        seconds, curve = _run(Path(folder), prompts, options.n, options.seed)
    rows = np.array([row for row, _ in curve])
    memory = np.array([size for _, size in curve]) / MIB
    quarters = [memory[(rows > low * prompts) & (rows <= (low + 0.25) * prompts)] for low in (0, 0.25, 0.5, 0.75)]
    second, last = float(np.median(quarters[1])), float(np.median(quarters[3]))
    report.ratios["memory_growth"] = Spread.of([last / second])
    report.rows = [{"case": "memory", "row": row, "mib": round(size / MIB, 1)} for row, size in curve]
    report.rows.append({"case": "run", "seconds": seconds, "candidates_per_s": prompts * options.n / seconds})
    lines = [[f"{i}", f"{np.median(q):.0f}", f"{q.max():.0f}"] for i, q in enumerate(quarters, 1) if len(q)]
    report.text.append("resident memory of the process, MiB\n" + table(["quarter", "median", "most"], lines))
    report.text.append(f"{prompts} prompts, {options.n} candidates each, in {seconds:.0f} s.")
    report.emit(options.out)


def _run(folder: Path, prompts: int, n: int, seed: int) -> tuple[float, list[tuple[int, int]]]:
    """Run the command on a file; returns seconds and, every so often, (rows written, bytes resident)."""
    source, target = folder / "prompts.jsonl", folder / "best.jsonl"
    source.write_bytes(b"\n".join(orjson.dumps({"prompt": text}) for text in sample_instructions(prompts, seed)))
    command = [sys.executable, "-m", "bon", "run", str(source), "-o", str(target), "-n", str(n), "--seed", str(seed)]
    started, curve = time.perf_counter(), []
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            done = target.read_bytes().count(b"\n") if target.exists() else 0
            curve.append((done, watched.memory_info().rss))
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(f"bon run ended with {process.returncode}")
    assert target.read_bytes().count(b"\n") == prompts
    return time.perf_counter() - started, curve


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    options.add_argument("--prompts", type=int, metavar="COUNT", help="from the mini world; 1000, or 100 with --quick")
    options.add_argument("--n", type=int, default=16, help="candidates of each")
    return options.parse_args(argv)


if __name__ == "__main__":
    script(main)
