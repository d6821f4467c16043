"""What pruning could save at best, and what scoring identical candidates once saves before it."""

from __future__ import annotations

from bon import portal
from bon.bench.pruning import EVERYTHING, Pruning, decoded
from bon.group import Group
from bon.scorers.base import Scorer


def headroom(measured: Pruning, scorer: Scorer) -> dict[str, float | None]:
    """Shares of all scorer decode tokens, for the report.

    Args:
        measured: by ``measure_pruning``.
        scorer: that was measured.

    Returns:
        ``possible_in_step``: what the best possible bound saves while rows decode in step; None where they do not.
        ``possible_informed``: what drafts and a bound save that knows the winner's reward from the start. No schedule
        does better with the same bound; one that scores the winner first comes near. ``saved_on_duplicates``: what
        scoring identical candidates once saves, before anything is pruned.
    """
    return {
        "possible_in_step": None if measured.sampled else possible_in_step(measured),
        "possible_informed": portal.run(_possible_informed(measured, scorer)),
        "saved_on_duplicates": _saved_on_duplicates(measured),
    }


def headroom_text(shares: dict[str, float | None]) -> str:
    """The same in sentences."""
    sentences = {
        "possible_in_step": "Without drafts the best possible bound saves {:.1%} while rows decode in step.",
        "possible_informed": "Drafts and a bound that knows the winner's reward save {:.1%}.",
        "saved_on_duplicates": "Scoring identical candidates once had saved {:.1%} before.",
    }
    return "\n".join(text.format(shares[name]) for name, text in sentences.items() if shares[name] is not None)


def possible_in_step(measured: Pruning) -> float:
    """Share of decode tokens that the best possible bound could save while all rows decode in step.

    A reconstruction can only lose against one that ended before: at best it is given up at the first step at which a
    higher reward than its own final one is known.
    """
    saved = 0
    for result in measured.results[EVERYTHING]:
        ended = [(s.tokens, -1.0 if s.reward is None else s.reward) for s in result.scores if s.same_as is None]
        for tokens, reward in ended:
            known = min((at for at, better in ended if better > reward), default=tokens)
            saved += max(0, tokens - known)
    return saved / _all(measured)


async def _possible_informed(measured: Pruning, scorer: Scorer) -> float:
    spent = 0
    for result in measured.results[EVERYTHING]:
        group = Group.of(result.task, result.candidates, prune=True)
        group.best_reward = result.reward
        spent += sum([decoded(score.usage) async for _, score in scorer.score(group.pending())])
    return 1 - spent / _all(measured)


def _saved_on_duplicates(measured: Pruning) -> float:
    every = [
        result.scores[index if score.same_as is None else score.same_as].tokens
        for result in measured.results[EVERYTHING]
        for index, score in enumerate(result.scores)
    ]
    return 1 - _all(measured) / max(1, sum(every))


def _all(measured: Pruning) -> int:
    return max(1, sum(measured.tokens(EVERYTHING)))
