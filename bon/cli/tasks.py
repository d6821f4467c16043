"""``bon tasks``: what the embedded model can be asked."""

from __future__ import annotations

from typing import Annotated

import typer

MOST = 10_000
"""The world is finite; beyond this, new instructions become hard to find."""


def tasks(
    count: Annotated[int | None, typer.Option("--count", min=1, max=MOST, help="One of each kind by default.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed, the same instructions.")] = 0,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print rows for bon run.")] = False,
) -> int:
    """Print instructions of the embedded model's world, none of which it was trained on."""
    from bon.cli.terminal import print_json
    from bon.mini.tasks import FAMILIES, instruction, sample_tasks

    for index, task in enumerate(sample_tasks(count or len(FAMILIES), seed)):
        if jsonl:
            print_json({"id": f"{task.family}-{index}", "prompt": instruction(task), "family": task.family})
        else:
            print(instruction(task))
    return 0
