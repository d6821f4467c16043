"""Latency of best-of-N, one prompt at a time: what scoring adds to sampling.

On the torch engine: best-of-16 takes at most twice as long as sampling 16 alone with FLIP `direct`, although the mini
model's reconstructions are as long as its responses (`overhead_bon16`), and at most 1.3 times with the likelihood
scorer, which decodes nothing (`overhead_bon16_likelihood`).

With `--engine vllm` beside the same work written against vLLM itself, with response lengths drawn from real ones: at
most 1.35 times sampling 16 alone (`overhead_bon16`; 1.15 on a GPU with the shapes of a 4B policy and a 0.6B scorer), no
more than 1.03 times a barrier and one batch of scores where every reward is asked for (`vs_gather`), 0.8 times where
the first maximum ends it, in the mini world with its real rewards (`vs_gather_stopping`), half of scoring one by one
(`vs_one_by_one`, N=32); 0.9 of what the prefix cache could serve comes from it (`cached_share`), and two engines start
in 1.3 times the time of one (`two_engine_start`; of the mini model with `--dummy`, where nothing depends on the text
and `vs_gather_stopping` is left out).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bon.bench.harness import Report, conditions
from bon.bench.latency import latency_table, measure_latency
from bon.mini import WEIGHTS
from bon.mini.tasks import sample_instructions
from bon.scorers.flip import Flip
from bon.scorers.likelihood import BackwardLikelihood
from bon.task import Message, Task
from bon.types import Sampling
from lib.lengths import real_lengths
from lib.models import Filler
from lib.opening import Models, forced, model_options, open_models
from lib.scripts import parser, script

NS = (1, 2, 4, 8, 16, 32, 64)
FLIP, LIKELIHOOD = "FLIP direct", "likelihood"
LENGTHS = Path(__file__).parent.parent.parent / "shared" / "data" / "alpacaeval_dev.jsonl"
HISTORY = 300  # tokens of the conversation before the prompt whose share from the cache is counted
NOTES = {
    "candidates": "one request each on all sides, with the same token ids, seeds and lengths",
    "prefix_cache": "on; emptied before each side of each round",
}


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    models = open_models(options)
    try:
        card = conditions(seed=options.seed, dtype=options.dtype, engine=options.engine, **models.facts)
        report = _on_vllm(models, options, card) if options.engine == "vllm" else _on_torch(models, options, card)
    finally:
        models.close()
    if options.engine == "vllm":
        _start(report, options)
    report.emit(options.out)


def _on_torch(models: Models, options: argparse.Namespace, card: dict[str, Any]) -> Report:
    count = options.prompts or (5 if options.quick else 40)
    ns = options.n or ((1, 16) if options.quick else NS[:-1])
    sampling = Sampling(max_tokens=options.max_tokens, seed=options.seed)
    tasks = [Task.of(text) for text in sample_instructions(count, options.seed)]
    scorers = {
        FLIP: Flip(models.scorer, sampling=Sampling(temperature=0.0, max_tokens=options.max_tokens)),
        LIKELIHOOD: BackwardLikelihood(models.scorer),
    }
    latencies = measure_latency(models.policy, scorers, tasks, ns, sampling)
    facts = {"prompts": count, "max_tokens": options.max_tokens, "temperature": sampling.drawing.temperature}
    report = Report("latency", {**card, **facts}, text=[latency_table(latencies)])
    for latency in latencies:
        report.rows += latency.rows()
        if latency.n == 16:
            report.ratios["overhead_bon16"] = latency.overhead(FLIP)
            report.ratios["overhead_bon16_likelihood"] = latency.overhead(LIKELIHOOD)
    return report


def _on_vllm(models: Models, options: argparse.Namespace, card: dict[str, Any]) -> Report:
    from lib import schedules as s
    from lib.resources import measure_cached_share

    rounds = options.prompts or (3 if options.quick else 8)
    ns = options.n or ((1, 16, 32) if options.quick else NS)
    jobs = _real_jobs(models, options, rounds, max(ns))
    report = Report("latency", {**card, "prompts": rounds, "lengths": _source(options), **NOTES})
    sides = (s.ALONE, s.ONE_BY_ONE, s.GATHER, s.BON, s.EVERYTHING)
    measured = [s.measure_schedules(models, "real lengths", jobs, n, sides) for n in ns]
    report.text.append(s.schedules_table(measured))
    for at in measured:
        report.rows += at.rows()
        if at.n == 16:
            report.ratios["overhead_bon16"] = at.ratio(s.BON, s.ALONE)
            report.ratios["vs_gather"] = at.ratio(s.EVERYTHING, s.GATHER)
        if at.n == 32:
            report.ratios["vs_one_by_one"] = at.ratio(s.BON, s.ONE_BY_ONE)
    if not models.dummy:
        sides = (s.ALONE, s.TOGETHER, s.GATHER, s.EVERYTHING, s.STOPPING)
        mini = s.measure_schedules(models, "mini world", _mini_jobs(models, options, 4 * rounds), 16, sides)
        report.ratios["vs_gather_stopping"] = mini.ratio(s.STOPPING, s.GATHER)
        same = f"Winner's reward as with {s.GATHER}: {mini.same_rewards(s.STOPPING, s.GATHER)} of {4 * rounds} prompts."
        report.text.append(f"{s.schedules_table([mini])}\n{same}")
        report.rows += mini.rows()
    job = jobs[0]
    cached = measure_cached_share(
        models, _with_history(models, options, rounds), job.scorer, 16, job.sampling.replace(max_tokens=64)
    )
    report.ratios["cached_share"] = cached.ratio
    report.rows.append(cached.to_dict())
    return report


def _real_jobs(models: Models, options: argparse.Namespace, count: int, n: int) -> list[Any]:
    """Prompts, candidates and reconstructions of real lengths; the words are fillers."""
    from lib.plain import Job

    contexts = [m for m in (models.policy.max_model_len, models.scorer.max_model_len) if m]
    filler = _filler(models, options)
    writing, reading = (forced(engine) for engine in (models.policy, models.scorer))
    jobs = []
    for drawn in real_lengths(options.lengths, count, n, context=min(contexts, default=None), seed=options.seed):
        sampling = Sampling(max_tokens=max(drawn.responses), seed=options.seed, extra=writing)
        scoring = Sampling(temperature=0.0, max_tokens=drawn.instruction, extra=reading)
        scorer = Flip(models.scorer, sampling=scoring)
        jobs.append(Job(Task.of(filler(drawn.instruction)), sampling, scorer, drawn.responses))
    return jobs


def _mini_jobs(models: Models, options: argparse.Namespace, count: int) -> list[Any]:
    """Instructions of the mini world, whose candidates and rewards are what the model makes of them."""
    from lib.plain import Job

    sampling = Sampling(max_tokens=options.max_tokens, seed=options.seed)
    scorer = Flip(models.scorer, sampling=Sampling(temperature=0.0, max_tokens=options.max_tokens))
    return [Job(Task.of(text), sampling, scorer) for text in sample_instructions(count, options.seed)]


def _with_history(models: Models, options: argparse.Namespace, count: int) -> list[Task]:
    filler = _filler(models, options)

    def turn(role: str, tokens: int) -> Message:
        return Message(role, filler(tokens))

    return [
        Task.of([turn("user", HISTORY // 2), turn("assistant", HISTORY // 2), turn("user", 24)]) for _ in range(count)
    ]


def _filler(models: Models, options: argparse.Namespace) -> Filler:
    return Filler(models.policy.renderer.tokenizer, options.seed)


def _start(report: Report, options: argparse.Namespace) -> None:
    """Two engines of the policy's model, and one, started while nothing else is."""
    from lib.resources import measure_start

    start = measure_start(options.policy or WEIGHTS, 1 if options.quick else 3, dtype=options.dtype)
    report.ratios["two_engine_start"] = start.ratio
    report.rows.append(start.to_dict())
    lines = [f"{key}: {spread:.3f} (quartiles)" for key, spread in report.ratios.items()]
    report.text.append("\n".join(lines))


def _source(options: argparse.Namespace) -> str:
    words = "4/3 tokens a word"
    if options.lengths.exists():
        return f"of the instructions and responses in {options.lengths.name}, {words}"
    return f"of the mini world's instructions and responses, {words}, because there is no {options.lengths.name}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    model_options(options)
    options.add_argument("--prompts", type=int, metavar="COUNT", help="rounds; torch 40 (quick 5), vllm 8 (quick 3)")
    options.add_argument("--n", type=int, nargs="+", help="candidates; 1 to 32 or 64, fewer sizes with --quick")
    options.add_argument("--max-tokens", type=int, default=96, help="where the model ends a text: of a response, too")
    options.add_argument("--lengths", type=Path, default=LENGTHS, help="real responses, whose lengths are drawn")
    return options.parse_args(argv)


if __name__ == "__main__":
    script(main)
