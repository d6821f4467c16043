"""What vLLM is spared and what starting it costs: tokens served from the prefix cache; two engines against one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bon import portal
from bon.bench.harness import Pairs, Timed, interleave
from bon.best_of_n import BestOfN
from bon.models import Model, ModelPool
from bon.scorers.flip import Flip
from bon.scorers.parsing import response_piece
from bon.spec import ENGINES
from bon.task import Task
from bon.types import Candidate, Sampling
from lib.opening import Models

ONE, TWO = "one engine", "two engines"


def measure_cached_share(models: Models, tasks: Sequence[Task], scorer: Flip, n: int, sampling: Sampling) -> Pairs:
    """Count tokens of scoring prompts that came from the prefix cache, and those that could have.

    What the prompts of a task's candidates have in common (the preamble and the history) could come from the cache for
    all candidates but the first. The cache is emptied between sampling and scoring, and all candidates are scored at
    the same time. Only whole blocks are shared.

    Args:
        models: on vLLM.
        tasks: with a history; one measurement for each.
        scorer: what scores.
        n: candidates.
        sampling: of the candidates.
    """
    bon = BestOfN(models.policy, scorer, n=n, sampling=sampling, prune=False)
    served, possible = [], []
    for task in tasks:
        candidates = portal.run(bon.run(task)).candidates
        models.forget()
        result = portal.run(bon.run_rerank(task, candidates))
        scored = [candidates[s.candidate] for s in result.scores if s.same_as is None and s.status != "empty"]
        served.append(float(result.usage.cached_tokens))
        possible.append(float((len(scored) - 1) * _common(models.scorer, scorer, task, scored)))
    return Pairs("cached_share", {"n": n}, ("from the cache", "could be"), served, possible, "tokens")


def _common(engine: Any, scorer: Flip, task: Task, candidates: Sequence[Candidate]) -> int:
    """Tokens with which the scoring prompts of all candidates begin."""
    pieces = [piece for candidate in candidates if (piece := response_piece(candidate)) is not None]
    prompts = [engine.renderer.render(scorer.style.prompt(task, piece, scorer.template)) for piece in pieces]
    return next((i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1), 0)


def measure_start(model: str | Path, rounds: int, **options: Any) -> Pairs:
    """Time the start of two vLLM engines of a model at the same time, and of one.

    Not timed are the import of vLLM, which comes once, and freeing the engines.

    Args:
        model: a folder.
        rounds: pairs.
        options: of the engines.
    """
    pool = ModelPool()
    named = [Model(str(model), "vllm", {**options, "seed": seed}) for seed in range(2)]  # or they were the same model

    def free() -> None:
        portal.run(pool.aclose())

    ENGINES.load("vllm")
    sides: dict[str, Callable[[int], None]] = {
        ONE: lambda round_: pool.load(named[:1]),
        TWO: lambda round_: pool.load(named),
    }
    timed: dict[str, list[Timed[None]]] = interleave(sides, rounds, warmup=0, label="start-up", before=free)
    free()
    seconds = {name: [t.seconds for t in ts] for name, ts in timed.items()}
    return Pairs("two_engine_start", {}, (TWO, ONE), seconds[TWO], seconds[ONE])
