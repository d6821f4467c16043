"""Best-of-N as DSPy's ``BestOfN`` does it: one attempt after the other, until FLIP's reward is 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dspy
from f1 import inversion, serve, word_f1


class Plain(dspy.Adapter):  # type: ignore[misc]
    """The question as it is and the answer as it comes: a model of a million parameters knows no format of fields."""

    def format(self, signature: Any, demos: Any, inputs: dict[str, Any]) -> list[dict[str, str]]:
        """Messages of one question."""
        return [{"role": "user", "content": inputs["question"]}]

    def parse(self, signature: Any, completion: str) -> dict[str, str]:
        """The fields of a completion."""
        return {"answer": completion}


def made(setting: dict[str, Any]) -> Callable[[str, int], str]:
    """What finds the best of n answers to a prompt."""
    name, at = f"openai/{setting['model']}", {"api_base": setting["url"], "api_key": "none", "cache": False}
    lm = dspy.LM(name, temperature=setting["temperature"], max_tokens=setting["max_tokens"], **at)
    reader = dspy.LM(name, temperature=0.0, max_tokens=setting["scorer_max_tokens"], **at)
    dspy.configure(lm=lm, adapter=Plain())

    def reward(asked: dict[str, str], found: Any) -> float:
        return word_f1(reader(messages=inversion(setting, found.answer))[0], asked["question"])

    def best(prompt: str, n: int) -> str:
        answer: str = dspy.BestOfN(dspy.Predict("question -> answer"), n, reward, 1.0)(question=prompt).answer
        return answer

    return best


if __name__ == "__main__":
    serve(made)
