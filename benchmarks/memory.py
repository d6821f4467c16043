"""Memory: does it stay flat over a long file, and within its bounds in one large call?

Claims: `bon run` over 1,000 prompts with 16 candidates each needs no more memory at the end than after the first
quarter (`memory_growth`, the median of the last quarter of the run / that of the second quarter, at most 1.05).
Scoring 256 responses in one call of the torch engine (135M parameters, float32) takes at most 1.5 GB beyond weights,
the interpreter and its libraries included (`scoring_memory_rate`, `scoring_memory_generate`: what it takes / 1.5 GB).
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson
import psutil
from transformers import AutoTokenizer

from bon.bench.harness import Report, Spread, conditions, table
from bon.mini.tasks import sample_instructions
from lib import peak
from lib.models import Filler, describe, random_model
from lib.scripts import parser, script

EVERY = 0.5  # seconds between two looks
BOUND = 1.5e9  # bytes beyond the weights
MOST_WORDS = 180  # of a response
MIB = 1 << 20


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    prompts = options.prompts or (100 if options.quick else 1000)
    facts = {"prompts": prompts, "n": options.n, "model": describe(None)}
    report = Report("memory", conditions(seed=options.seed, engine="torch", **facts))
    with tempfile.TemporaryDirectory() as folder:
        _scoring(report, Path(folder), options)
        seconds, curve = _run(Path(folder), prompts, options.n, options.seed)
    rows = np.array([row for row, _ in curve])
    memory = np.array([size for _, size in curve]) / MIB
    quarters = [memory[(rows > low * prompts) & (rows <= (low + 0.25) * prompts)] for low in (0, 0.25, 0.5, 0.75)]
    second, last = float(np.median(quarters[1])), float(np.median(quarters[3]))
    report.ratios["memory_growth"] = Spread.of([last / second])
    report.rows += [{"case": "memory", "row": row, "mib": round(size / MIB, 1)} for row, size in curve]
    report.rows.append({"case": "run", "seconds": seconds, "candidates_per_s": prompts * options.n / seconds})
    lines = [[f"{i}", f"{np.median(q):.0f}", f"{q.max():.0f}"] for i, q in enumerate(quarters, 1) if len(q)]
    report.text.append("resident memory of the process, MiB\n" + table(["quarter", "median", "most"], lines))
    report.text.append(f"{prompts} prompts, {options.n} candidates each, in {seconds:.0f} s.")
    report.emit(options.out)


def _scoring(report: Report, folder: Path, options: argparse.Namespace) -> None:
    """One call for many responses, by prefill alone and with a reconstruction for each."""
    shape = "llama-4.7m" if options.quick else "llama-135m"
    model = options.model or random_model(folder / shape, shape, seed=options.seed, tie_word_embeddings=True)
    filler, draw = Filler(AutoTokenizer.from_pretrained(model), options.seed), random.Random(options.seed)
    if options.responses:
        texts = [t for line in options.responses.open() for t in orjson.loads(line)["candidates"]]
        texts = [t for t in texts if len(t.split()) <= MOST_WORDS][: options.candidates]
    else:
        texts = [filler(draw.randint(10, 240)) for _ in range(16 if options.quick else options.candidates)]
    (folder / "texts.json").write_bytes(orjson.dumps(texts))
    weights = 4 * describe(model)["parameters"]  # float32
    lines = []
    for kind in ("rate", "generate"):
        found = peak.measure(model, folder / "texts.json", kind)
        beyond = found["peak"] - weights
        report.ratios[f"scoring_memory_{kind}"] = Spread.of([beyond / BOUND])
        report.rows.append({"case": "scoring", "kind": kind, "responses": len(texts), "weights": weights, **found})
        sizes = (weights, found["loaded"], found["peak"])
        lines.append([kind, *(f"{size / 1e9:.2f}" for size in sizes), f"{found['seconds']:.0f}"])
    title = f"{len(texts)} responses in one call, {describe(model)['model']}; GB"
    report.text.append(title + "\n" + table(["kind", "weights", "loaded", "peak", "s"], lines))


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
    options.add_argument("--model", type=Path, help="that scores; a random Llama of 135M parameters when not given")
    options.add_argument("--candidates", type=int, default=256, help="responses that are scored in one call")
    options.add_argument("--responses", type=Path, help="JSON lines with 'candidates', a list of texts")
    return options.parse_args(argv)


if __name__ == "__main__":
    script(main)
