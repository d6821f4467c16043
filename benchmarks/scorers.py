"""Every reward beside the others: what judges cost, which pairing finds the same winner, and who picks best.

Claims: a pointwise judge of 32 candidates is faster fused and shared than one at a time (`judge_fused`, in CPU time);
a knock-out of 16 candidates takes 15 comparisons where all pairs take 120, and finds the same winner (`same_winner`).
Then one table of the mini world: 25 prompts with 8 labelled candidates each train heads, and on other prompts every
scorer that the embedded model can run picks one of the same 8 candidates. Beside the pass rate stand its difference to
FLIP's and the AUC within prompts, with 95% intervals over prompts, and the tokens that were read and written.
"""

from __future__ import annotations

import argparse
import json
import re
import zlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

import numpy as np

from bon import BestOfN, Sampling, portal
from bon.bench.harness import Pairs, Report, conditions, interleave, table
from bon.engines.base import Completion
from bon.engines.scripted import ScriptedEngine
from bon.engines.torch.engine import TorchEngine
from bon.evals.dataset import as_dataset
from bon.evals.metrics import bootstrap, expected_best, interval
from bon.group import Group
from bon.heads.data import Labelled, States
from bon.heads.training import train
from bon.mini.tasks import Task as World
from bon.mini.tasks import instruction, sample_tasks, verify
from bon.models import ModelPool
from bon.pipeline import score
from bon.scorers.base import Scorer
from bon.scorers.judge import Judge
from bon.task import Task
from bon.types import Candidate
from lib.models import Filler, describe, random_model
from lib.scripts import parser, script

SPECS = {
    "flip": "flip:mini",
    "likelihood": "likelihood:mini",
    "default": "default:mini",
    "judge": "judge:mini,reasoning=false",
    "judge, pairwise": "judge:mini,reasoning=false,style=pairwise,pairs=knockout",
    "judge, listwise": "judge:mini,reasoning=false,style=listwise",
    "slot": 'slot:mini,explain=0,labels=["A", "B"]',
    "forward": "forward:mini",
    "head": "head:{probe}",
    "head, bnrm": "head:{bnrm}",
    "consensus": "consensus",
    "consensus, chrf": "consensus:chrf",
    "consensus, rouge_l": "consensus:rouge_l",
    "majority": "majority:(?s).+",
    "ensemble": 'ensemble:"flip:mini + consensus:chrf"',
    "guard": "guard:flip:mini",
    "logprob": "logprob",
    "self-certainty": "self-certainty:mini",
    "deepconf": "deepconf:mini",
    "longest": "longest",
    "shortest": "shortest",
    "first": "first",
    "random": "random",
}
"""What picks in the mini world, under the names of the table. Left out: ``implicit`` (it compares a model with its
base, and the embedded one has none), ``reward-model`` and ``consensus:embedding`` (what is made here would have random
weights)."""
HOT = Sampling(temperature=1.5, max_tokens=96)  # 16 different candidates among 64
REASONING, RATED, COMPARED = 24, 32, 16  # tokens of a judge's answer; candidates to rate, to compare


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--train", type=int, default=25, help="prompts with labels, for the heads")
    options.add_argument("--prompts", type=int, default=100, help="of the mini world that scorers pick for")
    options.add_argument("--pairs", type=int, default=20, help="prompts whose candidates are compared in pairs")
    options.add_argument("--rounds", type=int, default=3, help="of the judge's timing")
    chosen = options.parse_args(argv)
    if chosen.quick:
        chosen.train, chosen.prompts, chosen.pairs, chosen.rounds = 20, 8, 2, 1
    sizes = {name: getattr(chosen, name) for name in ("train", "prompts", "pairs", "rounds")}
    with TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "random-llama", seed=chosen.seed)
        report = Report("scorers", conditions(seed=chosen.seed, **sizes, judge=describe(model), world=describe(None)))
        _judging(report, model, chosen)
        pool = ModelPool(1)
        try:
            _pairing(report, pool, chosen)
            _picking(report, pool, Path(folder), chosen)
        finally:
            portal.run(pool.aclose())
    report.emit(chosen.out)


# --- a pointwise judge, one at a time or fused ------------------------------------------------------------------------


class Answering(TorchEngine):
    """A random model, whose words become the reasoning of a verdict: so that the rating behind it is read as well."""

    async def generate(self, requests: Any, *, keep: Any = None) -> AsyncGenerator[Completion, None]:
        """See ``Generates.generate``."""
        async for done in super().generate(requests, keep=keep):
            yield replace(done, text=json.dumps({"reasoning": done.text, "score": 7}))


