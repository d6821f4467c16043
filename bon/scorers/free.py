"""Rewards that cost no model: what every other one has to beat."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from typing import ClassVar, Literal

from bon.answers import Extract, as_extract, classes
from bon.errors import InputError, whole_number
from bon.scorers.base import Needs, Pending, Scorer, by_group
from bon.scorers.parsing import NO_RESPONSE, strip_think
from bon.types import Score


class Free(Scorer):
    """Scores each candidate by itself, at once."""

    concurrent = True

    @property
    def name(self) -> str:
        """What it is called in a spec."""
        return type(self).__name__.lower()

    @abstractmethod
    def reward(self, pending: Pending, text: str) -> float:
        """The reward of one candidate; its text without thinking."""

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``."""
        for position, each in enumerate(pending):
            text = strip_think(each.candidate.text)
            yield position, Score(self.reward(each, text)) if text.strip() else NO_RESPONSE


class Longest(Free):
    """Scores candidates by their length in characters."""

    def reward(self, pending: Pending, text: str) -> float:
        """Characters."""
        return float(len(text))


class Shortest(Free):
    """Scores candidates by their length in characters, the shorter the better."""

    def reward(self, pending: Pending, text: str) -> float:
        """Characters, negative."""
        return -float(len(text))


class First(Free):
    """Scores candidates by their place: the first is the best. It is what one sample would have been."""

    def reward(self, pending: Pending, text: str) -> float:
        """The index, negative."""
        return -float(pending.candidate.index)


class Chance(Free):
    """Scores candidates by chance, the same text of the same task always alike.

    Args:
        seed: another one is another draw.

    Raises:
        InputError: seed < 0.
    """

    range = (0.0, 1.0)

    def __init__(self, seed: int = 0) -> None:
        self.seed = whole_number("seed", seed, 0)

    @property
    def name(self) -> str:
        """What it is called in a spec."""
        return "random"

    def reward(self, pending: Pending, text: str) -> float:
        """A number in [0, 1)."""
        content = f"{self.seed}\0{pending.task.instruction}\0{text}"
        return int.from_bytes(hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=6).digest()) / 2**48


class Logprob(Scorer):
    """Scores candidates by their log-probability under the policy that sampled them, in nats.

    A candidate that came from elsewhere has none, and no reward.

    Args:
        over: "mean" per token, or the "sum", which prefers short candidates.

    Raises:
        InputError: another word.
    """

    needs: ClassVar[Needs] = Needs(logprobs=True)
    concurrent = True

    def __init__(self, over: Literal["mean", "sum"] = "mean") -> None:
        if over not in ("mean", "sum"):
            raise InputError(f"logprob is the mean or the sum, not {over!r}: write logprob:mean or logprob:sum.")
        self.over = over

    @property
    def name(self) -> str:
        """What it is called in a spec."""
        return f"logprob-{self.over}"

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``."""
        for position, each in enumerate(pending):
            if not strip_think(each.candidate.text).strip():
                yield position, NO_RESPONSE
                continue
            total, tokens = each.candidate.cumulative_logprob, each.candidate.completion_tokens
            if total is None or not tokens:
                yield position, Score(None, "failed", "the policy gave no log-probabilities of this candidate")
            else:
                yield position, Score(total if self.over == "sum" else total / tokens)


class Majority(Scorer):
    """Scores candidates by the share of the candidates with the same final answer (self-consistency, 2203.11171).

    A candidate without an answer has no vote and the reward 0.

    Args:
        extract: "number", "boxed" or "choice"; a regular expression, whose last match is the answer (its first group,
            if it has one); or a function from a text to an answer or None. Answers that ``math-verify`` finds equal are
            the same, where it is installed.

    Raises:
        InputError: none of these.
    """

    needs: ClassVar[Needs] = Needs(group=True, all_rewards=True)
    concurrent = True
    range = (0.0, 1.0)

    def __init__(self, extract: str | Extract) -> None:
        self.extract = as_extract(extract)
        self._shown = extract if isinstance(extract, str) else "function"

    @property
    def name(self) -> str:
        """Kind and what it looks for."""
        return f"majority({self._shown})"

    async def score(self, pending: Sequence[Pending]) -> AsyncGenerator[tuple[int, Score], None]:
        """Score every candidate; see ``Scorer.score``."""
        for positions in by_group(pending):
            answers = [self.extract(strip_think(pending[position].candidate.text)) for position in positions]
            found = classes(answers)
            votes = Counter(one for one in found if one is not None)
            for position, answer, one in zip(positions, answers, found, strict=True):
                if one is None:
                    yield position, Score(0.0, reason="it has no answer that could be found, and so no vote")
                else:
                    yield position, Score(votes[one] / len(positions), explanation=answer)
