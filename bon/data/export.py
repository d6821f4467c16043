"""Results as rows that trainers read: preference pairs, groups with rewards, and winners.

Each export is a function of one result that gives its rows, as many as there are; ``refused`` counts what it left out,
by reason. Messages have TRL's conversational form, in which the answer is a list of one message of the assistant. Its
prompt does not hold what a last message of the assistant prescribed: an answer begins with that.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bon.data.sink import to_json
from bon.engines.base import Prompt, Rates
from bon.errors import BonError, InputError, MissingExtraError, UnknownNameError, number, whole_number
from bon.task import Task, openai_message, without_calls
from bon.types import Candidate, Result, Score

Rated = tuple[float, Candidate, Score]
"""What a candidate is ordered by, and what is known of it."""

PAIRINGS = ("best-worst", "best-random", "adjacent", "optimistic")
"""Which candidates of a prompt make pairs; see ``Pairs``."""

_STEADY = 1e-4  # added to the standard deviation that advantages are divided by, as TRL's GRPO does


@dataclass(frozen=True, kw_only=True)
class Export(ABC):
    """What all exports share.

    Args:
        keep: names of the prompt's own columns that its rows keep.

    Attributes:
        refused: what was left out, by reason.
    """

    own: ClassVar[frozenset[str]] = frozenset()
    """Columns that its rows have beside ``id`` and ``prompt``."""

    keep: Sequence[str] = ()
    refused: Counter[str] = field(default_factory=Counter, compare=False, repr=False)

    @abstractmethod
    def __call__(self, result: Result) -> list[dict[str, Any]]:
        """The rows of a prompt."""

    def _head(self, result: Result) -> dict[str, Any]:
        """What every row begins with: ``id`` (the row's, else its number, as text), ``prompt``, and what it keeps."""
        task = result.task
        known = task.metadata
        identity = known.get("id", known.get("line"))
        for name in self.keep:
            if name in self.own | {"id", "prompt"}:
                raise InputError(f"the column {name!r} cannot be kept: the rows have one of that name of their own.")
            if name not in known and name != "reference":
                columns = ", ".join(map(repr, known)) or "none"
                raise InputError(f"the row has no column {name!r} to keep. Its columns: {columns:.200}.")
        kept = {name: task.reference if name == "reference" else known[name] for name in self.keep}
        return {"id": None if identity is None else str(identity), "prompt": prompt_of(task), **kept}

    def _ended(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that were not cut off: the others have no end to learn."""
        ended = [c for c in candidates if c.finish_reason != "length"]
        self.refused["candidates that were cut off"] += len(candidates) - len(ended)
        return ended

    def _rated(self, result: Result) -> list[tuple[Candidate, Score]]:
        """The candidates that have a reward, in their own order."""
        pairs = list(zip(result.candidates, result.scores, strict=True))
        for _, score in pairs:
            if score.reward is None:
                self.refused[f"candidates without a reward ({score.status})"] += 1
        return [(candidate, score) for candidate, score in pairs if score.reward is not None]


@dataclass(frozen=True, kw_only=True)
class Pairs(Export):
    """Preference pairs: ``id, prompt, chosen, rejected, chosen_reward, rejected_reward, margin``.

    Candidates count once for each text, and those without a reward not at all. ``margin`` is the difference of what the
    candidates are ordered by: of their rewards, or with ``optimistic`` of the mean plus c standard deviations.

    Args:
        pairing: "best-worst"; "best-random", the best with a random other one; "adjacent", each with the next in order,
            which makes a pair less than there are texts; "optimistic:C", the best and the worst by reward plus C (1 by
            default) standard deviations of it (``Score.spread``), for scorers that know these.
        drop_ties: whether pairs with a margin of 0 are left out.
        min_margin: the least margin of a pair.
        reference_response: whether pairs have a ``reference_response``, a text that is one of the prompt's candidates
            at random, whatever its reward: a sample of the policy, which SELM's optimism term needs (arXiv 2405.19332).
        seed: of what is random; the same seed and candidates give the same pairs.
        cut_off: whether candidates that were cut off stand in pairs.

    Raises:
        InputError: an option that cannot be.
    """

    own = frozenset({"chosen", "rejected", "chosen_reward", "rejected_reward", "margin", "reference_response"})
    pairing: str = "best-worst"
    drop_ties: bool = False
    min_margin: float = 0.0
    reference_response: bool = False
    seed: int = 0
    cut_off: bool = False

    def __post_init__(self) -> None:
        name, _, deviations = self.pairing.partition(":")
        if name not in PAIRINGS or (deviations and name != "optimistic"):
            raise UnknownNameError("pairing", self.pairing, PAIRINGS)
        if not 0 <= self._deviations < math.inf:
            raise InputError(f"optimistic:C takes a number >= 0 of standard deviations, got {deviations!r}.")
        if number("min_margin", self.min_margin) < 0:
            raise InputError(f"min_margin must be a number >= 0, got {self.min_margin!r}.")
        whole_number("seed", self.seed, 0)

    @property
    def _deviations(self) -> float:
        name, _, deviations = self.pairing.partition(":")
        try:
            return (float(deviations) if deviations else 1.0) if name == "optimistic" else 0.0
        except ValueError:
            return math.nan

    def __call__(self, result: Result) -> list[dict[str, Any]]:
        """The pairs of a prompt.

        Raises:
            InputError: with "optimistic", a reward whose standard deviation is unknown; a column that is not there.
        """
        draw = random.Random("\0".join([str(self.seed), *(candidate.text for candidate in result.candidates)]))
        head, rows = self._head(result), []
        for better, worse in self._pairs(self._ordered(result), draw):
            margin = better[0] - worse[0]
            if (self.drop_ties and margin == 0) or margin < self.min_margin:
                self.refused["pairs that are ties" if margin == 0 else "pairs below the least margin"] += 1
                continue
            rewards = {"chosen_reward": better[2].reward, "rejected_reward": worse[2].reward, "margin": margin}
            rows.append({**head, "chosen": [answer(better[1])], "rejected": [answer(worse[1])], **rewards})
        if self.reference_response and rows:
            written = [candidate.text for candidate in result.candidates if candidate.text.strip()]
            rows = [{**row, "reference_response": draw.choice(written)} for row in rows]
        return rows

    def _ordered(self, result: Result) -> list[Rated]:
        """The candidates that may stand in pairs, one for each text, the best first."""
        rated = self._rated(result)
        learnt = [candidate for candidate, _ in rated]
        ended = {candidate.index for candidate in (learnt if self.cut_off else self._ended(learnt))}
        place = {index: at for at, index in enumerate(result.selection.ranking)}
        texts: dict[str, Rated] = {}
        for candidate, score in sorted(rated, key=lambda pair: place[pair[0].index]):
            if candidate.index in ended:
                texts.setdefault(candidate.text, (self._value(score), candidate, score))
        return sorted(texts.values(), key=lambda one: -one[0])  # stable: equal ones as the run ranked them

    def _value(self, score: Score) -> float:
        assert score.reward is not None
        if not self.pairing.startswith("optimistic"):
            return score.reward
        if score.spread is None:
            raise InputError(
                "optimistic pairs need rewards whose standard deviation is known, and this scorer knew none: "
                "head:FILE does, and flip:MODEL,samples=4. Or take another pairing."
            )
        return score.reward + self._deviations * score.spread

    def _pairs(self, ordered: list[Rated], draw: random.Random) -> Iterable[tuple[Rated, Rated]]:
        if len(ordered) < 2:
            self.refused["prompts with fewer than two different candidates to compare"] += 1
            return []
        if self.pairing == "adjacent":
            return pairwise(ordered)
        return [(ordered[0], draw.choice(ordered[1:]) if self.pairing == "best-random" else ordered[-1])]


@dataclass(frozen=True, kw_only=True)
class Groups(Export):
    """One row a prompt with all candidates that have a reward, copies and cut-off ones too: they were sampled.

    ``id, prompt, completions`` (each a list of one message), ``rewards``; ``ranks``, 1 for the largest reward, equal
    ones sharing the better rank; ``soft_targets``, the softmax of reward / tau; ``advantages``, (reward - mean) /
    (standard deviation + 1e-4) as in GRPO (arXiv 2402.03300); ``finish_reasons``; ``logps``, the policy's own sum of
    log-probabilities in nats where it is known; ``unrated``, how many candidates there were besides.

    Args:
        tau: temperature of the soft targets, in units of the reward.
        scale: whether advantages are divided by the standard deviation; Dr. GRPO (2503.20783) does not.
        drop_ties: whether groups whose rewards are all the same are left out: they have no gradient.

    Raises:
        InputError: a tau that is no positive number.
    """

    own = frozenset(
        {"completions", "rewards", "ranks", "soft_targets", "advantages", "finish_reasons", "logps", "unrated"}
    )
    tau: float = 1.0
    scale: bool = True
    drop_ties: bool = False

    def __post_init__(self) -> None:
        if not 0 < number("tau", self.tau) < math.inf:
            raise InputError(f"tau must be a positive number, got {self.tau!r}.")

    def __call__(self, result: Result) -> list[dict[str, Any]]:
        """The group of a prompt, if it has one.

        Raises:
            InputError: a column that is not there.
        """
        rated = self._rated(result)
        rewards = np.array([score.reward for _, score in rated])
        if len(rated) < 2:
            self.refused["prompts with fewer than two candidates that have a reward"] += 1
            return []
        if self.drop_ties and (rewards == rewards[0]).all():
            self.refused["groups whose rewards are all the same"] += 1
            return []
        deviation = rewards.std(ddof=1) + _STEADY if self.scale else 1.0
        weights = np.exp((rewards - rewards.max()) / self.tau)
        row = {
            "completions": [[answer(candidate)] for candidate, _ in rated],
            "rewards": rewards.tolist(),
            "ranks": [1 + int((rewards > reward).sum()) for reward in rewards],
            "soft_targets": (weights / weights.sum()).tolist(),
            "advantages": ((rewards - rewards.mean()) / deviation).tolist(),
            "finish_reasons": [candidate.finish_reason for candidate, _ in rated],
            "logps": [candidate.cumulative_logprob for candidate, _ in rated],
            "unrated": len(result.candidates) - len(rated),
        }
        return [{**self._head(result), **row}]


@dataclass(frozen=True, kw_only=True)
class SFT(Export):
    """What the run's selector picked, as rows to imitate: ``id, prompt, completion, reward``.

    One a prompt, or k where it was ``top-k:K``; rejection sampling (RAFT, arXiv 2304.06767).

    Args:
        min_reward: the least reward of an answer.
        cut_off: whether an answer that was cut off is one to imitate.

    Raises:
        InputError: a minimum that is no number.
    """

    own = frozenset({"completion", "reward"})
    min_reward: float | None = None
    cut_off: bool = False

    def __post_init__(self) -> None:
        if self.min_reward is not None:
            number("min_reward", self.min_reward)

    def __call__(self, result: Result) -> list[dict[str, Any]]:
        """The rows of a prompt.

        Raises:
            InputError: a column that is not there.
        """
        if not result.picked:
            self.refused["prompts without a winner"] += 1
        head, rows = self._head(result), []
        for candidate in result.picked if self.cut_off else self._ended(result.picked):
            reward = result.scores[candidate.index].reward
            if self.min_reward is not None and (reward is None or reward < self.min_reward):
                self.refused["answers below the least reward"] += 1
            else:
                rows.append({**head, "completion": [answer(candidate)], "reward": reward})
        return rows


def prompt_of(task: Task) -> list[dict[str, Any]]:
    """What is answered, as messages in OpenAI's format.

    Raises:
        InputError: a message has images, which a row of text cannot hold.
    """
    if any(message.parts for message in task.asked):
        raise InputError("the prompt has images, and an export holds text alone. Leave the row out: --skip-bad.")
    return [message.to_dict() for message in task.asked]


def answer(candidate: Candidate) -> dict[str, Any]:
    """A candidate as a message of the assistant."""
    calls = {"tool_calls": list(candidate.tool_calls)} if candidate.tool_calls else {}
    return openai_message("assistant", without_calls(candidate.text, candidate.tool_calls), calls)


async def reference_logps(engine: Rates, results: Sequence[Result]) -> list[list[float] | BonError]:
    """The sums of log-probabilities of the completions of ``Groups``, under another model, in nats.

    An answer that ended by itself counts with its end token, as the policy's own does.

    Args:
        engine: the model.
        results: their candidates with a reward are rated.

    Returns:
        For each result one number for each completion, or why one of them could not be rated.

    Raises:
        EngineError: the model failed.
    """
    found: list[list[float] | BonError] = []
    asked: dict[bool, list[tuple[int, int, Candidate]]] = {True: [], False: []}  # by whether the end counts
    for at, result in enumerate(results):
        rated = [c for c, score in zip(result.candidates, result.scores, strict=True) if score.reward is not None]
        found.append([math.nan] * len(rated))
        for place, candidate in enumerate(rated):
            asked[candidate.finish_reason != "length"].append((at, place, candidate))
    for end, some in asked.items():
        prompts = [Prompt.of(results[at].task.asked) for at, _, _ in some]
        told = await engine.loglikelihood(prompts, [c.text for _, _, c in some], end=end) if some else []
        for (at, place, _), one in zip(some, told, strict=True):
            if one.error is not None:
                found[at] = one.error
            elif isinstance(row := found[at], list):
                row[place] = one.total
    return found


def save(rows: Iterable[dict[str, Any]], path: str | Path) -> int:
    """Write rows to a file, Parquet where its name ends so, else JSON Lines; returns how many.

    What is there is replaced once all rows are written.

    Raises:
        MissingExtraError: it is Parquet, and pyarrow is not installed.
        InputError: rows whose columns do not fit together in one table.
    """
    path, rows = Path(path), list(rows)
    part = path.with_name(path.name + ".part")
    try:
        if path.suffix.lower() == ".parquet":
            _parquet(rows, part)
        else:
            part.write_bytes(b"".join(to_json(row) + b"\n" for row in rows))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return len(rows)


def _parquet(rows: Sequence[dict[str, Any]], path: Path) -> None:
    arrow = pyarrow()
    columns = dict.fromkeys(name for row in rows for name in row)
    try:
        table = arrow.table({name: [row.get(name) for row in rows] for name in columns})
        arrow.parquet.write_table(table, path)
    except arrow.ArrowException as error:
        raise InputError(f"the rows make no table: {error}. Write JSON Lines in its place.") from error


def pyarrow() -> Any:
    """The library that writes Parquet.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow, which writes Parquet,", "pip install 'bon[parquet]'") from error
    return pyarrow
