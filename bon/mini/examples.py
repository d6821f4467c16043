"""Training examples of the mini model: a prompt and the text to learn, in both directions.

Forward (the policy's job): instruction -> response, where the response may forget or alter constraints.
Backward (the scorer's job): response -> instruction, always clean, under the very prompt that `Flip` sends with its
`direct` style.

Prompts are kept in pieces, the way inference renders them: fixed text and user text are tokenized apart and their ids
joined, so training sees the token boundaries that inference will produce.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bon.mini.tasks import corrupt, instruction, response, sample_task

_DIRECT = Path(__file__).parents[1] / "prompts" / "direct"
BACKWARD_SYSTEM: str = (_DIRECT / "system.txt").read_text("utf-8").rstrip("\n")
BACKWARD_USER: str = (_DIRECT / "user.txt").read_text("utf-8").rstrip("\n").format(context="", response="")
"""The fixed text before the response; the response is the last thing in the user message."""


@dataclass(frozen=True, slots=True)
class Example:
    """Prompt pieces, to be tokenized one by one, and the target that follows them (without its end token)."""

    prompt: tuple[str, ...]
    target: str


def forward_example(instruction: str, response: str) -> Example:
    """The policy's side: one user message, then the response."""
    return Example(("<|im_start|>user\n", instruction, "<|im_end|>\n<|im_start|>assistant\n"), response)


def backward_example(response: str, instruction: str) -> Example:
    """The scorer's side: FLIP's `direct` prompt around the response, then the instruction."""
    return Example(
        (
            "<|im_start|>system\n",
            BACKWARD_SYSTEM,
            "<|im_end|>\n<|im_start|>user\n",
            BACKWARD_USER,
            response,
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        instruction,
    )


def training_examples(rng: random.Random, drop: float, alter: float) -> Iterator[Example]:
    """Endless examples of training tasks, half of each direction; `drop` and `alter` as in `tasks.corrupt`."""
    while True:
        task = sample_task(rng, "train")
        asked = instruction(task)
        if rng.random() < 0.5:
            yield forward_example(asked, response(corrupt(task, rng, drop, alter), rng))
        else:
            yield backward_example(response(task, rng), asked)
