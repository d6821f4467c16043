"""FLIP's reward for processes in which bon is not installed; the standard library only."""

from __future__ import annotations

import json
import re
import string
import sys
from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any


def word_f1(inferred: str, instruction: str) -> float:
    """F1 of two texts' words, as in the FLIP paper."""
    a, b = _words(inferred), _words(instruction)
    common = sum((a & b).values())
    return 2 * common / (a.total() + b.total()) if common else 0.0


def _words(text: str) -> Counter[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return Counter(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def inversion(setting: dict[str, Any], response: str) -> list[dict[str, str]]:
    """The messages that ask for the instruction behind a response."""
    user = setting["user"].replace("{context}", "").replace("{response}", response)
    return [{"role": "system", "content": setting["system"]}, {"role": "user", "content": user}]


def serve(made: Callable[[dict[str, Any]], Callable[[str, int], str]]) -> None:
    """Answer prompts: the first line on stdin is the setting, each further one a prompt, which gets a line on stdout.

    Args:
        made: takes the setting, returns what finds the best of n answers to a prompt.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    best = made(json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        asked = json.loads(line)
        started = perf_counter()
        text = best(asked["prompt"], asked["n"])
        print(json.dumps({"seconds": perf_counter() - started, "text": text}), file=answers, flush=True)
