"""What a reader of a result must know before relying on it, each as one sentence (``Result.warnings``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bon.engines.base import Engine
from bon.mini import WEIGHTS, shown_name
from bon.mini.tasks import knows
from bon.task import Task
from bon.types import Candidate, Sampling, Score, Selection

OFF_WORLD = (
    "the embedded model knows a small world of writing tasks only (`bon tasks` prints one of each kind): what it "
    "writes and scores beyond that means nothing."
)
_EMBEDDED = shown_name(WEIGHTS)


def of_task(task: Task, engines: Sequence[Engine | None]) -> Iterator[str]:
    """What can be said before anything is sampled: the embedded model is asked for what it cannot do.

    Args:
        task: what is asked.
        engines: of policy and scorer.
    """
    embedded = any(engine is not None and engine.name == _EMBEDDED for engine in engines)
    if embedded and not knows(task.messages[-1].content):
        yield OFF_WORLD


def of_sampling(sampling: Sampling, n: int) -> Iterator[str]:
    """What can be said of how ``n`` candidates are sampled."""
    if n > 1 and sampling.temperature == 0:
        yield f"at temperature 0 the {n} candidates are {n} times the same greedy one: raise temperature, or take n=1."


def of_result(candidates: Sequence[Candidate], scores: Sequence[Score], selection: Selection) -> Iterator[str]:
    """What the rewards and the winner say of themselves."""
    rewarded = {c.text: score for c, score in zip(candidates, scores, strict=True) if score.reward is not None}
    rewards = {score.reward for score in rewarded.values()}
    if len(rewarded) > 1 and len(rewards) == 1 and all(score.status != "pruned" for score in scores):
        [reward] = rewards
        yield f"all rewards are {reward:.4g}, so they say nothing: the tie-break picked."
    statuses = [score.status for score in scores if score.reward is not None]
    echoes, won = statuses.count("echo"), selection.best is not None and scores[selection.best].status == "echo"
    if won or 2 * echoes > len(statuses):
        yield (
            f"of {len(statuses)} candidates the scorer repeated {echoes}, where it should infer an instruction: such a "
            "reward means nothing. Take style=turns, a bigger model, or another scorer."
        )
    if selection.best is not None and candidates[selection.best].finish_reason == "length":
        yield "the winner was cut off by the token limit: raise max_tokens."
