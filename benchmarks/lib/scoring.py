"""What fusing candidates into one batch and sharing their prefixes saves: whole calls of the scoring stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bon import portal
from bon.bench.forward import PLAIN, SHARED
from bon.bench.harness import interleave
from bon.pipeline import score
from bon.scorers.base import Scorer
from bon.task import Task

ONE_BY_ONE, FUSED, FUSED_SHARED = "one by one", "fused", "fused and shared"


def measure_scoring(
    scorers: Mapping[str, Scorer], task: Task, candidates: Callable[[int], Sequence[str]], rounds: int
) -> dict[str, list[float]]:
    """Seconds to score all candidates: one call for each, one call for all, one call for all with shared prefixes.

    Nothing is pruned, so that every side decodes every token.

    Args:
        scorers: the scorer without sharing under ``PLAIN``, with sharing under ``SHARED``.
        task: what the candidates answer.
        candidates: round -> texts.
        rounds: how often.
    """

    def rewards(name: str, texts: Sequence[str]) -> Sequence[float | None]:
        [group] = portal.run(score(scorers[name], [(task, texts)]))
        return group.rewards

    sides: dict[str, Callable[[int], Sequence[float | None]]] = {
        ONE_BY_ONE: lambda r: [reward for text in candidates(r) for reward in rewards(PLAIN, [text])],
        FUSED: lambda r: rewards(PLAIN, candidates(r)),
        FUSED_SHARED: lambda r: rewards(SHARED, candidates(r)),
    }
    timed = interleave(sides, rounds, label="scoring")
    return {name: [t.seconds for t in of_side] for name, of_side in timed.items()}
