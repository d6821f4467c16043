"""Best-of-N as optillm's approach ``bon`` does it: a request for n answers, then the model rates one after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from f1 import serve
from openai import OpenAI
from optillm.bon import best_of_n_sampling


def made(setting: dict[str, Any]) -> Callable[[str, int], str]:
    """What finds the best of n answers to a prompt."""
    client = OpenAI(base_url=setting["url"], api_key="none")

    def best(prompt: str, n: int) -> str:
        config = {"max_tokens": setting["max_tokens"], "temperature": setting["temperature"]}
        text, _ = best_of_n_sampling("", prompt, client, setting["model"], n, config)
        return str(text)

    return best


if __name__ == "__main__":
    serve(made)