def _judging(report: Report, model: Path, options: argparse.Namespace) -> None:
    plain, shared = (
        Answering(model, device=options.device, dtype=options.dtype, threads=1, share_prefix=share)
        for share in (False, True)
    )
    filler = Filler(shared.renderer.tokenizer, options.seed)
    task = Task.of(filler(24).strip())
    texts = [[filler(16 + 48 * i // RATED).strip() for i in range(RATED)] for _ in range(options.rounds)]
    lines = []
    alone, fused = (Judge(engine, sampling={"max_tokens": REASONING}) for engine in (plain, shared))
    sides: dict[str, Callable[[int], tuple[float, list[float]]]] = {
        "one by one": lambda r: _cpu(lambda: [x for one in texts[r] for x in _rate(alone, task, [one])]),
        "fused and shared": lambda r: _cpu(lambda: _rate(fused, task, texts[r])),
    }
    timed = interleave(sides, options.rounds, warmup=0, label="judging")
    first, second = timed.values()
    worst = max(np.abs(np.subtract(a.value[1], b.value[1])).max() for a, b in zip(first, second, strict=True))
    for clock, key, times in (
        ("cpu", "judge_fused", [[one.value[0] for one in side] for side in (first, second)]),
        ("wall", "judge_fused_wall", [[one.seconds for one in side] for side in (first, second)]),
    ):
        pairs = Pairs("judging", {"candidates": RATED, "clock": clock}, ("one by one", "fused and shared"), *times)
        report.rows.append({**pairs.to_dict(), "largest_difference": float(worst)})
        report.ratios[key] = pairs.ratio
        lines.append([clock, *(f"{median:.2f}" for median in pairs.to_dict()["medians"]), f"{pairs.ratio:.1f}"])
    for engine in (plain, shared):
        portal.run(engine.aclose())
    headers = [f"pointwise judge, {RATED} candidates; s", "one by one", "fused, shared", "ratio"]
    report.text.append(table(headers, lines))


def _rate(judge: Judge, task: Task, texts: Sequence[str]) -> list[float]:
    [group] = portal.run(score(judge, [(task, texts)]))
    return [float(reward) for reward in group.rewards if reward is not None]


def _cpu(work: Callable[[], list[float]]) -> tuple[float, list[float]]:
    started = process_time()
    found = work()
    return process_time() - started, found


# --- pairwise: knock-out and pivot against all pairs ------------------------------------------------------------------


def _pairing(report: Report, pool: ModelPool, options: argparse.Namespace) -> None:
    tasks = sample_tasks(options.pairs, options.seed + 1, "heldout")
    with BestOfN(scorer="first", n=4 * COMPARED, sampling=HOT.replace(seed=options.seed)) as policy:
        results = list(policy.map([instruction(task) for task in tasks]))
    sampled = [[*dict.fromkeys(candidate.text for candidate in result.candidates)][:COMPARED] for result in results]
    kept = [(task, texts) for task, texts in zip(tasks, sampled, strict=True) if len(texts) == COMPARED]
    groups = [(instruction(task), texts) for task, texts in kept]
    rated = portal.run(score("likelihood:mini", groups, pool=pool))
    worth = {text: reward for group, (_, texts) in zip(rated, kept, strict=True)
             for text, reward in zip(texts, group.rewards, strict=True)}  # fmt: skip
    right = {text: verify(task, text) for task, texts in kept for text in texts}
    judges: dict[str, Any] = {"embedded model, probabilities": pool.engine("mini")}
    for wrong in (0.0, 0.05, 0.1, 0.2):
        judges[f"likelihood read backwards, {wrong:.0%} of verdicts wrong"] = _comparing(worth, wrong)
    judges["the world's checker, both right or both wrong: A"] = _comparing(right, 0.0)
    lines = []
    for name, engine in judges.items():
        winners: dict[str, list[str]] = {}
        for pairs in ("all", "knockout", "pivot"):
            scripted = isinstance(engine, ScriptedEngine)
            scorer = Judge(engine, style="pairwise", pairs=pairs, reasoning=scripted, expected=not scripted)  # type: ignore[arg-type]
            done = portal.run(score(scorer, groups, pool=pool))
            winners[pairs] = [_winner(group) for group in done]
            asked = np.mean([sum(len(each.details.verdicts) for each in group.scores) / 2 for group in done])
            same = np.mean([a == b for a, b in zip(winners[pairs], winners["all"], strict=True)])
            row = {
                "case": "pairing",
                "judge": name,
                "pairs": pairs,
                "prompts": len(kept),
                "asked": float(asked),
                "comparisons": float(asked) if pairs == "pivot" else float(asked) / 2,  # else in both orders
                "same_winner": float(same),
                "passes": float(np.mean([right[text] for text in winners[pairs]])),
            }
            report.rows.append(row)
            lines.append(
                [name, pairs, f"{row['comparisons']:.0f}", f"{asked:.0f}", f"{same:.0%}", f"{row['passes']:.0%}"]
            )
    headers = [f"judge, {COMPARED} candidates", "pairs", "comparisons", "asked", "same winner", "passes"]
    report.text.append(table(headers, lines))


def _comparing(worth: dict[str, Any], wrong: float) -> ScriptedEngine:
    """A judge that names the response that is worth more, but for a share of its verdicts."""

    def verdict(text: str, draw: int) -> str:
        found = re.search(r"Response A:\n(.*)\n\nResponse B:\n(.*)\n\nReply", text, re.DOTALL)
        assert found is not None
        errs = zlib.crc32(text.encode()) / 2**32 < wrong
        return json.dumps({"reasoning": "", "better": "AB"[(worth[found[2]] > worth[found[1]]) != errs]})

    return ScriptedEngine(verdict)


def _winner(group: Group) -> str:
    return group.candidates[int(np.argmax([-np.inf if r is None else r for r in group.rewards]))].text


# --- every scorer on the same candidates of the mini world ------------------------------------------------------------


def _picking(report: Report, pool: ModelPool, folder: Path, options: argparse.Namespace) -> None:
    tasks = sample_tasks(options.train + options.prompts, options.seed, "heldout")
    prompts = [instruction(task) for task in tasks]
    with BestOfN(scorer="logprob", n=8, sampling=Sampling(seed=options.seed, max_tokens=96)) as policy:
        candidates = [result.candidates for result in policy.map(prompts)]
    labels = [_labels(task, some) for task, some in zip(tasks, candidates, strict=True)]
    heads = _heads(pool, folder, options, prompts, candidates, labels)
    groups, labels = [*zip(prompts, candidates, strict=True)][options.train :], labels[options.train :]
    draws = bootstrap(options.prompts, options.seed)
    names, truth = np.repeat(np.arange(options.prompts), 8), np.concatenate(labels)
    rows = Labelled(States((), np.zeros((len(truth), 1, 1)), np.zeros((len(truth), 1))), truth, truth, names)
    passes: dict[str, Any] = {}
    lines = []
    for name, spec in SPECS.items():
        ready: Scorer = pool.scorer(spec.format(**heads))
        seconds, done = _spent(ready, groups, pool)
        rewards = np.array([[-np.inf if r is None else r for r in group.rewards] for group in done])
        passes[name] = np.array([expected_best(row, got, 8) for row, got in zip(labels, rewards, strict=True)])
        within = rows.in_order(rewards.ravel())
        usage = [group.usage for group in done]
        read, cached, written = (
            sum(getattr(one, field) for one in usage) / len(truth)
            for field in ("scorer_prompt_tokens", "cached_tokens", "scorer_completion_tokens")
        )
        figures = {
            "passes": interval(draws, passes[name]),
            "minus_flip": interval(draws, passes[name] - passes["flip"]),
            "auc": interval(bootstrap(len(within), options.seed), within),
            "read": read,
            "cached": cached,
            "written": written,
            "cpu_ms": 1e3 * seconds / len(truth),
            "without_reward": float(np.isinf(rewards).mean()),
        }
        report.rows.append({"case": "picking", "scorer": name, "spec": spec, **figures})
        cells = [_cell(figures[key]) for key in ("passes", "minus_flip", "auc")]
        lines.append(
            [
                name,
                *cells,
                *(f"{figures[key]:.0f}" for key in ("read", "cached", "written")),
                f"{figures['cpu_ms']:.1f}",
            ]
        )
    rates = {"random pick": np.mean(truth), "oracle": np.mean([row.max() for row in labels])}
    report.rows.append({"case": "picking", "scorer": "bounds", **{name: float(rate) for name, rate in rates.items()}})
    headers = ["mini world, best of 8", "passes", "minus FLIP", "AUC", "read", "cached", "written", "ms"]
    bounds = ", ".join(f"{name} {rate:.3f}" for name, rate in rates.items())
    report.text.append(f"{table(headers, lines)}\n{bounds}; tokens and CPU time for each candidate")


def _heads(
    pool: ModelPool,
    folder: Path,
    options: argparse.Namespace,
    prompts: Sequence[str],
    candidates: Sequence[Sequence[Candidate]],
    labels: Sequence[Any],
) -> dict[str, str]:
    """The files of heads that the first rows trained."""
    rows = zip(prompts, candidates, labels, strict=True)
    file = folder / "rows.jsonl"
    with file.open("w") as lines:
        for prompt, some, right in [*rows][: options.train]:
            texts = [candidate.text for candidate in some]
            lines.write(json.dumps({"prompt": prompt, "candidates": texts, "correct": right.tolist()}) + "\n")
    engine: Any = pool.engine("mini")
    for kind in ("probe", "bnrm"):
        train(as_dataset(str(file)), engine, "mini", kind, seed=options.seed, kept=folder / "s.npz").save(folder / kind)
    return {kind: str(folder / kind) for kind in ("probe", "bnrm")}


def _spent(scorer: Scorer, groups: Any, pool: ModelPool) -> tuple[float, list[Group]]:
    started = process_time()
    done = portal.run(score(scorer, groups, pool=pool))
    return process_time() - started, done


def _labels(task: World, candidates: Sequence[Candidate]) -> Any:
    return np.array([float(verify(task, candidate.text)) for candidate in candidates])


def _cell(found: dict[str, float] | None) -> str:
    assert found is not None
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


if __name__ == "__main__":
    script(main)
