"""What `bon plan` predicts beside what `bon run --ray` does: 5,000 prompts of the mini world on 1 and on 2 workers.

For each number of workers, round after round: first the plan, which measures rates on 320 of the prompts in that many
workers at once, then the run of all prompts with as many. The ratio is predicted seconds / measured seconds, loading
left out on both sides (`seconds_1`, `seconds_2`); it should be between 0.85 and 1.15. The rows are compared between
rounds and numbers of workers: all must be the same. What a million prompts would take stands in the rows as well.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from hashlib import blake2b
from pathlib import Path

from bon.bench.harness import Report, Spread, conditions, table
from bon.errors import EngineError
from bon.mini.tasks import sample_instructions
from lib.scripts import parser, script, warn


def main(argv: list[str] | None = None) -> None:
    command = parser(__doc__ or "")
    command.add_argument("--prompts", type=int, default=None, help="5000, or 200 with --quick")
    command.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="how many, in turn")
    command.add_argument("--rounds", type=int, default=None, help="2, or 1 with --quick")
    command.add_argument("-n", type=int, default=8, help="candidates for each prompt")
    options = command.parse_args(argv)
    count = options.prompts or (200 if options.quick else 5000)
    rounds = options.rounds or (1 if options.quick else 2)
    report = Report("many_machines", conditions(seed=options.seed, prompts=count, n=options.n, rounds=rounds))
    ratios: dict[int, list[float]] = {workers: [] for workers in options.workers}
    made = set()
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "prompts.jsonl"
        rows = [{"prompt": prompt} for prompt in sample_instructions(count, options.seed)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number in range(rounds):
            for workers in options.workers:
                given = [str(source), "-n", str(options.n), "--seed", str(options.seed)]
                given += ["--ray", "local", "--workers", str(workers)]
                plan = json.loads(_bon(["plan", *given, "--json", *(["--block", "32"] if options.quick else [])])[0])
                output = Path(folder) / f"{number}-{workers}"
                seconds, digest = _run([*given, "-o", str(output)], output)
                made.add(digest)
                ratios[workers].append(plan["seconds"] / seconds)
                measured = {"case": "run", "workers": workers, "round": number, "measured": seconds}
                measured |= {"predicted": plan["seconds"], "ratio": ratios[workers][-1], "plan": plan}
                report.rows.append(measured)
                shown = [plan["seconds"], seconds, ratios[workers][-1], count / seconds, plan["million"]["hours"]]
                lines.append([number, workers, *(f"{value:.3g}" for value in shown)])
                warn(f"round {number}, {workers} workers: predicted {plan['seconds']:.1f} s, took {seconds:.1f} s")
    if len(made) > 1:
        raise EngineError("the rows differ between numbers of workers or rounds.")
    report.ratios = {f"seconds_{workers}": Spread.of(values) for workers, values in ratios.items()}
    heads = ["round", "workers", "predicted s", "measured s", "ratio", "prompts/s", "a million, h"]
    report.text.append(table(heads, lines))
    report.emit(options.out)


def _run(arguments: list[str], output: Path) -> tuple[float, bytes]:
    """Run all prompts: the seconds that the command says it took, and a digest of its rows."""
    said = _bon(["run", *arguments])[1]
    found = re.search(r"([\d.]+) s, [\d.]+ candidates/s", said)
    if found is None:
        raise EngineError(f"bon run did not say what it took: {said}")
    rows = b"".join(path.read_bytes() for path in sorted(output.iterdir()))
    return float(found[1]), blake2b(rows, digest_size=8).digest()


def _bon(arguments: list[str]) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-m", "bon", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"bon {arguments[0]} failed: {done.stderr}")
    return done.stdout, done.stderr


if __name__ == "__main__":
    script(main)
