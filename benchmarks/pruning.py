"""Pruning: how many of the scorer's decode steps need not be taken, with the same winner.

On the torch engine, at n=16 on the mini world, drafts and pruning save at least a tenth of the scorer's decode tokens
(`pruning_saved`), and on every prompt the winner and its reward are what they are without. Rows decode in step there,
so a candidate can only be given up against rewards of reconstructions that ended earlier in the same batch.

With `--engine vllm`, where candidates are scored as they finish, drafts, pruning and stopping at the maximum reward
save at least three tenths (`scorer_tokens_saved`), with the same winner's reward on every prompt; what each of them
adds stands in the table. `--dummy` shows what watching reconstructions grow costs on a large model; what is saved then
says nothing.
"""

from __future__ import annotations

import argparse

from bon.bench.harness import Report, conditions
from bon.bench.pruning import PRUNED, STOPPED, measure_pruning
from bon.mini.tasks import sample_instructions
from bon.scorers.flip import Flip
from bon.task import Task
from bon.types import Sampling
from lib.headroom import headroom, headroom_text
from lib.opening import forced, model_options, open_models
from lib.scripts import parser, script


def main(argv: list[str] | None = None) -> None:
    options = _options(argv)
    count = options.prompts or (6 if options.quick else 100)
    tasks = [Task.of(text) for text in sample_instructions(count, options.seed)]
    models = open_models(options)
    try:
        writing, reading = (forced(e) if models.dummy else {} for e in (models.policy, models.scorer))
        scorer = Flip(models.scorer, sampling=Sampling(temperature=0.0, max_tokens=options.max_tokens, extra=reading))
        sampling = Sampling(max_tokens=options.max_tokens, seed=options.seed, extra=writing)
        card = conditions(seed=options.seed, dtype=options.dtype, engine=options.engine, prompts=count, **models.facts)
        # On vLLM the rounding of the arithmetic depends on what else is running.
        exact = options.engine == "torch" and options.dtype == "float32"
        measured = measure_pruning(models.policy, scorer, tasks, options.n, sampling, exact=exact, before=models.forget)
        shares = headroom(measured, scorer)
    finally:
        models.close()
    report = Report(
        "pruning",
        {**card, "n": options.n, "max_tokens": options.max_tokens},
        rows=[{**row, **shares} for row in measured.rows()],
    )
    if options.engine == "vllm":
        report.ratios["scorer_tokens_saved"] = measured.saved(STOPPED)
    else:
        report.ratios = {
            "pruning_saved": measured.saved(PRUNED),
            "pruning_saved_stopping": measured.saved(STOPPED),
            "pruning_time": measured.time(PRUNED),
            "pruning_time_stopping": measured.time(STOPPED),
        }
    report.text.append(f"{measured.text()}\n{headroom_text(shares)}")
    report.emit(options.out)


def _options(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__ or "")
    model_options(options)
    options.add_argument("--prompts", type=int, metavar="COUNT", help="from the mini world; 100, or 6 with --quick")
    options.add_argument("--n", type=int, default=16, help="candidates for each prompt")
    options.add_argument("--max-tokens", type=int, default=96, help="of a response and of a reconstruction")
    return options.parse_args(argv)


if __name__ == "__main__":
    script(main)
