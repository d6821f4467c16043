"""Best-of-N as its-hub 1.2 does it, with FLIP as its outcome reward model; a process in its-hub's own environment.

The first line on stdin is the setting, each further one a prompt; each prompt is answered by a line on stdout. Only
the standard library and its-hub are imported, because bon is not installed where this runs.
"""

from __future__ import annotations

import asyncio
import json
import re
import string
import sys
from collections import Counter
from time import perf_counter
from typing import Any

from its_hub import BestOfN, OpenAICompatibleLanguageModel
from its_hub.api import AbstractOutcomeRewardModel
from its_hub.api.types import ChatMessage


class Flip(AbstractOutcomeRewardModel):  # type: ignore[misc]
    """Scores all responses at once: one request each, made by the orchestrator that samples as well."""

    def __init__(self, lm: Any, setting: dict[str, Any]) -> None:
        self._lm, self._setting = lm, setting

    def score(self, messages: Any, **_: Any) -> list[float]:
        """Not supported; the base class wants it."""
        raise NotImplementedError("its-hub's BestOfN awaits ascore")

    async def ascore(self, messages: Any, orchestrator: Any = None, **_: Any) -> list[float]:
        """Reward of each conversation's last message."""
        asked = [self._prompt(conversation[-1].extract_text_content()) for conversation in messages]
        tokens = self._setting["scorer_max_tokens"]
        answers = await orchestrator.agenerate(self._lm, asked, temperature=0.0, max_completion_tokens=tokens)
        instructions = [conversation[0].extract_text_content() for conversation in messages]
        return [word_f1(a["content"], text) for a, text in zip(answers, instructions, strict=True)]

    def _prompt(self, response: str) -> list[ChatMessage]:
        user = self._setting["user"].replace("{context}", "").replace("{response}", response)
        return [ChatMessage("system", self._setting["system"]), ChatMessage("user", user)]


def word_f1(inferred: str, instruction: str) -> float:
    """F1 of two texts' words, as in the FLIP paper."""
    a, b = _words(inferred), _words(instruction)
    common = sum((a & b).values())
    return 2 * common / (a.total() + b.total()) if common else 0.0


def _words(text: str) -> Counter[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return Counter(re.sub(r"\b(a|an|the)\b", " ", bare).split())


async def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # its-hub prints what it tries again
    setting = json.loads(sys.stdin.readline())
    lm = OpenAICompatibleLanguageModel(
        setting["url"],
        "none",
        setting["model"],
        temperature=setting["temperature"],
        max_completion_tokens=setting["max_tokens"],
    )
    best_of_n = BestOfN(Flip(lm, setting))
    # Read on a thread: the loop has to run between prompts, or it would not see the server close idle connections.
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        started = perf_counter()
        result = await best_of_n.ainfer(lm, asked["prompt"], asked["n"], return_response_only=False)
        seconds = perf_counter() - started
        print(json.dumps({"seconds": seconds, "reward": max(result.scores)}), file=answers, flush=True)
    await lm.close()


if __name__ == "__main__":
    asyncio.run(main())
