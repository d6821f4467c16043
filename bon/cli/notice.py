"""Sentences that more than one command says: what the embedded model does not know, and what was saved."""

from __future__ import annotations

from bon.cli.console import say
from bon.types import Saved


def off_world(*, ranked: bool = False) -> None:
    """Say that the prompt is outside the embedded model's world, and how to get a real model."""
    from bon.mini.tasks import sample_instructions

    say(_plainly(ranked))
    for example in sample_instructions(2):
        say(f"  it knows, for example: {example}")
    say(_remedy(ranked))


def off_world_summary(count: int, rows: int, *, ranked: bool = False) -> str:
    """The same for a file, in one line."""
    return f"{count} of {rows} prompts are outside its world: {_plainly(ranked)} {_remedy(ranked)}"


def said_of(saved: Saved) -> str:
    """What was left undone, and what that saved the scorer; "" when nothing was."""
    counts = {"not sampled": saved.unsampled, "pruned": saved.pruned, "scored as copies": saved.copies}
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    if saved.drafted:
        parts.append(f"{saved.drafted} tokens drafted")
    if parts:
        parts.append(f"which saved about {saved.share:.0%} of the scorer's decoding (an estimate)")
    return ", ".join(parts)


def _plainly(ranked: bool) -> str:
    what = "scores" if ranked else "writes and scores"
    return f"the embedded model knows a small world of writing tasks only; what it {what} beyond that means nothing."


def _remedy(ranked: bool) -> str:
    flag = "--flip Qwen/Qwen3-0.6B" if ranked else "--policy Qwen/Qwen3-0.6B"
    return f"For a real model name one, for example {flag} (`bon tasks` lists what the embedded one knows)."
