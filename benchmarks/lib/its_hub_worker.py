"""Best-of-N as its-hub 1.2 does it, with FLIP as its outcome reward model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from f1 import inversion, serve, word_f1
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
        asked = [
            [ChatMessage(**message) for message in inversion(self._setting, conversation[-1].extract_text_content())]
            for conversation in messages
        ]
        tokens = self._setting["scorer_max_tokens"]
        answers = await orchestrator.agenerate(self._lm, asked, temperature=0.0, max_completion_tokens=tokens)
        instructions = [conversation[0].extract_text_content() for conversation in messages]
        return [word_f1(a["content"], text) for a, text in zip(answers, instructions, strict=True)]


def made(setting: dict[str, Any]) -> Callable[[str, int], str]:
    """What finds the best of n answers to a prompt."""
    lm = OpenAICompatibleLanguageModel(
        setting["url"],
        "none",
        setting["model"],
        temperature=setting["temperature"],
        max_completion_tokens=setting["max_tokens"],
    )
    best_of_n = BestOfN(Flip(lm, setting))
    # The loop has to run between prompts, or it would not see the server close idle connections.
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    async def infer(prompt: str, n: int) -> str:
        result = await best_of_n.ainfer(lm, prompt, n, return_response_only=False)
        text: str = result.the_one["content"]
        return text

    return lambda prompt, n: asyncio.run_coroutine_threadsafe(infer(prompt, n), loop).result()


if __name__ == "__main__":
    serve(made)
